"""Lengths (N,), the steps of each sample, and what padded samples get.

A sample is padded after its own last step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..compat.torch_private import transforms_are_active
from .spec import check_dense

_INTS = {torch.int64, torch.int32, torch.int16, torch.int8}
_INTS |= {torch.uint64, torch.uint32, torch.uint16, torch.uint8}


class CheckedLengths(NamedTuple):
    """Lengths that a stack checked for sequences of `time` steps, and passes to its layers."""

    lengths: Tensor
    time: int


def checked_lengths(
    lengths: Any, time: int, batch: int, device: torch.device, traced: bool
) -> Tensor:
    """Check the steps of each sample, ints between 0 and T, and return them as int64 on `device`.

    Numbers that the host lacks (on a GPU, under torch.compile, in transforms) are only clamped.
    """
    if type(lengths) is CheckedLengths:
        lengths, before = lengths
        if before == time and lengths.shape == (batch,) and lengths.device == device:
            return lengths
    tensor = lengths
    if not isinstance(tensor, Tensor):
        try:
            tensor = torch.as_tensor(lengths, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"lengths must be ints, one for each sample, got {lengths!r}"
            ) from error
    check_dense("lengths", tensor)
    if tensor.dtype not in _INTS and (tensor.numel() or tensor.dtype is torch.bool):
        raise TypeError(f"lengths must be ints, got a tensor of {tensor.dtype}")
    if tuple(tensor.shape) != (batch,):
        raise ValueError(
            f"lengths must have shape ({batch},), one for each sample, got {tuple(tensor.shape)}"
        )
    if tensor.device.type != "cpu" and tensor.device != device:
        raise ValueError(f"lengths must be on the CPU or on x's {device}, got {tensor.device}")
    hidden = traced or transforms_are_active() or type(tensor) is not Tensor
    if tensor.device.type == "cpu" and tensor.numel() and not hidden:
        numbers = tensor.tolist()  # torch.min does not take wide unsigned ints
        least, most = min(numbers), max(numbers)
        if least < 0 or most > time:
            raise ValueError(
                f"lengths must lie between 0 and x's number of steps, {time}, "
                f"got {least if least < 0 else most}"
            )
    return tensor.detach().to(device, torch.int64).clamp(0, time)  # a copy: the caller's may change


def length_mask(lengths: Tensor, time: int, dims: int = 5) -> Tensor:
    """A mask of `dims` dimensions, (T, N, 1, ...): whether a step is one of the sample's own."""
    steps = torch.arange(time, device=lengths.device)[:, None] < lengths
    return steps.reshape(*steps.shape, *(1,) * (dims - 2))


def last_state(recorded: Tensor, before: Tensor, lengths: Tensor) -> Tensor:
    """Each sample's last own state, (N, ...), of `recorded`; `before` if it has no step."""
    state = recorded[(lengths - 1).clamp(min=0), torch.arange(len(lengths), device=lengths.device)]
    return torch.where(length_mask(lengths, 1, recorded.dim())[0], state, before)


def hold_last(recorded: Tensor, before: Tensor, lengths: Tensor) -> Tensor:
    """Make padded samples repeat their last state in the states of all steps, (T, N, ...)."""
    steps = length_mask(lengths, recorded.shape[0], recorded.dim())
    return torch.where(steps, recorded, last_state(recorded, before, lengths))


def held(live: Tensor, new: Any, old: Any, first: bool = False) -> Any:
    """Return `new` for samples where `live`, (N,), is True, and `old` for the padded others.

    Tuples are processed item by item. Padded samples get 0 if there is no `old`, and, with `first`,
    in the first item of a tuple.
    """
    if isinstance(new, tuple | list):
        olds = old if isinstance(old, tuple | list) else (None,) * len(new)
        pairs = enumerate(zip(new, olds, strict=True))
        return tuple(held(live, *pair, first and k == 0) for k, pair in pairs)
    if not isinstance(new, Tensor):
        return new
    if first or old is None or old.shape != new.shape:
        old = torch.zeros_like(new)
    return torch.where(live.reshape(-1, *(1,) * (new.dim() - 1)), new, old)


def mask_padding(x: Tensor, lengths: Tensor) -> Tensor:
    """Set the padded samples of a sequence (T, N, ...) to zero."""
    return torch.where(length_mask(lengths, x.shape[0], x.dim()), x, 0)
