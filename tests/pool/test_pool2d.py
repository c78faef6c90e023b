"""The kernels' max_pool2d and avg_pool2d equal torch's by bits, and torch takes all else."""

from functools import partial
from itertools import product
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tests.shared.cases import drawing
from tests.shared.cpu_kernels import native, needs_core
from tests.shared.left_to_torch import CALLS, Call, assert_torchs, with_x
from tests.shared.poison import HUGE, NAN, poisoned

pytestmark = needs_core
if native is not None:
    from snnlstm import _C
    from snnlstm.native import pool2d

DTYPES = torch.float32, torch.float64
SPECIAL = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1.0, -1.0, 1e-45, -1e-45, 3e38]


@pytest.fixture(autouse=True)
def calls(monkeypatch) -> list[str]:
    """Returns the names of the core's functions that a test has called; no pool is too small."""
    called: list[str] = []
    for name in ("pool_forward", "pool_backward"):
        run = getattr(_C, name)
        noting = lambda fields, name=name, run=run: called.append(name) or run(fields)  # noqa: E731
        monkeypatch.setattr(_C, name, noting)
    for name in ("LEAST", "LEAST_IN_TRAINING"):
        monkeypatch.setattr(pool2d, name, 0)
    return called


def same(actual: Tensor, expected: Tensor, exact: bool) -> None:
    """Asserts equal bits and strides; unless `exact`, a NaN may have other bits than torch's.

    The bits of a sum of two NaN depend on the order in which the compiler adds them.
    """
    assert actual.shape == expected.shape
    assert actual.stride() == expected.stride()
    assert actual.dtype is expected.dtype
    bits = torch.int32 if actual.dtype is torch.float32 else torch.int64
    other = actual.contiguous().view(bits) != expected.contiguous().view(bits)
    if not exact:
        other &= ~(actual.isnan() & expected.isnan())
    assert not other.any()


def images(shape: tuple[int, ...], kind: str, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """Returns random numbers, few different ones, special ones, or infinities alone."""
    x = torch.randn(shape, dtype=dtype)
    if kind == "few":
        x = x.sign() * (x.abs() > 0.7)
    elif kind == "special":
        x = torch.tensor(SPECIAL, dtype=dtype)[torch.randint(len(SPECIAL), shape)]
    elif kind == "-inf":
        x = torch.full(shape, -torch.inf, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def compare(pool: str, x: Tensor, kind: str, options: dict[str, Any]) -> None:
    """Compares a pool, and its gradient, with torch's."""
    theirs, ours = getattr(F, pool), getattr(pool2d, pool)
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    expected = theirs(leaf, **options)
    grad = torch.empty_like(expected).copy_(images(tuple(expected.shape), kind, x.dtype, False))
    (of_x,) = torch.autograd.grad(expected, leaf, grad)
    for pattern in (NAN, HUGE):
        with poisoned(pattern):
            same(ours(x, **options), expected, pool == "max_pool2d")
            out = ours(leaf, **options)
            same(out, expected, pool == "max_pool2d")
            same(torch.autograd.grad(out, leaf, grad)[0], of_x, False)


# The shape of x, and the options; averages also have others.
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "2x2": ((2, 3, 12, 70), {"kernel_size": 2}),
    "2x2 of narrow images": ((3, 16, 8, 6), {"kernel_size": [2, 2], "stride": (2,)}),
    "2x2 of odd images": ((1, 5, 7, 13), {"kernel_size": 2, "ceil_mode": True}),
    "3x3 by 2": ((2, 17, 13, 37), {"kernel_size": 3, "stride": 2}),
    "3x3 by 2, padded": ((2, 12, 14, 14), {"kernel_size": 3, "stride": 2, "padding": 1}),
    "3x3 by 1": ((1, 33, 7, 19), {"kernel_size": 3, "stride": 1, "padding": 1, "ceil_mode": True}),
    "4x4": ((2, 3, 16, 36), {"kernel_size": 4}),
    "5x2 by 3": ((2, 4, 23, 41), {"kernel_size": (5, 2), "stride": (3, 2), "padding": (2, 0)}),
    "1x2 by 5": ((2, 9, 11, 29), {"kernel_size": (1, 2), "stride": (5, 2)}),
    "3x2 by 1": ((2, 4, 15, 34), {"kernel_size": (3, 2), "stride": (1, 2), "padding": (0, 1)}),
    "1x1": ((1, 3, 5, 18), {"kernel_size": 1, "stride": (1, 2)}),
    "the whole image": ((2, 3, 7, 9), {"kernel_size": (7, 9)}),
    "more than the image": ((2, 3, 2, 3), {"kernel_size": 6, "stride": 1, "padding": 3}),
    "256 pixels": ((1, 2, 18, 40), {"kernel_size": 16, "stride": 2}),
    "more than 256": ((1, 3, 20, 40), {"kernel_size": (17, 18), "stride": 1, "padding": (2, 9)}),
    "2x130 by 2": ((1, 2, 3, 270), {"kernel_size": (130, 2), "stride": 131, "padding": (65, 0)}),
    "one pixel": ((3, 2, 1, 1), {"kernel_size": 1}),
    "one channel": ((4, 1, 9, 9), {"kernel_size": 3}),
}  # fmt: skip
AVERAGED = {"count_include_pad": False}, {"divisor_override": -7}, {"divisor_override": 3}


@pytest.mark.parametrize("name", CASES)
def test_pools_equal_torchs(isa, name, calls):
    shape, options = CASES[name]
    kinds = "random", "few", "special", "-inf"
    for dtype, kind, channels_last in product(DTYPES, kinds, (False, True)):
        x = images(shape, kind, dtype, channels_last)
        compare("max_pool2d", x, kind, options)
        for averaged in ({}, *(AVERAGED if kind == "special" else ())):
            compare("avg_pool2d", x, kind, options | averaged)
    assert calls.count("pool_forward") == 2 * calls.count("pool_backward") > 0


@pytest.mark.drawn
@drawing(150)
@given(seed=st.integers(0, 2**32))
def test_drawn_pools_equal_torchs(isa, seed):
    random = Random(seed)
    torch.manual_seed(seed)
    sides = [random.choice([1, 2, 2, 2, 3, 3, 4, 5, 7]) for _ in range(2)]
    padding = [random.choice([0, 0, side // 2]) for side in sides]
    options = {
        "kernel_size": sides, "padding": padding, "ceil_mode": random.random() < 0.4,
        "stride": [random.choice([1, 2, 2, 2, 3, 4]) for _ in range(2)],
    }  # fmt: skip
    least = (k - 2 * pad for k, pad in zip(sides, padding, strict=True))
    sizes = (max(1, size + random.choice([0, 1, 8, 19, 40])) for size in least)
    shape = random.choice([1, 2, 3]), random.choice([1, 2, 5, 8, 12, 17, 33]), *sizes
    pool = random.choice(["max_pool2d", "avg_pool2d"])
    if pool == "avg_pool2d":
        options |= {"count_include_pad": random.random() < 0.5}
        options |= {"divisor_override": random.choice([None, None, 3, -7])}
    kind = random.choice(["random", "few", "special"])
    x = images(shape, kind, random.choice(DTYPES), random.random() < 0.5)
    compare(pool, x, kind, options)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_pools_of_several_threads(threads, channels_last):
    """Threads cut images across windows. torch's gradient is the same with any number of them."""
    torch.set_num_threads(threads)
    for shape in ((3, 5, 101, 67), (1, 16, 130, 41)):
        x = images(shape, "few", torch.float32, channels_last)
        for k, stride, padding in ((2, 2, 0), (3, 2, 1), (5, 1, 2)):
            options = {"kernel_size": k, "stride": stride, "padding": padding}
            for pool in ("max_pool2d", "avg_pool2d"):
                compare(pool, x, "few", options)


# ---- what is torch's -----------------------------------------------------------------------------

X = torch.randn(2, 3, 6, 8)

# Calls of a pool, which takes x, a window of 2, and torch's options. What records a pool stands in
# tests/pool/test_recorded.py.
TORCHS: dict[str, Call] = CALLS | {
    "3-D": with_x(lambda x: x[0]),
    # Errors.
    "2-D": with_x(lambda x: x[0, 0]),
    "no pixel": with_x(lambda x: x[:, :, :0]),
    "no channel": with_x(lambda x: x[:, :0]),
    "large window": lambda f, x: f(x, kernel_size=9),
    "large padding": lambda f, x: f(x, padding=2),
    "no window": lambda f, x: f(x, kernel_size=0),
    "no stride": lambda f, x: f(x, stride=0),
    "half a pixel": lambda f, x: f(x, kernel_size=1.5),
    "words": lambda f, x: f(x, kernel_size="2"),
    "three sizes": lambda f, x: f(x, kernel_size=(2, 2, 2)),
    "lists": lambda f, x: f(x, kernel_size=[[2], [2]]),
}
OF_ONE = {
    "indices": lambda pools: pools.max_pool2d(X, 2, return_indices=True),
    "dilation": lambda pools: pools.max_pool2d(X, 2, dilation=(1, 2)),
    "divisor": lambda pools: pools.avg_pool2d(X, 2, divisor_override=0),
    "divisor of half": lambda pools: pools.avg_pool2d(X, 2, divisor_override=0.5),
}


@pytest.mark.parametrize("name", TORCHS)
def test_torch_takes_everything_else(name, calls):
    for pool in ("max_pool2d", "avg_pool2d"):
        # Anybody's kernel_size takes the place of 2.
        ours, theirs = (partial(getattr(pools, pool), kernel_size=2) for pools in (pool2d, F))
        assert_torchs(TORCHS[name], ours, theirs, X)
    assert not calls


@pytest.mark.parametrize("name", OF_ONE)
def test_torch_takes_options_of_one_pool(name, calls):
    assert_torchs(OF_ONE[name], pool2d, F)
    assert not calls


def test_small_images_are_torchs(monkeypatch, calls):
    monkeypatch.undo()
    called: list[Any] = []
    monkeypatch.setattr(_C, "pool_forward", called.append)
    for repeats, inference, training in ((1, 0, 0), (4, 1, 0), (16, 1, 1)):
        for pool in (pool2d.max_pool2d, pool2d.avg_pool2d):
            called.clear()
            pool(x := X.repeat(1, repeats, 1, 1), 2)
            assert len(called) == inference
            pool(x.requires_grad_(), 2)
            assert len(called) == inference + training


# ---- derivatives ---------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
def test_second_derivatives_and_batched_gradients(channels_last):
    x = images((2, 2, 5, 6), "random", torch.float64, channels_last).requires_grad_()
    for options in ({"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1}):
        for pool in (pool2d.max_pool2d, pool2d.avg_pool2d):
            of_x = partial(pool, **options)
            assert torch.autograd.gradcheck(of_x, x, check_batched_grad=True)
            assert torch.autograd.gradgradcheck(of_x, x)


def test_gradients_and_places_may_come_back_in_another_form():
    x = images((2, 3, 6, 70), "random", torch.float32, False).requires_grad_()
    with saved_tensors_hooks(lambda t: t.to(torch.int64).mT.contiguous(), lambda t: t.mT):
        out = pool2d.max_pool2d(x, 2)
    for grad in (torch.ones(()).expand_as(out), torch._neg_view(torch.rand_like(out))):
        expected = torch.autograd.grad(F.max_pool2d(x, 2), x, grad)
        with torch.no_grad():
            x.mul_(-1)  # nothing saved it
        assert torch.equal(*torch.autograd.grad(out, x, grad, retain_graph=True), *expected)
        with torch.no_grad():
            x.mul_(-1)


# ---- the core ------------------------------------------------------------------------------------

FIELDS = 0, 1, 0, 2, 3, 6, 8, 3, 4, 2, 2, 2, 2, 0, 0, 1, 0, 1 << 20, 1 << 20, 1 << 20


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, 2), (3, -1), (4, 0), (5, 0), (6, 1 << 50), (7, 4), (8, 5), (9, 0), (11, 0), (13, 2),
        (9, 1 << 40), (17, 0), (18, 0), (19, -1),
    ],
)  # fmt: skip
def test_the_core_refuses_what_would_reach_other_memory(place, value):
    for run in (_C.pool_forward, _C.pool_backward):
        fields = (*FIELDS[:place], value, *FIELDS[place + 1 :])
        if (run is _C.pool_forward) != (place == 19) or place < 17:
            with pytest.raises((TypeError, ValueError, OverflowError)):
                run(fields)
    for fields in (FIELDS[:-1], (*FIELDS, 0)):
        with pytest.raises(ValueError, match="takes 20 fields"):
            _C.pool_forward(fields)
