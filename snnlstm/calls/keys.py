"""The keys of calls, and the dictionaries that they index.

A key, :func:`key_of`, includes what decides between kernels and reference path.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..compat.torch_private import any_autocast
from .call import LeakyCall, autocast_dtype

K = TypeVar("K")
V = TypeVar("V")

TORCH_TYPES = {Tensor, nn.Parameter, type(None)}
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


def key_of(call: Any) -> tuple[Any, ...] | None:
    """The static properties of a call's tensors; None if the call has no key.

    Calls with tensors of subclasses have none, because sizes may be symbols, and neither have those
    with sparse tensors, which have no strides. The key omits values, addresses, the weight's
    strides, because its values are packed, and lengths, except whether there are any.
    """
    is_leaky = isinstance(call, LeakyCall)
    tensors: Any = call[: 5 if is_leaky else 7]
    if not TORCH_TYPES.issuperset(map(type, tensors)):
        return None
    try:
        if is_leaky:
            states = (
                (t.shape, t.stride(), t.dtype, t.device, t.is_neg(), t.requires_grad)
                for t in tensors
            )
            return *states, torch.is_grad_enabled()
        x, syn, mem, weight, bias, threshold, graded, lengths, record = call
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


def _key_of_numbers(tensor: Tensor) -> Any:
    """The static properties of a tensor that the kernels read as contiguous numbers."""
    contiguous, negated = tensor.is_contiguous(), tensor.is_neg()
    return tensor.shape, tensor.dtype, tensor.device, contiguous, negated, tensor.requires_grad
