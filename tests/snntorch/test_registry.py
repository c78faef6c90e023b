"""snnTorch's list of all neurons, and ours, know every living layer of ours and keep none alive."""

import copy
import gc
import pickle
import weakref

import pytest
import snntorch
import snntorch.functional.quant
import snntorch.utils
import torch
from torch import nn

import snnlstm
from tests.shared.helpers import close, described, ours, steps, theirs

X = torch.ones(1, 2, 5, 5)


def leaky(library=snnlstm, **options):
    return library.Leaky(0.9, threshold=0.3, learn_beta=True, **options)


def accelerated(layer):
    return snnlstm.accelerate(layer).model


def patched():
    with snnlstm.patch():
        return leaky(snntorch)


class Mine(snnlstm.Leaky):
    pass


LAYERS = {
    "cell": ours,
    "leaky": leaky,
    "subclass": lambda: Mine(0.9, threshold=0.3, learn_beta=True),
    "patched": patched,
    "an accelerated cell": lambda: accelerated(theirs()),
    "an accelerated leaky": lambda: accelerated(leaky(snntorch)),
    "a copy": lambda: copy.deepcopy(leaky()),
    "a pickle": lambda: pickle.loads(pickle.dumps(leaky())),
}
made = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


@made
def test_layers_are_not_kept_alive(make):
    """Each dies with its last reference, without the garbage collector, also after a call."""
    make()  # what is compared once with snnTorch's leaves garbage
    gc.collect()
    gc.disable()
    try:
        seen = []
        for _ in range(50):
            layer = make()
            assert layer in snntorch.SpikingNeuron.instances
            layer(layer(X)[0][:, :2])
            assert layer.mem.requires_grad
            seen.append(weakref.ref(layer))
        entries = len(snntorch.SpikingNeuron.instances)
        del layer
        assert [one() for one in seen] == [None] * 50
    finally:
        gc.enable()
    snntorch.Leaky.reset_hidden()
    snntorch.SConv2dLSTM.reset_hidden()
    assert entries < 9, "a dead layer's place is not reused"


def test_swaps_do_not_make_the_list_longer():
    net = nn.Sequential(theirs(), leaky(snntorch), snntorch.Synaptic(0.9, 0.8))
    lengths = set()
    for _ in range(5):
        snnlstm.accelerate(net)
        lengths.add(len(snntorch.SpikingNeuron.instances))
        assert {*net} == {*snntorch.SpikingNeuron.instances}
    assert max(lengths) - 3 <= 5, "a swap leaves entries behind"
    assert len(snntorch.SpikingNeuron.instances) == max(lengths)


def test_the_list_may_be_walked_while_a_cell_dies():
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


@made
def test_snntorch_reaches_every_living_layer(make):
    layer, gone = make(), make()
    kind = snntorch.Leaky if isinstance(layer, snntorch.Leaky) else snntorch.SConv2dLSTM
    del gone
    for reset in (kind.reset_hidden, lambda: snntorch.utils.reset(nn.Sequential(layer))):
        layer(X)
        kind.detach_hidden()
        assert layer.mem.any()
        assert not layer.mem.requires_grad
        reset()
        assert not layer.mem.any()


def test_the_list_is_a_list_of_the_layers_themselves():
    layer, cell, other = leaky(), ours(), snntorch.Synaptic(0.9, 0.8)
    known = snntorch.SpikingNeuron.instances
    assert [*known] == known[:] == [layer, cell, other]
    assert known[1] is known[-2] is cell
    del cell
    assert [*known] == [layer, other]  # a loop over the list calls methods of each neuron
    snntorch.Leaky(0.9)
    assert len(known) == 3, "snnTorch's neuron does not take the vacant place"
    known.remove(layer)
    assert layer not in known
    known[0] = known[1] = layer
    known.clear()
    assert snntorch.SpikingNeuron.instances is known
    again = leaky()
    assert [*known] == [again]


def test_a_constructor_that_fails_leaves_nothing_behind():
    for options in ({"reset_mechanism": "none at all"}, {"bias": 1}):
        with pytest.raises((TypeError, ValueError)):
            leaky(**options)
        gc.collect()
        assert not [*snntorch.SpikingNeuron.instances]
    snntorch.Leaky.reset_hidden()


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


# ---- within compiled code ------------------------------------------------------------------------


class Resets(nn.Module):
    """Resets its layers at the start of each sequence, as many of snnTorch's users write it."""

    def __init__(self, library):
        super().__init__()
        torch.manual_seed(0)
        self.lif = leaky(library, init_hidden=True)
        self.cell = library.SConv2dLSTM(2, 3, 3, threshold=0.1, init_hidden=True)

    def forward(self, x):
        snntorch.utils.reset(self)
        return torch.stack([self.cell(self.lif(x_t)) for x_t in x])


@pytest.fixture
def nets(fresh_compiler):
    return Resets(snnlstm), Resets(snntorch)


def trains_alike(compiled, expected, calls, seed=0):
    for k in range(calls):
        results = []
        for net in (compiled, expected):
            net.zero_grad()
            spk = net(steps(2, 2, 2, 6, 7, seed=seed + k))
            spk.square().sum().backward()
            results.append((spk, *(p.grad for p in net.parameters())))
        close(*results)
        assert results[0][0].any()


def test_compiled_code_resets_the_layers(nets):
    """Also layers of other networks, which come, are used and die between the calls.

    The collector may run between the trace of the list and the guards of its entries, and then
    frees layers that only garbage holds.
    """
    net, expected = nets
    other, old = Resets(snnlstm), Resets(snnlstm)
    other(steps(3, 2, 2, 6, 7))

    def backend(graph, _):
        gc.collect()
        return graph

    gc.disable()
    try:
        old.itself = [old]
        del old
        compiled = torch.compile(net, backend=backend, fullgraph=True)
        trains_alike(compiled, expected, calls=3)
    finally:
        gc.enable()
    assert not other.lif.mem.any() | other.cell.mem.any()
    del other
    trains_alike(compiled, expected, calls=3, seed=3)
    other = Resets(snnlstm)
    other(steps(3, 2, 2, 6, 7))
    trains_alike(compiled, expected, calls=1)
    assert not other.lif.mem.any() | other.cell.mem.any()
