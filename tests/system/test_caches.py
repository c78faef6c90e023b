"""What is kept between calls is bounded: signatures, plans, and the algorithms of a plan."""

import pytest
import torch
from cases import Options
from cpu_kernels import native
from helpers import ours

from snnlstm import call

pytestmark = pytest.mark.skipif(native is None, reason="the core is not built")


def tensors(width: int = 5) -> tuple[torch.Tensor, ...]:
    state = torch.zeros(1, 3, 5, width)
    one = torch.ones(())
    return torch.ones(1, 2, 5, width), state, state, torch.zeros(12, 5, 3, 3), None, one, one


@torch.no_grad()
def test_signatures_are_bounded(monkeypatch):
    monkeypatch.setattr(call, "_signatures", {})
    monkeypatch.setattr(call, "_MOST", 8)
    for width in range(3, 40):
        made = call.make_call(tensors(width), Options((3, 3)))
        assert call.make_call(tensors(width), Options((3, 3))).signature is made.signature
        assert len(call._signatures) <= 8


@torch.no_grad()
def test_plans_of_a_signature_are_bounded(monkeypatch):
    monkeypatch.setattr(native, "_MOST", 8)
    x, *others = tensors()
    for stride in range(5, 40):
        padded = torch.ones(1, 2, 5, stride)[..., :5]
        made = call.make_call((padded, *others), Options((3, 3)))
        plan = native.plan_of(made, "auto")
        assert native.plan_of(made, "auto") is plan
        assert len(made.signature.notes) <= 8


@torch.no_grad()
def test_the_algorithms_of_a_plan_are_bounded():
    """They are told apart by the density of x in hundredths, and by the gain of the weight."""
    cell = ours(4, 3, 3)
    x = torch.zeros(1, 4, 40, 40)
    for k in range(0, x.numel(), 5):
        x.view(-1)[k] = 1
        cell(x, *cell.reset_mem())
    (plan,) = (
        note
        for signature in call._signatures.values()
        if signature.input == tuple(x.shape)
        for note in signature.notes.values()
        if hasattr(note, "_cores")
    )
    assert len(plan._cores) <= 101
