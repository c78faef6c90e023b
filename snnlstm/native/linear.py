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
from . import cpu, lender, products
from .function import differentiable
from .products import Ran, flat
from .tensors import contiguous_strides, laid_out, pointer, restored


def linear(input: Any, weight: Any, bias: Any = None) -> Tensor:
    """``torch.nn.functional.linear``, by the kernels where they gain; equal to rounding."""
    return run(input, weight, bias)[0]


def run(input: Any, weight: Any, bias: Any = None) -> tuple[Tensor, Ran]:
    """The result of :func:`linear`, and what ran."""
    try:
        outputs, inputs = weight.shape
        values = input.numel()
        wants = may_require_grad((input, weight, bias))
        if values * outputs < (LEAST_IN_TRAINING if wants else LEAST):
            return F.linear(input, weight, bias), products.SMALL
    except (AttributeError, RuntimeError, ValueError):  # no matrix, or a nested tensor
        return F.linear(input, weight, bias), products.SHAPES
    reason = products.reason_against(input, weight, bias)
    if reason is None:
        layer = _layer_of(input, inputs, outputs, bias)
        if isinstance(layer, str):
            reason = layer
        elif (density := layer.look(input)) > MOST_NONZERO:
            reason = products.too_dense(density)
        elif wants:
            return _apply(layer, density, input, weight, bias)
        else:
            return layer.run(input, weight, bias)[:2]
    return F.linear(input, weight, bias), reason


# The least products of rows, inputs and outputs for which the kernels pay, without and with a
# gradient; rows and outputs; and the most inputs, whose places have 16 bits.
LEAST, LEAST_IN_TRAINING = 1_000_000, 1_000_000
LEAST_ROWS, LEAST_OUTPUTS, MOST_INPUTS = 32, 32, 65_535

# The largest shares of nonzeros for which the forward pass and the weight's gradient pay, and the
# fewest rows for which the gradient does.
MOST_NONZERO, MOST_IN_GRADIENT, LEAST_ROWS_OF_GRADIENT = 0.25, 0.2, 128


def _layer_of(x: Tensor, inputs: int, outputs: int, bias: Tensor | None) -> _Layer | str:
    """The sizes of a call, or why torch's function runs it."""
    shape = x.shape
    if shape[-1] != inputs or (bias is not None and bias.shape != (outputs,)):
        return products.SHAPES
    row = inputs
    if not x.is_contiguous():
        row, step = x.stride() if x.dim() == 2 else (0, 0)
        if step != 1 or row < inputs:
            return products.TENSORS
    rows = x.numel() // inputs
    if rows < LEAST_ROWS or outputs < LEAST_OUTPUTS or inputs > MOST_INPUTS:
        return products.SMALL
    return _Layer(rows, inputs, outputs, row, (shape, x.stride(), x.dtype, x.device))


class _Layer(NamedTuple):
    """The sizes of a call: its fields in csrc/args.h, and how x lies in memory."""

    rows: int
    inputs: int
    outputs: int
    row: int
    x_memory: Any

    def look(self, x: Tensor) -> float:
        """The share of nonzeros in a part of x."""
        return _C.linear_look((*self[:4], x.data_ptr(), 0, 0))

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
            layout = packed.pack(key, _C.linear_packed_bytes(*sizes), pack)
        shape = (*x.shape[:-1], self.outputs)
        y = lender.empty_result(shape, contiguous_strides(shape), x.dtype, x.device)
        fields = *self[:4], x.data_ptr(), pointer(nonzeros)
        most = 3 * self.rows * self.inputs // 10
        last = most, layout[0], pointer(bias), y.data_ptr()
        count, ones = lender.with_workspace(
            _C.linear_forward_workspace((*fields, 0)),
            lambda workspace: _C.linear_forward((*fields, workspace, *last)),
        )
        if count < 0:  # the look has not seen them
            return F.linear(x, weight, bias), products.too_dense(1), False
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
            _C.linear_backward_workspace((*fields, 0)),
            lambda workspace: _C.linear_backward((*fields, workspace, *last)),
        )
        return weight, bias


# ---- the Function --------------------------------------------------------------------------------


def _forward(
    ctx: Any, layer: _Layer, density: float, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[tuple[Tensor, Ran], Any]:
    wants_x, wants_weight, _ = ctx.needs_input_grad[2:]
    nonzeros = None
    if wants_weight and density <= MOST_IN_GRADIENT and layer.rows >= LEAST_ROWS_OF_GRADIENT:
        nonzeros = lender.empty((layer.rows, (layer.inputs + 7) // 8), torch.uint8)
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
    shape, _, dtype, device = layer.x_memory
    if not by_torch:
        y_shape = (*shape[:-1], layer.outputs)
        grad = laid_out(grad, y_shape, contiguous_strides(y_shape), dtype, device)
        if wants_x:
            weight = restored(weight, (layer.outputs, layer.inputs), dtype, device)
    if wants_x:
        of_x = (flat(grad) @ weight).view(shape)
    if wants_weight and nonzeros is not None and not by_torch:
        nonzeros = laid_out(
            nonzeros,
            (layer.rows, (layer.inputs + 7) // 8),
            ((layer.inputs + 7) // 8, 1),
            torch.uint8,
            device,
        )
        x = None if ctx.ones else laid_out(x, *layer.x_memory)
        of_weight, of_bias = layer.gradients(x, nonzeros, grad)
    elif wants_weight:
        x = x if by_torch else restored(x, *shape, dtype, device)
        of_weight = flat(grad).t() @ flat(x)
    if wants_bias and of_bias is None:
        of_bias = flat(grad).sum(0)
    return of_x, of_weight, of_bias if wants_bias else None


_apply = differentiable("_Linear", _forward, _gradients)
