"""Sequences of different lengths in one batch: the steps of each sample, and what follows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["active", "checked", "last", "repeated", "silenced"]

_INTS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def checked(lengths: Any, time: int, batch: int, device: torch.device, traced: bool) -> Tensor:
    """Check the steps of each sample, ints between 0 and T; returns them as int64, on `device`.

    Only numbers that the host has can be checked: on a GPU, and where torch.compile traces or a
    transform is active, they are clamped.
    """
    given = lengths
    if not isinstance(given, Tensor):
        try:
            given = torch.as_tensor(lengths, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"lengths must be ints, one for each sample, got {lengths!r}"
            ) from error
    if given.dtype not in _INTS and (given.numel() or given.dtype is torch.bool):
        raise TypeError(f"lengths must be ints, got a tensor of {given.dtype}")
    if tuple(given.shape) != (batch,):
        raise ValueError(
            f"lengths must have shape ({batch},), one for each sample, got {tuple(given.shape)}"
        )
    if given.device.type != "cpu" and given.device != device:
        raise ValueError(f"lengths must be on the CPU or on x's {device}, got {given.device}")
    hidden = traced or torch._C._are_functorch_transforms_active() or type(given) is not Tensor
    if given.device.type == "cpu" and given.numel() and not hidden:
        least, most = int(given.min()), int(given.max())
        if least < 0 or most > time:
            raise ValueError(
                f"lengths must lie between 0 and x's number of steps, {time}, "
                f"got {least if least < 0 else most}"
            )
    return given.detach().to(device, torch.int64).clamp(0, time)  # a copy: the caller's may change


def active(lengths: Tensor, time: int) -> Tensor:
    """Whether each of `time` steps is one of the sample's own, (T, N, 1, 1, 1)."""
    own = torch.arange(time, device=lengths.device)[:, None] < lengths
    return own[..., None, None, None]


def last(recorded: Tensor, before: Tensor, lengths: Tensor) -> Tensor:
    """Each sample's state after its own last step, (N, C, H, W), of those of all steps.

    `before` is the state before the first step.
    """
    found = recorded[(lengths - 1).clamp(min=0), torch.arange(len(lengths), device=lengths.device)]
    return torch.where(lengths[:, None, None, None] > 0, found, before)


def repeated(recorded: Tensor, before: Tensor, lengths: Tensor) -> Tensor:
    """The states of all steps, (T, N, C, H, W), with a sample's last state behind its last step."""
    own = active(lengths, recorded.shape[0])
    return torch.where(own, recorded, last(recorded, before, lengths))


def silenced(x: Tensor, lengths: Tensor) -> Tensor:
    """A sequence (T, N, ...), with zeros behind each sample's last step."""
    own = active(lengths, x.shape[0]).flatten(1)
    return torch.where(own.reshape(own.shape + (1,) * (x.dim() - 2)), x, 0)
