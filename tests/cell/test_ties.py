"""Max pooling chooses among nearly equal states as exact sums would.

Where a layer is nearly silent, many states are equal but for rounding. The maximum decides the
spike. The gradient goes to the first state that is within one unit of the maximum's last place.
tests/kernels compares the spikes and gradients of other states with the definition. Inhibition
chooses among all states of a sample, the first of those that are equal.
"""

import pytest
import torch
from torch import Tensor

import snnlstm
from snnlstm.quant import StateQuant
from tests.shared.helpers import ours


def open_cell(**kwargs) -> snnlstm.SConv2dLSTM:
    """Returns a cell of one channel whose mem is tanh(syn), whatever its input is."""
    cell = ours(1, 1, 1, **kwargs)
    with torch.no_grad():
        cell.conv.weight.zero_()
        cell.conv.bias.copy_(torch.tensor([-99.0, 99, 99, 0]))  # i, f, o, g
    return cell


def run(cell, syn: Tensor) -> tuple[Tensor, Tensor]:
    spk, _, mem = cell(torch.zeros_like(syn[:, :1]), syn, torch.zeros_like(syn))
    return spk, mem


def image(dtype: torch.dtype, below: list[int], width: int) -> Tensor:
    """Returns syn of one image of this width, whose mem lies `below` units below a number."""
    unit = torch.finfo(dtype).eps / 4  # of numbers from 1/4 to 1/2
    syn = 0.4 + torch.arange(64, dtype=dtype) * unit
    mem = run(open_cell().to(dtype), syn.view(1, 1, 1, -1))[1].flatten()
    units = ((mem - mem[0]) / unit).round().tolist()  # tanh leaves some numbers out
    first = next(n for n in reversed(units) if {n - 1, n - 2} <= set(units))
    values = [syn[units.index(first - count)] for count in range(3)]
    return torch.stack([values[count] for count in below]).view(1, 1, -1, width)


def chosen_by(cell, syn: Tensor) -> list[int]:
    """Returns which pixels get a gradient."""
    syn = syn.clone().requires_grad_()
    spk, _ = run(cell, syn)
    return torch.autograd.grad(spk.sum(), syn)[0].flatten().nonzero().flatten().tolist()


def skip_reference(backend) -> None:
    if backend.name == "reference":
        pytest.skip("the reference path chooses as torch does")


WINDOWS = {  # units below the maximum, row by row, and the pixel that is chosen
    "equal": ([0, 0, 0, 0], 0),
    "one unit": ([2, 1, 0, 1], 1),
    "two units": ([2, 2, 2, 0], 3),
    "the first": ([1, 2, 0, 0], 0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("window", WINDOWS)
def test_the_first_pixel_within_a_unit_of_the_maximum_gets_the_gradient(backend, dtype, window):
    skip_reference(backend)
    below, expected = WINDOWS[window]
    cell = open_cell(max_pool=2).to(dtype)
    assert chosen_by(cell, image(dtype, below, 2)) == [expected]
    backend.check(cell.path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_choose_the_first_that_equals_the_maximum(backend, dtype):
    if backend.name in ("reference", "cpu"):
        pytest.skip("the CPU computes half types in float32")
    cell = open_cell(max_pool=2).to(dtype)
    for below, expected in ([2, 1, 0, 0], 2), ([1, 1, 1, 0], 3), ([0, 1, 0, 0], 0):
        assert chosen_by(cell, image(dtype, below, 2)) == [expected]


def test_the_maximum_decides_the_spike(backend):
    """The first pixel within a unit does not reach the threshold."""
    skip_reference(backend)
    syn = image(torch.float32, [1, 0, 2, 2], 2)
    mem = run(open_cell(), syn)[1].flatten()
    for threshold, spike in ((mem[0].item(), 1), (mem[1].item(), 0)):
        assert run(open_cell(max_pool=2, threshold=threshold), syn)[0].item() == spike


def test_a_nan_is_the_maximum_and_does_not_spike(backend):
    syn = image(torch.float32, [0, 2, 0, 0], 2)
    syn[0, 0, 1, 0] = torch.nan
    for cell in (open_cell(max_pool=2), open_cell(inhibition=True)):
        assert not run(cell, syn)[0].any()
    assert chosen_by(open_cell(max_pool=2), syn) == [2]


@pytest.mark.parametrize("size", [(16, 16), (17, 17), (1, 300)], ids=str)
def test_every_pixel_of_a_large_window_can_be_chosen(backend, size):
    for expected in (0, size[0] * size[1] // 2, size[0] * size[1] - 1):
        syn = torch.zeros(1, 1, *size)
        syn.view(-1)[expected] = 0.5
        assert chosen_by(open_cell(max_pool=size), syn) == [expected]


def test_under_inhibition_the_first_of_the_highest_quantised_states_wins():
    """snnTorch's documentation promises inhibition; its cell warns and ignores the argument."""
    cell = open_cell(inhibition=True, state_quant=StateQuant(torch.tensor([0.0, 0.5, 1.0])))
    spk, mem = run(cell, torch.tensor([[[[0.0, 0.55], [0.6, 0.5]]]]))
    assert mem.flatten().tolist() == [0, 0.5, 0.5, 0.5]
    assert spk.flatten().tolist() == [0, 1, 0, 0]
    assert chosen_by(open_cell(inhibition=True), mem) == [1]
    assert str(cell.path) == "reference (inhibition is unknown to the kernels)"


# ---- equal sums -----------------------------------------------------------------------------
# Pixels of one pooling window that see the same have bitwise equal mem and syn, with every
# algorithm. Most images here are lines in one direction: each pixel sees what the next one of its
# line sees, unless the border is near.

STEPS, SIZE = 4, (27, 30)
DIRECTIONS = [(0, 1), (1, 0), (1, 1), (1, -1)]
CELLS = {  # in, out, kernel, max_pool, the share of lines that are not zero, and dilation
    "narrow": (1, 5, 3, 2, 0.2, 1),
    "wide": (8, 33, 3, 2, 0.9, 1),  # dense, so that x has Winograd's sums, too
    "sparse": (16, 20, 3, 2, 0.05, 1),
    "5x5": (2, 16, 5, 2, 0.3, 1),
    "7x3": (2, 8, (7, 3), (3, 2), 0.3, 1),
    "larger windows than kernels": (2, 8, 3, 4, 0.3, 1),
    "dilated": (2, 8, 3, 2, 0.3, 2),
    "1x1": (2, 3, 1, 2, 0.3, 1),  # no border: the last pixels of a row count, which share no vector
}


def make(name: str) -> snnlstm.SConv2dLSTM:
    torch.manual_seed(0)
    channels, out, kernel, pool, _, dilation = CELLS[name]
    return snnlstm.SConv2dLSTM(
        channels, out, kernel, threshold=0.05, max_pool=pool, dilation=dilation
    )


def lines(name: str, direction: tuple[int, int]) -> Tensor:
    """Returns x (STEPS, 2, Cin, rows, columns), constant in this direction."""
    channels, *_, density, _ = CELLS[name]
    random = torch.Generator().manual_seed(1)
    shape = STEPS, 2, channels, sum(SIZE) + max(SIZE)
    values = torch.randn(shape, generator=random)
    values *= torch.rand(shape, generator=random) < density
    rows, columns = torch.meshgrid(*map(torch.arange, SIZE), indexing="ij")
    number = rows * direction[1] - columns * direction[0]
    return values[..., number - number.min()]


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("direction", DIRECTIONS, ids=str)
def test_pixels_that_see_the_same_have_the_same_bits(kernels, name, direction):
    cell = make(name)
    _, syn, mem = cell(lines(name, direction), record=True)
    # As far as the border is seen.
    h, w = (size // 2 * CELLS[name][-1] * STEPS for size in cell.conv.weight.shape[2:])
    for state in (syn, mem):
        inner = state[..., h : SIZE[0] - h, w : SIZE[1] - w]
        assert min(inner.shape[-2:]) > 2
        assert inner[:, 0, 0].unique().numel() > 2 * STEPS
        down, right = direction
        columns = inner.shape[-1]
        first = inner[..., : inner.shape[-2] - down, max(-right, 0) : columns - max(right, 0)]
        second = inner[..., down:, max(right, 0) : columns + min(right, 0)]
        assert torch.equal(first, second)
