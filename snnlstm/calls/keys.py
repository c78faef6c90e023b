"""The keys of calls, and the dictionaries that they index.

An entry's key, :func:`key_of`, includes what decides between kernels and reference path. A plan's,
:func:`plan_key`, is narrower: a cell in training and evaluation has several entries, but one plan.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..compat.torch_private import any_autocast
from .call import Call, autocast_dtype
from .spec import CellSpec

K = TypeVar("K")
V = TypeVar("V")

OF_TORCH = {Tensor, nn.Parameter, type(None)}
"""The types of a call's arguments, unless a tensor is of a subclass."""


class BoundedDict(dict[K, V]):
    """A dictionary that drops all of its entries before it exceeds `max_entries`.

    It has no lock, because a fork or a signal handler could find it taken. Threads that race for a
    key may each make a value, but all of them use the first one.
    """

    def __init__(self, max_entries: int = 1024) -> None:
        super().__init__()
        self.max_entries = max_entries

    def keep(self, key: K, value: V) -> V:
        """Store a value if the key has none yet, and return the stored one."""
        if len(self) >= self.max_entries:
            self.clear()
        return self.setdefault(key, value)


def key_of(call: Call) -> tuple[Any, ...] | None:
    """The static properties of a call's tensors; None if the call has no key.

    Calls with tensors of subclasses have none, because sizes may be symbols, and neither have those
    with sparse tensors, which have no strides. The key omits values, addresses, the weight's
    strides, because its values are packed, and lengths, except whether there are any.
    """
    if not OF_TORCH.issuperset(map(type, call[:7])):
        return None
    x, syn, mem, weight, bias, threshold, graded, lengths, record = call
    try:
        device = x.device
        return (
            x.shape, x.stride(), x.dtype, device, x.is_neg(), x.requires_grad,
            syn.shape, syn.stride(), syn.dtype, syn.device, syn.is_neg(), syn.requires_grad,
            mem.shape, mem.stride(), mem.dtype, mem.device, mem.is_neg(), mem.requires_grad,
            weight.shape, weight.dtype, weight.device, weight.is_neg(),
            weight.requires_grad,
            None if bias is None else _key_of_numbers(bias),
            None if threshold is None else _key_of_numbers(threshold),
            None if graded is None else _key_of_numbers(graded),
            record, lengths is None, torch.is_grad_enabled(),
            autocast_dtype(device.type) if any_autocast() else None,
        )  # fmt: skip
    except (AttributeError, RuntimeError):  # an argument is no tensor, or a sparse one
        return None


def plan_key(
    call: Call, spec: CellSpec, operands: torch.dtype | None, settings: tuple[Any, ...]
) -> tuple[Any, ...]:
    """The key of the plan of a call; `operands` and `settings` are the plan's.

    It omits what :func:`key_of` omits, and what follows from the rest: the spec and the channels of
    x and mem give the weight's shape. It also omits gradients, because a plan runs both passes.
    """
    x, syn, mem, threshold = call.x, call.syn, call.mem, call.threshold
    return (
        spec, operands, settings, call.record, call.lengths is None, x.shape, x.stride(), x.dtype,
        x.device, syn.stride(), mem.shape, mem.stride(),
        None if threshold is None else threshold.numel(), are_contiguous(call),
    )  # fmt: skip


def are_contiguous(call: Call) -> bool:
    """Whether the core can read bias, threshold and graded factor without a copy."""
    return all(t is None or is_contiguous_as(t, call.x.dtype) for t in call[4:7])


def is_contiguous_as(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether the core can read a tensor without a copy as contiguous numbers of `dtype`."""
    return tensor.dtype == dtype and tensor.is_contiguous() and not tensor.is_neg()


def _key_of_numbers(tensor: Tensor) -> Any:
    """The static properties of a tensor that the kernels read as contiguous numbers."""
    contiguous, negated = tensor.is_contiguous(), tensor.is_neg()
    return tensor.shape, tensor.dtype, tensor.device, contiguous, negated, tensor.requires_grad
