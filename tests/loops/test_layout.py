"""Convolutions that run channels-last: nothing that can tell layouts apart sees another one."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import snnlstm
from snnlstm.loops import rules
from snnlstm.loops.layout import channels_last, for_neurons
from snnlstm.loops.steps import Loop
from snnlstm.networks import layers as sizes
from tests.loops.compiled import as_eager, dyadic_, merges, numbers
from tests.loops.networks import exact_leaky
from tests.loops.parts import MODES

T, N = 3, 2


class Images(nn.Module):
    """Runs a function behind a convolution and Leaky, of x (T, N, 3, 8, 8)."""

    def __init__(self, behind: Any) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3)
        self.lif1 = exact_leaky()
        self.fc = nn.Linear(4 * 9, 5)
        self.behind = behind

    def forward(self, x: Tensor) -> Any:
        mem1, out = self.lif1.reset_mem(), []
        for x_t in x:
            cur = self.conv1(x_t)
            spk, mem1 = self.lif1(F.max_pool2d(cur, 2), mem1)
            out.append(self.behind(self, cur, spk, mem1))
        return out, mem1


def rest(net: Images, cur: Tensor, spk: Tensor, mem: Tensor) -> Any:
    """The rest of a network: a second convolution, and Linear behind flatten."""
    return net.fc(F.avg_pool2d(net.conv2(F.pad(spk, (1, 1, 1, 1, 0, 0))), 2, 1).flatten(1)[:, :36])


BEHIND = {
    "a network": rest,
    "results": lambda net, cur, spk, mem: (cur, spk, mem, torch.relu(cur) + 1),
    "dropout": lambda net, cur, spk, mem: F.dropout(cur),
    "rand_like": lambda net, cur, spk, mem: torch.rand_like(mem * 2) + mem,
    "strides": lambda net, cur, spk, mem: (cur.as_strided((9, 7), (8, 2)), spk.unfold(1, 2, 1)),
    "view": lambda net, cur, spk, mem: (cur.view(N, -1), spk.view(-1), cur.flatten()),
    "numbers": lambda net, cur, spk, mem: (cur.argmax(), cur.sum((1, 2)), spk[:, 1] - mem[:, 2]),
    "in place": lambda net, cur, spk, mem: (cur * 2).add_(1).view(-1),
    "joined": lambda net, cur, spk, mem: torch.cat([cur, cur * 2], 1).as_strided((9, 7), (8, 2)),
}  # fmt: skip


@MODES
@pytest.mark.parametrize("by_step", [False, True], ids=["all steps", "step by step"])
@pytest.mark.parametrize("names", [{*BEHIND} - {"rand_like"}, {"rand_like"}], ids=["all", "random"])
def test_what_follows_sees_the_recorded_layout(names, by_step, training, monkeypatch):
    """Random numbers, strides, and whatever depends on these.

    One graph has all that may follow, because each compilation takes long; an error has the name.
    Two layers that draw numbers may do so in another order than in a loop.
    """
    if by_step:
        for limit in ("_SMALL", "_LARGEST_SEQUENCE"):
            monkeypatch.setattr(sizes, limit, 0)

    def make():
        net = Images(lambda *given: {name: BEHIND[name](*given) for name in sorted(names)})
        snnlstm.accelerate(dyadic_(net))
        return net

    as_eager(make, numbers(T, N, 3, 8, 8), training=training)


# Samples, channels and kernel of the first convolution, and the second's kernel; whether gradients
# are recorded; and for each convolution whether it runs channels-last.
CHOICES = {
    "few channels of many samples": (8, 2, 3, 3, True, [True, True]),
    "few channels of one sample": (1, 2, 3, 3, True, [False, True]),
    "more channels": (1, 6, 3, 3, True, [True, True]),
    "no gradients": (4, 6, 3, 3, False, [True, True]),
    "no gradients, few channels": (4, 2, 3, 3, False, [False, True]),
    "no gradients, few channels of many samples": (8, 2, 3, 3, False, [True, True]),
    "no gradients, few samples": (2, 6, 3, 3, False, [False, False]),
    "no gradients, larger kernels": (8, 6, 5, 5, False, [False, False]),
    "1x1": (8, 2, 1, 3, True, [False, True]),
    "1x1 behind channels-last": (8, 2, 3, 1, True, [True, True]),
    "1x1 behind channels-last and a norm": (8, 2, 3, 1, True, [True, True]),
    "1x1 behind another": (1, 2, 3, 1, True, [False, False]),
}


@merges
@pytest.mark.parametrize("name", CHOICES)
def test_where_convolutions_run_channels_last(name):
    """The second one does so for its gradients, or because its input is channels-last."""
    samples, channels, first, second, training, expected = CHOICES[name]
    found: list[bool] = []

    def backend(graph: Any, inputs: Any) -> Any:
        loop = Loop(graph.graph)
        chosen = channels_last(loop)
        found.extend(node in chosen for node in loop.nodes if rules.name_of(node) == "conv2d")
        return graph.forward

    net = Images(lambda net, cur, spk, mem: F.avg_pool2d(net.conv2(spk), 2))
    net.conv1 = nn.Conv2d(channels, 4, first, padding=first // 2)
    net.conv2 = nn.Conv2d(4, 4, second, padding=second // 2)
    if "norm" in name:
        net.conv2 = nn.Sequential(nn.BatchNorm2d(4), net.conv2)
    snnlstm.accelerate(net)
    torch._dynamo.reset()
    with torch.set_grad_enabled(training):
        torch.compile(net, backend=backend)(numbers(1, samples, channels, 8, 8))
    assert found == expected


def read(net: Images, x: Tensor, by: str) -> Any:
    """Lets some layers read a convolution's result."""
    mem, read = net.lif1.reset_mem(), []
    for x_t in x:
        cur = net.conv1(x_t)
        if by == "a pool":
            cur = F.max_pool2d(cur, 2)
        if by == "a norm and a sum":
            cur = net.norm(cur) + net.conv1(x_t * 2)
        spk, mem = net.lif1(cur, mem)
        if by == "a neuron and relu":
            read.append(torch.relu(cur))
        if by == "a neuron and the caller":
            read.append(cur)
        read.append(F.max_pool2d(mem if by == "a neuron whose mem is pooled" else spk, 2))
    return spk, mem, read


@merges
@pytest.mark.parametrize(
    ("by", "expected"),
    {
        "a neuron": 3, "a norm and a sum": 6, "a pool": 0, "a neuron whose mem is pooled": 0,
        "a neuron and relu": 0, "a neuron and the caller": 0,
    }.items(),
)  # fmt: skip
def test_which_convolutions_neurons_alone_read(by, expected):
    """Tiles may compute them, which round equal pixels apart."""
    found: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        loop = Loop(graph.graph)
        chosen = for_neurons(loop)
        assert {rules.name_of(node) for node in chosen} <= {"conv2d"}
        found.append(len(chosen))
        return graph.forward

    net = Images(None)
    net.norm = nn.BatchNorm2d(4)
    snnlstm.accelerate(net)
    torch._dynamo.reset()
    torch.compile(lambda x: read(net, x, by), backend=backend)(numbers(T, N, 3, 8, 8))
    assert found == [expected]
