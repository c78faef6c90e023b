"""With batch_first=True cell and function take and return sequences with the batch before time."""

import pytest
import torch
from helpers import close, ours, steps
from torch import Tensor

import snnlstm
from snnlstm.functional import sconv2dlstm

T, N = 5, 3
OPTIONS = {"threshold": 0.05, "reset_mechanism": "subtract", "max_pool": 2}


def twins(**arguments) -> tuple[snnlstm.SConv2dLSTM, snnlstm.SConv2dLSTM]:
    """Returns two cells of equal weights; the second one has batch_first=True."""
    arguments = OPTIONS | {"batch_first": True} | arguments
    return ours(2, 4, 3, **(arguments | {"batch_first": False})), ours(2, 4, 3, **arguments)


def events() -> Tensor:
    """Returns events (N, T, 2, 7, 6)."""
    return steps(N, T, 2, 7, 6)


def turned(t: Tensor) -> Tensor:
    return t.transpose(0, 1)


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize(("contiguous", "later"), [(False, True), (True, False)])
def test_it_is_the_same_with_the_axes_exchanged(backend, record, contiguous, later):
    one, other = twins(batch_first=not later)
    other.batch_first = True
    mine, theirs = events().requires_grad_(), events().requires_grad_()
    x = turned(theirs)
    spk, syn, mem = one(x.contiguous() if contiguous else x, record=record)
    found = other(mine, record=record)
    backend.check(other.path)
    close(found, (turned(spk), turned(syn), turned(mem)) if record else (turned(spk), syn, mem))
    assert found[0].shape == (N, T, 4, 3, 3)
    close((other.spk, other.mem), (found[0], one.mem))
    for out in (found, (spk, syn, mem)):
        (out[0].sum() + out[1].square().sum() + out[2].sum()).backward()
    grads = [[x.grad, *(p.grad for p in c.parameters())] for x, c in ((mine, other), (theirs, one))]
    close(*grads, atol=1e-4, rtol=1e-4)


def test_steps_and_stored_states_stay_as_they_are(backend):
    one, other = twins(init_hidden=True)
    x = events()
    close(other(x), torch.stack([one(x[:, t]) for t in range(T)], 1))
    close(other(x[:, 0]), one(x[:, 0]))
    assert other.spk.shape == (N, 4, 3, 3)


def test_the_functional_forms(backend):
    cell, _ = twins()
    x = events()
    kept = {"weight": cell.conv.weight, "bias": cell.conv.bias, "threshold": 0.05}
    for form in (sconv2dlstm, snnlstm.reference.sconv2dlstm):
        plain = form(turned(x), record=True, **kept)
        close(form(x, record=True, batch_first=True, **kept), [turned(a) for a in plain])


@pytest.mark.parametrize("record", [False, True])
def test_results_lie_in_memory_as_they_are_seen(record):
    """The kernels write contiguous results, so that a layer that folds N and T copies nothing."""
    _, cell = twins()
    with torch.no_grad():
        spk, _, mem = cell(events(), record=record)
    assert cell.path.name == "reference" or (spk.is_contiguous() and mem.is_contiguous())


def test_errors_speak_of_the_shape_that_came():
    for cell in twins():
        with pytest.raises(ValueError, match=r"shape \(2, 3, 1, 7, 6\)"):
            cell(torch.zeros(2, 3, 1, 7, 6))
    with pytest.raises(ValueError, match=r"shape \(2, 3, 1, 7, 6\)"):
        sconv2dlstm(torch.zeros(2, 3, 1, 7, 6), weight=cell.conv.weight, threshold=0.05)
    with pytest.raises(ValueError, match=r"\(N, T, 2, H, W\) for a sequence, got \(7, 6\)"):
        cell(torch.zeros(7, 6))


def test_a_stack_has_an_order_of_its_own():
    one, other = twins(init_hidden=True)
    x = events()
    expected = snnlstm.Sequential(one)(turned(x))
    assert torch.equal(snnlstm.Sequential(other)(turned(x)), expected)
    other.reset_mem()
    assert torch.equal(snnlstm.Sequential(other, batch_first=True)(x), turned(expected))
