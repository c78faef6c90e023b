"""Truncated backpropagation through time: sequences in chunks, with the graph cut between them."""

import pytest
import snntorch
import torch
from helpers import close, ours, same_gradients, steps, theirs
from torch import nn

import snnlstm

T, K = 8, 3  # the last chunk is shorter
X = steps(T, 2, 2, 6, 6)
OPTIONS = {"reset_mechanism": "subtract", "learn_threshold": True}


def two(make, **kwargs):
    return nn.ModuleList([make(2, 3, 3, **OPTIONS, **kwargs), make(3, 2, 3, **OPTIONS, **kwargs)])


def through(cells, x):
    for cell in cells:
        x, *states = cell(x)
    return x, states[-1]


def loss_of(spk, mem):
    return (spk.mean() - 0.3).square() + mem.square().mean()


def step_loop(cells, chunk):
    """Steps as snnTorch does, and returns all spikes and the last mem."""
    outs = [through(cells, x) for x in chunk]
    return torch.stack([spk for spk, _ in outs]), outs[-1][1]


def gradients(cells):
    grads = [parameter.grad.clone() for parameter in cells.parameters()]
    cells.zero_grad()
    return grads


def test_detach_hidden_cuts_the_graph_where_snntorchs_does(backend):
    """The gradients of each chunk and the last states agree."""
    cells, expected = two(ours), two(theirs)
    for chunk in X.split(K):
        loss_of(*through(cells, chunk)).backward()
        loss_of(*step_loop(expected, chunk)).backward()
        close(gradients(cells), gradients(expected), atol=2e-5, rtol=1e-4)
        snnlstm.SConv2dLSTM.detach_hidden()
        snntorch.SConv2dLSTM.detach_hidden()
        assert not any(cell.mem.requires_grad or cell.syn.requires_grad for cell in cells)
    for one, other in zip(cells, expected, strict=True):
        close((one.syn, one.mem), (other.syn, other.mem))
        backend.check(one.path)


def test_chunks_equal_one_long_sequence_with_detached_boundaries(backend):
    """The gradients of all chunks add up to those of one graph that is cut by hand."""
    cells, expected, uncut = two(ours), two(ours), two(ours)
    for chunk in X.split(K):
        loss_of(*through(cells, chunk)).backward()
        snnlstm.SConv2dLSTM.detach_hidden()
    for whole, cut in ((expected, True), (uncut, False)):
        states = [(torch.zeros(0), torch.zeros(0)) for _ in whole]
        losses = []
        for chunk in X.split(K):
            x = chunk
            for k, cell in enumerate(whole):
                start = [state.detach() for state in states[k]] if cut else states[k]
                x, *states[k] = cell(x, *start)
            losses.append(loss_of(x, states[-1][1]))
        sum(losses).backward()
    same_gradients(cells, expected)
    difference = cells[0].conv.weight.grad - uncut[0].conv.weight.grad
    assert difference.abs().max() > 1e-4  # the cuts matter


@pytest.mark.parametrize("pattern", ["by hand", "Sequential"])
def test_training_in_chunks_is_that_of_snntorchs_step_loop(pattern):
    """The optimizer steps after every chunk."""
    hidden = {"init_hidden": True} if pattern == "Sequential" else {}
    cells, expected = two(ours, **hidden), two(theirs)
    if hidden:
        cells[1].output = True
    net = snnlstm.Sequential(*cells)
    states = [(None, None), (None, None)]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (cells, expected)]
    for chunk in X.split(K):
        if hidden:
            spk, _, mem = net(chunk)  # mem of every step
            mem = mem[-1]
        else:
            spk = chunk
            for k, cell in enumerate(cells):
                spk, syn, mem = cell(spk, *states[k])
                states[k] = syn.detach(), mem.detach()
        for optimizer, out in zip(
            optimizers, ((spk, mem), step_loop(expected, chunk)), strict=True
        ):
            optimizer.zero_grad()
            loss_of(*out).backward()
            optimizer.step()
        if hidden:
            snnlstm.SConv2dLSTM.detach_hidden()
        snntorch.SConv2dLSTM.detach_hidden()
    close(list(cells.parameters()), list(expected.parameters()), atol=1e-4)
    assert not torch.equal(cells[0].conv.weight, ours(2, 3, 3, **OPTIONS).conv.weight)


def test_a_chunk_without_detached_states_says_what_is_wrong():
    """The history of the chunk before is gone: torch refuses, and nothing is trained wrongly."""
    cell = ours()
    cell(X[:K])[2].sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        cell(X[K:])[2].sum().backward()
