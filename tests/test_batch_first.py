"""batch_first=True: sequences with the batch before time, of the cell and of the function."""

import pytest
import torch
from torch import Tensor

import snnlstm
from snnlstm.functional import sconv2dlstm

T, N = 5, 3


def twins(**arguments) -> tuple[snnlstm.SConv2dLSTM, snnlstm.SConv2dLSTM]:
    """Returns cells of one weight, the second one with the batch first."""
    arguments = {"threshold": 0.05, "reset_mechanism": "subtract", "max_pool": 2} | arguments
    cells = [
        snnlstm.SConv2dLSTM(2, 4, 3, batch_first=first, **arguments) for first in (False, True)
    ]
    cells[1].load_state_dict(cells[0].state_dict())
    return cells[0], cells[1]


def events() -> Tensor:
    """(N, T, ...)"""
    return torch.rand(N, T, 2, 7, 6).gt(0.7).float()


def turned(t: Tensor) -> Tensor:
    return t.transpose(0, 1)


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("contiguous", [False, True])
def test_it_is_the_same_with_the_axes_exchanged(backend, record, contiguous):
    one, other = twins()
    x = events()
    spk, syn, mem = one(turned(x).contiguous() if contiguous else turned(x), record=record)
    found = other(x, record=record)
    backend.check(other.path)
    expected = (turned(spk), turned(syn), turned(mem)) if record else (turned(spk), syn, mem)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, atol=1e-6, rtol=0)
    assert found[0].shape == (N, T, 4, 3, 3)
    torch.testing.assert_close(other.spk, found[0])
    torch.testing.assert_close(other.mem, one.mem, atol=1e-6, rtol=0)


def test_gradients_are_the_same(backend):
    found = []
    for cell in twins():
        x = events_of_seed().requires_grad_()
        data = x if cell.batch_first else turned(x)
        spk, syn, mem = cell(data, record=True)
        (spk.sum() + syn.square().sum() + mem.sum()).backward()
        found.append((x.grad, *(p.grad for p in cell.parameters())))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, atol=1e-4, rtol=1e-4)


def events_of_seed() -> Tensor:
    torch.manual_seed(4)
    return events()


def test_steps_and_stored_states_stay_as_they_are(backend):
    one, other = twins(init_hidden=True)
    x = events()
    steps = [one(x[:, t]) for t in range(T)]
    torch.testing.assert_close(other(x), torch.stack(steps, 1))
    torch.testing.assert_close(other(x[:, 0]), one(x[:, 0]), atol=1e-6, rtol=0)


def test_the_functional_forms(backend):
    cell, _ = twins()
    x = events()
    kept = {"weight": cell.conv.weight, "bias": cell.conv.bias, "threshold": 0.05}
    for form in (sconv2dlstm, snnlstm.reference.sconv2dlstm):
        plain = form(turned(x), record=True, **kept)
        first = form(x, record=True, batch_first=True, **kept)
        for a, b in zip(plain, first, strict=True):
            torch.testing.assert_close(b, turned(a), atol=1e-6, rtol=0)


@pytest.mark.parametrize("record", [False, True])
def test_results_lie_in_memory_as_they_are_seen(record):
    """The kernels write them so: nobody has to copy them for a layer that folds N and T."""
    _, cell = twins()
    with torch.no_grad():
        spk, _, mem = cell(events(), record=record)
    assert spk.is_contiguous() or cell.path.name == "reference"
    assert mem.is_contiguous() or cell.path.name == "reference"


def test_errors_speak_of_the_shape_that_came():
    _, cell = twins()
    with pytest.raises(ValueError, match=r"got 3: shape \(3, 5, 3, 7, 6\)"):
        cell(torch.zeros(N, T, 3, 7, 6))
    with pytest.raises(ValueError, match=r"\(N, T, 2, H, W\) for a sequence, got \(7, 6\)"):
        cell(torch.zeros(7, 6))


def test_a_stack_has_an_order_of_its_own():
    one, other = twins(init_hidden=True)
    x = events()
    expected = snnlstm.Sequential(one)(turned(x))
    assert torch.equal(snnlstm.Sequential(other)(turned(x)), expected)
    other.reset_mem()
    assert torch.equal(snnlstm.Sequential(other, batch_first=True)(x), turned(expected))


def test_it_can_be_set():
    cell, _ = twins()
    x = events()
    expected = cell(turned(x))[0]
    cell.reset_mem()
    cell.batch_first = True
    torch.testing.assert_close(cell(x)[0], turned(expected))
