"""snnTorch's list of all neurons, and ours, know every living cell and keep none alive."""

import gc
import weakref

import pytest
import snntorch
import snntorch.functional.quant
import torch

import snnlstm
from tests.shared.helpers import described, ours


def test_cells_are_not_kept_alive():
    cell = ours()
    cell(torch.ones(1, 2, 5, 5))
    seen, entries = weakref.ref(cell), len(snntorch.SpikingNeuron.instances)
    del cell
    gc.collect()
    assert seen() is None
    snntorch.Leaky.reset_hidden()  # snnTorch walks the list and drops dead entries
    snntorch.SConv2dLSTM.reset_hidden()
    for _ in range(5):
        ours()
    assert len(snntorch.SpikingNeuron.instances) == entries, "a dead cell's place is not reused"


def test_the_list_may_be_walked_in_the_midst_of_a_cells_end():
    """Python clears all weak references to an object, and then calls their callbacks in turn."""
    walks = []

    def walk(_):
        snntorch.SConv2dLSTM.reset_hidden()
        snntorch.SConv2dLSTM.detach_hidden()
        walks.append(True)

    cell = ours()
    seen = weakref.ref(cell, walk)
    del cell
    gc.collect()
    assert seen() is None
    assert walks


@pytest.mark.parametrize("library", [snnlstm.SConv2dLSTM, snntorch.SConv2dLSTM])
def test_reset_hidden_and_detach_hidden_reach_all_living_cells(library):
    cells = [ours(), ours(init_hidden=True), ours(stride=2)]
    x = torch.ones(1, 2, 5, 5)
    for cell in cells:
        cell(x)
        assert cell.mem.requires_grad
    mems = [cell.mem for cell in cells]
    library.detach_hidden()
    for cell, mem in zip(cells, mems, strict=True):
        assert cell.mem is mem
        assert not mem.requires_grad
        assert not cell.syn.requires_grad
    library.reset_hidden()
    for cell in cells:
        assert not cell.mem.any()
        assert not cell.syn.any()


@pytest.mark.parametrize(
    "options",
    [
        {"state_quant": snntorch.functional.quant.state_quant(4)},  # snnTorch's cell raises here
        {"reset_mechanism": "zero", "avg_pool": 2},
        {"stride": 2, "inhibition": True},
    ],
    ids=described,
)
def test_stored_states_can_be_detached_in_place(backend, options):
    cell = ours(**options)
    for x in (torch.ones(1, 2, 5, 5), torch.ones(2, 1, 2, 5, 5)):
        for record in {False, x.dim() == 5}:
            cell(x, record=record)
            assert cell.mem.requires_grad
            snntorch.SConv2dLSTM.detach_hidden()
            assert not cell.mem.requires_grad
            assert not cell.syn.requires_grad


def test_the_registries_survive_being_cleared(monkeypatch):
    monkeypatch.setattr(snntorch.SpikingNeuron, "instances", [])
    before = ours()
    before(torch.ones(1, 2, 5, 5))
    snntorch.SpikingNeuron.init()
    after = ours()
    after(torch.ones(1, 2, 5, 5))
    snnlstm.SConv2dLSTM.reset_hidden()  # ours keeps its own registry
    assert not before.mem.any() | after.mem.any()
    snnlstm.SConv2dLSTM.init()
    after(torch.ones(1, 2, 5, 5))
    snnlstm.SConv2dLSTM.reset_hidden()
    assert after.mem.any()
    assert snntorch.SpikingNeuron.instances == []
