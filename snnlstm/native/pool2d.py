"""max_pool2d and avg_pool2d on the CPU kernels: an autograd Function that runs a plan.

Both functions take torch's arguments and return what torch's do. torch's own run whatever the
kernels do not cover.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _C
from ..calls import entries
from ..calls.call import may_require_grad
from ..calls.entries import Entry
from ..calls.spec import DTYPES, POOLS
from . import lender
from .function import differentiable, torch_must_run
from .tensors import is_readable, laid_out, pointer


def max_pool2d(
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """``torch.nn.functional.max_pool2d``, by the kernels if they can."""
    if not return_indices and is_readable(input) and not torch_must_run():
        plan = _plan_of(input, "max", kernel_size, stride, padding, ceil_mode, dilation)
        if plan is not None and plan.pays(needs_grad := may_require_grad((input,))):
            return plan.run(input, needs_grad)
    return F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def avg_pool2d(
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """``torch.nn.functional.avg_pool2d``, by the kernels if they can."""
    if is_readable(input) and not torch_must_run():
        options = kernel_size, stride, padding, ceil_mode, 1, count_include_pad, divisor_override
        plan = _plan_of(input, "avg", *options)
        if plan is not None and plan.pays(needs_grad := may_require_grad((input,))):
            return plan.run(input, needs_grad)
    return F.avg_pool2d(
        input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    )


# ---- plans ---------------------------------------------------------------------------------------


class Plan:
    """Both passes of equal calls.

    Raises
    ------
    TypeError, ValueError
        If the kernels do not cover such calls.
    """

    def __init__(self, entry: Entry, x: Tensor) -> None:
        (n, c, h, w), options = x.shape, (*entry.spec, True, None)
        pool, kernel, stride, padding, ceil_mode, dilation = options[:6]
        count_include_pad, divisor_override = options[6:8]
        self.kernel, self.padding = _pair(kernel), _pair(padding)
        self.stride = _pair(kernel if stride in (None, ()) else stride)
        self.ceil_mode, self.counts = bool(ceil_mode), bool(count_include_pad)
        self.divisor = None if divisor_override is None else operator.index(divisor_override)
        orders = {order(*x.shape): order for order in (_channels_last, _contiguous)}
        order = orders.get(x.stride())
        if (
            x.dtype not in DTYPES[:2] or x.numel() == 0 or order is None
            or _pair(dilation) != (1, 1) or self.divisor == 0
            or max(*self.kernel, *self.stride, abs(self.divisor or 0)) > _LARGEST
        ):  # fmt: skip
            raise ValueError
        geometry = zip((h, w), self.kernel, self.stride, self.padding, strict=True)
        sizes = [_outputs(*numbers, self.ceil_mode) for numbers in geometry]
        self.pool, self.x_memory = pool, (x.shape, x.stride(), x.dtype, x.device)
        self.y_memory = (shape := (n, c, *sizes)), order(*shape), x.dtype, x.device
        dtype = torch.uint8 if self.kernel[0] * self.kernel[1] <= 256 else torch.int32
        self.argmax_memory = *self.y_memory[:2], dtype, x.device
        # torch takes a quarter of the time if images are channels-last.
        pixels = math.prod((*shape, *self.kernel))
        self._pixels = pixels // 4 if order is _channels_last else pixels
        # What both passes share of the fields (csrc/args.h).
        self.first = (
            DTYPES.index(x.dtype), POOLS.index(pool), order is _channels_last, *x.shape, *sizes,
            *self.kernel, *self.stride, *self.padding, self.counts, self.divisor or 0,
        )  # fmt: skip

    def pays(self, needs_grad: bool) -> bool:
        """Whether the kernels save more time than a call of theirs takes longer than torch's."""
        return self._pixels >= (LEAST_IN_TRAINING if needs_grad else LEAST)

    @lender.where_it_fits
    def run(self, x: Tensor, needs_grad: bool) -> Tensor:
        """Pool x; a gradient goes through the kernels, too."""
        return _apply(self, None, x) if needs_grad else self.forward(x, None)

    def forward(self, x: Tensor, argmax: Tensor | None) -> Tensor:
        """Run the forward kernel; `argmax` gets the index in its window of each maximum."""
        y = lender.empty_result(*self.y_memory)
        _C.pool_forward((*self.first, x.data_ptr(), y.data_ptr(), pointer(argmax)))
        return y

    def backward(self, argmax: Tensor | None, grad: Tensor) -> Tensor:
        """The gradient of x."""
        grad, argmax = laid_out(grad, *self.y_memory), self._laid_out(argmax)
        x = lender.empty_result(*self.x_memory)
        _C.pool_backward((*self.first, grad.data_ptr(), pointer(argmax), x.data_ptr()))
        return x

    def by_torch(self, argmax: Tensor | None, grad: Tensor) -> Tensor:
        """The gradient of x by torch's operators, which can be differentiated again."""
        shape, strides, dtype, device = self.x_memory
        x = torch.empty_strided(shape, strides, dtype=dtype, device=device)  # nobody reads it
        geometry, aten = (x, self.kernel, self.stride, self.padding), torch.ops.aten
        if argmax is None:
            averaged = self.ceil_mode, self.counts, self.divisor
            return aten.avg_pool2d_backward(grad, *geometry, *averaged)
        argmax = self._laid_out(argmax).long()
        rows, columns = (
            torch.arange(size, device=device) * step - pad
            for size, step, pad in zip(self.y_memory[0][2:], self.stride, self.padding, strict=True)
        )
        row = rows[:, None] + argmax // self.kernel[1]
        indices = row * shape[3] + columns + argmax % self.kernel[1]
        chosen = (1, 1), self.ceil_mode, indices
        return aten.max_pool2d_with_indices_backward(grad, *geometry, *chosen)

    def _laid_out(self, argmax: Any) -> Any:
        """What autograd saved, as the kernels read it."""
        return None if argmax is None else laid_out(argmax, *self.argmax_memory)


def _pair(value: Any) -> tuple[int, int]:
    """Both numbers of an argument of torch's, which is an int or a sequence of one or two."""
    values = value if isinstance(value, tuple | list) else (value,)
    one, *others = map(operator.index, values)
    (other,) = others or (one,)
    return one, other


def _outputs(size: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> int:
    """The number of windows along an image, each of which has a pixel of it."""
    if kernel < 1 or stride < 1 or not 0 <= padding <= kernel // 2:
        raise ValueError
    count = (size + 2 * padding - kernel + (stride - 1) * ceil_mode) // stride + 1
    count -= ceil_mode and (count - 1) * stride >= size + padding
    if count < 1:
        raise ValueError
    return count


def _contiguous(_: int, c: int, h: int, w: int) -> tuple[int, ...]:
    return c * h * w, h * w, w, 1


def _channels_last(_: int, c: int, h: int, w: int) -> tuple[int, ...]:
    return h * w * c, 1, w * c, c


LEAST, LEAST_IN_TRAINING = 1 << 10, 1 << 12
"""The fewest pixels of all windows for which the kernels pay.

A call of torch's takes 3 us and some 4 ns a pixel, a call here 6 us, and in training 15 us more.
"""
_LARGEST = 1 << 15  # of a window's sides, so that the core's integers hold an index in it


def _plan_of(x: Tensor, *options: Any) -> Plan | None:
    """Look up or make the plan of a call; None if the kernels do not cover it."""
    key = x.shape, x.stride(), x.dtype, options
    try:
        entry = entries.table.get(key)
    except TypeError:  # an option is a list, or nothing that torch takes
        has_lists = any(isinstance(value, list) for value in options)
        frozen = (tuple(value) if isinstance(value, list) else value for value in options)
        return _plan_of(x, *frozen) if has_lists else None
    if entry is None:
        entry = Entry(options, None, None)
        with suppress(TypeError, ValueError):  # torch takes it, or refuses it
            entry.planned(Plan, x)
        entry = entries.table.keep(key, entry)
    return entry.plan


# ---- the Function --------------------------------------------------------------------------------


def _forward(ctx: Any, plan: Plan, _: None, x: Tensor) -> tuple[Tensor, Any]:
    argmax = lender.empty_result(*plan.argmax_memory) if plan.pool == "max" else None
    ctx.save_for_backward(argmax)
    return plan.forward(x, argmax), ()


def _gradients(
    ctx: Any, saved: Sequence[Any], grads: Sequence[Any], by_torch: bool
) -> Sequence[Tensor | None]:
    plan = ctx.plan
    return ((plan.by_torch if by_torch else plan.backward)(*saved, *grads),)


_apply = differentiable("_Pool2d", _forward, _gradients)
