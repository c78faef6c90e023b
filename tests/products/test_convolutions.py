"""Convolutions by lists of nonzeros, and their gradients by Winograd, equal torch's to rounding."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
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

import snnlstm
from snnlstm import _C
from snnlstm.native import conv2d as layers
from snnlstm.native.conv2d import conv2d
from snnlstm.networks.torch_layers import Conv2d, MaxPool2d
from tests.loops.compiled import BACKEND
from tests.products.parts import (
    CONV2D,
    ORDERS,
    Product,
    assert_exact,
    gradients,
    parameters,
    spikes,
)
from tests.shared.cases import drawing
from tests.shared.helpers import close

pytestmark = pytest.mark.usefixtures("calls")


FOR_NEURONS = replace(CONV2D, ours=partial(conv2d, for_neurons=True), of_y=1e-6)


def compare(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    orders: Sequence[Any] = ORDERS[:1] * 3,
    product: Product = CONV2D,
    share: float = 1,
    **options: Any,
) -> None:
    """Asserts that y and the gradients are as exact as torch's, with such orders of memory.

    `share` is that of nonzeros in the gradient of y.
    """
    grad = torch.randn(F.conv2d(x, weight, bias, **options).shape)
    grad = grad * (torch.rand(grad.shape) < share)
    x, weight, grad = (
        t.detach().clone(memory_format=order)
        for t, order in zip((x, weight, grad), orders, strict=True)
    )
    tensors = (t.requires_grad_() for t in (x, weight, bias))
    assert_exact(product, *tensors, grad=grad, **options)


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
    cin, cout, image, kernel, stride, padding = sizes
    weight, bias = parameters(cin, cout, (kernel, kernel) if isinstance(kernel, int) else kernel)
    for density in (0.0, 0.01, 0.1, 0.4, 1.0):
        for kind in ("ones", "numbers", "clustered"):
            x = spikes((3, cin, *image), density, kind)
            for share in (1, 0.25):
                compare(x, weight, bias, share=share, stride=stride, padding=padding)
    assert calls.count("lists") == 2 * 3 * 15
    assert "tiles" not in calls
    # No tile of 5x5 rounds as little as gradients of mostly zeros need.
    backward = (2 if stride == 1 else 0) * 15 * (1 if kernel == 5 else 2)
    assert calls.count("x") == calls.count("weight") == backward


@pytest.mark.parametrize("sizes", [sizes for sizes in SIZES if sizes[4] == 1], ids=str)
def test_tiles_for_neurons_are_as_exact(isa, sizes, calls):
    cin, cout, image, kernel, _, padding = sizes
    weight, bias = parameters(cin, cout, (kernel, kernel) if isinstance(kernel, int) else kernel)
    for density in (0.4, 0.7, 1.0):
        for kind in ("ones", "numbers"):
            calls.clear()
            x = spikes((3, cin, *image), density, kind)
            compare(x, weight, bias, product=FOR_NEURONS, padding=padding)
            few = kernel == 5 and density < 0.45  # there are no fine tiles of 5x5
            assert calls.count("tiles") == (0 if few else 3)


def test_tiles_compute_neither_whole_numbers_nor_large_ones(calls):
    """They would round what is exact, and errors beside a large number."""
    (_, weight, bias), options = CONV2D.tensors, {"for_neurons": True}
    dense, whole = torch.rand(4, 8, 10, 10), (8 * weight.detach()).round()
    counts = (4 * dense).ceil()
    assert torch.equal(conv2d(counts, whole, **options), F.conv2d(counts, whole))
    conv2d(dense * 1e4, weight, bias, **options)
    assert "tiles" not in calls
    conv2d(dense, weight, bias, **options)
    assert "tiles" in calls


@pytest.mark.parametrize("number", range(8))
def test_orders_of_memory_are_torchs(number, calls):
    weight, bias = parameters(12, 20, (3, 3))
    orders = [ORDERS[number >> k & 1] for k in range(3)]
    for shape in ((4, 12, 9, 7), (1, 12, 6, 6), (3, 12, 1, 3), (2, 12, 3, 1), (3, 12, 4, 5)):
        for product, density in ((CONV2D, 0.2), (FOR_NEURONS, 0.9)):
            compare(spikes(shape, density), weight, bias, orders, product, padding=1)
    assert calls.count("x") == 20
    assert calls.count("tiles") == 3 * 4  # lists are faster on images of one row


@pytest.mark.drawn
@drawing(60)
@given(seed=st.integers(0, 2**32))
def test_drawn_convolutions(isa, seed):
    random = Random(seed)
    torch.manual_seed(seed)
    cin, cout = (random.choice([2, 3, 8, 16, 30, 64]) + random.choice([0, 1, 5]) for _ in "ab")
    # oneDNN's own gradient of 1x1 weights sometimes crashes in torch 2.13, and no kernel takes 1x1.
    kernel = random.choice([[1, 3], [3, 1], [3, 3], [3, 3], [5, 5], [5, 1], [3, 5], [7, 3], [7, 7]])
    padding = [random.randrange(side) for side in kernel]
    image = [random.randint(max(2, k - 2 * p), 14) for k, p in zip(kernel, padding, strict=True)]
    x = spikes(
        (random.choice([1, 2, 7, 12]), cin, *image), random.choice([0, 0.02, 0.2, 0.7]),
        random.choice(["ones", "numbers", "clustered"]),
    )  # fmt: skip
    orders = [random.choice(ORDERS) for _ in range(3)]
    stride = random.choice([1, 1, 1, 2, (1, 3)])
    options = {"stride": stride, "padding": tuple(padding), "share": random.choice([1, 0.25])}
    product = random.choice([CONV2D, FOR_NEURONS])
    compare(x, *parameters(cin, cout, kernel), orders, product, **options)


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


def pooled(conv: nn.Module, pool: nn.Module) -> dict[str, Callable[[Tensor], Tensor]]:
    """Returns the ways in which the steps of x may pass both layers."""
    loop = lambda x: torch.stack([pool(conv(x_t)) for x_t in x])  # noqa: E731
    compiled = torch.compile(loop, backend=BACKEND)
    return {
        "loop": loop, "unroll": lambda x: snnlstm.unroll(x, conv, pool), "compiled": compiled
    }  # fmt: skip


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("density", [0.01, 0.06, 0.21])
@pytest.mark.parametrize("kernel", [3, 5])
def test_the_maximum_of_equal_pixels_is_torchs(kernel, density, background, calls):
    """A gradient goes to the first of equal pixels, which are many beside clusters."""
    conv, pool = Conv2d(16, 24, kernel, padding=kernel // 2, bias=False), MaxPool2d(2)
    ways, ratios = pooled(conv, pool), defaultdict(list)
    for seed in range(8):
        x = clustered(density, seed)
        if background:  # a quarter of the channels fires everywhere
            x[:, ::4] = 1
        conv.reset_parameters()
        grad = torch.randn(2, 4, 24, 16, 16)

        def gradient(form: Any, dtype: torch.dtype = torch.float32, x=x, grad=grad) -> Tensor:
            one = x.unflatten(0, (2, 4)).to(dtype).requires_grad_()
            return torch.autograd.grad(form(one), one, grad.to(dtype))[0]

        theirs = lambda x: torch.stack([  # noqa: E731
            F.max_pool2d(F.conv2d(x_t, conv.weight.to(x.dtype), padding=kernel // 2), 2)
            for x_t in x
        ])  # fmt: skip
        exact = gradient(theirs, torch.float64)
        allowed = (gradient(theirs) - exact).norm()
        for name, form in ways.items():
            calls.clear()
            ratios[name].append(float((gradient(form) - exact).norm() / allowed))
            assert "lists" in calls
            # No tile of 5x5 rounds as little as the gradient behind a pool needs.
            assert ("x" in calls) == (kernel == 3)
    assert all(median(found) <= 3 for found in ratios.values()), ratios


# ---- which calls the kernels take ----------------------------------------------------------------


OPTIONS = [
    {"padding": "same"},
    {"padding": "valid", "stride": (2,)},
    {"stride": [1, 2], "padding": [1, 0]},
]


def test_an_option_that_equals_another_calls_is_torchs_to_refuse(calls):
    conv2d(*CONV2D.tensors, 1)
    for stride in (1.0, (1.0, 1)):
        with pytest.raises(TypeError):
            conv2d(*CONV2D.tensors, stride)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_are_given_as_torch_takes_them(options, calls):
    close(*(f(*CONV2D.tensors, **options) for f in (conv2d, F.conv2d)))
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


# ---- the core ------------------------------------------------------------------------------------


def test_the_core_refuses_what_would_reach_other_memory(monkeypatch):
    monkeypatch.undo()
    sizes = (0, False, False, 1, 4, 8, 6, 10, 10, (3, 3), (1, 1), (1, 1))
    for place, value in [
        (0, 4), (0, -1), (3, 2), (3, 0), (4, 0), (4, 1 << 50), (5, 0), (6, 0), (6, 1 << 50), (7, 0),
        (8, 1 << 46), (9, (2, 3)), (9, (3, 0)), (9, (13, 3)), (10, (0, 1)), (11, (3, 1)),
        (11, (1, -1)),
    ]:  # fmt: skip
        with pytest.raises(ValueError):
            _C.Convolution(*sizes[:place], value, *sizes[place + 1 :])
    for fine, kernel, stride in (
        (False, (1, 1), (1, 1)), (False, (3, 3), (2, 1)), (True, (5, 7), (1, 1))
    ):  # fmt: skip
        with pytest.raises(ValueError, match="no tiles"):
            _C.Convolution(1, fine, *sizes[2:9], kernel, stride, (0, 0))
    at, view = 1 << 20, (1 << 20, (0, 1, 1, 1, 1))
    by_lists, of_weight = _C.Convolution(*sizes), _C.Convolution(3, *sizes[1:])
    fields = (at, at, view, at, view, 0, 0)
    for call, argument, match in (
        (by_lists.run, (0, *fields[1:]), "must be given"),
        (by_lists.run, (at, 0, *fields[2:]), "must be given"),
        (by_lists.run, (at, at, None, *fields[3:]), "must be given"),
        (by_lists.run, (*fields[:4], None, 0, 0), "must be given"),
        (by_lists.run, (*fields[:5], at, 0), "must not be given"),
        (by_lists.run, (*fields, 0), "7 fields"),
        (of_weight.run, fields, "grad_weight must be given"),
        (by_lists.facts, None, "x must be given"),
    ):
        with pytest.raises(ValueError, match=match):
            call(argument)
    for layer, addresses, match in (
        (by_lists, (0, at), "must be given"),
        (by_lists, (at, 0), "must be given"),
        (of_weight, (at, at), "reads no weight"),
    ):
        with pytest.raises(ValueError, match=match):
            layer.pack(*addresses)
