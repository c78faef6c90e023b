"""What tells like calls apart, and the dictionaries of what follows from it.

Entries have :func:`key_of`, which is wider: it also tells what decides between the kernels and the
reference path. Plans have :func:`plan_key`: a cell that is trained and evaluated has several
entries, and one plan.
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
"""The types of a call's tensors that are of no subclass."""


class BoundedDict(dict[K, V]):
    """A dictionary that drops all of its entries before it exceeds `max_entries`.

    There is no lock, which a fork or a signal handler could find taken: threads that race for a key
    may each make a value, and all of them use the first one.
    """

    def __init__(self, max_entries: int = 1024) -> None:
        super().__init__()
        self.max_entries = max_entries

    def keep(self, key: K, value: V) -> V:
        """Store a value, if the key has none yet; returns the one that is stored."""
        if len(self) >= self.max_entries:
            self.clear()
        return self.setdefault(key, value)


def key_of(call: Call) -> tuple[Any, ...] | None:
    """All that is static of a call's tensors; None if the call has no key.

    Tensors of subclasses have none, because their sizes may be symbols, and sparse ones, which have
    no strides. The key leaves out values, addresses, the weight's strides, because it is packed by
    its values, and lengths but for whether there are any.
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
    """The key of a call that the kernels run; `operands` and `settings` are those of its plan.

    The key leaves out what :func:`key_of` leaves out, what follows from the rest, such as the
    weight's shape from the spec and the channels of x and mem, and gradients: a plan runs both
    passes.
    """
    x, syn, mem, threshold = call.x, call.syn, call.mem, call.threshold
    return (
        spec, operands, settings, call.record, call.lengths is None, x.shape, x.stride(), x.dtype,
        x.device, syn.stride(), mem.shape, mem.stride(),
        None if threshold is None else threshold.numel(), are_contiguous(call),
    )  # fmt: skip


def are_contiguous(call: Call) -> bool:
    """Whether the core can read bias, threshold and graded factor where they lie."""
    return all(
        t is None or (t.dtype == call.x.dtype and t.is_contiguous() and not t.is_neg())
        for t in call[4:7]
    )


def _key_of_numbers(tensor: Tensor) -> Any:
    """What is static of a tensor that the kernels read as contiguous numbers."""
    contiguous, negated = tensor.is_contiguous(), tensor.is_neg()
    return tensor.shape, tensor.dtype, tensor.device, contiguous, negated, tensor.requires_grad
