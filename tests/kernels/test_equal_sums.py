"""Pixels that see the same have bitwise equal mem and syn, if the cell chooses among them.

Pixels of one pooling window are so with every algorithm. Inhibition chooses among all pixels of an
image, so "auto" forms direct sums. Most images here are lines in one direction: each pixel sees
what the next one of its line sees, unless the border is near.
"""

import pytest
import torch
from torch import Tensor

import snnlstm

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


def test_inhibition_chooses_the_first_of_equal_neurons(kernels):
    if kernels.algorithm == "winograd":
        pytest.skip("Winograd alone rounds equal pixels differently")
    torch.manual_seed(0)
    cell = snnlstm.SConv2dLSTM(1, 16, 3, threshold=0.01, inhibition=True)
    x = torch.zeros(1, 1, 1, 33, 35)
    x[..., 3:30:7, 4:33:6] = 1
    spk, _, mem = cell(x)
    highest = (mem == mem.max()).flatten().nonzero()
    assert len(highest) == 20
    assert spk.flatten().nonzero().tolist() == highest[:1].tolist()
