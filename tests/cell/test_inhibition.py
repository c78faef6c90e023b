"""With inhibition=True only the neuron with the highest state of each sample may spike.

snnTorch's documentation promises this, but its cell warns and ignores the argument.
"""

import pytest
import torch
from helpers import close, ours, states, steps
from oracle import pooled
from torch.nn import functional as F

from snnlstm.quant import StateQuant


def run(cell, x, *state):
    spk, _, mem = cell(x, *state)
    return spk, mem


def with_bias(cell, *gates):
    """Sets the weight to zero and the biases to `gates`, so that they alone decide the gates."""
    with torch.no_grad():
        cell.conv.weight.zero_()
        cell.conv.bias.copy_(torch.tensor(gates))
    return cell


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("pool", [{}, {"max_pool": 2}, {"avg_pool": (2, 3)}], ids=str)
def test_only_the_highest_pooled_state_of_each_sample_spikes(backend, pool):
    cell = ours(inhibition=True, **pool)
    syn, mem = states(3, 3, 6, 7)
    syn[2] = -9  # no neuron of this sample reaches the threshold
    spk, new_mem = run(cell, steps(1, 3, 2, 6, 7)[0], syn, mem)
    winner = pooled(new_mem, cell._describe()).flatten(1).argmax(1)
    assert spk.sum((1, 2, 3)).tolist() == [1, 1, 0]
    assert all(spk[n].flatten()[winner[n]] == 1 for n in range(2))
    backend.check(cell.path)


def test_states_are_those_without_inhibition(backend):
    """Suppressed neurons are reset as spiking neurons are."""
    kwargs = {"reset_mechanism": "subtract"}
    one, other = ours(inhibition=True, **kwargs), ours(**kwargs)
    x, start = steps(4, 2, 2, 6, 7), states(2, 3, 6, 7)
    actual, expected = one(x, *start, record=True), other(x, *start, record=True)
    close(actual[1:], expected[1:])
    assert expected[0].sum() > actual[0].sum() > 0


def test_a_tie_goes_to_the_lowest_index(backend):
    cell = with_bias(ours(1, 2, 1, inhibition=True), 9.0, 9, 0, 0, 9, 9, 9, 9)
    spk, mem = run(cell, torch.zeros(2, 1, 3, 3))
    assert mem.unique().numel() == 1
    assert spk.sum() == 2
    assert spk[:, 0, 0, 0].eq(1).all()
    backend.check(cell.path)


def test_the_highest_state_counts_not_the_distance_to_the_threshold(backend):
    cell = ours(1, 2, 1, inhibition=True, threshold=torch.tensor([0.7, 0.1]).view(2, 1, 1))
    with_bias(cell, 9.0, 9, 0, 0, 9, 9, 9, 0.8)
    spk, mem = run(cell, torch.zeros(1, 1, 1, 1))
    assert 0.7 < mem[0, 0] < 0.9
    assert mem[0, 0] > mem[0, 1] > 0.1
    assert spk.flatten().tolist() == [1, 0]


def test_the_winner_is_that_of_the_quantised_state(backend):
    """Of two states that round to one level, the first wins."""
    cell = ours(1, 1, 1, inhibition=True, state_quant=StateQuant(torch.tensor([0.0, 0.5, 1.0])))
    with_bias(cell, -99.0, 99, 99, 0)
    syn = torch.tensor([[[[0.5, 0.55], [0.6, 0.0]]]])
    spk, mem = run(cell, torch.zeros(1, 1, 2, 2), syn, torch.zeros(1, 1, 2, 2))
    assert mem.flatten().tolist() == [0.5, 0.5, 0.5, 0]
    assert spk.flatten().tolist() == [1, 0, 0, 0]


def test_nan_counts_as_the_highest_and_does_not_spike(backend):
    cell = ours(inhibition=True)
    syn, mem = states(2, 3, 5, 5)
    syn[0, 2, 4, 4] = torch.nan
    spk, _ = run(cell, steps(1, 2, 2, 5, 5)[0], syn, mem)
    assert spk.sum((1, 2, 3)).tolist() == [0, 1]


def test_no_gradient_flows_through_the_suppressed(backend):
    """The gradient is that of a cell without inhibition, if the loss reads the winners alone."""
    one, other = ours(inhibition=True, max_pool=2), ours(max_pool=2)
    syn, mem = states(2, 3, 6, 8)
    x = steps(1, 2, 2, 6, 8)[0]
    weights = torch.rand(2, 3, 3, 4)
    spk, new_mem = run(one, x, syn, mem)
    winner = F.max_pool2d(new_mem, 2).flatten(1).argmax(1)
    (spk * weights).sum().backward()
    mask = F.one_hot(winner, 36).view(2, 3, 3, 4)
    (run(other, x, syn, mem)[0] * weights * mask).sum().backward()
    close(one.conv.weight.grad, other.conv.weight.grad)
    assert one.conv.weight.grad.any()
