"""Products by lists of nonzeros equal torch's to rounding, and torch takes all else."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import snnlstm
from tests.shared.cpu_kernels import native, needs_core
from tests.shared.helpers import close, same
from tests.shared.poison import HUGE, NAN, poisoned

pytestmark = needs_core
if native is not None:
    from snnlstm import _C
    from snnlstm.native import linear as layers
    from snnlstm.native.linear import linear


@pytest.fixture(autouse=True)
def calls(monkeypatch) -> list[str]:
    """Returns the names of the core's functions that a test has called; every product pays."""
    called: list[str] = []
    for name in ("linear_forward", "linear_backward", "linear_pack"):
        run = getattr(_C, name)
        noting = lambda *a, name=name, run=run: called.append(name[7:]) or run(*a)  # noqa: E731
        monkeypatch.setattr(_C, name, noting)
    for name in ("IN_FORWARD", "IN_GRADIENT", "OF_VALUE", "OF_WEIGHT"):
        monkeypatch.setattr(layers, name, 0)
    for name in ("LEAST", "MOST_NONZERO"):
        monkeypatch.setattr(layers, name, 1)
    return called


def spikes(shape: tuple[int, ...], density: float, kind: str = "ones") -> Tensor:
    """Returns an x with this share of nonzeros: ones, other numbers, or ones in few rows."""
    x = (torch.rand(shape) < density).float()
    if kind == "numbers":  # also negative and subnormal ones, and zeros of both signs
        return x * torch.randn(shape) * torch.tensor([1.0, 1e-39])[torch.randint(2, shape)]
    if kind == "clustered":
        return x * (torch.rand(*shape[:-1], 1) < 0.4) * (torch.rand(shape[-1]) < 0.5)
    return x


def parameters(inputs: int, outputs: int) -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(torch.randn(outputs, inputs)), nn.Parameter(torch.randn(outputs))


def gradients(function: Any, *tensors: Any, grad: Tensor) -> list[Tensor]:
    """Returns y and the gradients of the tensors that want one."""
    y = function(*tensors)
    return [y.detach(), *torch.autograd.grad(y, [t for t in tensors if t.requires_grad], grad)]


X, (W, B) = spikes((40, 30), 0.2), parameters(30, 50)
X[0, 0] = 1
GRAD = torch.randn(40, 50)


# ---- results -------------------------------------------------------------------------------------


def compare(x: Tensor, outputs: int) -> None:
    """Asserts that the errors of y and of the gradients are at most twice torch's.

    Those of few numbers, which may be small by chance, are compared with the sum of magnitudes.
    """
    tensors = x, *parameters(x.shape[-1], outputs), torch.randn(*x.shape[:-1], outputs)
    *arguments, grad = tensors
    theirs = gradients(F.linear, *arguments, grad=grad)
    exact = []
    for change in (Tensor.double, lambda t: t.double().abs()):
        x64, weight, bias, grad64 = (change(t.detach()) for t in tensors)
        wanted = weight.requires_grad_(), bias.requires_grad_()
        exact.append(gradients(F.linear, x64, *wanted, grad=grad64))
    for pattern in (NAN, HUGE):
        with poisoned(pattern):
            ours = gradients(linear, *arguments, grad=grad)
        for actual, other, right, sums in zip(ours, theirs, *exact, strict=True):
            assert actual.stride() == other.stride()
            error, allowed = ((t.double() - right).norm() for t in (actual, other))
            scale = sums if right.numel() < 100 else right
            assert error <= max(2 * allowed, 1.5e-7 * scale.norm())
        assert not ours[1][:, (x == 0).reshape(-1, x.shape[-1]).all(0)].any()
    with torch.no_grad():
        assert torch.equal(linear(*arguments), ours[0])
        assert torch.equal(linear(*arguments[:2]) + arguments[2], ours[0])


SIZES = [
    ((7,), 1, 5), ((3, 3), 2, 33), ((31,), 7, 1), ((33,), 8, 128), ((2, 4, 5), 9, 129),
    ((64,), 17, 64), ((5,), 31, 263), ((130,), 33, 7), ((), 64, 90), ((257,), 65, 40),
    ((33,), 100, 200), ((129,), 255, 17), ((1, 40), 784, 111), ((1030,), 129, 21),
    ((70,), 1000, 10), ((21,), 5000, 35),
]  # fmt: skip


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_products_are_as_exact_as_torchs(isa, sizes, calls):
    lead, inputs, outputs = sizes
    for density in (0.0, 0.01, 0.1, 0.3, 1.0):
        for kind in ("ones", "numbers", "clustered"):
            compare(spikes((*lead, inputs), density, kind), outputs)
    assert calls.count("forward") == 4 * 15
    assert calls.count("backward") == 2 * 15


def test_zeros_of_x_meet_no_weight(isa):
    """Other products have infinities and NaN where they should."""
    x, (weight, bias) = spikes((40, 70), 0.2, "numbers"), parameters(70, 50)
    special = torch.tensor([torch.inf, -torch.inf, torch.nan])
    x[:, 0] = weight.data[:, 1] = x[3:, 2] = 0
    weight.data[:, 0] = special[torch.randint(3, (50,))]
    weight.data[7, 5], x[9, 4], x[2, 11] = torch.inf, torch.nan, torch.inf
    grad = torch.randn(40, 50)
    grad[6, 8] = torch.inf
    y, of_weight, _ = gradients(linear, x, weight, bias, grad=grad)
    met = (x != 0)[:, None]
    expected = torch.where(met, x[:, None] * weight, 0.0).double().sum(2) + bias
    of = torch.where(met, grad[:, :, None] * x[:, None], 0.0).double().sum(0)
    for actual, right in ((y, expected), (of_weight, of)):
        assert right.isnan().any()
        close(actual.double(), right, atol=1e-5)


@pytest.mark.parametrize("sizes", [(2100, 5000, 40), (1500, 90, 300), (200, 700, 130)], ids=str)
def test_any_number_of_threads_has_equal_bits(sizes):
    """The first size has several groups of chunks."""
    rows, inputs, outputs = sizes
    weight, bias = parameters(inputs, outputs)
    x, grad = spikes((rows, inputs), 0.05, "numbers"), torch.randn(rows, outputs)
    found = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        with poisoned(NAN):
            found.append(gradients(linear, x, weight, bias, grad=grad))
        same(found[0], found[-1])
    right = grad.double().t() @ x.double()
    assert (found[0][1] - right).norm() <= 3e-7 * right.norm()


def test_a_weight_is_packed_when_its_bytes_have_changed(calls):
    weight, bias = parameters(30, 50)
    with torch.no_grad():
        for _ in range(3):
            for rest in ((weight, bias), (weight,)):
                close(linear(X, *rest), F.linear(X, *rest), atol=1e-5)
            weight.data[7].neg_()
    assert calls.count("pack") == 3


# ---- what is torch's -----------------------------------------------------------------------------

Tagged = type("Tagged", (Tensor,), {})


def faked(f: Any) -> Any:
    with FakeTensorMode() as mode:
        return f(*map(mode.from_tensor, (X, W.detach(), B.detach()))).shape


def dual(f: Any) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(X, X.cos()), W, B))


def within(context: Callable[[], Any], f: Any) -> Any:
    with context():
        return f(X, W, B)


def traced(f: Any) -> int:
    trace = torch.jit.trace(lambda x: f(x, W.detach(), B.detach()), X)
    return str(trace.graph).count("aten::linear")


TORCHS: dict[str, Callable[[Any], Any]] = {
    "float64": lambda f: f(X.double(), W.double(), B.double()),
    "autocast": partial(within, partial(torch.autocast, "cpu")),
    "reference": partial(within, partial(snnlstm.algorithm, "reference")),
    "FakeTensorMode": faked,
    "a subclass": lambda f: f(X.as_subclass(Tagged), W, B),
    "a weight of a subclass": lambda f: f(X, W.as_subclass(Tagged), B),
    "every other column": lambda f: f(X.repeat_interleave(2, 1)[:, ::2], W, B),
    "steps within the batch": lambda f: f(X.view(8, 5, 30).transpose(0, 1), W, B),
    "a transposed weight": lambda f: f(X, W.t().contiguous().t(), B),
    "every other bias": lambda f: f(X, W, B.repeat_interleave(2)[::2]),
    "negated": lambda f: f(torch._neg_view(X), W, B),
    "a negated weight": lambda f: f(X, torch._neg_view(W.detach()), B),
    "meta": lambda f: f(X.to("meta"), W.to("meta"), B.to("meta")).shape,
    "vmap": lambda f: torch.func.vmap(f, (0, None, None))(X.view(8, 5, 30), W, B),
    "dual": dual,
    "trace": traced,
    "no row": lambda f: f(X[:0], W, B),
    "no column": lambda f: f(X[:, :0], W[:, :0], B),
    "no output": lambda f: f(X, W[:0], B[:0]),
    "65,536 columns": lambda f: f(torch.zeros(2, 65_536), torch.ones(3, 65_536)),
    "other columns": lambda f: f(X[:, :20], W, B),
    "other outputs": lambda f: f(X, W, torch.ones(7)),
    "a number as bias": lambda f: f(X, W, 1.0),
    "two dtypes": lambda f: f(X, W.double(), B),
    "nothing": lambda f: f(None, W, B),
    "nested": lambda f: f(torch.nested.nested_tensor([X, X]), W, B).to_padded_tensor(0),
}


def result_of(function: Callable[[Any], Any], of: Any) -> Any:
    """Returns what a call returns, or the type of the error that it raises, and its text."""
    try:
        return function(of)
    except Exception as error:  # a TypeError's text tells how the argument was given
        return type(error), None if isinstance(error, TypeError) else str(error)


@pytest.mark.parametrize("name", TORCHS)
def test_torch_takes_everything_else(name, calls):
    expected, actual = (result_of(TORCHS[name], f) for f in (F.linear, linear))
    if any(isinstance(leaf, Tensor) for leaf in tree_leaves(actual)):
        close(actual, expected, atol=0, rtol=0)
    else:
        assert actual == expected
    assert "forward" not in calls


def test_the_rule_takes_what_pays(monkeypatch):
    monkeypatch.undo()
    ones = torch.ones(128, 784)
    weight, bias = parameters(784, 1000)
    for x, ran in (
        (spikes((128, 784), 0.1), 10), (torch.arange(784) % 2 * ones, "50 % of x is not zero"),
        (ones, "100 % of x is not zero"), (ones[:4] * 0, layers.products.SMALL),
        (ones * 0, 0), (ones[0], layers.products.SMALL),
    ):  # fmt: skip
        for tensors in ((x, weight, bias), (x, weight.detach(), None)):
            assert layers.run(*tensors)[1] == ran or abs(layers.run(*tensors)[1] - ran) <= 1
    # A gradient needs fewer nonzeros, or more rows.
    x = spikes((128, 784), 0.24).requires_grad_()
    assert layers._layer_of(x, weight, bias).lists_gradient is False
    assert layers._layer_of(x, weight[:100], bias[:100]) == "24 % of x is not zero"


def test_what_the_look_misses_is_torchs(monkeypatch, calls):
    monkeypatch.setattr(layers, "MOST_NONZERO", 0.4)
    monkeypatch.setattr(_C, "linear_look", lambda fields: 0.0)
    x = spikes((40, 30), 0.6)
    assert layers.run(x, W, B)[1] == layers.products.MISSED
    x.requires_grad_()
    close(*(gradients(f, x, W, B, grad=GRAD) for f in (linear, F.linear)), atol=1e-5)
    assert "backward" not in calls


# ---- derivatives ---------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", range(1, 8))
def test_each_tensor_may_want_a_gradient_or_not(wanted, calls):
    """The rows of x lie apart."""
    grad = torch.randn(50, 40).t()
    tensors = [t.detach().clone() for t in (torch.cat([X + 1, X, X + 1], 1), W, B)]
    for k, tensor in enumerate(tensors):
        tensor.requires_grad_(bool(wanted >> k & 1))
    theirs, ours = (
        gradients(lambda x, *rest, f=f: f(x[:, 30:60], *rest), *tensors, grad=grad)
        for f in (F.linear, linear)
    )
    close(ours, theirs, atol=1e-5)
    assert calls.count("backward") == wanted >> 1 & 1


def test_second_derivatives_batched_gradients_and_tangents(calls):
    x, grad = X.clone().requires_grad_(), GRAD.clone().requires_grad_()
    found = []
    for f in (F.linear, linear):
        y = f(x, W, B)
        first = torch.autograd.grad(y, (x, W, B), grad, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, W, grad))
        batch = torch.stack([GRAD, GRAD.cos()])
        batched = torch.autograd.grad(f(x, W, B), (x, W, B), batch, is_grads_batched=True)
        with forward_ad.dual_level():
            of_y = torch.autograd.grad(y, (x, W, B), forward_ad.make_dual(GRAD, GRAD.cos()))
            tangents = [forward_ad.unpack_dual(g).tangent for g in of_y]
        found.append([*first, *second, *batched, *tangents])
    close(*found, atol=1e-4, rtol=1e-4)
    assert "backward" not in calls


def test_what_was_saved_lives_by_autograds_rules():
    y = linear(X, W, B)
    y.relu_()
    same(*(torch.autograd.grad(y.sum(), W, retain_graph=kept) for kept in (True, False)))
    for changed in range(2):
        tensors = X.clone().requires_grad_() * 1, W.clone()
        y = linear(*tensors, B)
        with torch.no_grad():
            tensors[changed].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("kind", ["ones", "numbers"])
def test_hooks_may_bring_back_what_was_saved_in_another_form(kind, calls):
    x = spikes((40, 30), 0.2, kind).requires_grad_()
    expected = gradients(linear, x, W, B, grad=GRAD)
    for context in (
        saved_tensors_hooks(lambda t: t.double().mT.contiguous(), lambda t: t.mT), save_on_cpu()
    ):  # fmt: skip
        with context:
            y = linear(x, W, B)
        same((y, *torch.autograd.grad(y, (x, W, B), GRAD)), expected)
    for reentrant in (False, True):
        checkpoint(linear, x, W, B, use_reentrant=reentrant).backward(GRAD)
        same((x.grad, W.grad, B.grad), expected[1:])
        x.grad = W.grad = B.grad = None
    assert calls.count("backward") == 5


def test_no_hook_can_make_the_kernel_leave_its_memory():
    """The bits beyond the columns of x count as zeros."""

    def hooked(change: Callable[[Tensor], Tensor]) -> Tensor:
        with saved_tensors_hooks(lambda t: t, lambda t: change(t) if t.dtype == torch.uint8 else t):
            return linear(X, W, B)

    with poisoned(NAN):
        (of_weight,) = torch.autograd.grad(hooked(lambda t: t | 255), W, torch.ones(40, 50))
    assert of_weight.eq(40).all()
    for shape in ((40, 3), (39, 4), (160,)):
        y = hooked(lambda t, shape=shape: t.new_zeros(shape))
        with pytest.raises(RuntimeError, match="must keep its shape"):
            y.sum().backward()


# ---- the core ------------------------------------------------------------------------------------

AT = 1 << 20  # of memory that nobody touches
SIZES_REFUSED = (0, 0), (0, 1 << 50), (1, 0), (1, 65_536), (2, 0), (2, 1 << 46), (3, 29), (6, 0)
REFUSED: dict[str, tuple[tuple[int, ...], list[tuple[int, int]]]] = {
    "forward": ((AT, AT, AT, 100, AT, AT, AT), [(4, 0), (7, -1), (8, 0), (10, 0)]),
    "backward": ((AT, AT, AT, AT, AT, AT), [(5, 0), (7, 0), (8, 0)]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_core_refuses_what_would_reach_other_memory(name):
    last, needed = REFUSED[name]
    run, fields = getattr(_C, f"linear_{name}"), (4, 30, 50, 30, *last)
    for place, value in (*SIZES_REFUSED, *needed):
        with pytest.raises((TypeError, ValueError, OverflowError)):
            run((*fields[:place], value, *fields[place + 1 :]))
    with pytest.raises(ValueError, match=f"takes {len(fields)} fields"):
        run((*fields, 0))
    for sizes in ((0, 5), (65_536, 5), (30, 0), (30, 1 << 47)):
        for function, rest in ((_C.linear_bytes, ()), (_C.linear_pack, (AT, AT))):
            with pytest.raises(ValueError):
                function(*sizes, *rest)
    for addresses in ((0, AT), (AT, 0)):
        with pytest.raises(ValueError):
            _C.linear_pack(30, 50, *addresses)
    with pytest.raises(ValueError, match="x must be given"):
        _C.linear_look((4, 30, 50, 30, 0, 0, 0))
