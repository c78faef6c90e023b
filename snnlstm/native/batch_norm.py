"""Batch norm in training of all steps, each with its own statistics, on the CPU kernels.

torch's kernel for channels-last images sums all pixels of a channel in one number of x's type, and
loses 1e-5 to 3e-4 in float32. Ours sum in float64, in either layout. Whatever they do not cover
runs as a loop of torch's function.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _C
from ..calls.call import may_require_grad
from ..calls.spec import DTYPES
from . import lender
from .function import differentiable, torch_must_run
from .tensors import is_readable, laid_out, pointer, restored

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
    if eps <= 0 or not _is_readable(x, (running_mean, running_var, weight, bias)):
        rest = running_mean, running_var, weight, bias, training, momentum, eps
        outs = [F.batch_norm(step, *rest) for step in x.unbind()]
        return torch.stack(outs) if len(outs) > 1 else outs[0].unsqueeze(0)
    first = x[0]
    is_image, last = x.dim() == 5, torch.channels_last
    if not (first.is_contiguous() or (is_image and first.is_contiguous(memory_format=last))):
        x = x.contiguous()  # here, so that autograd knows of the copy
    options = running_mean, running_var, momentum, eps
    if may_require_grad((x, weight, bias)):
        return _apply(options, None, x, weight, bias)
    return _run(options, x, weight, bias)[0]


def batch_norm_of_step(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``F.batch_norm``, in training by the kernels."""
    rest = running_mean, running_var, weight, bias, training, momentum, eps
    if not training:
        return F.batch_norm(input, *rest)
    return batch_norm(input.unsqueeze(0), *rest).squeeze(0)


def _is_readable(x: Tensor, others: Sequence[Tensor | None]) -> bool:
    """Whether the kernels may read the tensors, and torch need not run the call.

    Torch refuses steps with a single value for each channel, and tensors of another size.
    """
    given = [tensor for tensor in others if tensor is not None]
    return (
        all(map(is_readable, (x, *given))) and not torch_must_run()
        and x.dtype in DTYPES[:2] and x.dim() > 2 and x.numel() > x.shape[0] * x.shape[2] > 0
        and all(t.shape == x.shape[2:3] and t.dtype is x.dtype for t in given)
        and all(t.is_contiguous() for t in given)
    )  # fmt: skip


def _memory_of_steps(x: Tensor) -> Any:
    """Shape, strides, dtype and device of a result, whose steps have the layout of x's."""
    return x.shape, (x[0].numel(), *x.stride()[1:]), x.dtype, x.device


def _run_pass(kernel: Any, x: Tensor, statistics: Tensor, weight: Any, *fields: Any) -> None:
    """Run a pass; `fields` are those behind the workspace (csrc/args.h)."""
    steps, n, c, *pixels = x.shape
    count = math.prod(pixels)
    if not x[0].is_contiguous():  # channels-last: each pixel is an image of one pixel
        n, count = n * count, 1
    sizes = DTYPES.index(x.dtype), steps, n, c, count
    workspace = lender.empty((_C.batch_norm_workspace(*sizes),), torch.uint8)
    read = x.data_ptr(), pointer(weight), *map(Tensor.data_ptr, statistics)
    kernel((*sizes, x.stride(0), *read, workspace.data_ptr(), *fields))


def _run(
    options: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The result, and mean and 1 / deviation of each step and channel, (2, T, C) in float64."""
    *running, momentum, eps = options
    y = lender.empty_result(*_memory_of_steps(x))
    statistics = x.new_empty(2, x.shape[0], x.shape[2], dtype=torch.float64)
    fields = *map(pointer, (bias, *running)), momentum, eps, y.data_ptr()
    _run_pass(_C.batch_norm_forward, x, statistics, weight, *fields)
    return y, statistics


def _forward(ctx: Any, options: Any, _: None, x: Tensor, *parameters: Any) -> tuple[Tensor, Any]:
    y, statistics = _run(options, x, *parameters)
    ctx.memory = _memory_of_steps(x)
    ctx.save_for_backward(parameters[0], x, statistics)
    return y, ()


def _gradients(
    ctx: Any, saved: Sequence[Any], grads: Sequence[Any], by_torch: bool
) -> Sequence[Tensor | None]:
    weight, x, statistics = saved
    (grad,), wanted = grads, ctx.needs_input_grad[2:]
    if by_torch:
        means, inverses = statistics.to(x.dtype)
        return _by_torch(grad, x, weight, means, inverses, ctx.plan[-1], wanted)
    shape, strides, dtype, device = ctx.memory
    steps, _, c, *_ = shape
    if x.shape != shape or x.stride()[1:] != strides[1:] or x.dtype is not dtype:
        x = laid_out(x, *ctx.memory)  # hooks brought it back otherwise
    statistics = restored(statistics, (2, steps, c), torch.float64, device).contiguous()
    weight = None if weight is None else restored(weight, (c,), dtype, device).contiguous()
    grad = laid_out(grad, *ctx.memory)
    dx = lender.empty_result(*ctx.memory) if wanted[0] else None
    dw, db = (x.new_empty(c) if want else None for want in wanted[1:])
    fields = map(pointer, (grad, dx, dw, db))
    _run_pass(_C.batch_norm_backward, x, statistics, weight, *fields)
    return dx, dw, db


def _by_torch(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    means: Tensor,
    inverses: Tensor,
    eps: float,
    wanted: Sequence[bool],
) -> Sequence[Tensor | None]:
    """The gradients by torch's operator, which can be differentiated again."""
    steps = zip(grad.contiguous(), x.contiguous(), means, inverses, strict=True)
    found = [_BACKWARD(g, x, weight, None, None, *rest, True, eps, wanted) for g, x, *rest in steps]
    dx, dw, db = (
        torch.stack(column) if w else None
        for column, w in zip(zip(*found, strict=True), wanted, strict=True)
    )
    return dx, None if dw is None else dw.sum(0), None if db is None else db.sum(0)


_apply = differentiable("_BatchNorm", _forward, _gradients)
