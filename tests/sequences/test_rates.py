"""snnlstm.spike_rates counts spikes and changes nothing."""

import copy
import logging
import math
import re

import pytest
import snntorch
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import snnlstm
from snnlstm import SpikeCount
from tests.loops.compiled import merges
from tests.shared.helpers import close, ours, quietly, steps, theirs

X = steps(4, 2, 2, 6, 6)


def network(cell=ours):
    grad = snnlstm.surrogate.atan()
    return nn.Sequential(
        cell(init_hidden=True, max_pool=2),
        cell(3, 2, 3, init_hidden=True, threshold=0.9, spike_grad=grad),
        nn.Flatten(),
        nn.Linear(18, 4),
        snntorch.Leaky(beta=0.9, threshold=0.1, init_hidden=True, spike_grad=grad),
    )


@pytest.mark.parametrize("cell", [ours, theirs])
def test_it_counts_the_spikes_of_every_neuron_layer(cell):
    net = network(cell)
    with snnlstm.spike_rates(net, show=False) as rates:
        spikes = [0, 0]
        for x in X:
            first = net[0](x)
            spikes[0] += int(first.sum())
            spikes[1] += int(net[2:](net[1](first)).sum())
    assert list(rates) == ["0", "1", "4"]
    assert [int(rates[name].spikes) for name in rates] == [spikes[0], 0, spikes[1]]
    assert spikes[0] > 0
    assert rates["0"].rate == spikes[0] / (4 * 2 * 3 * 3 * 3)
    assert rates["4"].chances == 4 * 2 * 4
    assert 0 < float(rates["1"].highest) < 0.9
    net(X[0])  # a call outside of the block is not counted
    assert rates["4"].chances == 4 * 2 * 4


POOLED = {
    "averaged": (lambda make: make(2, 3, 3, avg_pool=2), 4),
    "a signal": (lambda make: snnlstm.SConv1dLSTM(2, 3, 3, threshold=0.1, avg_pool=3), 3),
    "quantised": (lambda make: make(2, 3, 3, avg_pool=2, state_quant=QUANT), 4),
}
QUANT = snnlstm.quant.StateQuant(torch.linspace(-0.15, 0.15, 13))


@pytest.mark.parametrize("name", POOLED)
@pytest.mark.parametrize("cell", [ours, theirs])
def test_it_shows_the_mem_that_is_compared_with_the_threshold(cell, name):
    """With a threshold just below it the layer spikes, and with that threshold it does not.

    The threshold that a silent layer is told makes 5 % of its neurons spike.
    """
    make, dims = POOLED[name]
    x = X[0] if dims == 4 else X[0][..., 0]
    for factor, spikes in ((1.0, False), (0.999, True)):
        layer = make(cell)
        layer.threshold.fill_(10.0)
        with snnlstm.spike_rates(layer, show=False) as rates:
            layer(x)
        layer.threshold.copy_(rates[""].highest * factor)
        layer.reset_mem()
        assert bool(layer(x)[0].any()) is spikes
        layer.threshold.fill_(rates[""].exceeded)
        layer.reset_mem()
        assert 0.05 <= layer(x)[0].mean() < 0.3


def test_it_changes_neither_results_nor_paths(backend):
    counted, plain = snnlstm.Sequential(*network()), snnlstm.Sequential(*network())
    plain.load_state_dict(counted.state_dict())
    expected = plain(X)
    with snnlstm.spike_rates(counted, show=False) as rates:
        close(counted(X), expected, atol=0)
    assert counted.report == plain.report
    backend.check(counted[0].path)
    assert rates["0"].chances == 4 * 2 * 3 * 3 * 3
    expected.sum().backward()
    assert not counted[0]._forward_hooks
    copy.deepcopy(counted[0])


def test_the_table_is_printed_as_documented_and_names_what_never_spiked(capsys):
    net = nn.ModuleDict({"a": ours(), "b": quietly(ours, threshold=1.0), "c": ours(seed=2)})
    with snnlstm.spike_rates(net) as rates:
        net["a"](X)
        net["b"](X[0])
    printed = capsys.readouterr().out
    assert printed == f"{rates}\n"
    ends = [line.rpartition("  ")[2] for line in printed.splitlines()[2:]]
    assert re.fullmatch(r"never spiked; 5 % of mem > 0\.\d+", ends.pop(0))
    assert ends == ["not called, compiled before, or under torch.func"]
    table = snnlstm.networks.spikes.SpikeRates(nn.Identity(), show=False)
    table["lstm1"] = SpikeCount("SConv2dLSTM", 0.1, torch.tensor(1203), 22656, torch.tensor(0.192))
    table["lstm2"] = SpikeCount("SConv2dLSTM", 1.0, torch.tensor(0), 11328, torch.tensor(0.0871))
    table["lstm2"].compared = torch.linspace(-0.8, 0.0871, 101)
    assert math.isnan(rates["c"].rate)
    for line in str(table).splitlines():
        assert line in snnlstm.spike_rates.__doc__


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_network_is_counted_without_a_graph_for_each_call():
    net, counter = (
        nn.Sequential(snnlstm.Leaky(0.9, threshold=0.3, init_hidden=True)),
        CompileCounter(),
    )
    eager = copy.deepcopy(net)
    with (
        snnlstm.spike_rates(net, show=False) as rates,
        snnlstm.spike_rates(eager, show=False) as of,
    ):
        compiled = torch.compile(net, backend=counter)
        for x in torch.rand(6, 2, 3):
            compiled(x)
            eager(x)
    assert counter.frame_count <= 3
    assert (rates["0"].spikes, rates["0"].chances) == (of["0"].spikes, of["0"].chances)
    assert rates["0"].chances == 6 * 2 * 3


@merges
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.usefixtures("fresh_compiler")
def test_a_loop_that_is_compiled_within_the_block_is_counted_and_runs_sequences(training, caplog):
    net = snnlstm.accelerate(network()).model

    def loop(x):
        snnlstm.reset(net)
        return torch.stack([net(x_t) for x_t in x])

    found = []
    for run in (loop, torch.compile(loop, backend="snnlstm")):
        with (
            torch.set_grad_enabled(training),
            snnlstm.spike_rates(net, show=False) as rates,
            caplog.at_level(logging.INFO, "snnlstm"),
        ):
            found.append((run(X), run(X)))
        found[-1] += tuple((r.spikes, r.chances, r.highest) for r in rates.values())
    close(*found)
    said = [message.count("one call for all steps") for message in caplog.messages]
    assert said == [3, 3]  # the first call makes the counts, and the next one adds to them


def test_fake_tensors_are_counted_without_numbers():
    with FakeTensorMode() as mode:
        net = nn.Sequential(snnlstm.Leaky(0.9, threshold=0.3, init_hidden=True))
    with snnlstm.spike_rates(net, show=False) as rates, mode:
        for _ in range(2):
            net(torch.rand(2, 3))
    assert rates["0"].spikes.shape == rates["0"].chances.shape == ()


def test_a_model_without_neurons_and_what_is_no_model():
    with snnlstm.spike_rates(nn.Linear(2, 2), show=False) as rates:
        assert rates == {}
    assert len(str(rates).splitlines()) == 1
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got list"):
        snnlstm.spike_rates([ours()])


def test_errors_and_exports_leave_nothing_behind(capsys):
    cell = ours()
    with pytest.raises(KeyError), snnlstm.spike_rates(cell):
        raise KeyError
    assert not cell._forward_hooks
    assert capsys.readouterr().out == ""
    with snnlstm.spike_rates(cell, show=False) as rates:
        cell(torch.zeros(1, 2, 5, 5))
        torch.export.export(cell, (X[0],), strict=False)  # its tensors hold no numbers
    assert list(rates) == [""]
    assert rates[""].chances == 3 * 25


def test_blocks_within_blocks_count_each_for_itself():
    cell = ours()
    with snnlstm.spike_rates(cell, show=False) as outer:
        cell(X[0])
        with snnlstm.spike_rates(cell, show=False) as inner:
            cell(X[1])
        with pytest.raises(RuntimeError, match="are being counted: call spike_rates again"), outer:
            pass
        cell(X[2])
    assert outer[""].chances == 3 * inner[""].chances
    assert not cell._forward_hooks
    with outer:  # a block after the block starts anew
        cell(X[0])
    assert outer[""].chances == inner[""].chances


def test_calls_under_transforms_of_torch_func_are_not_counted():
    net, x = network()[:1], steps(4, 1, 2, 6, 6)
    with snnlstm.spike_rates(net, show=False) as rates:
        net(x[0])
        before = int(rates["0"].spikes), rates["0"].chances, float(rates["0"].highest)
        net[0].reset_mem()
        torch.func.vmap(net)(x)
    assert (int(rates["0"].spikes), rates["0"].chances, float(rates["0"].highest)) == before
