"""The cell as one autograd Function over the native kernels.

Saved for the backward pass: the arguments, and per time step the activated gates and syn.
mem and the reset are recomputed from these (the reset rides in a sign bit of the gates). With
``checkpoint`` the gates are recomputed too: checkpoint.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import checkpoint, native, ops, reference
from .options import CellOptions

__all__ = ["last_name", "run"]

last_name = native.last_name


class _SConv2dLSTM(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        syn: Tensor,
        mem: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        threshold: Tensor,
        graded: Tensor,
        options: CellOptions,
        algorithm: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        arguments = (x, syn, mem, weight, bias, threshold, graded, options)
        saved: Any
        if options.checkpoint:
            (spk, new_syn, new_mem, _), saved = checkpoint.forward(*arguments, algorithm)
        else:
            spk, new_syn, new_mem, saved = native.forward(*arguments, True, algorithm)
        ctx.save_for_backward(x, syn, mem, weight, bias, threshold, graded, *saved)
        ctx.options, ctx.algorithm = options, algorithm
        ctx.set_materialize_grads(False)
        if options.surrogate.kind == 0:
            ctx.mark_non_differentiable(spk)
        return spk, new_syn, new_mem

    @staticmethod
    def backward(ctx: Any, grad_spk: Any, grad_syn: Any, grad_mem: Any) -> tuple:
        x, syn, mem, weight, bias, threshold, graded, *saved = ctx.saved_tensors
        grads = (grad_spk, grad_syn, grad_mem)
        wanted = ctx.needs_input_grad[:6]
        if all(grad is None for grad in grads):
            return (None,) * 9
        if torch.is_grad_enabled():  # create_graph: derivatives of these gradients are wanted
            inputs = (x, syn, mem, weight, bias, threshold)
            return (*_differentiable(inputs, graded, ctx.options, grads, wanted), *(None,) * 3)
        tensors, rest = (x, syn, mem, weight), (threshold, graded, ctx.options)
        how = (*grads, wanted, ctx.algorithm)
        if ctx.options.checkpoint:
            out = checkpoint.backward(*tensors, bias, *rest, saved, *how)
        else:
            out = native.backward(*tensors, *rest, native.Saved(*saved), *how)
        return (*out, *(None,) * 3)


def _differentiable(
    inputs: tuple[Tensor | None, ...],
    graded: Tensor,
    options: CellOptions,
    grads: tuple[Tensor | None, ...],
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """The same gradients in plain torch, as a graph that can be differentiated again."""
    # Aliases: one input may have been computed from another, and only direct paths count here.
    own: list[Any] = [None if t is None else t.view_as(t) for t in inputs]
    x, syn, mem, weight, bias, threshold = own
    outputs = reference.run(x, syn, mem, weight, bias, threshold, graded, options)
    pairs = [
        (o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad
    ]
    sources: list[Any] = [t for t, want in zip(own, wanted, strict=True) if want]
    if not pairs:
        return (None,) * len(inputs)
    found = iter(
        torch.autograd.grad(
            [o for o, _ in pairs],
            sources,
            [g for _, g in pairs],
            create_graph=True,
            allow_unused=True,
        )
    )
    return tuple(next(found) if want else None for want in wanted)


def _with_autocast(options: CellOptions, x: Tensor) -> CellOptions:
    """The options of a call that may be under autocast, which leaves float64 alone."""
    device = x.device.type
    if x.dtype == torch.float32 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return replace(options, operands=None if dtype == torch.float32 else dtype)
    return options


def run(
    x: Tensor,
    syn: Tensor,
    mem: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    graded: Tensor,
    options: CellOptions,
    algorithm: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the native kernels; arguments and results as :func:`snnlstm.reference.run`'s.

    The threshold is one number or one a channel, `graded` a single number without gradient;
    `algorithm` is one of ``native.ALGORITHMS``.
    """
    options = _with_autocast(options, x)
    if weight.dtype != x.dtype:  # a half precision module under autocast
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    inputs = (x, syn, mem, weight, bias, threshold)
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    if torch.compiler.is_compiling():
        return ops.run(*inputs, graded, options, training, algorithm)
    if training:
        return _SConv2dLSTM.apply(*inputs, graded, options, algorithm)
    return native.forward(*inputs, graded, options, False, algorithm)[:3]
