"""Linear layers of spikes on the CPU kernels, which sum weights over the nonzeros of x."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _C
from ..calls.call import may_require_grad
from ..calls.entries import TORCH_TYPES
from ..compat.torch_private import is_tracing
from . import cpu, lender, products
from .function import differentiable
from .products import Ran, flat
from .tensors import contiguous_strides, laid_out, pointer, restored


def linear(input: Any, weight: Any, bias: Any = None) -> Tensor:
    """``torch.nn.functional.linear``, by the kernels where they gain; equal to rounding."""
    return run(input, weight, bias)[0]


def run(input: Any, weight: Any, bias: Any = None) -> tuple[Tensor, Ran]:
    """The result of :func:`linear`, and what ran."""
    layer = _layer_of(input, weight, bias)
    if isinstance(layer, str):
        return F.linear(input, weight, bias), layer
    return _run(layer, input, weight, bias)


@lender.where_it_fits
def _run(layer: _Layer, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Ran]:
    if layer.needs_grad:
        return _apply(layer, None, x, weight, bias)
    return layer.run(x, weight, bias)[:2]


# The kernels' costs in multiply-adds of torch's product: what a nonzero takes in the forward pass
# and in the weight's gradient, a value of x, and a weight; and the least that each pass must save.
IN_FORWARD, IN_GRADIENT, OF_VALUE, OF_WEIGHT = 3, 4, 25, 12
LEAST = 2_000_000
MOST_NONZERO = 0.4  # with more, which the look has missed, the kernel stops
MOST_INPUTS = 65_535  # their places have 16 bits


def _layer_of(x: Any, weight: Any, bias: Any) -> _Layer | str:
    """Decide about a call: what the kernels run, or why torch's function does.

    The steps come in the order of what they cost, because each step of a loop asks.
    """
    if not TORCH_TYPES.issuperset((type(x), type(weight), type(bias))) or is_tracing():
        return products.INTERCEPTED  # sizes may be symbols
    try:
        outputs, inputs = weight.shape
        values = x.numel()
    except (AttributeError, RuntimeError, ValueError):  # None, no matrix, or a nested tensor
        return products.SHAPES
    all_products = values * outputs
    fixed = OF_VALUE * values + OF_WEIGHT * inputs * outputs
    if all_products - fixed < LEAST:
        return products.SMALL
    if (reason := products.reason_against(x)) is not None:
        return reason
    if x.shape[-1:] != (inputs,):
        return products.SHAPES
    if inputs > MOST_INPUTS:
        return products.WIDE
    row = inputs
    if not x.is_contiguous():
        row, step = x.stride() if x.dim() == 2 else (0, 0)
        if step != 1 or row < inputs:
            return products.X
    sizes = values // inputs, inputs, outputs, row
    density = _C.linear_look((*sizes, x.data_ptr(), 0, 0))
    needs_grad = may_require_grad((x, weight, bias))
    saved = all_products * (1 - IN_FORWARD * density) - fixed
    in_gradient = all_products * (1 - IN_GRADIENT * density) - fixed
    lists_gradient = needs_grad and weight.requires_grad and in_gradient > 0
    if saved + lists_gradient * in_gradient < LEAST * (1 + needs_grad):
        return products.too_dense(density)
    if (reason := products.reason_against_weight(weight, bias)) is not None:
        return reason
    if bias is not None and bias.shape != (outputs,):
        return products.SHAPES
    return _Layer(*sizes, needs_grad, lists_gradient)


class _Layer(NamedTuple):
    """A call that the kernels run: its sizes, as csrc/args.h has them, and what was decided."""

    rows: int
    inputs: int
    outputs: int
    row: int
    needs_grad: bool
    lists_gradient: bool

    def run(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, nonzeros: Tensor | None = None
    ) -> tuple[Tensor, Ran, bool]:
        """The result, what ran, and whether all nonzeros are 1; `nonzeros` gets a bit for each."""
        key = "linear", cpu.isa
        packed = cpu.packed_weight(weight)
        layout = packed.layouts.get(key)
        if layout is None:
            sizes = self.inputs, self.outputs
            pack = partial(_C.linear_pack, *sizes)
            layout = packed.pack(key, _C.linear_bytes(*sizes), pack)
        shape = (*x.shape[:-1], self.outputs)
        y = lender.empty_result(shape, contiguous_strides(shape), x.dtype, x.device)
        fields = *self[:4], x.data_ptr(), pointer(nonzeros)
        most = int(MOST_NONZERO * self.rows * self.inputs)
        last = most, layout[0], pointer(bias), y.data_ptr()
        count, ones = lender.with_workspace(
            _C.linear_workspace((*fields, 0), False),
            lambda workspace: _C.linear_forward((*fields, workspace, *last)),
        )
        if count < 0:
            return F.linear(x, weight, bias), products.MISSED, False
        return y, round(100 * count / (self.rows * self.inputs)), ones

    def gradients(self, x: Tensor | None, nonzeros: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of weight and bias; x is None if all nonzeros are 1."""
        weight = lender.empty_result(
            (self.outputs, self.inputs), (self.inputs, 1), grad.dtype, grad.device
        )
        bias = grad.new_empty(self.outputs)
        fields = *self[:4], pointer(x), nonzeros.data_ptr()
        last = grad.data_ptr(), weight.data_ptr(), bias.data_ptr()
        lender.with_workspace(
            _C.linear_workspace((*fields, 0), True),
            lambda workspace: _C.linear_backward((*fields, workspace, *last)),
        )
        return weight, bias


# ---- the Function --------------------------------------------------------------------------------


def _forward(
    ctx: Any, layer: _Layer, _: None, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[tuple[Tensor, Ran], Any]:
    wants_x, wants_weight, _ = ctx.needs_input_grad[2:]
    nonzeros = None
    if layer.lists_gradient:
        nonzeros = lender.empty((layer.rows, (layer.inputs + 7) // 8), torch.uint8)
    ctx.x_memory = x.shape, x.stride(), x.dtype, x.device
    y, ran, ctx.ones = layer.run(x, weight, bias, nonzeros)
    if isinstance(ran, str):
        nonzeros = None
    ctx.save_for_backward(x if wants_weight else None, weight if wants_x else None, nonzeros)
    return (y, ran), ()


def _gradients(
    ctx: Any, saved: Sequence[Any], grads: Sequence[Any], by_torch: bool
) -> Sequence[Tensor | None]:
    layer, (x, weight, nonzeros), grad = ctx.plan, saved, grads[0]
    wants_x, wants_weight, wants_bias = ctx.needs_input_grad[2:]
    of_x = of_weight = of_bias = None
    shape, _, dtype, device = ctx.x_memory
    if not by_torch:
        y_shape = (*shape[:-1], layer.outputs)
        grad = laid_out(grad, y_shape, contiguous_strides(y_shape), dtype, device)
    if wants_x:
        weight = restored(weight, (layer.outputs, layer.inputs), dtype, device)
        of_x = (flat(grad) @ weight).view(shape)
    if wants_weight and nonzeros is not None and not by_torch:
        bits = (layer.inputs + 7) // 8
        nonzeros = laid_out(nonzeros, (layer.rows, bits), (bits, 1), torch.uint8, device)
        x = None if ctx.ones else laid_out(x, *ctx.x_memory)
        of_weight, of_bias = layer.gradients(x, nonzeros, grad)
    elif wants_weight:
        of_weight = flat(grad).t() @ flat(restored(x, shape, dtype, device))
    if wants_bias and of_bias is None:
        of_bias = flat(grad).sum(0)
    return of_x, of_weight, of_bias if wants_bias else None


_apply = differentiable("_Linear", _forward, _gradients)
