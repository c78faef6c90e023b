"""Layers that run step by step take turns at every step, and their results are stacked."""

import pytest
import torch
from torch import nn

import snnlstm
from tests.shared.helpers import close, ours, steps

T, N = 5, 2
X = steps(T, N, 2, 6, 6)


@pytest.fixture(params=[False, True], ids=["small", "large"])
def large(request, monkeypatch):
    """Steps are small, or so large that they run one by one."""
    if request.param:
        monkeypatch.setattr(snnlstm.layers, "LARGEST", 0)
    return request.param


class Each(nn.Module):
    """A layer of the user's applies a function, which may know the step."""

    def __init__(self, function):
        super().__init__()
        self.function, self.step = function, -1

    def forward(self, x):
        self.step += 1
        return self.function(x, self.step)


def test_a_step_goes_through_all_layers_before_the_next(monkeypatch):
    monkeypatch.setattr(snnlstm.layers, "LARGEST", 0)
    order = []

    def noted(name):
        return Each(lambda x, step: (order.append(name + str(step)), x.tanh())[1])

    net = [noted("a"), nn.Conv2d(2, 3, 3, padding=1), noted("b"), ours(3, 2, 3), noted("c")]
    snnlstm.unroll(X, *net)
    assert order == [f"{name}{t}" for t in range(T) for name in "ab"] + [f"c{t}" for t in range(T)]


def test_gradients_of_the_first_and_the_second_order(large):
    net = [nn.Conv2d(1, 2, 3, dtype=torch.float64), Each(lambda x, t: torch.tanh(x * (t + 1)))]
    x = torch.rand(3, 1, 1, 4, 4, dtype=torch.float64, requires_grad=True)

    def run(x):
        net[1].step = -1
        return snnlstm.unroll(x, *net)

    assert torch.autograd.gradcheck(run, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, x)
    _, found = torch.func.jvp(run, (x,), (x,))
    close(found, torch.autograd.functional.jvp(run, x, x)[1])


def test_steps_without_a_gradient_among_steps_with_one():
    weight = torch.tensor(3.0, requires_grad=True)
    layer = Each(lambda x, t: x * weight if t in (1, 3) else x * 1)
    out = snnlstm.unroll(X, layer)
    (out * torch.arange(1.0, T + 1).view(-1, 1, 1, 1, 1)).sum().backward()
    close(weight.grad, 2 * X[1].sum() + 4 * X[3].sum(), atol=1e-4)
    out = snnlstm.unroll(X, Each(lambda x, t: x * 2))
    assert not out.requires_grad


def test_steps_of_several_dtypes_become_one_as_in_the_loop():
    layer = Each(lambda x, t: x.double() if t == 3 else x * 1)
    close(snnlstm.unroll(X, layer), X.double(), atol=0)


def test_steps_of_several_shapes_are_an_error():
    said = r"layer 1 must return tensors of one shape at every step, got \(2, 2, 6.* and \(2, 1, 6"
    with pytest.raises(ValueError, match=said):
        snnlstm.unroll(X, nn.Tanh(), Each(lambda x, t: x[:, :1] if t == 3 else x * 1))


def test_tuples_must_come_at_every_step():
    said = "layer 0 must return tensors, or tuples of as many tensors, at every step, got "
    for odd in ("a text", None, ()):
        with pytest.raises(TypeError, match=said):
            snnlstm.unroll(X, Each(lambda x, t, odd=odd: odd if t == 3 else x * 1))
        with pytest.raises(TypeError, match=said):
            snnlstm.unroll(X, Each(lambda x, t, odd=odd: odd), nn.BatchNorm2d(2))
    for few in (lambda x: x * 1, lambda x: (x,)):
        with pytest.raises(TypeError, match=said):
            snnlstm.unroll(X, Each(lambda x, t, few=few: few(x) if t == 3 else (x, x)))


def test_vmap_sees_every_step(large):
    layers = [nn.Conv2d(2, 2, 3), Each(lambda x, t: x.sin())]
    x = torch.rand(3, T, N, 2, 5, 5)
    expected = torch.stack([snnlstm.unroll(each, *layers) for each in x])
    with torch.no_grad():
        close(torch.func.vmap(lambda each: snnlstm.unroll(each, *layers))(x), expected)
