"""What tests of linear layers and of convolutions share: inputs, calls and comparisons."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snnlstm.native import conv2d, linear
from tests.shared.poison import HUGE, NAN, poisoned

ORDERS = torch.contiguous_format, torch.channels_last


def spikes(shape: Sequence[int], density: float, kind: str = "ones") -> Tensor:
    """Returns an x with this share of nonzeros: ones, other numbers, or ones in few places."""
    shape, half = tuple(shape), (len(shape) + 1) // 2
    x = (torch.rand(shape) < density).float()
    if kind == "numbers":  # also negative and subnormal ones, and zeros of both signs
        return x * torch.randn(shape) * torch.tensor([1.0, 1e-39])[torch.randint(2, shape)]
    if kind == "clustered":
        x[torch.rand(shape[:half]) > 0.4] = 0
        return x * (torch.rand(shape[half:]) < 0.5)
    return x


def parameters(
    inputs: int, outputs: int, kernel: Sequence[int] = ()
) -> tuple[nn.Parameter, nn.Parameter]:
    bound = (inputs * math.prod(kernel)) ** -0.5
    weight = torch.randn(outputs, inputs, *kernel) * bound
    return nn.Parameter(weight), nn.Parameter(torch.randn(outputs))


def gradients(function: Any, *tensors: Any, grad: Tensor, **options: Any) -> list[Tensor]:
    """Returns y and the gradients of the tensors that want one."""
    y = function(*tensors, **options)
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, grad)]


@dataclass(frozen=True)
class Product:
    """Our function beside torch's, with a call that the kernels take if every pass pays.

    Errors may be `times` torch's, or `of_y` and `of_gradients` of a result. Results of fewer
    numbers than `few` may be small by chance; the sum of magnitudes stands in for them.
    """

    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    tensors: tuple[Tensor, nn.Parameter, nn.Parameter]  # x, weight and bias
    grad: Tensor  # of y
    passes: tuple[str, ...]  # of the kernels in a backward pass: "x", "weight"
    times: float
    of_y: float
    of_gradients: float
    few: int
    rtol: float  # of numbers beside torch's, which round, too

    def __str__(self) -> str:
        return self.theirs.__name__


torch.manual_seed(0)
LINEAR = Product(
    linear.linear, F.linear, (spikes((40, 30), 0.2), *parameters(30, 50)), torch.randn(40, 50),
    passes=("weight",), times=2, of_y=1.5e-7, of_gradients=1.5e-7, few=100, rtol=1e-5,
)  # fmt: skip
CONV2D = Product(
    conv2d.conv2d, F.conv2d, (spikes((4, 8, 10, 10), 0.2), *parameters(8, 6, (3, 3))),
    torch.randn(4, 6, 8, 8),
    passes=("x", "weight"), times=3, of_y=2e-7, of_gradients=1e-6, few=1000, rtol=1e-4,
)  # fmt: skip


def assert_exact(product: Product, *tensors: Tensor, grad: Tensor, **options: Any) -> list[Tensor]:
    """Asserts that errors stay within the product's bounds; returns y and the gradients."""
    exact = []
    for change in (Tensor.double, lambda t: t.double().abs()):
        doubles = [change(t.detach()).requires_grad_(t.requires_grad) for t in tensors]
        grad64 = change(grad.detach())
        exact.append(gradients(product.theirs, *doubles, grad=grad64, **options))
    theirs = gradients(product.theirs, *tensors, grad=grad, **options)
    bounds = product.of_y, *[product.of_gradients] * (len(theirs) - 1)
    for pattern in (NAN, HUGE):
        with poisoned(pattern):
            ours = gradients(product.ours, *tensors, grad=grad, **options)
        for actual, other, right, sums, bound in zip(ours, theirs, *exact, bounds, strict=True):
            assert actual.stride() == other.stride()
            error, allowed = ((t.double() - right).norm() for t in (actual, other))
            scale = sums if right.numel() < product.few else right
            # Subnormal results have an absolute error.
            assert error <= max(product.times * allowed, bound * scale.norm(), 1e-40)
    with torch.no_grad():
        assert torch.equal(product.ours(*tensors, **options), ours[0])
    return ours
