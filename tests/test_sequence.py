"""One call for a whole sequence: the same as its steps one by one."""

import pytest
import torch
from helpers import close, ours, states, steps, theirs, twins


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("explicit", [False, True])
def test_a_sequence_is_as_many_step_calls(backend, record, explicit):
    whole, single = ours(reset_mechanism="subtract"), theirs(reset_mechanism="subtract")
    x = steps(5, 2, 2, 6, 7).requires_grad_()
    again = x.detach().clone().requires_grad_()
    start = states(2, 3, 6, 7) if explicit else (None, None)
    spk, syn, mem = whole(x, *start, record=record)
    backend.check(whole.path)
    state, out = start, []
    for t in range(5):
        out.append(single(again[t], *state))
        state = out[-1][1:]
    spks, syns, mems = map(torch.stack, zip(*out, strict=True))
    close(spk, spks)
    close((syn, mem), (syns, mems) if record else (syns[-1], mems[-1]))
    close((whole.syn, whole.mem), (syns[-1], mems[-1]))
    weights = torch.linspace(-1, 1, 5).view(-1, 1, 1, 1, 1)
    (spk * weights).sum().add((mem * weights if record else mem).sum()).backward()
    (spks * weights).sum().add((mems * weights if record else mems[-1]).sum()).backward()
    close(x.grad, again.grad, atol=1e-5, rtol=1e-4)
    close(whole.conv.weight.grad, single.conv.weight.grad, atol=1e-4, rtol=1e-4)


def test_states_are_carried_from_sequences_to_steps_and_back(backend):
    one, other = twins(reset_mechanism="zero")
    x = steps(7, 2, 2, 6, 7)
    parts = [one(x[:3])[0], one(x[3])[0][None], one(x[4:6], record=True)[0], one(x[6])[0][None]]
    close(torch.cat(parts), torch.stack([other(x[t])[0] for t in range(7)]))
    assert not one.mem._is_view()


def test_a_sequence_of_no_steps_leaves_the_states_unchanged(backend):
    cell = ours(max_pool=2)
    cell(steps(1, 2, 2, 6, 7)[0])
    syn, mem = cell.syn.clone(), cell.mem.clone()
    for record in (False, True):
        spk, s, m = cell(torch.zeros(0, 2, 2, 6, 7), record=record)
        assert spk.shape == (0, 2, 3, 3, 3)
        assert torch.equal(cell.syn, syn)
        assert torch.equal(cell.mem, mem)
        assert s.shape == m.shape == ((0, 2, 3, 6, 7) if record else (2, 3, 6, 7))


@pytest.mark.parametrize("pool", [{}, {"max_pool": 2}, {"avg_pool": 2}], ids=str)
def test_an_empty_batch_works(backend, pool):
    cell = ours(inhibition=True, **pool)
    for x in (torch.zeros(0, 2, 6, 7), torch.zeros(3, 0, 2, 6, 7)):
        cell.reset_mem()
        spk, syn, mem = cell(x)
        assert spk.shape[-4] == 0
        assert syn.shape == mem.shape == (0, 3, 6, 7)
        (spk.sum() + mem.sum()).backward()
        assert not cell.conv.weight.grad.any()


def test_record_with_init_hidden_and_output(backend):
    x = steps(3, 1, 2, 5, 5)
    assert ours(init_hidden=True)(x, record=True).shape == (3, 1, 3, 5, 5)
    out = ours(init_hidden=True, output=True)(x, record=True)
    assert [tuple(o.shape) for o in out] == [(3, 1, 3, 5, 5)] * 3
