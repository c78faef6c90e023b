"""Batch norm in training of all steps, each with its own statistics, by torch's CPU kernels.

The kernels write each step into one result, and read and write images in either layout. Whatever
they do not cover runs as a loop of torch's function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..calls.call import may_require_grad
from ..calls.entries import TORCH_TYPES
from ..calls.spec import DTYPES
from ..compat.torch_private import dispatch_modes, forward_level, is_tracing, transforms_are_active
from . import lender
from .function import differentiable
from .tensors import laid_out

_FORWARD = torch.ops.aten.native_batch_norm.out
_BACKWARD = torch.ops.aten.native_batch_norm_backward.default


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``F.batch_norm`` in training of each step of x, (T, N, C, ...), in their order."""
    if not _is_readable(x, (running_mean, running_var, weight, bias)):
        rest = running_mean, running_var, weight, bias, training, momentum, eps
        return torch.stack([F.batch_norm(step, *rest) for step in x.unbind()])
    first = x[0]
    is_image, last = x.dim() == 5, torch.channels_last
    if not (first.is_contiguous() or (is_image and first.is_contiguous(memory_format=last))):
        x = x.contiguous()  # here, so that autograd knows of the copy
    options = running_mean, running_var, momentum, eps
    if may_require_grad((x, weight, bias)):
        return _apply(options, None, x, weight, bias)
    return _run(options, x, weight, bias)[0]


def _is_readable(x: Tensor, others: Sequence[Tensor | None]) -> bool:
    """Whether the kernels may read the tensors, and nothing records or transforms the call.

    Torch refuses steps with a single value for each channel, and tensors of another size.
    """
    given = [tensor for tensor in others if tensor is not None]
    return (
        TORCH_TYPES.issuperset(map(type, (x, *given)))
        and not (transforms_are_active() or dispatch_modes() or is_tracing())
        and forward_level() < 0
        and x.device.type == "cpu" and x.dtype in DTYPES[:2] and not x.is_neg()
        and x.dim() > 2 and x.numel() > x.shape[0] * x.shape[2] > 0
        and all(t.shape == x.shape[2:3] and t.dtype is x.dtype for t in given)
        and not any(t.is_neg() or t.device != x.device for t in given)
    )  # fmt: skip


def _empty_like_steps(x: Tensor) -> Tensor:
    """Memory for a result, whose steps have the layout of x's."""
    strides = x[0].numel(), *x.stride()[1:]
    return lender.empty_result(x.shape, strides, x.dtype, x.device)


def _run(
    options: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and mean and 1 / deviation of each step and channel."""
    running_mean, running_var, momentum, eps = options
    y = _empty_like_steps(x)
    means, deviations = x.new_empty(2, x.shape[0], x.shape[2])
    with torch.no_grad():
        for x_t, y_t, mean, deviation in zip(x, y, means, deviations, strict=True):
            _FORWARD(
                x_t, weight, bias, running_mean, running_var, True, momentum, eps,
                out=y_t, save_mean=mean, save_invstd=deviation,
            )  # fmt: skip
    return y, means, deviations


def _forward(ctx: Any, options: Any, _: None, x: Tensor, *parameters: Any) -> tuple[Tensor, Any]:
    y, *saved = _run(options, x, *parameters)
    ctx.save_for_backward(parameters[0], x, *saved)
    return y, ()


def _gradients(
    ctx: Any, saved: Sequence[Any], grads: Sequence[Any], by_torch: bool
) -> Sequence[Tensor | None]:
    weight, x, means, deviations = saved
    (grad,), wanted, eps = grads, list(ctx.needs_input_grad[2:]), ctx.plan[-1]
    if not by_torch:
        out = _empty_like_steps(x)
        grad = laid_out(grad, out.shape, out.stride(), out.dtype, out.device)
    steps, sums = [], []
    for t, (grad_t, x_t) in enumerate(zip(grad.unbind(), x.unbind(), strict=True)):
        dx, *others = _BACKWARD(
            grad_t, x_t, weight, None, None, means[t], deviations[t], True, eps, wanted
        )
        steps.append(dx if by_torch or dx is None else out[t].copy_(dx))
        sums.append(others)
    dx = torch.stack(steps) if by_torch and wanted[0] else out if wanted[0] else None
    dw, db = (
        torch.stack(column).sum(0) if want else None
        for column, want in zip(zip(*sums, strict=True), wanted[1:], strict=True)
    )
    return dx, dw, db


_apply = differentiable("_BatchNorm", _forward, _gradients)
