"""Batch norm of all steps leaves what torch's function leaves step by step."""

from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks

import snnlstm
from tests.shared.cpu_kernels import native, needs_core, one_thread
from tests.shared.helpers import close

pytestmark = needs_core
if native is not None:
    from snnlstm.native import batch_norm as kernels

T, N, C = 3, 4, 5
X = torch.randn(T, N, C, 6, 7, generator=torch.Generator().manual_seed(0))
# x in the layouts of steps, and with the dimensions, that batch norm takes.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "images": lambda x: x.clone(),
    "channels-last": lambda x: x.movedim(2, -1).contiguous().movedim(-1, 2),
    "time within the batch": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "one image": lambda x: x[:1].expand_as(x),
    "some columns": lambda x: x[..., 1:4],
    "numbers": lambda x: x[..., 0, 0].contiguous(),
    "lines": lambda x: x[..., 0].contiguous(),
    "volumes": lambda x: x.unsqueeze(3).contiguous(),
}


def by_torch(x: Tensor, *rest: Any) -> Tensor:
    rest = (*rest, *(None,) * (4 - len(rest)), True) if len(rest) < 5 else rest
    return torch.stack([F.batch_norm(step, *rest) for step in x])


@pytest.fixture
def runs(monkeypatch) -> list[int]:
    """Returns the number of steps of each call that does not run as a loop of torch's function."""
    found, run = [], kernels._run
    monkeypatch.setattr(
        kernels, "_run", lambda o, x, *rest: found.append(len(x)) or run(o, x, *rest)
    )
    return found


def left(function: Any, x: Tensor, wanted: str, affine: bool, tracked: bool) -> list[Any]:
    """Returns result, statistics, gradients, and in float64 those of a norm of the gradients."""
    kind = {"dtype": x.dtype}
    statistics = (torch.zeros(C, **kind), torch.ones(C, **kind)) if tracked else (None, None)
    weight = torch.linspace(0.5, 2, C, **kind) if affine else None
    tensors = {"x": x.detach(), "w": weight, "b": torch.ones(C, **kind) if affine else None}
    leaves = [tensors[name].requires_grad_() for name in wanted if tensors[name] is not None]
    out = function(tensors["x"], *statistics, tensors["w"], tensors["b"], True, 0.3, 1e-3)
    found = [out.detach(), *statistics]
    if leaves:
        second = x.dtype is torch.float64
        factors = torch.arange(out.numel(), **kind).cos().reshape(out.shape)
        grads = torch.autograd.grad((out * factors).sum(), leaves, create_graph=second)
        found += [grad.detach() for grad in grads]
        if second:
            total = sum((grad * grad.detach().roll(1)).sum() for grad in grads)
            found += torch.autograd.grad(total, leaves, allow_unused=True)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("wanted", ["", "x", "wb", "xwb", "xb"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_equal_torchs(layout, wanted, dtype, runs):
    """Results have the layout of the steps, and both derivatives reach x, weight and bias."""
    for affine, tracked in product([True, False], repeat=2):
        x = LAYOUTS[layout](X.to(dtype))
        found = left(kernels.batch_norm, x, wanted, affine, tracked)
        expected = left(by_torch, x, wanted, affine, tracked)
        close(found, expected, atol=2e-5 if dtype is torch.float32 else 1e-10)
        last = layout == "channels-last"
        assert found[0][0].is_contiguous(memory_format=torch.channels_last) == last
    assert runs == [T] * 4


# Sizes of x, and mean and deviation of its numbers.
SIZES = [
    ((2, 8, 16, 32, 32), 3, 2),
    ((2, 3, 70, 13, 17), 0, 1),
    ((1, 2, 5, 61, 31), -4, 1),
    ((3, 4, 9, 5, 7), 100, 0.1),
    ((2, 2, 3, 1, 1), 0, 1),
    ((4, 129, 33, 1, 1), 1, 1),
    ((2, 1, 3, 3, 5), 0, 1),
    ((5, 40, 2, 4, 4), 0, 1e-3),
]


def of_size(size: Any, mean: float, deviation: float, layout: str) -> tuple[Tensor, Tensor]:
    """Returns x and a gradient of its norm. Spikes in x make the first pixel an exception."""
    x, grad = torch.randn(2, *size, dtype=torch.float64)
    x = (x * deviation + mean).float().double()
    x[:, 0, :, 0, 0] += 30 * deviation
    return LAYOUTS[layout](x), LAYOUTS[layout](grad.float().double())


@pytest.mark.parametrize("layout", ["images", "channels-last"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_precision(size, layout, isa):
    """Errors are at most twice those of torch's function on contiguous images."""
    torch.manual_seed(1)
    x, grad = of_size(*size, layout)
    c = x.shape[2]
    parameters = torch.randn(2, c, dtype=torch.float64).float().double()

    def run(function: Any, dtype: torch.dtype, arrange: Any = lambda x: x) -> list[Tensor]:
        statistics = torch.zeros(c, dtype=dtype), torch.ones(c, dtype=dtype)
        weight, bias = parameters.to(dtype)
        leaves = [t.detach().requires_grad_() for t in (arrange(x).to(dtype), weight, bias)]
        y = function(leaves[0], *statistics, *leaves[1:], True, 0.3, 1e-5)
        grads = torch.autograd.grad(y, leaves, arrange(grad).to(dtype))
        return [t.detach().double() for t in (y, *grads, *statistics)]

    def error(found: Tensor, exact: Tensor) -> float:
        return float((found - exact).norm() / exact.norm())

    exact, torchs = run(by_torch, torch.float64), run(by_torch, torch.float32, Tensor.contiguous)
    with one_thread():
        found = run(kernels.batch_norm, torch.float32)
        torch.set_num_threads(2)
        again = run(kernels.batch_norm, torch.float32)
    for k, (ours, theirs) in enumerate(zip(found, torchs, strict=True)):
        assert error(ours, exact[k]) <= max(2 * error(theirs, exact[k]), 1e-7), k
        assert torch.equal(ours, again[k])
    close(run(kernels.batch_norm, torch.float64), exact, atol=1e-11, rtol=1e-11)


def test_a_view_of_one_sample_under_a_contiguous_gradient():
    """torch's own backward pass takes the view's stride of samples for an order of dimensions."""
    view = torch.randn(2, 3, 5, 3).movedim(-1, 1)[:1]  # (1, 3, 3, 5)
    x = view.as_strided((1, *view.shape), (45, 3, 1, 15, 3)).requires_grad_()
    grad = torch.randn(x.shape)
    exact = x.detach().double().contiguous().requires_grad_()
    (expected,) = torch.autograd.grad(by_torch(exact, None, None), exact, grad.double())
    for twice in False, True:
        y = kernels.batch_norm(x, None, None)
        (found,) = torch.autograd.grad(y, x, grad, create_graph=twice)
        close(found.double(), expected, atol=1e-6)


@pytest.mark.parametrize("values", ["infinite", "NaN", "huge", "equal"])
def test_unusual_numbers(values, isa):
    x = torch.randn(2, 3, 5, 6, 7)
    first = {"infinite": torch.inf, "NaN": torch.nan, "huge": 1e12}
    if values == "equal":
        x[:, :, 1] = 7
    else:
        x[0, 0, 1, 0, 0] = x[1, 2, 3, 4, 5] = first[values]
    exact = torch.zeros(5).double(), torch.ones(5).double()
    y = by_torch(x.double(), *exact, None, None, True, 0.3, 1e-5)
    for layout in "images", "channels-last":
        statistics = torch.zeros(5), torch.ones(5)
        given = LAYOUTS[layout](x), *statistics, None, None, True, 0.3, 1e-5
        found = kernels.batch_norm(*given), *statistics
        close(found, [t.float() for t in (y, *exact)], atol=1e-6)


def test_what_hooks_bring_back():
    """A saved x may come back in another layout, and with save_on_cpu in other memory."""
    grad = torch.randn(X.shape)
    for change in Tensor.contiguous, lambda t: t.double():
        x, found = LAYOUTS["channels-last"](X).requires_grad_(), []
        for hooks in nullcontext(), saved_tensors_hooks(lambda t: t, change):
            with hooks:
                y = kernels.batch_norm(x, None, None, torch.ones(C))
            found += torch.autograd.grad(y, x, grad)
        assert torch.equal(*found)


OTHERS: dict[str, Callable[[Any], Any]] = {
    "a half type": lambda f: f(X.bfloat16(), None, None),
    "a weight of another type": lambda f: f(X.bfloat16(), None, None, torch.ones(C)),
    "vmap": lambda f: torch.func.vmap(lambda x: f(x, None, None))(X[None]),
    "grad": lambda f: torch.func.grad(lambda x: f(x, None, None).square().sum())(X[:, :2]),
    "a lazily negated x": lambda f: f(torch._neg_view(X), None, None),
    "nothing": lambda f: f(X[:, :0], None, None),
    "an eps of 0": lambda f: f(X, None, None, None, None, True, 0.1, 0.0),
    "a weight with gaps": lambda f: f(X, None, None, torch.ones(2 * C)[::2]),
    "no channel": lambda f: f(X[:, :, :0], None, None),
    "the user's choice": snnlstm.algorithm("reference")(lambda f: f(X, None, None)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_the_kernels_do_not_cover_is_torchs(name, runs):
    try:
        expected = OTHERS[name](by_torch)
    except (RuntimeError, ValueError) as error:
        with pytest.raises(type(error), match=r"."):
            OTHERS[name](kernels.batch_norm)
    else:
        close(OTHERS[name](kernels.batch_norm), expected, atol=1e-6)
    assert not runs


def test_tangents_and_batched_gradients():
    x, found = X.double().requires_grad_(), []
    grads = torch.stack([X, X.cos()]).double()
    for f in kernels.batch_norm, by_torch:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.detach(), grads[1])
            found.append(forward_ad.unpack_dual(f(dual, None, None)).tangent)
        found += torch.autograd.grad(f(x, None, None), x, grads, is_grads_batched=True)
    close(found[:2], found[2:], atol=1e-10)


def test_torchs_errors():
    """The kernels would divide by zero, or read beyond a tensor."""
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        kernels.batch_norm(X[:, :1, :, 0, 0], torch.zeros(C), torch.ones(C))
    for k in range(4):
        numbers = [torch.ones(C + (at == k)) for at in range(4)]
        with pytest.raises(RuntimeError, match="elements"):
            kernels.batch_norm(X, *numbers)
