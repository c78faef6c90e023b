"""Which functions and layers of a loop get all steps in one call, and which stay in steps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import snnlstm
from snnlstm.loops import rules
from snnlstm.native import pool2d
from tests.loops.compiled import as_eager, numbers
from tests.loops.networks import exact_leaky
from tests.loops.parts import MODES, N, T, check, expect
from tests.shared.helpers import close

# ---- what mixes samples --------------------------------------------------------------------------

# Functions of a step (N, 6). Those that the table of rules.py does not have take the same way.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax(0)": lambda x: x.softmax(0),
    "mean": lambda x: x.mean(),
    "sum(0)": lambda x: x.sum(0, keepdim=True) + x,
    "max": lambda x: x.max(0).values,
    "max of all": lambda x: x * x.max(),
    "min of all": lambda x: x - torch.min(x),
    "max of a number": lambda x: x * x.mean().max(),
    "maximum by max": lambda x: torch.max(x, x.mean(0)),
    "sort": lambda x: x.sort(0)[0],
    "transpose": lambda x: x.t() @ x,
    "flatten(0)": lambda x: x.flatten(),
    "flatten(1)": lambda x: x.view(N, 2, 3).flatten(1),
    "view": lambda x: x.view(x.shape[0], -1),
    "view of other rows": lambda x: x.reshape(-1, 3),
    "view of all": lambda x: x.reshape(2, 9),
    "a row": lambda x: x[0],
    "columns": lambda x: x[:, 1:4],
    "cat(0)": lambda x: torch.cat([x, x]),
    "cat(1)": lambda x: torch.cat([x, x], 1),
    "stack": lambda x: torch.stack([x, x]),
    "a row for all": lambda x: x + x[0],
    "one for each sample": lambda x: x + torch.arange(N)[:, None] / 4,
    "one for each number": lambda x: x * torch.arange(6) / 4,
    "layer_norm": lambda x: F.layer_norm(x, (6,)),
    "layer_norm of all": lambda x: F.layer_norm(x, (N, 6)),
    "unbatched convolution": lambda x: F.conv1d(x, torch.ones(2, N, 3) / 4),
    "unbatched pool": lambda x: F.max_pool1d(x, 2),
    "group_norm": lambda x: F.group_norm(x, 3),
    "batch_norm of its own": lambda x: F.batch_norm(x, None, None, training=True),
    "dropout in evaluation": lambda x: F.dropout(x, 0.5, False),
    "where": lambda x: torch.where(x > 0, x, x.mean(0)),
    "alpha": lambda x: torch.add(x, x.sum(1, keepdim=True), alpha=2),
    "a number in float64": lambda x: x * x.mean().double(),
    "a vector in float64": lambda x: x * x.mean(0).double(),
    "integers": lambda x: (x * 4).long() // 3,
    "type_as": lambda x: (x > 0).type_as(x),
    "expand": lambda x: x[:1].expand(N, 6) + 1,
    "pad": lambda x: F.pad(x, (1, 0)),
    "pad of samples": lambda x: F.pad(x, (0, 0, 1, 0)),
    "circular pad": lambda x: F.pad(x[None], (1, 2), mode="circular"),
    "cat(-1)": lambda x: torch.cat([x, x[:, :2]], -1),
    "cat(-2)": lambda x: torch.cat([x, torch.ones(1, 6)], dim=-2),
    "cat by name": lambda x: torch.cat(tensors=[x, x], dim=1),
    "cat with an empty tensor": lambda x: torch.cat([torch.ones(0), x]),
    "channels_last": lambda x: x.view(N, 1, 2, 3).to(memory_format=torch.channels_last) + 1,
    "a number by reshape": lambda x: x.mean().reshape(()),
    "cat with the same": lambda x: torch.cat([torch.ones(N, 2), x], dim=1),
    "another weight in each step": lambda x: F.linear(x, x),
    "another bias in each step": lambda x: F.linear(x, torch.eye(6), x[0]),
    "one image for each sample": lambda x: F.max_pool2d(x.view(N, 1, 2, 3), (1, 2)).flatten(1),
    "max_pool with indices": lambda x: F.max_pool1d(x[None], 2, return_indices=True)[1],
}  # fmt: skip


def test_what_mixes_samples_stays_in_steps():
    """A function that is folded although it mixes samples has other results.

    One graph has all functions, because each compilation takes long; an error has the name.
    """

    def forward(net, x):
        return {
            name: torch.stack([function(net.fc1(x_t)) for x_t in x])
            for name, function in FUNCTIONS.items()
        }

    check(forward, training=False, atol=1e-6, rtol=1e-6)


# ---- what a layer may be -------------------------------------------------------------------------


@MODES
def test_hooks_see_each_step(training):
    """torch.compile traces hooks: what they read and change is part of the graph."""

    def prepare(net):
        net.lif1.register_forward_hook(lambda layer, args, out: (out[0] * 2, out[1]))
        net.fc1.register_forward_pre_hook(lambda layer, args: (args[0] + 1,))

    def forward(net, x):
        mem, out = net.lif1.reset_mem(), []
        for x_t in x:
            spk, mem = net.lif1(net.fc1(x_t), mem)
            out.append(spk)
        return torch.stack(out)

    expect(check(forward, training, prepare), leaky=1, linear=1)


class Cells(nn.Module):
    """Has a cell and calls it on two sequences of (T, N, 2, 5, 5), one after the other."""

    def __init__(self, lengths: bool) -> None:
        super().__init__()
        self.cell = snnlstm.SConv2dLSTM(2, 3, 3, threshold=0.05)
        self.lengths = torch.tensor([4, 1, 3]) if lengths else None

    def forward(self, x: Tensor) -> Any:
        state, out = self.cell.reset_mem(), []
        for part in (x, x * 0.5):
            spk, *state = self.cell(part, *state, lengths=self.lengths)
            out.append(spk)
        return torch.stack(out), state


@MODES
@pytest.mark.parametrize("lengths", [False, True])
def test_calls_of_sequences_are_left_as_they_are(lengths, training):
    """Sequences are not stacked once more, and `lengths` are those of each."""
    x = numbers(T, N, 2, 5, 5, dtype=torch.float64)
    expect(
        as_eager(lambda: Cells(lengths).double(), x, training=training, atol=1e-10, rtol=1e-10),
        cell=2,
    )


@MODES
def test_cells_with_all_options(training):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = snnlstm.SConv2dLSTM(
                2, 3, 3, threshold=torch.full((3, 1, 1), 0.05), stride=2, dilation=2,
                learn_threshold=True, reset_mechanism="zero", init_hidden=True, output=True,
            )  # fmt: skip

        def forward(self, x):
            return [self.cell(x_t) for x_t in x]

    x = numbers(T, N, 2, 6, 6, dtype=torch.float64)
    expect(as_eager(lambda: Net().double(), x, training=training, atol=1e-10, rtol=1e-10), cell=1)


@pytest.mark.parametrize(("features", "count"), [(60_000, 1), (100_000, T)])
def test_linear_and_leaky_take_all_steps_up_to_a_mebibyte_each(features, count):
    """A step has N * features numbers of 4 bytes."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lif, self.fc = snnlstm.Leaky(beta=0.5), nn.Linear(features, 2)

        def forward(self, x):
            mem, out = self.lif.reset_mem(), []
            for x_t in x:
                spk, mem = self.lif(x_t, mem)
                out.append(self.fc(spk))
            return torch.stack(out)

    calls = as_eager(Net, 2 * numbers(T, N, features), training=True, atol=1e-3, rtol=1e-3)
    expect(calls, leaky=count, linear=count)


@MODES
def test_pools_of_torch_become_ours(training, monkeypatch):
    """In runs and alone, by each name that torch has for them; indices stay torch's."""
    for name in ("LEAST", "LEAST_IN_TRAINING"):
        monkeypatch.setattr(pool2d, name, 0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.max, self.avg = nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2)
            self.lif = exact_leaky()
            snnlstm.accelerate(self)

        def forward(self, x):
            mem, out = self.lif.reset_mem(), []
            scale = F.max_pool2d(x[0], x.shape[-2:])
            for x_t in x:
                spk, mem = self.lif(self.max(F.avg_pool2d(x_t, 2, ceil_mode=True)) * scale, mem)
                last = torch.max_pool2d(self.avg(mem), kernel_size=2, stride=1)
                out += [spk, last, F.max_pool2d(x_t, 2, return_indices=True)[1]]
            return out

    calls = as_eager(Net, numbers(T, N, 2, 16, 16), training=training)
    expect(calls, pool=5 + T, leaky=1)


@pytest.mark.parametrize("outputs", [3, 9], ids=["fewer", "more"])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)], ids=str)
def test_linear_of_all_steps_in_any_order_of_memory(order, outputs):
    x = numbers(T, N, 6).permute(order).contiguous().permute(order).requires_grad_()
    found = []
    for function in rules.linear, F.linear:
        for bias in None, numbers(outputs):
            weight = numbers(outputs, 6).requires_grad_()
            out = function(x, weight, bias)
            grads = torch.autograd.grad((out * numbers(T, N, outputs)).sum(), (x, weight))
            found.append((out, *grads))
            assert out.is_contiguous()
    close(found[:2], found[2:])


@MODES
def test_a_linear_function_of_one_result(training):
    """Its weight is a vector, and time lies within the batch."""

    def forward(net, x):
        out = [F.linear(x[:, t], net.fc1.weight[0]) for t in range(N)]
        return torch.stack(out)

    expect(check(forward, training), linear=1)
