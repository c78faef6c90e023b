"""Max pooling and inhibition choose among nearly equal states as exact sums would.

Where a layer is nearly silent, many states are equal but for rounding. The maximum decides the
spike. The gradient goes to the first state that is within one unit of the maximum's last place.
"""

import pytest
import torch
from helpers import ours
from torch import Tensor

import snnlstm


def open_cell(**kwargs) -> snnlstm.SConv2dLSTM:
    """Returns a cell of one channel whose mem is tanh(syn), whatever its input is."""
    cell = ours(1, 1, 1, **kwargs)
    with torch.no_grad():
        cell.conv.weight.zero_()
        cell.conv.bias.copy_(torch.tensor([-99.0, 99, 99, 0]))  # i, f, o, g
    return cell


def run(cell, syn: Tensor) -> tuple[Tensor, Tensor]:
    spk, _, mem = cell(torch.zeros_like(syn), syn, torch.zeros_like(syn))
    return spk, mem


def neighbours(dtype: torch.dtype) -> list[Tensor]:
    """Returns three values of syn, whose mem lies 0, 1 and 2 units below the first one's."""
    unit = torch.finfo(dtype).eps / 4  # of numbers from 1/4 to 1/2
    syn = 0.4 + torch.arange(64, dtype=dtype) * unit
    mem = run(open_cell().to(dtype), syn.view(1, 1, 1, -1))[1].flatten()
    units = ((mem - mem[0]) / unit).round().tolist()  # tanh leaves some numbers out
    first = next(n for n in reversed(units) if {n - 1, n - 2} <= set(units))
    return [syn[units.index(first - below)] for below in range(3)]


def image(dtype: torch.dtype, below: list[int], width: int) -> Tensor:
    """Returns syn of one image of this width; `below` counts units, row by row."""
    values = neighbours(dtype)
    return torch.stack([values[count] for count in below]).view(1, 1, -1, width)


def gradient_of(cell, syn: Tensor) -> Tensor:
    syn = syn.clone().requires_grad_()
    spk, _ = run(cell, syn)
    return torch.autograd.grad(spk.sum(), syn)[0].flatten()


def skip_plain_torch(backend) -> None:
    if backend.name == "reference":
        pytest.skip("plain torch chooses as torch does")


WINDOWS = {  # units below the maximum, row by row, and the pixel that is chosen
    "equal": ([0, 0, 0, 0], 0),
    "one unit": ([2, 1, 0, 1], 1),
    "two units": ([2, 2, 2, 0], 3),
    "the first": ([1, 2, 0, 0], 0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_first_pixel_within_a_unit_of_the_maximum_gets_the_gradient(
    backend, dtype, window, checkpoint
):
    skip_plain_torch(backend)
    below, chosen = WINDOWS[window]
    cell = open_cell(max_pool=2, checkpoint=checkpoint).to(dtype)
    grad = gradient_of(cell, image(dtype, below, 2))
    assert grad.nonzero().flatten().tolist() == [chosen]
    backend.check(cell.path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_choose_the_first_that_equals_the_maximum(backend, dtype):
    if backend.name in ("reference", "cpu"):
        pytest.skip("the CPU computes half types in float32")
    cell = open_cell(max_pool=2).to(dtype)
    for below, chosen in ([2, 1, 0, 0], 2), ([1, 1, 1, 0], 3), ([0, 1, 0, 0], 0):
        grad = gradient_of(cell, image(dtype, below, 2))
        assert grad.nonzero().flatten().tolist() == [chosen]


def test_the_maximum_decides_the_spike(backend):
    """The first pixel within a unit does not reach the threshold."""
    skip_plain_torch(backend)
    syn = image(torch.float32, [1, 0, 2, 2], 2)
    mem = run(open_cell(), syn)[1].flatten()
    spk, _ = run(open_cell(max_pool=2, threshold=mem[0].item()), syn)
    assert spk.item() == 1
    spk, _ = run(open_cell(max_pool=2, threshold=mem[1].item()), syn)
    assert spk.item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_first_neuron_within_a_unit_of_the_highest_wins(backend, dtype):
    skip_plain_torch(backend)
    below = [2] * 3 + [1] + [2] * 300 + [0] + [2] * 7
    cell = open_cell(inhibition=True).to(dtype)
    spk, _ = run(cell, image(dtype, below, 8))
    assert spk.flatten().nonzero().flatten().tolist() == [3]
    backend.check(cell.path)


def test_a_nan_is_the_maximum(backend):
    syn = image(torch.float32, [0, 2, 0, 0], 2)
    syn[0, 0, 1, 0] = torch.nan
    cell = open_cell(max_pool=2)
    assert run(cell, syn)[0].item() == 0
    grad = gradient_of(cell, syn)
    assert grad.isnan().tolist() == [False, False, True, False]
    assert grad.nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize("size", [16, 17, (1, 300)], ids=str)
def test_every_pixel_of_a_large_window_can_be_chosen(backend, size):
    height, width = size if isinstance(size, tuple) else (size, size)
    for chosen in (0, height * width // 2, height * width - 1):
        syn = torch.zeros(1, 1, height, width)
        syn.view(-1)[chosen] = 0.5
        grad = gradient_of(open_cell(max_pool=(height, width)), syn)
        assert grad.nonzero().flatten().tolist() == [chosen]
