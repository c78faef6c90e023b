"""snnTorch's neurons that take whole sequences, and DeltaLeaky, within Sequential and unroll."""

import copy

import pytest
import snntorch
import torch
from torch import nn

import snnlstm
from tests.sequences.by_length import LENGTHS, TIME
from tests.sequences.stacks import equals_the_loop
from tests.shared.helpers import close, ours, steps

N = len(LENGTHS)
X = steps(TIME, N, 2, 6, 6)
SPIKES = {"threshold": 0.3, "spike_grad": snnlstm.surrogate.atan()}  # snnTorch's cannot be copied

NEURONS = {
    "StateLeaky": lambda: snntorch.StateLeaky(0.8, 5, learn_beta=True, **SPIKES),
    "StateLeaky without spikes": lambda: snntorch.StateLeaky(0.8, 5, output=False),
    "truncated": lambda: snntorch.StateLeaky(0.8, 5, kernel_truncation_steps=2, **SPIKES),
    "LinearLeaky": lambda: snntorch.LinearLeaky(0.7, 5, 4, **SPIKES),
    "AssociativeLeaky": lambda: snntorch.AssociativeLeaky(5, 2, 2, 4),
    "LeakyParallel": lambda: snntorch.LeakyParallel(5, 4, beta=0.5, **SPIKES),
}


def parts_of(out):
    return out if isinstance(out, tuple) else (out,)


def stack(make):
    torch.manual_seed(2)
    return [ours(init_hidden=True, max_pool=2), nn.Flatten(), nn.Linear(27, 5), make()]


def by_hand(net):
    return net[3](net[2](net[0](X).flatten(2)))


@pytest.mark.parametrize("make", NEURONS.values(), ids=NEURONS)
def test_neurons_that_take_sequences_are_called_once(make):
    net = snnlstm.Sequential(*stack(make))
    stepped = copy.deepcopy(net)
    for _ in range(2):  # the cell goes on from its state, and the neuron starts anew
        results = net(X), by_hand(stepped)
        close(*results)
    for out in results:
        sum(part.sum() for part in parts_of(out)).backward()
    for actual, expected in zip(net.parameters(), stepped.parameters(), strict=True):
        close(actual.grad, expected.grad, atol=1e-4)
    assert net.report[3].kind == "sequence"
    assert net.report[3].reason == "it takes sequences"
    out = snnlstm.unroll(X.transpose(0, 1), *net, batch_first=True)
    close([part.transpose(0, 1) for part in parts_of(out)], parts_of(by_hand(stepped)))


@pytest.mark.parametrize("make", NEURONS.values(), ids=NEURONS)
def test_with_lengths_each_sample_is_as_it_is_alone(make):
    layers = stack(make)[2:]
    x = torch.randn(TIME, N, 27)
    for n, length in enumerate(LENGTHS):
        x[length:, n] = torch.nan
    out = parts_of(snnlstm.unroll(x, *layers, lengths=LENGTHS))
    sum(part.sum() for part in out).backward()
    assert not any(p.grad.isnan().any() for layer in layers for p in layer.parameters()
                   if p.grad is not None)  # fmt: skip
    for n, length in enumerate(LENGTHS):
        assert not out[0][length:, n].any()
        if length == 0:
            assert not any(part[:, n].any() for part in out)
            continue
        alone = parts_of(snnlstm.unroll(x[:length, n : n + 1], *layers))
        close([part[:length, n : n + 1] for part in out], alone, atol=1e-5)
        for part in out[1:]:
            close(part[length:, n], part[length - 1, n].expand_as(part[length:, n]), atol=0)


@pytest.mark.parametrize("make", NEURONS.values(), ids=NEURONS)
def test_their_hooks_see_sequences_and_one_may_be_in_two_places(make):
    neuron, seen = make(), []
    neuron.register_forward_hook(lambda layer, args, out: seen.append(args[0].shape))
    x = torch.rand(TIME, N, 5)
    back = nn.Linear(snnlstm.unroll(x, neuron)[0].shape[-1], 5)
    seen.clear()
    net = snnlstm.Sequential(neuron, back, neuron)
    once = parts_of(neuron(x))[0]
    close(net(x), neuron(back(once)))
    assert seen == 4 * [x.shape]
    assert [layer.kind for layer in net.report] == ["sequence", "fold", "sequence"]


@pytest.mark.parametrize("make", NEURONS.values(), ids=NEURONS)
def test_errors_name_the_layer(make):
    neuron, cell = make(), ours(2, 2, 3, init_hidden=True)
    name = type(neuron).__name__
    said = rf"a sequence of steps \(N, C\) for layer 1 \({name}\), got steps of shape \(7, 3, 6"
    with pytest.raises(ValueError, match=said):
        snnlstm.unroll(X, ours(init_hidden=True), neuron)
    said = (
        rf"layer 3 \({name}\) needs whole sequences, but layer 1 is in several places and may keep"
    )
    with pytest.raises(ValueError, match=said):
        snnlstm.unroll(X, cell, cell, nn.Flatten(), neuron)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "lengths"])
def test_delta_leaky_goes_step_by_step(lengths):
    options = {"beta": 0.9, "init_hidden": True, "delta_threshold": 0.2, **SPIKES}
    net = nn.Sequential(nn.Flatten(), nn.Linear(72, 3), snntorch.DeltaLeaky(**options))
    if lengths is None:
        net.append(nn.Tanh())
        equals_the_loop(net, X, "fold fold step fold")
        return
    spk, (mem, before) = snnlstm.unroll(X, *net, lengths=lengths)
    for n, length in enumerate(lengths):
        net[2].reset_mem()
        assert not spk[length:, n].any()
        if length:
            alone = snnlstm.unroll(X[:length, n : n + 1], *net)
            close((spk[:length, n : n + 1], (mem[:length, n : n + 1], before[:length, n : n + 1])),
                  alone)  # fmt: skip
            close(mem[length:, n], mem[length - 1, n].expand_as(mem[length:, n]))
