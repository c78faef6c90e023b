"""What holds for linear layers and convolutions alike: torch takes all else, and derivatives."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from tests.products.parts import CONV2D, LINEAR, ORDERS, Product, gradients, parameters, spikes
from tests.shared.helpers import close, same
from tests.shared.left_to_torch import CALLS, Call, Tagged, assert_torchs, with_all, with_x, within
from tests.shared.poison import NAN, poisoned

pytestmark = pytest.mark.usefixtures("calls")

# ---- what is torch's -----------------------------------------------------------------------------

TORCHS: dict[str, Call] = CALLS | {
    "float64": with_all(Tensor.double),
    "autocast": within(partial(torch.autocast, "cpu")),
    "a weight of a subclass": lambda f, x, w, b: f(x, w.as_subclass(Tagged), b),
    "a bias of a subclass": lambda f, x, w, b: f(x, w, b.as_subclass(Tagged)),
    "a transposed weight": lambda f, x, w, b: f(x, w.mT.contiguous().mT, b),
    "a negated weight": lambda f, x, w, b: f(x, torch._neg_view(w.detach()), b),
    "every other bias": lambda f, x, w, b: f(x, w, b.repeat_interleave(2)[::2]),
    "no output": lambda f, x, w, b: f(x, w[:0], b[:0]),
    # Errors.
    "nothing": with_x(lambda x: None),
    "no weight": lambda f, x, w, b: f(x, None, b),
    "other inputs": lambda f, x, w, b: f(x[:, :5], w, b),
    "other outputs": lambda f, x, w, b: f(x, w, torch.ones(7)),
    "a number as bias": lambda f, x, w, b: f(x, w, 1.0),
    "another dtype of weight": lambda f, x, w, b: f(x, w.double(), b),
    "another dtype of bias": lambda f, x, w, b: f(x, w, b.double()),
}
OF_ONE: dict[Product, dict[str, Call]] = {
    LINEAR: {
        "steps within the batch": lambda f, x, w, b: f(x.view(8, 5, -1).transpose(0, 1), w, b),
        "no column": lambda f, x, w, b: f(x[:, :0], w[:, :0], b),
        "65,536 columns": lambda f, *_: f(torch.zeros(2, 65_536), torch.ones(3, 65_536)),
    },
    CONV2D: {
        "one image": with_x(lambda x: x[0]),
        "an image of one pixel": lambda f, x, w, b: f(x[..., :1, :1].contiguous(), w, b, 1, 1),
        "groups": lambda f, x, w, b: f(x, w[:, :4], b, groups=2),
        "dilation": lambda f, x, w, b: f(x, w, b, dilation=2),
        "an even kernel": lambda f, x, w, b: f(x, w[..., :2], b),
        "1x1": lambda f, x, w, b: f(x, w[..., :1, :1], b),
        "much padding": lambda f, x, w, b: f(x, w, b, padding=3),
        # Errors.
        "a large kernel": with_x(lambda x: x[..., :2]),
        "no stride": lambda f, x, w, b: f(x, w, b, stride=0),
        "negative padding": lambda f, x, w, b: f(x, w, b, padding=-1),
        "a word": lambda f, x, w, b: f(x, w, b, padding="some"),
        "three strides": lambda f, x, w, b: f(x, w, b, (1, 1, 1)),
        "same with a stride": lambda f, x, w, b: f(x, w, b, 2, "same"),
    },
}


@pytest.mark.parametrize(
    ("product", "name"),
    [(product, name) for product, own in OF_ONE.items() for name in TORCHS | own],
    ids=str,
)
def test_torch_takes_everything_else(product, name, calls):
    call = (TORCHS | OF_ONE[product])[name]
    assert_torchs(call, product.ours, product.theirs, *product.tensors)
    assert not calls


# ---- derivatives ---------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", range(1, 8))
def test_each_tensor_may_want_a_gradient_or_not(product, wanted, calls):
    tensors = [
        t.detach().clone().requires_grad_(bool(wanted >> k & 1))
        for k, t in enumerate(product.tensors)
    ]
    grad = product.grad.transpose(0, 1).contiguous().transpose(0, 1)
    theirs, ours = (gradients(f, *tensors, grad=grad) for f in (product.theirs, product.ours))
    close(ours, theirs, atol=1e-5, rtol=product.rtol)
    for place, name in enumerate(("x", "weight")):
        assert calls.count(name) == (wanted >> place & 1 and name in product.passes)


def test_second_derivatives_batched_gradients_and_tangents(product, calls):
    x, weight, bias = product.tensors
    x, grad = x.clone().requires_grad_(), product.grad.clone().requires_grad_()
    batch, found = torch.stack([product.grad, product.grad.cos()]), []
    for f in (product.theirs, product.ours):
        y, tensors = f(x, weight, bias), (x, weight, bias)
        first = torch.autograd.grad(y, tensors, grad, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight, grad))
        batched = torch.autograd.grad(f(*tensors), tensors, batch, is_grads_batched=True)
        with forward_ad.dual_level():
            of_y = torch.autograd.grad(y, tensors, forward_ad.make_dual(*batch))
            tangents = [forward_ad.unpack_dual(g).tangent for g in of_y]
        found.append([*first, *second, *batched, *tangents])
    close(*found, atol=1e-4, rtol=1e-4)
    assert {*calls} <= {"pack", "lists"}


def test_what_was_saved_lives_by_autograds_rules(product):
    x, weight, bias = product.tensors
    y = product.ours(x, weight, bias)
    y.relu_()
    same(*(torch.autograd.grad(y.sum(), weight, retain_graph=kept) for kept in (True, False)))
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(y.sum(), weight)
    for changed in range(2):
        tensors = x.clone().requires_grad_() * 1, weight.clone()
        y = product.ours(*tensors, bias)
        with torch.no_grad():
            tensors[changed].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("kind", ["ones", "numbers"])
def test_hooks_may_bring_back_what_was_saved_in_another_form(product, kind, calls):
    x, *rest = product.tensors
    tensors = [spikes(x.shape, 0.2, kind).requires_grad_(), *rest]
    expected = gradients(product.ours, *tensors, grad=product.grad)
    other = saved_tensors_hooks(lambda t: t.double().mT.contiguous(), lambda t: t.mT)
    again = [partial(checkpoint, product.ours, use_reentrant=way) for way in (False, True)]
    for context, f in (
        (other, product.ours), (save_on_cpu(), product.ours), *((nullcontext(), f) for f in again)
    ):  # fmt: skip
        with context:
            y = f(*tensors)
        y.backward(product.grad)
        same((y, *(t.grad for t in tensors)), expected)
        for tensor in tensors:
            tensor.grad = None
    assert all(calls.count(name) == 5 for name in product.passes)
    with saved_tensors_hooks(lambda t: t, lambda t: t[:2]):
        y = product.ours(*tensors)
    with pytest.raises(RuntimeError, match="must keep its shape"):
        y.sum().backward()


# ---- threads and packed weights ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("product", "shape", "sizes"),
    [
        (LINEAR, (2100, 5000), (5000, 40)),  # has several groups of chunks
        (LINEAR, (1500, 90), (90, 300)),
        (LINEAR, (200, 700), (700, 130)),
        *((CONV2D, (n, 20, 13, 13), (20, 40, (3, 3))) for n in (13, 24, 36)),
    ],
    ids=str,
)
def test_any_number_of_threads_has_equal_bits(product, shape, sizes):
    x, (weight, bias) = spikes(shape, 0.05, "numbers"), parameters(*sizes)
    grad, found = torch.randn(product.theirs(x, weight).shape), []
    doubles = x.double(), weight.detach().double().requires_grad_()
    _, of_weight = gradients(product.theirs, *doubles, grad=grad.double())
    x.requires_grad_("x" in product.passes)
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        with poisoned(NAN):
            found.append(gradients(product.ours, x, weight, bias, grad=grad))
        same(found[0], found[-1])
    assert (found[0][-2] - of_weight).norm() <= 2 * product.of_gradients * of_weight.norm()


@pytest.mark.parametrize(
    ("product", "order"),
    [(LINEAR, torch.contiguous_format), *((CONV2D, order) for order in ORDERS)],
    ids=str,
)
def test_a_weight_is_packed_when_its_bytes_have_changed(product, order, calls):
    x, weight, bias = product.tensors
    x = x.clone().requires_grad_()
    weight = weight.detach().clone(memory_format=order).requires_grad_()
    for _ in range(3):
        for rest in (weight, bias), (weight, None):
            ours, theirs = (
                gradients(f, x, *rest, grad=product.grad) for f in (product.ours, product.theirs)
            )
            close(ours, theirs, atol=1e-5, rtol=product.rtol)
        weight.data[3].neg_()
    assert calls.count("pack") == 3 * (1 + ("x" in product.passes))
