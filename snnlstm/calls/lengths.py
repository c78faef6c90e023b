"""Lengths: the steps of each sample of a batch, and what padded samples get.

A sample is padded after its own last step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..compat.torch_private import transforms_are_active

_INTS = (
    torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint64, torch.uint32, torch.uint16, torch.uint8,
)  # fmt: skip


def check_dense(name: str, tensor: Tensor) -> None:
    """Refuse sparse, nested and quantised tensors, and those of MKL-DNN."""
    if tensor.is_nested or tensor.is_quantized:
        found = "nested" if tensor.is_nested else "quantised"
        raise TypeError(f"{name} must be a plain tensor, got a {found} one")
    if tensor.layout is not torch.strided:
        raise TypeError(
            f"{name} must be dense, as {name}.to_dense() is, got layout {tensor.layout}"
        )


def checked_lengths(
    lengths: Any, time: int, batch: int, device: torch.device, traced: bool
) -> Tensor:
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
    check_dense("lengths", given)
    if given.dtype not in _INTS and (given.numel() or given.dtype is torch.bool):
        raise TypeError(f"lengths must be ints, got a tensor of {given.dtype}")
    if tuple(given.shape) != (batch,):
        raise ValueError(
            f"lengths must have shape ({batch},), one for each sample, got {tuple(given.shape)}"
        )
    if given.device.type != "cpu" and given.device != device:
        raise ValueError(f"lengths must be on the CPU or on x's {device}, got {given.device}")
    hidden = traced or transforms_are_active() or type(given) is not Tensor
    if given.device.type == "cpu" and given.numel() and not hidden:
        numbers = given.tolist()  # torch.min does not take wide unsigned ints
        least, most = min(numbers), max(numbers)
        if least < 0 or most > time:
            raise ValueError(
                f"lengths must lie between 0 and x's number of steps, {time}, "
                f"got {least if least < 0 else most}"
            )
    return given.detach().to(device, torch.int64).clamp(0, time)  # a copy: the caller's may change


def length_mask(lengths: Tensor, time: int, dims: int = 5) -> Tensor:
    """Whether each of `time` steps is one of the sample's own, (T, N, 1, ...) of `dims`."""
    steps = torch.arange(time, device=lengths.device)[:, None] < lengths
    return steps.reshape(*steps.shape, *(1,) * (dims - 2))


def last_state(recorded: Tensor, before: Tensor, lengths: Tensor) -> Tensor:
    """Each sample's state after its own last step, (N, ...), of those of all steps, (T, N, ...).

    `before` is the state before the first step.
    """
    state = recorded[(lengths - 1).clamp(min=0), torch.arange(len(lengths), device=lengths.device)]
    return torch.where(length_mask(lengths, 1, recorded.dim())[0], state, before)


def hold_last(recorded: Tensor, before: Tensor, lengths: Tensor) -> Tensor:
    """The states of all steps, (T, N, ...); padded samples repeat their last state."""
    steps = length_mask(lengths, recorded.shape[0], recorded.dim())
    return torch.where(steps, recorded, last_state(recorded, before, lengths))


def mask_padding(x: Tensor, lengths: Tensor) -> Tensor:
    """A sequence (T, N, ...), with zeros for padded samples."""
    return torch.where(length_mask(lengths, x.shape[0], x.dim()), x, 0)
