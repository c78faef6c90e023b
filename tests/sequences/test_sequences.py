"""A call of the cell takes a sequence: with states of the calls before, or with the batch first."""

import pytest
import torch
from torch import Tensor

import snnlstm
from snnlstm.functional import sconv2dlstm
from tests.shared.helpers import close, ours, same, steps


@pytest.mark.parametrize("record", [False, True])
def test_a_sequence_of_no_steps_leaves_the_states_unchanged(backend, record):
    cell = ours(max_pool=2)
    cell(steps(1, 2, 2, 6, 7)[0])
    syn, mem = cell.syn.clone(), cell.mem.clone()
    spk, s, m = cell(torch.zeros(0, 2, 2, 6, 7), record=record)
    assert spk.shape == (0, 2, 3, 3, 3)
    same((cell.syn, cell.mem), (syn, mem))
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


EXPANDED = {
    "a static image": lambda: steps(1, 2, 2, 6, 7)[0].expand(4, 2, 2, 6, 7),
    "one sample": lambda: steps(4, 1, 2, 6, 7).expand(4, 2, 2, 6, 7),
    "a colour": lambda: steps(4, 2, 2)[..., None, None].expand(4, 2, 2, 6, 7),
}


@pytest.mark.parametrize("name", EXPANDED)
def test_results_of_an_expanded_x_are_contiguous(backend, name):
    x, cell = EXPANDED[name](), ours(max_pool=2)
    out = cell(x, record=True)
    backend.check(cell.path)
    assert all(o.is_contiguous() for o in out)
    close(out, ours(max_pool=2)(x.contiguous(), record=True))


# ---- batch_first ----------------------------------------------------------------------------

T, N = 5, 3
OPTIONS = {"threshold": 0.05, "reset_mechanism": "subtract", "max_pool": 2}


def both_orders(**arguments) -> tuple[snnlstm.SConv2dLSTM, snnlstm.SConv2dLSTM]:
    """Returns two cells of equal weights; the second one has batch_first=True."""
    arguments = OPTIONS | {"batch_first": True} | arguments
    return ours(2, 4, 3, **(arguments | {"batch_first": False})), ours(2, 4, 3, **arguments)


def events() -> Tensor:
    """Returns events (N, T, 2, 7, 6)."""
    return steps(N, T, 2, 7, 6)


def turned(t: Tensor) -> Tensor:
    return t.transpose(0, 1)


@pytest.mark.emulator_long
@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize(("contiguous", "later"), [(False, True), (True, False)])
def test_it_is_the_same_with_the_axes_exchanged(backend, record, contiguous, later):
    plain, first = both_orders(batch_first=not later)
    first.batch_first = True
    mine, theirs = events().requires_grad_(), events().requires_grad_()
    x = turned(theirs)
    spk, syn, mem = plain(x.contiguous() if contiguous else x, record=record)
    actual = first(mine, record=record)
    backend.check(first.path)
    close(actual, (turned(spk), turned(syn), turned(mem)) if record else (turned(spk), syn, mem))
    assert actual[0].shape == (N, T, 4, 3, 3)
    assert first.spk is actual[0]
    close(first.mem, plain.mem)
    for out in (actual, (spk, syn, mem)):
        (out[0].sum() + out[1].square().sum() + out[2].sum()).backward()
    pairs = (mine, first), (theirs, plain)
    grads = [[x.grad, *(p.grad for p in c.parameters())] for x, c in pairs]
    close(*grads, atol=1e-4, rtol=1e-4)


def test_steps_and_stored_states_stay_as_they_are(backend):
    plain, first = both_orders(init_hidden=True)
    x = events()
    close(first(x), torch.stack([plain(x[:, t]) for t in range(T)], 1))
    close(first(x[:, 0]), plain(x[:, 0]))
    assert first.spk.shape == (N, 4, 3, 3)


def test_the_functional_form(backend):
    cell, _ = both_orders()
    x = events()
    kept = {"weight": cell.conv.weight, "bias": cell.conv.bias, "threshold": 0.05}
    plain = sconv2dlstm(turned(x), record=True, **kept)
    close(sconv2dlstm(x, record=True, batch_first=True, **kept), [turned(a) for a in plain])
