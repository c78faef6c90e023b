"""Layers without a form for sequences take turns at every step, and are gathered in place."""

import weakref

import pytest
import torch
from helpers import close, ours, steps
from torch import nn

import snnlstm

T, N = 5, 2
X = steps(T, N, 2, 6, 6)


@pytest.fixture(params=["in place", "at the end"], autouse=True)
def gathered(request, monkeypatch):
    """Each step goes alone; what comes of the steps is gathered in one way and in the other."""
    monkeypatch.setattr(snnlstm.together, "FOLD", 1)
    monkeypatch.setattr(snnlstm.gather, "IN_PLACE", 0 if request.param == "in place" else 1 << 40)
    return request.param


class Each(nn.Module):
    """A layer of the user's applies a function, which may know the step."""

    def __init__(self, function):
        super().__init__()
        self.function, self.step = function, -1

    def forward(self, x):
        self.step += 1
        return self.function(x, self.step)


def test_a_step_goes_through_all_layers_before_the_next(gathered):
    order = []

    def noted(name):
        return Each(lambda x, step: (order.append(name + str(step)), x.tanh())[1])

    net = [noted("a"), nn.Conv2d(2, 3, 3, padding=1), noted("b"), ours(3, 2, 3), noted("c")]
    snnlstm.unroll(X, *net)
    assert order == [f"{name}{t}" for t in range(T) for name in "ab"] + [f"c{t}" for t in range(T)]


def test_a_step_that_was_gathered_in_place_is_let_go_of(gathered):
    alive, most = weakref.WeakSet(), []

    def watched(x, _):
        out = x.tanh().mul(2)  # a product with a number saves no tensor
        alive.add(out)
        most.append(len(alive))
        return out

    weight = torch.ones((), requires_grad=True)
    for x in (X, X * weight):
        alive.clear()
        most.clear()
        snnlstm.unroll(x, Each(watched), ours())
        assert max(most) <= (2 if gathered == "in place" else T)
    if gathered == "at the end":
        assert max(most) == T


def test_gradients_of_the_first_and_the_second_order():
    net = [nn.Conv2d(1, 2, 3, dtype=torch.float64), Each(lambda x, t: torch.tanh(x * (t + 1)))]
    x = torch.rand(3, 1, 1, 4, 4, dtype=torch.float64, requires_grad=True)

    def run(x):
        net[1].step = -1
        return snnlstm.unroll(x, *net)

    assert torch.autograd.gradcheck(run, x)
    assert torch.autograd.gradgradcheck(run, x)


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
    with pytest.raises(RuntimeError, match=r"must match|equal size"):
        snnlstm.unroll(X, Each(lambda x, t: x[:, :1] if t == 3 else x * 1))


def test_tuples_must_come_at_every_step():
    for odd in (lambda x: (x, x), lambda x: "a text"):
        with pytest.raises(TypeError, match="layer 0 must return tensors, or tuples of them, at"):
            snnlstm.unroll(X, Each(lambda x, t, odd=odd: odd(x) if t == 3 else x * 1))
    with pytest.raises(TypeError, match="layer 0 must return tensors, or tuples of them, at"):
        snnlstm.unroll(X, Each(lambda x, t: x * 1 if t == 3 else (x, x)))


def test_what_is_gathered_in_place_has_the_order_of_memory_of_the_steps(gathered):
    if gathered != "in place":
        pytest.skip("torch.cat chooses the order")
    x = X.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (T, N))
    layers = [Each(lambda x, t: x * 2)]
    expected = torch.stack([step * 2 for step in x])
    assert snnlstm.unroll(x, *layers).stride() == expected.stride()


def test_transforms_of_torch_func_and_forward_mode_see_every_step():
    layers = [nn.Conv2d(2, 2, 3), Each(lambda x, t: x.sin())]
    x = torch.rand(3, T, N, 2, 5, 5)
    expected = torch.stack([snnlstm.unroll(each, *layers) for each in x])
    with torch.no_grad():
        close(torch.func.vmap(lambda each: snnlstm.unroll(each, *layers))(x), expected)
    tangent = torch.rand(T, N, 2, 5, 5)
    _, found = torch.func.jvp(lambda each: snnlstm.unroll(each, *layers), (x[0],), (tangent,))
    _, whole = torch.func.jvp(
        lambda each: layers[0](each.flatten(0, 1)).sin().unflatten(0, (T, N)), (x[0],), (tangent,)
    )
    close(found, whole)
