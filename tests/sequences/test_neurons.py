"""snnTorch's neurons that take whole sequences, and DeltaLeaky, within Sequential and unroll."""

import copy

import pytest
import torch
from torch import nn

import snnlstm
from tests.sequences.by_length import LENGTHS, TIME
from tests.sequences.stacks import NEURONS, delta_leaky, equals_the_loop
from tests.shared.helpers import close, flat, ours, steps

N = len(LENGTHS)
X = steps(TIME, N, 2, 6, 6)


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
        sum(part.sum() for part in flat(out)).backward()
    for actual, expected in zip(net.parameters(), stepped.parameters(), strict=True):
        close(actual.grad, expected.grad, atol=1e-4)
    assert net.report[3].kind == "sequence"
    assert net.report[3].reason == "it takes sequences"
    out = snnlstm.unroll(X.transpose(0, 1), *net, batch_first=True)
    close([part.transpose(0, 1) for part in flat(out)], flat(by_hand(stepped)))


@pytest.mark.parametrize("make", NEURONS.values(), ids=NEURONS)
def test_their_hooks_see_sequences_and_one_may_be_in_two_places(make):
    neuron, seen = make(), []
    neuron.register_forward_hook(lambda layer, args, out: seen.append(args[0].shape))
    x = torch.rand(TIME, N, 5)
    back = nn.Linear(snnlstm.unroll(x, neuron)[0].shape[-1], 5)
    seen.clear()
    net = snnlstm.Sequential(neuron, back, neuron)
    once = flat(neuron(x))[0]
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


def test_delta_leaky_goes_step_by_step():
    equals_the_loop(nn.Sequential(*delta_leaky(), nn.Tanh()), X, "fold fold step fold")
