"""Steps stacked into a sequence, whose memory is used again if it is large."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch.path import reason_now
from ..native import pool


def stack(steps: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """torch.stack(steps); a large result lies in a block of :mod:`snnlstm.native.pool`."""
    if not torch.compiler.is_compiling() and reason_now() is None:
        size = len(steps) * steps[0].numel() * steps[0].element_size()
        if size >= pool.MAPPED and _are_alike(steps):
            return _Stack.apply(*steps)
    return torch.stack(steps)


def _are_alike(steps: list[Tensor] | tuple[Tensor, ...]) -> bool:
    """Whether they are plain tensors on the CPU, in a memory layout that torch.stack keeps."""
    first = steps[0]
    return (
        first.device.type == "cpu"
        and first.layout is torch.strided
        and (first.is_contiguous() or _is_channels_last(first))
        and all(
            type(step) is Tensor and step.dtype is first.dtype and step.stride() == first.stride()
            for step in steps
        )
    )


def _is_channels_last(step: Tensor) -> bool:
    return step.dim() == 4 and step.is_contiguous(memory_format=torch.channels_last)


class _Stack(torch.autograd.Function):
    """torch.stack, which takes no memory for its result where gradients are computed."""

    @staticmethod
    def forward(ctx: Any, *steps: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        first = steps[0]
        shape, strides = (len(steps), *first.shape), (first.numel(), *first.stride())
        return torch.stack(steps, out=pool.empty_result(shape, strides, first.dtype, first.device))

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None,) * len(ctx.needs_input_grad) if grad is None else grad.unbind()
