"""The ConvLSTM without spikes has the results and gradients of plain torch, and its interface."""

import functools
import logging

import pytest
import torch
from torch import Tensor, nn

import snnlstm
from tests.shared.helpers import close, flat
from tests.shared.plain_convlstm import Cell, Stack

# Rows have the arguments of both stacks; sizes are odd or prime.
STACKS = {
    "one layer": ((1, 4, (3, 3), 1), {}),
    "two layers, batch first": ((2, [5, 3], (3, 3), 2), {"batch_first": True}),
    "all layers": ((3, [4, 7], [(5, 3), (1, 3)], 2), {"return_all_layers": True}),
    "no bias": ((2, 3, (5, 5), 2), {"bias": False, "batch_first": True}),
    "stride": ((2, 3, (1, 3), 2), {"stride": 3, "return_all_layers": True}),
    "dilation": ((2, 9, (3, 5), 1), {"dilation": 2, "batch_first": True}),
}
TIME, BATCH, SIZE = 3, 2, (7, 11)
long = functools.partial(pytest.param, marks=pytest.mark.emulator_long)
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def pair(name: str, dtype: torch.dtype = F32) -> tuple[snnlstm.ConvLSTM, Stack]:
    """Returns our stack and plain torch's in float64, with equal weights."""
    args, options = STACKS[name]
    ours = snnlstm.ConvLSTM(*args, **options, dtype=dtype).to(torch.empty(0).device)
    plain = Stack(*args, **options).to(torch.empty(0).device, F64)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def sequence(module: nn.Module, channels: int, dtype: torch.dtype = F32) -> Tensor:
    """Returns a sequence in the order that the module takes."""
    lead = (BATCH, TIME) if module.batch_first else (TIME, BATCH)
    return torch.randn(*lead, channels, *SIZE).to(dtype)


def initial(stack: nn.Module, dtype: torch.dtype = F32) -> list[tuple[Tensor, Tensor]]:
    """Returns random states for each layer."""
    states, size = [], SIZE
    for cell in stack.cell_list:
        h, c = (torch.randn_like(zeros).to(dtype) for zeros in cell.init_hidden(BATCH, size))
        states.append((h.tanh(), c))
        size = tuple(h.shape[-2:])
    return states


def leaves_of(tree, dtype: torch.dtype):
    """Returns copies of tensors, in lists and tuples, that require gradients."""
    if isinstance(tree, Tensor):
        return tree.detach().to(dtype, copy=True).requires_grad_()
    return [leaves_of(branch, dtype) for branch in tree]


def compare(
    ours: nn.Module, plain: nn.Module, x: Tensor, states, error: float, gradient_error: float
):
    """Compares all results, and the gradients of all inputs and parameters."""
    leaves = [leaves_of((x, states), dtype) for dtype in (x.dtype, F64)]
    outs = [flat(m(*args)) for m, args in zip((ours, plain), leaves, strict=True)]
    close([out.double() for out in outs[0]], outs[1], atol=error, rtol=0)
    weights = [torch.randn_like(out) for out in outs[1]]
    for out in outs:
        sum((o * w.to(o.dtype)).sum() for o, w in zip(out, weights, strict=True)).backward()
    sources = [
        [*flat(tree), *m.parameters()] for tree, m in zip(leaves, (ours, plain), strict=True)
    ]
    for one, exact in zip(*sources, strict=True):
        scale = float(exact.grad.abs().max())
        close(one.grad.double(), exact.grad, atol=gradient_error * max(scale, 1), rtol=0)
    return outs[0]


@pytest.mark.parametrize("dtype", [F32, long(F64), long(F16), long(BF16)], ids=str)
@pytest.mark.parametrize(
    "name", [name if name == "two layers, batch first" else long(name) for name in STACKS]
)
def test_a_stack_computes_what_plain_torch_does(backend, name, dtype):
    ours, plain = pair(name, dtype)
    x, states = sequence(plain, STACKS[name][0][0], dtype), initial(ours, dtype)
    with torch.no_grad():
        ours(x)
    backend.check(ours.cell_list[-1].path)
    # Winograd's transforms lose a decimal digit, and three products in tf32 for one 2^-22 of it.
    path = ours.cell_list[0].path.name
    of_a_step = 2e-5 if "winograd" in path else 5e-6 if "mma" in path else 2e-6
    errors = {F32: TIME * of_a_step, F64: 1e-12}
    error = errors.get(dtype, 16 * torch.finfo(dtype).eps)
    out = compare(ours, plain, x, states, error, 10 * error)
    assert {o.dtype for o in out} == {dtype}
    assert out[0].is_contiguous()
    close([o.double() for o in flat(ours(x))], flat(plain(x.double())), atol=error, rtol=0)
    step, state = x[:, 0] if plain.batch_first else x[0], [s.double() for s in states[0]]
    close(
        [o.double() for o in ours.cell_list[0](step, states[0])],
        [*plain.cell_list[0](step.double(), state)],
        atol=error,
        rtol=0,
    )


# ---- what people have ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["two layers, batch first", "no bias"])
def test_one_seed_gives_the_same_bits_and_keys(name):
    args, options = STACKS[name]
    state_dicts = []
    for kind in (snnlstm.ConvLSTM, Stack):
        torch.manual_seed(3)
        state_dicts.append(kind(*args, **options).state_dict())
    assert list(state_dicts[0]) == list(state_dicts[1])
    assert all(torch.equal(state_dicts[0][key], state_dicts[1][key]) for key in state_dicts[0])
    torch.manual_seed(3)
    ours = snnlstm.ConvLSTMCell(2, 5, (3, 3), True)
    torch.manual_seed(3)
    assert torch.equal(ours.conv.weight, Cell(2, 5, (3, 3)).conv.weight)


def test_attributes_and_forms():
    cell = snnlstm.ConvLSTMCell(2, 3, (3, 5), bias=False)
    assert (cell.input_dim, cell.hidden_dim, cell.bias) == (2, 3, False)
    assert (cell.kernel_size, cell.padding) == ((3, 5), (1, 2))
    h, c = cell.init_hidden(2, (5, 7))
    assert h.shape == c.shape == (2, 3, 5, 7)
    assert not h.any()
    h, c = cell(input_tensor=torch.rand(2, 2, 5, 7), cur_state=[h, c])
    close(cell(torch.rand(2, 2, 5, 7) * 0 + 1, None), cell(torch.ones(2, 2, 5, 7), (None, None)))
    stack = snnlstm.ConvLSTM(2, [3, 4], 3, 2, True, True, True)
    outputs, last = stack(input_tensor=torch.rand(2, 4, 2, 5, 7), hidden_state=None)
    assert [tuple(out.shape) for out in outputs] == [(2, 4, 3, 5, 7), (2, 4, 4, 5, 7)]
    assert [[tuple(s.shape) for s in pair] for pair in last] == [[(2, n, 5, 7)] * 2 for n in (3, 4)]
    assert all(torch.equal(out[:, -1], h) for out, (h, _) in zip(outputs, last, strict=True))
    assert last[0][0].untyped_storage().nbytes() == 4 * last[0][0].numel()  # nobody keeps the rest
    decoded, _ = stack(torch.rand(2, 1, 2, 5, 7), last)
    assert decoded[1].shape == (2, 1, 4, 5, 7)


# ---- fallbacks -----------------------------------------------------------------------------------


class Doubled(snnlstm.ConvLSTMCell):
    def forward(self, input_tensor, cur_state=None):
        h, c = super().forward(input_tensor, cur_state)
        return 2 * h, c


def test_a_cell_with_hooks_or_overrides_is_called_step_by_step(caplog):
    ours, plain = pair("two layers, batch first")
    x = sequence(ours, 2)
    seen = []
    handle = ours.cell_list[1].register_forward_hook(lambda *_: seen.append(1))
    with caplog.at_level(logging.WARNING, "snnlstm"):
        out = ours(x)
    assert len(seen) == TIME
    assert "layer 1 step by step: its ConvLSTMCell has hooks or" in caplog.text
    handle.remove()
    close(flat(out), flat(ours(x)))
    ours.cell_list[0].__class__ = Doubled
    plain = plain.float()
    plain.cell_list[0].forward = lambda input_tensor, cur_state: (lambda h, c: (2 * h, c))(
        *Cell.forward(plain.cell_list[0], input_tensor, cur_state)
    )
    close(flat(ours(x)), flat(plain(x)), atol=1e-5)
    assert "layer 0 step by step: its Doubled has hooks or a forward" in caplog.text


def test_a_convolution_with_hooks_or_parametrizations_is_called(caplog):
    ours, plain = pair("two layers, batch first", F64)
    for stack in (ours, plain):
        nn.utils.parametrizations.weight_norm(stack.cell_list[0].conv)
        stack.cell_list[1].conv.register_forward_hook(lambda m, args, out: out / 2)
    plain.load_state_dict(ours.state_dict())
    with caplog.at_level(logging.WARNING, "snnlstm"):
        compare(ours, plain, sequence(ours, 2, F64), initial(ours, F64), 1e-12, 1e-11)
    assert [cell.path.name for cell in ours.cell_list] == ["reference"] * 2
    assert "conv carries hooks" in caplog.text
    assert "conv is a Parametrized" in caplog.text
