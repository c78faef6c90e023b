"""Convolutions by lists of nonzeros, and their gradients by Winograd, equal torch's to rounding."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from random import Random
from statistics import median
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import snnlstm
from snnlstm.calls.entries import BoundedDict
from tests.shared.cases import drawing
from tests.shared.cpu_kernels import native, needs_core
from tests.shared.poison import HUGE, NAN, poisoned

pytestmark = needs_core
if native is not None:
    from snnlstm import _C
    from snnlstm.native import conv2d as layers
    from snnlstm.native.conv2d import conv2d

LAST = torch.channels_last
ORDERS = torch.contiguous_format, LAST


@pytest.fixture(autouse=True)
def calls(monkeypatch) -> list[str]:
    """Returns the passes that a test has run; every pass pays."""
    called: list[str] = []
    kind = _C.Convolution

    class Noting:
        """This object takes the place of a pass."""

        def __init__(self, number: int, *sizes: Any) -> None:
            self._name, self._pass = ("lists", "x", "weight")[number], kind(number, *sizes)

        def __getattr__(self, name: str) -> Any:
            if name in ("run", "pack"):
                called.append(self._name if name == "run" else name)
            return getattr(self._pass, name)

    monkeypatch.setattr(_C, "Convolution", Noting)
    for name, value in {
        "OF_PACKED": 0,
        "OF_GRADIENT": 0,
        "LEAST": 0,
        "LEAST_IN_TRAINING": 0,
        "FEWEST": 1,
    }.items():
        monkeypatch.setattr(layers, name, value)
    monkeypatch.setattr(layers, "MOST_TIME", 1e9)
    monkeypatch.setattr(layers, "_layers", BoundedDict())
    return called


def spikes(shape: Sequence[int], density: float, kind: str = "ones") -> Tensor:
    """Returns an x with this share of nonzeros: ones, other numbers, or ones in few places."""
    x = (torch.rand(*shape) < density).float()
    if kind == "numbers":  # also negative and subnormal ones, and zeros of both signs
        return x * torch.randn(*shape) * torch.tensor([1.0, 1e-39])[torch.randint(2, tuple(shape))]
    if kind == "clustered":
        return x * (torch.rand(*shape[:2], 1, 1) < 0.4) * (torch.rand(*shape[2:]) < 0.5)
    return x


def parameters(cin: int, cout: int, kernel: Sequence[int]) -> tuple[nn.Parameter, nn.Parameter]:
    bound = (cin * kernel[0] * kernel[1]) ** -0.5
    return nn.Parameter(torch.randn(cout, cin, *kernel) * bound), nn.Parameter(torch.randn(cout))


def in_order(tensor: Tensor, order: Any) -> Any:
    """Returns a leaf in this order of memory."""
    return tensor.detach().clone(memory_format=order).requires_grad_(tensor.requires_grad)


def gradients(function: Any, *tensors: Any, grad: Tensor, **options: Any) -> list[Tensor]:
    """Returns y and the gradients of the tensors that want one."""
    y = function(*tensors, **options)
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, grad)]


def compare(
    x: Tensor, weight: Tensor, bias: Tensor, orders: Sequence[Any] = ORDERS[:1] * 3, **options: Any
) -> None:
    """Asserts that errors are at most three times torch's, or those of a few roundings.

    Those of few numbers, which may be small by chance, are compared with the sum of magnitudes.
    """
    x.requires_grad_()
    grad = torch.randn(F.conv2d(x, weight, bias, **options).shape)
    doubles = [t.detach().double() for t in (x, weight, bias, grad)]
    expected, magnitudes = (
        gradients(F.conv2d, *(t.requires_grad_() for t in tensors[:3]), grad=tensors[3], **options)
        for tensors in (doubles, [t.detach().abs() for t in doubles])
    )
    x, weight, grad = map(in_order, (x, weight, grad), orders)
    theirs = gradients(F.conv2d, x, weight, bias, grad=grad, **options)
    for pattern in (NAN, HUGE):
        with poisoned(pattern):
            ours = gradients(conv2d, x, weight, bias, grad=grad, **options)
        for actual, other, right, sums in zip(ours, theirs, expected, magnitudes, strict=True):
            assert actual.stride() == other.stride()
            error, allowed = ((t.double() - right).norm() for t in (actual, other))
            scale = sums if right.numel() < 1000 else right
            most = 2e-7 if actual is ours[0] else 1e-6
            # Subnormal results have an absolute error.
            assert error <= max(3 * allowed, most * scale.norm(), 1e-40)
    with torch.no_grad():
        assert torch.equal(conv2d(x, weight, bias, **options), ours[0])


# Channels of x and y, image, kernel, stride, padding.
SIZES = [
    (2, 1, (2, 3), (1, 3), 1, 0), (2, 5, (7, 5), 3, 1, 1), (3, 16, (9, 9), 3, 1, 0),
    (4, 17, (8, 13), 5, 1, 2), (5, 33, (11, 4), (3, 1), 1, (1, 0)), (8, 64, (16, 16), 3, 1, 1),
    (13, 31, (6, 7), (5, 3), 1, (4, 0)), (16, 7, (15, 14), 7, 1, 3), (17, 130, (10, 10), 3, 2, 1),
    (32, 65, (5, 5), 3, 1, 2), (64, 48, (9, 12), 5, (1, 2), 2),
    (7, 10, (13, 13), (1, 5), 3, (0, 1)),
    (129, 20, (4, 4), 3, 1, 1), (6, 12, (12, 12), 9, 1, 4),
]  # fmt: skip


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_convolutions_are_as_exact_as_torchs(isa, sizes, calls):
    torch.manual_seed(0)
    cin, cout, image, kernel, stride, padding = sizes
    weight, bias = parameters(cin, cout, (kernel, kernel) if isinstance(kernel, int) else kernel)
    densities = (0.0, 0.01, 0.1, 0.4, 1.0)
    kinds = ["ones", "numbers", "clustered"]
    for density in densities:
        for kind in kinds:
            x = spikes((3, cin, *image), density, kind)
            compare(x, weight, bias, stride=stride, padding=padding)
    assert calls.count("lists") == 3 * 15
    assert calls.count("x") == 2 * 15 * (stride == 1)
    # Its tiles of 5x5 would round too much for so few pixels.
    assert calls.count("weight") == (0 if kernel == 5 else calls.count("x"))


@pytest.mark.parametrize("number", range(8))
def test_orders_of_memory_are_torchs(number, calls):
    weight, bias = parameters(12, 20, (3, 3))
    orders = [ORDERS[number >> k & 1] for k in range(3)]
    for shape in ((4, 12, 9, 7), (1, 12, 6, 6), (3, 12, 1, 3), (2, 12, 3, 1), (3, 12, 4, 5)):
        compare(spikes(shape, 0.2), weight, bias, orders, padding=1)
    assert calls.count("x") == 10


@pytest.mark.drawn
@drawing(60)
@given(seed=st.integers(0, 2**32))
def test_drawn_convolutions(isa, seed):
    random = Random(seed)
    torch.manual_seed(seed)
    cin, cout = (random.choice([2, 3, 8, 16, 30, 64]) + random.choice([0, 1, 5]) for _ in "ab")
    kernel = [random.choice([1, 3, 3, 5, 7]) for _ in "hw"]
    padding = [random.randrange(side) for side in kernel]
    image = [random.randint(max(2, k - 2 * p), 14) for k, p in zip(kernel, padding, strict=True)]
    x = spikes(
        (random.choice([1, 2, 7, 12]), cin, *image), random.choice([0, 0.02, 0.2, 0.7]),
        random.choice(["ones", "numbers", "clustered"]),
    )  # fmt: skip
    orders = [random.choice(ORDERS) for _ in range(3)]
    stride = random.choice([1, 1, 1, 2, (1, 3)])
    compare(x, *parameters(cin, cout, kernel), orders, stride=stride, padding=tuple(padding))


@pytest.mark.parametrize("n", [13, 24, 36])
def test_any_number_of_threads_has_equal_bits(n):
    weight, bias = parameters(20, 40, (3, 3))
    x, grad = spikes((n, 20, 11, 11), 0.1, "numbers").requires_grad_(), torch.randn(n, 40, 11, 11)
    found = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        with poisoned(NAN):
            found.append(gradients(conv2d, x, weight, bias, grad=grad, padding=1))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_zeros_of_x_meet_no_weight_and_a_tile_spreads_no_weight(calls):
    x, (weight, bias) = spikes((4, 16, 9, 9), 0.2), parameters(16, 8, (3, 3))
    x[:, 3], weight.data[:, 3] = 0, torch.inf
    x.requires_grad_()
    y, of_x, *_ = gradients(conv2d, x, weight, bias, grad=torch.ones(4, 8, 7, 7))
    assert y.isfinite().all()
    assert of_x.isfinite().sum() == of_x[:, 3].numel() * 15  # torch's: the others meet none
    assert "x" not in calls


@pytest.mark.parametrize("special", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_in_x_and_in_the_gradient_shows(special, calls):
    x, (weight, bias) = spikes((4, 16, 9, 9), 0.2), parameters(16, 8, (3, 3))
    x[2, 5, 4, 4] = special
    x.requires_grad_()
    y, _, of_weight, _ = gradients(conv2d, x, weight, bias, grad=torch.randn(4, 8, 9, 9), padding=1)
    expected = gradients(F.conv2d, x, weight, bias, grad=torch.ones(4, 8, 9, 9), padding=1)
    assert torch.equal(y.isfinite(), expected[0].isfinite())
    assert torch.equal(of_weight.isfinite(), expected[2].isfinite())
    grad = torch.ones(4, 8, 9, 9)
    grad[1, 3, 2, 2] = special
    x.data[2, 5, 4, 4] = 0
    _, of_x, of_weight, of_bias = gradients(conv2d, x, weight, bias, grad=grad, padding=1)
    assert not of_x[1].isfinite().all()
    assert of_x[[0, 2, 3]].isfinite().all()
    assert not of_weight[3].isfinite().any()
    assert of_weight[4:].isfinite().all()
    assert torch.equal(of_bias.isfinite(), torch.arange(8) != 3)


# ---- equal pixels --------------------------------------------------------------------------------


def clustered(density: float, seed: int) -> Tensor:
    """Returns spikes in clusters at places of their own in each image."""
    torch.manual_seed(seed)
    centres = (torch.rand(8, 1, 32, 32) < density / 9).float()
    near = F.max_pool2d(centres, 3, 1, 1)
    return near * (torch.rand(8, 16, 32, 32) < 0.6)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("density", [0.01, 0.06, 0.21])
def test_the_maximum_of_equal_pixels_is_torchs(density, background, calls):
    """A gradient goes to the first of equal pixels, which are many beside clusters."""
    ratios = []
    for seed in range(8):
        x = clustered(density, seed)
        if background:  # a quarter of the channels fires everywhere
            x[:, ::4] = 1
        weight, _ = parameters(16, 24, (3, 3))
        grad, found = torch.randn(8, 24, 16, 16), []
        for f, dtype in (
            (F.conv2d, torch.float64),
            (F.conv2d, torch.float32),
            (conv2d, torch.float32),
        ):
            one = x.to(dtype).requires_grad_()
            y = F.max_pool2d(f(one, weight.detach().to(dtype), None, 1, 1), 2)
            found += torch.autograd.grad(y, one, grad.to(dtype))
        theirs, ours = (float((other - found[0]).norm()) for other in found[1:])
        ratios.append(ours / theirs)
    assert median(ratios) <= 7
    assert calls.count("lists") == calls.count("x") == 8


# ---- what is torch's -----------------------------------------------------------------------------

Tagged = type("Tagged", (Tensor,), {})
torch.manual_seed(0)
X, (W, B) = spikes((4, 8, 10, 10), 0.2), parameters(8, 6, (3, 3))
X[0, 0, 0, 0] = 1


def faked(f: Any) -> Any:
    with FakeTensorMode() as mode:
        return f(*map(mode.from_tensor, (X, W.detach(), B.detach()))).shape


def dual(f: Any) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(X, X.cos()), W, B))


def within(context: Callable[[], Any], f: Any) -> Any:
    with context():
        return f(X, W, B)


TORCHS: dict[str, Callable[[Any], Any]] = {
    "float64": lambda f: f(X.double(), W.double(), B.double()),
    "bfloat16": lambda f: f(X.bfloat16(), W.bfloat16(), B.bfloat16()),
    "float16": lambda f: f(X.half(), W.half(), None),
    "autocast": partial(within, partial(torch.autocast, "cpu")),
    "reference": partial(within, partial(snnlstm.algorithm, "reference")),
    "FakeTensorMode": faked,
    "a subclass": lambda f: f(X.as_subclass(Tagged), W, B),
    "a weight of a subclass": lambda f: f(X, W.as_subclass(Tagged), B),
    "a bias of a subclass": lambda f: f(X, W, B.as_subclass(Tagged)),
    "one image": lambda f: f(X[0], W, B),
    "transposed": lambda f: f(X.mT, W, B),
    "every other column": lambda f: f(X.repeat_interleave(2, 3)[..., ::2], W, B),
    "expanded": lambda f: f(X[:1].expand(4, 8, 10, 10), W, B),
    "a transposed weight": lambda f: f(X, W.mT, B),
    "every other bias": lambda f: f(X, W, B.repeat_interleave(2)[::2]),
    "negated": lambda f: f(torch._neg_view(X), W, B),
    "a negated weight": lambda f: f(X, torch._neg_view(W.detach()), B),
    "zeros without memory": lambda f: f(torch._efficientzerotensor(X.shape), W, B),
    "meta": lambda f: f(X.to("meta"), W.to("meta"), B.to("meta")).shape,
    "vmap": lambda f: torch.func.vmap(f, (0, None, None))(X.view(2, 2, 8, 10, 10), W, B),
    "grad": lambda f: torch.func.grad(lambda x: f(x, W.detach(), B).sum())(X),
    "jvp": lambda f: torch.func.jvp(lambda x: f(x, W, B), (X,), (X.cos(),)),
    "dual": dual,
    "trace": lambda f: str(torch.jit.trace(lambda x: f(x, W.detach(), B.detach()), X).graph).count(
        "aten::_convolution"
    ),
    "an image of one pixel": lambda f: f(X[..., :1, :1].contiguous(), W, B, 1, 1),
    "no image": lambda f: f(X[:0], W, B),
    "no output": lambda f: f(X, W[:0], B[:0]),
    "groups": lambda f: f(X, W[:, :4], B, groups=2),
    "dilation": lambda f: f(X, W, B, dilation=2),
    "an even kernel": lambda f: f(X, W[..., :2], B),
    "1x1": lambda f: f(X, W[..., :1, :1], B),
    "much padding": lambda f: f(X, W, B, padding=3),
    # Errors.
    "other channels": lambda f: f(X[:, :5], W, B),
    "a large kernel": lambda f: f(X[..., :2], W, B),
    "a number": lambda f: f(X.sum(), W, B),
    "other outputs": lambda f: f(X, W, torch.ones(7)),
    "two dtypes": lambda f: f(X, W.double(), B),
    "another dtype of bias": lambda f: f(X, W, B.double()),
    "integers": lambda f: f(X.long(), W, B),
    "no tensor": lambda f: f([1.0], W, B),
    "no weight": lambda f: f(X, None, B),
    "no stride": lambda f: f(X, W, B, stride=0),
    "negative padding": lambda f: f(X, W, B, padding=-1),
    "a word": lambda f: f(X, W, B, padding="some"),
    "three strides": lambda f: f(X, W, B, (1, 1, 1)),
    "same with a stride": lambda f: f(X, W, B, 2, "same"),
}


def result_of(function: Callable[[Any], Any], of: Any) -> Any:
    """Returns what a call returns, or the type of the error that it raises, and its text."""
    try:
        return function(of)
    except TypeError as error:  # its text tells how the argument was given
        return type(error)
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("name", TORCHS)
def test_torch_takes_everything_else(name, calls):
    expected, actual = (result_of(TORCHS[name], f) for f in (F.conv2d, conv2d))
    if any(isinstance(leaf, Tensor) for leaf in tree_leaves(actual)):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    else:
        assert actual == expected
    assert not calls


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "same"},
        {"padding": "valid", "stride": (2,)},
        {"stride": [1, 2], "padding": [1, 0]},
    ],
    ids=str,
)
def test_options_are_given_as_torch_takes_them(options, calls):
    torch.testing.assert_close(conv2d(X, W, B, **options), F.conv2d(X, W, B, **options))
    assert calls[-1] == "lists"


def test_the_rule_takes_what_pays(monkeypatch):
    monkeypatch.undo()
    (weight, bias), shape = parameters(64, 64, (3, 3)), (8, 64, 32, 32)
    for density, ran in (0.1, 10), (0.6, "60 % of x is not zero"):
        for tensors in ((weight, bias), (weight.detach(), None)):
            assert str(layers.run(spikes(shape, density), *tensors, 1, 1)[1])[:2] == str(ran)[:2]
    small = spikes((1, 64, 8, 8), 0.1)
    assert layers.run(small, weight, bias, 1, 1)[1] == layers.products.SMALL
    first = spikes((8, 3, 32, 32), 0.1), weight.detach()[:, :3].contiguous(), bias.detach()
    assert layers.run(*first)[1] == layers.products.FEW
    dense = layers.run(torch.rand(shape), weight, bias, 1, 1)
    assert dense[0].grad_fn.name() == "_Conv2dBackward"  # its gradients pay all the same


def test_a_weight_is_packed_when_its_bytes_have_changed(calls):
    weight, bias = parameters(8, 6, (3, 3))
    x, grad = X.clone().requires_grad_(), torch.randn(4, 6, 8, 8)
    for _ in range(3):
        for order in ORDERS:
            given = weight if order is ORDERS[0] else in_order(weight, order)
            ours, theirs = (gradients(f, x, given, bias, grad=grad) for f in (conv2d, F.conv2d))
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
            assert torch.equal(conv2d(x, given, bias), ours[0])
        weight.data[3].neg_()
    assert calls.count("pack") == 2 * 6


# ---- derivatives ---------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", range(1, 8))
def test_each_tensor_may_want_a_gradient_or_not(wanted, calls):
    tensors = [
        t.detach().clone().requires_grad_(bool(wanted >> k & 1)) for k, t in enumerate((X, W, B))
    ]
    grad = torch.randn(6, 4, 8, 8).transpose(0, 1)
    theirs, ours = (gradients(f, *tensors, grad=grad) for f in (F.conv2d, conv2d))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert calls.count("x") == wanted & 1
    assert calls.count("weight") == wanted >> 1 & 1


def test_second_derivatives_batched_gradients_and_tangents(calls):
    x, grad = X.clone().requires_grad_(), torch.randn(4, 6, 8, 8, requires_grad=True)
    found = []
    for f in (F.conv2d, conv2d):
        y = f(x, W, B)
        first = torch.autograd.grad(y, (x, W, B), grad, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, W, grad))
        batch = torch.stack([grad.detach(), grad.detach().cos()])
        batched = torch.autograd.grad(f(x, W, B), (x, W, B), batch, is_grads_batched=True)
        with forward_ad.dual_level():
            pair = forward_ad.make_dual(grad.detach(), grad.detach().cos())
            of_y = torch.autograd.grad(y, (x, W, B), pair)
            tangents = [forward_ad.unpack_dual(g).tangent for g in of_y]
        found.append([*first, *second, *batched, *tangents])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert {*calls} <= {"pack", "lists"}


def test_a_result_may_change_in_place_and_a_graph_run_twice():
    y = conv2d(X, W, B)
    y.relu_()
    first = torch.autograd.grad(y.sum(), W, retain_graph=True)
    assert torch.equal(*first, *torch.autograd.grad(y.sum(), W))
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(y.sum(), W)


@pytest.mark.parametrize("changed", ["x", "weight"])
def test_saved_tensors_must_not_change_in_place(changed):
    moved, weight = X.clone().requires_grad_() * 1, W.clone()
    y = conv2d(moved, weight, B)
    with torch.no_grad():
        (moved if changed == "x" else weight).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_hooks_may_bring_back_what_was_saved_in_another_form(calls):
    x, grad = X.clone().requires_grad_(), torch.randn(4, 6, 8, 8)
    expected = gradients(conv2d, x, W, B, grad=grad)
    other = saved_tensors_hooks(lambda t: t.double().mT.contiguous(), lambda t: t.mT)
    again = [partial(checkpoint, conv2d, use_reentrant=reentrant) for reentrant in (False, True)]
    for context, f in [
        (other, conv2d),
        (save_on_cpu(), conv2d),
        *((nullcontext(), f) for f in again),
    ]:
        with context:
            y = f(x, W, B)
        y.backward(grad)
        assert all(map(torch.equal, (y, x.grad, W.grad, B.grad), expected))
        x.grad = W.grad = B.grad = None
    assert calls.count("weight") == calls.count("x") == 5
    with saved_tensors_hooks(lambda t: t, lambda t: t[:2]):
        y = conv2d(X, W, B)
    with pytest.raises(RuntimeError, match="must keep its shape"):
        y.sum().backward()


# ---- the core ------------------------------------------------------------------------------------


def test_the_core_refuses_what_would_reach_other_memory(monkeypatch):
    monkeypatch.undo()
    sizes = (0, False, False, 1, 4, 8, 6, 10, 10, (3, 3), (1, 1), (1, 1))
    for place, value in [
        (0, 3), (0, -1), (3, 2), (3, 0), (4, 0), (4, 1 << 50), (5, 0), (6, 0), (6, 1 << 50), (7, 0),
        (8, 1 << 46), (9, (2, 3)), (9, (3, 0)), (9, (13, 3)), (10, (0, 1)), (11, (3, 1)),
        (11, (1, -1)),
    ]:  # fmt: skip
        with pytest.raises(ValueError):
            _C.Convolution(*sizes[:place], value, *sizes[place + 1 :])
    for fine, kernel, stride in ((0, (1, 1), (1, 1)), (0, (3, 3), (2, 1)), (1, (5, 7), (1, 1))):
        with pytest.raises(ValueError, match="no tiles"):
            _C.Convolution(1, bool(fine), *sizes[2:9], kernel, stride, (0, 0))
    at, view = 1 << 20, (1 << 20, (0, 1, 1, 1, 1))
    by_lists, of_weight = _C.Convolution(*sizes), _C.Convolution(2, *sizes[1:])
    fields = (at, at, view, at, view, 0, 0)
    for place in (0, 1, 2, 4):
        missing = None if place in (2, 4) else 0
        with pytest.raises(ValueError, match="must be given"):
            by_lists.run((*fields[:place], missing, *fields[place + 1 :]))
    with pytest.raises(ValueError, match="must not be given"):
        by_lists.run((*fields[:5], at, 0))
    with pytest.raises(ValueError, match="grad_weight must be given"):
        of_weight.run(fields)
    with pytest.raises(ValueError, match="7 fields"):
        by_lists.run((*fields, 0))
    for addresses in ((0, at), (at, 0)):
        with pytest.raises(ValueError, match="must be given"):
            by_lists.pack(*addresses)
    with pytest.raises(ValueError, match="reads no weight"):
        of_weight.pack(at, at)
    with pytest.raises(ValueError, match="x must be given"):
        by_lists.facts(None)
