"""What reaches all layers reaches every living layer of ours, and keeps none alive."""

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
from torch._dynamo.testing import CompileCounter

import snnlstm
from tests.shared.fresh import fresh
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
            layer(layer(X)[0][:, :2])
            assert layer.mem.requires_grad
            seen.append(weakref.ref(layer))
        del layer
        assert [one() for one in seen] == [None] * 50
    finally:
        gc.enable()
    assert not snntorch.SpikingNeuron.instances


@made
@pytest.mark.parametrize("library", [snntorch, snnlstm])
def test_each_library_reaches_every_living_layer(library, make):
    layer, gone = make(), make()
    kind = library.Leaky if isinstance(layer, snntorch.Leaky) else library.SConv2dLSTM
    del gone
    for reset in (kind.reset_hidden, lambda: snntorch.utils.reset(nn.Sequential(layer))):
        layer(X)
        mem = layer.mem
        assert mem.requires_grad
        kind.detach_hidden()
        assert layer.mem is mem
        assert mem.any()
        assert not mem.requires_grad
        reset()
        assert not layer.mem.any()


def test_the_list_is_a_list_of_snntorchs_neurons():
    first, net = snntorch.Synaptic(0.9, 0.8), nn.Sequential(theirs(), leaky(snntorch))
    kept = leaky(), ours()
    for _ in range(2):
        snnlstm.accelerate(net)
        other = snntorch.Leaky(0.9)
        known = snntorch.SpikingNeuron.instances
        assert isinstance(known, list)
        assert known == known.copy() == known + [] == [first, other]  # noqa: RUF005
        known.sort(key=id)
        known.remove(other)
    assert {type(layer) for layer in (*net, *kept)} == {snnlstm.SConv2dLSTM, snnlstm.Leaky}


@pytest.mark.parametrize("library", [snnlstm, snntorch])
def test_a_constructor_that_fails_does_no_harm(library):
    """snnTorch keeps its half-made neuron for ever."""
    for options in ({"reset_mechanism": "none at all"}, {"bias": 1}):
        with pytest.raises((TypeError, ValueError)):
            leaky(library, **options)
    gc.collect()
    assert library is snntorch or not snntorch.SpikingNeuron.instances
    layer = leaky(library)
    layer(X)
    snntorch.Leaky.detach_hidden()
    snntorch.Leaky.reset_hidden()
    assert not layer.mem.any()


@pytest.mark.parametrize(
    "options",
    [
        {"state_quant": snntorch.functional.quant.state_quant(4)},  # snnTorch's cell raises here
        {"reset_mechanism": "zero", "avg_pool": 2},
        {"stride": 2},
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
    for make in LAYERS.values():
        before = make()
        snntorch.SpikingNeuron.init()
        after = make()
        for layer in (before, after):
            layer(X)
        kind = snntorch.Leaky if isinstance(after, snntorch.Leaky) else snntorch.SConv2dLSTM
        kind.reset_hidden()  # `init` forgets snnTorch's neurons alone
        assert not before.mem.any() | after.mem.any()
        assert snntorch.SpikingNeuron.instances == []
        snnlstm.SConv2dLSTM.init()
        after(X)
        kind.reset_hidden()
        assert after.mem.any()


@pytest.mark.filterwarnings("ignore:The module snntorch.backprop will be deprecated")
@pytest.mark.parametrize("cell", [True, False])
@pytest.mark.parametrize("chunks", [{}, {"K": 2}], ids=["BPTT", "TBPTT"])
def test_backprop_trains_alike(chunks, cell):
    """snnTorch resets and detaches all layers by their classes."""
    from snntorch import backprop

    method = backprop.TBPTT if chunks else backprop.BPTT
    shape = (2, 5, 5) if cell else (2,)
    data = [(steps(3, *shape, seed=k), torch.randint(3, (3, *shape[1:]))) for k in range(2)]
    results = []
    for library in (snnlstm, snntorch):
        torch.manual_seed(0)
        options = {"init_hidden": True, "output": True, "threshold": 0.1}
        last = library.SConv2dLSTM(3, 3, 3, **options) if cell else library.Leaky(0.9, **options)
        net = nn.Sequential(nn.Conv2d(2, 3, 1) if cell else nn.Linear(2, 3), last)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        criterion = snntorch.functional.ce_rate_loss()
        loss = method(net, data, optimizer, criterion, num_steps=4, time_var=False, **chunks)
        results.append((loss, *net.parameters()))
    close(*results)


# ---- within compiled code ------------------------------------------------------------------------

early = snntorch.utils.reset.__wrapped__  # a name that was imported before our package


class Resets(nn.Module):
    """Resets its layers at the start of each sequence, as many of snnTorch's users write it."""

    def __init__(self, library, reset):
        super().__init__()
        torch.manual_seed(0)
        options = {"init_hidden": True, "threshold": 0.1}
        self.cell = library.SConv2dLSTM(2, 3, 3, **options)
        self.last = nn.Sequential(nn.Sequential(library.Leaky(0.9, learn_beta=True, **options)))
        self.lif = library.Leaky(0.9, **options)
        self.reset = reset

    def forward(self, x):
        self.reset(self)
        return torch.stack([self.last(self.cell(self.lif(x_t))) for x_t in x])


def results(net, training, batch, seed=0):
    net.train(training)
    net.zero_grad()
    with torch.set_grad_enabled(training):
        spk = net(steps(2, batch, 2, 6, 7, seed=seed))
    assert spk.any()
    if training:
        spk.square().sum().backward()
    return [spk, *(parameter.grad for parameter in net.parameters())]


CALLS = [(True, 3), (False, 3), (False, 2), (True, 3)]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("reset", [snnlstm.reset, snntorch.utils.reset], ids=["ours", "utils"])
def test_a_reset_compiles_for_the_network_alone(reset):
    """Other networks come, run and die meanwhile, and keep their states."""
    counter, counts = CompileCounter(), []
    other, expected = Resets(snnlstm, early), Resets(snntorch, early)
    for _ in range(2):
        net = Resets(snnlstm, reset)
        compiled = torch.compile(net, backend=counter, fullgraph=True)
        for seed, call in enumerate(CALLS):
            close(results(compiled, *call, seed), results(expected, *call, seed))
            results(other, *call)
            mem = other.lif.mem
            results(compiled, *call)
            assert other.lif.mem is mem
            other, _gone = Resets(snnlstm, early), snntorch.Synaptic(0.9, 0.8)
        counts.append(counter.frame_count)
    assert counts[0] <= 4
    assert counts == [counts[0]] * 2


@pytest.mark.parametrize("library", [snnlstm, snntorch], ids=lambda library: library.__name__)
def test_utils_reset_looks_through_what_torch_compile_wraps(library):
    net = nn.Sequential(leaky(library), nn.Flatten(), snntorch.Synaptic(0.9, 0.8, init_hidden=True))
    net[0].mem = net[2].mem = torch.ones(3)
    snntorch.utils.reset(torch.compile(net))
    assert not any(neuron.mem.any() for neuron in (net[0], net[2]))


def neurons():
    """Makes a network of all kinds of neurons; returns it with its states, which are ones."""
    kinds = [
        leaky(), leaky(snntorch), ours(), theirs(), snntorch.Synaptic(0.9, 0.8),
        snntorch.RLeaky(0.9, linear_features=3), snntorch.RSynaptic(0.9, 0.8, linear_features=3),
        snntorch.Alpha(0.9, 0.8), snntorch.Lapicque(0.9), snntorch.SLSTM(2, 3),
        snntorch.StateLeaky(0.9, 3), snnlstm.SConv1dLSTM(2, 3, 3, threshold=0.1),
    ]  # fmt: skip
    states = [(one, name) for one in kinds for name in ("spk", "syn", "syn_exc", "syn_inh", "mem")
              if isinstance(getattr(one, name, None), torch.Tensor)]  # fmt: skip
    assert len(states) == 21
    for one, name in states:
        setattr(one, name, torch.ones(3))
    return nn.ModuleDict({"kind": nn.ModuleList(kinds)}), states


WRAPPERS = {
    "none": lambda net: net,
    "torch.compile": torch.compile,
    "torch.compile of a block": lambda net: nn.Sequential(torch.compile(net), nn.Flatten()),
    "DataParallel": nn.DataParallel,
    "accelerate": lambda net: snnlstm.accelerate(net).model,
}


@pytest.mark.parametrize(
    ("compiled", "reset"),
    [(False, snnlstm.reset), (True, snnlstm.reset), (True, snntorch.utils.reset)],
    ids=["ours", "ours, compiled", "utils, compiled"],
)
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.usefixtures("fresh_compiler")
def test_reset_reaches_each_neuron_in_a_network_and_no_other(wrapper, compiled, reset):
    """snnTorch's own function looks at direct children, of which a network of blocks has none."""
    (mixed, states), (_, others) = neurons(), neurons()
    net = WRAPPERS[wrapper](mixed)

    def run(x):
        reset(net)
        return x + 1

    (torch.compile(run, backend="eager", fullgraph=True) if compiled else run)(torch.ones(3))
    assert not any(getattr(one, name).any() for one, name in states)
    assert all(getattr(one, name).all() for one, name in others)
    for one, _ in others:
        snnlstm.reset(one)
    assert not any(getattr(one, name).any() for one, name in others)


WALKS = {
    "snntorch's": lambda _: [
        kind.reset_hidden() for kind in (snntorch.Leaky, snntorch.SConv2dLSTM)
    ],
    "ours": lambda _: [kind.reset_hidden() for kind in (snnlstm.Leaky, snnlstm.SConv2dLSTM)],
    "an early name": early,
}


@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.usefixtures("fresh_compiler")
def test_walks_over_all_layers_break_the_graph(walk):
    """They reach other networks, too, and further networks need no other graph."""
    other, expected = Resets(snnlstm, early), results(Resets(snntorch, early), True, 3)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="_hidden"):
        torch.compile(Resets(snnlstm, WALKS[walk]), backend="eager", fullgraph=True)(X[None])
    counter, counts = CompileCounter(), []
    for _ in range(2):
        other(X[None])
        net = Resets(snnlstm, WALKS[walk])
        close(results(torch.compile(net, backend=counter), True, 3), expected)
        assert not other.lif.mem.any() | other.cell.mem.any()
        counts.append(counter.frame_count)
    assert counts == [counts[0]] * 2


# ---- imported again ------------------------------------------------------------------------------

AGAIN = """
import logging, sys
import torch, snntorch, snntorch.utils
from torch import nn

logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.cell = snnlstm.SConv2dLSTM(2, 3, 3, threshold=0.1, init_hidden=True)
        self.lif = snnlstm.Leaky(0.9, threshold=0.1, init_hidden=True)

    def forward(self, x):
        snntorch.utils.reset(self)
        return torch.stack([self.cell(self.lif(x_t)) for x_t in x])

def wrapped():
    return snntorch.utils.reset, snntorch.Leaky.reset_hidden.__func__

nets, x = [], torch.rand(2, 2, 2, 5, 5)
for _ in range(2):
    import snnlstm
    net = Net()
    nets.append((net, torch.compile(net, backend="snnlstm")))
    before = wrapped() if len(nets) == 1 else before
    assert wrapped() == before
    for net, run in nets:
        assert torch.equal(run(x), net(x))
    for net, _ in nets:
        net.cell(net.lif(x[0]))
        assert net.lif.mem.any() and net.cell.mem.any()
    snntorch.utils.reset(net)
    assert not any(net.lif.mem.any() or net.cell.mem.any() for net, _ in nets)
    for name in [name for name in sys.modules if name.partition(".")[0] == "snnlstm"]:
        del sys.modules[name]
"""


def test_the_package_may_be_imported_again():
    """Compiled code of the first import goes on, and what changes in snnTorch changes once."""
    done = fresh(AGAIN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("lif Leaky: sequence (one call for all steps)") == 2
