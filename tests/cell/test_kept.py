"""What is kept between calls is bounded, and large results are what small ones are.

test_next_call.py proves that it hides no change.
"""

import pytest
import torch

import snnlstm
from benchmarks import peak_memory
from snnlstm.native import lender
from tests.shared.cpu_kernels import needs_core
from tests.shared.helpers import measures_memory, ours, states, steps

pytestmark = needs_core

START = states(2, 3, 6, 7)


CALLS = {
    "a cell": lambda cell, x: cell(x),
    "the functional form": lambda cell, x: snnlstm.functional.sconv2dlstm(
        x, weight=cell.conv.weight, threshold=0.1
    ),
}


@measures_memory
@torch.no_grad()
@pytest.mark.parametrize("name", CALLS)
def test_thousands_of_shapes_take_bounded_memory(name):
    cell, held = ours(1, 1, 1), []
    for batch in range(1, 41):
        for width in range(1, 61):
            CALLS[name](cell, torch.ones(batch, 1, 1, width))
        if batch in (13, 40):
            held.append(peak_memory.watch())
    assert held[1] - held[0] < 6 << 20  # 1,620 plans take 12 MiB


# ---- settings that change ------------------------------------------------------------------------


def test_a_checkpoint_computes_again_by_the_algorithm_of_the_first_time():
    found = []
    for algorithms in ("winograd", "winograd"), ("winograd", "direct"), ("direct", "direct"):
        cell = ours(checkpoint=True)
        with snnlstm.algorithm(algorithms[0]):
            mem = cell(steps(9, 2, 2, 6, 7), *START)[2]
        with snnlstm.algorithm(algorithms[1]):
            mem.sum().backward()
        found.append(cell.conv.weight.grad)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


# ---- blocks of memory ---------------------------------------------------------------------------


@pytest.mark.parametrize("time_within", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_large_results_are_what_small_ones_are(monkeypatch, channels_last, time_within):
    """Large ones lie in blocks; they are no views, which autograd treats otherwise."""
    cell = ours()
    x = torch.rand(4, 3, 2, 200, 300).gt(0.7).float()
    if channels_last:
        x = x.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, (4, 3))
    x = x.transpose(0, 1).contiguous().transpose(0, 1) if time_within else x
    results = []
    for mapped in (1 << 40, lender.SMALLEST):
        monkeypatch.setattr(lender, "MAPPED", mapped)
        cell.reset_mem()
        cell.zero_grad()
        spk, syn, mem = cell(x)
        (spk.sum() + mem.square().sum()).backward()
        results.append((spk, syn, mem, cell.conv.weight.grad.clone()))
    for small, large in zip(*results, strict=True):
        assert torch.equal(small, large)
        assert small.stride() == large.stride()
        assert not large._is_view()
