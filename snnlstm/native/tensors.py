"""Tensors as the core reads and writes them: addresses, strides, and memory for results.

The core takes raw memory and allocates none; everything it reads and writes is a torch tensor
that its caller keeps alive while it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..calls.call import Call
from ..calls.entries import TORCH_TYPES


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that the kernels compute in, for an x of `dtype`."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def readable(tensor: Tensor, name: str = "a tensor") -> Tensor:
    """Detach a tensor that torch will read; it must have memory, or the process would crash."""
    if tensor.numel() and not tensor.data_ptr():
        raise ValueError(f"{name} must have memory, got a tensor whose storage is empty")
    return tensor.detach()


def is_readable(tensor: Any) -> bool:
    """Whether something is a plain tensor of the CPU, whose memory has its numbers."""
    return (
        type(tensor) in TORCH_TYPES
        and tensor.layout is torch.strided
        and tensor.is_cpu
        and not (tensor.is_neg() or tensor.is_nested or tensor._is_zerotensor())
    )


def needs_no_copy(call: Call) -> bool:
    """Whether the core can read bias, threshold and graded factor without a copy."""
    return all(t is None or is_contiguous_as(t, call.x.dtype) for t in call[4:7])


def is_contiguous_as(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether the core can read a tensor without a copy as contiguous numbers of `dtype`."""
    return tensor.dtype == dtype and tensor.is_contiguous() and not tensor.is_neg()


def contiguous_as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor, or a copy, in `dtype`, contiguous and not lazily negated."""
    if is_contiguous_as(tensor, dtype):
        return tensor
    return readable(tensor).resolve_neg().to(dtype).contiguous()


def with_copies(call: Call) -> Call:
    """The call, or one whose bias, threshold and graded factor the core can read."""
    if needs_no_copy(call):
        return call
    numbers = (None if t is None else contiguous_as(t, call.x.dtype) for t in call[4:7])
    return Call._make((*call[:4], *numbers, *call[7:]))


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of contiguous memory."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return tuple(strides)


def pointer(tensor: Tensor | None) -> int:
    """Address of the tensor's numbers; 0 if there is no tensor."""
    return 0 if tensor is None else tensor.data_ptr()


def strided(*tensors: Tensor | None) -> list[tuple[int, tuple[int, ...]] | None]:
    """Address and five strides of each; None for a missing tensor, or an empty one."""
    return [
        None if t is None or not (address := t.data_ptr()) else (address, with_time(t.stride()))
        for t in tensors
    ]


def with_time(strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of time, batch, channel, row and column; that of time is 0 in a step call."""
    return strides if len(strides) == 5 else (0, *strides)


def check_memory(call: Call) -> None:
    """Refuse tensors with numbers but no memory: their storage was freed, or never made."""
    for name, tensor in zip((*Call._fields[:6], "graded_spikes_factor"), call[:7], strict=True):
        if tensor is not None:
            readable(tensor, name)


def keep_empty(call: Call, outs: Sequence[Tensor | None], values: Sequence[Tensor | None]) -> None:
    """Give samples without a step those of `values`, or 0, because the kernels skip them."""
    assert call.lengths is not None
    empty = (call.lengths == 0)[:, None, None, None]
    if empty.device.type == "cpu" and not empty.any():
        return
    for out, value in zip(outs, values, strict=True):
        if out is not None:
            out.copy_(torch.where(empty, 0 if value is None else value, out))


def restored(
    tensor: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return a tensor that autograd saved in its old dtype and device, and not lazily negated.

    Hooks on saved tensors, and assignments to ``.data``, may also have changed shape or memory.
    """
    if tuple(tensor.shape) != tuple(shape):
        raise RuntimeError(
            f"a saved tensor has come back as {tuple(tensor.shape)}, not {tuple(shape)}: what was "
            "saved for the backward pass must keep its shape"
        )
    return tensor.resolve_neg().to(device, dtype)


def laid_out(
    tensor: Tensor,
    shape: Sequence[int],
    strides: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """The tensor, or a copy, in a memory layout, in a dtype, on a device, not lazily negated."""
    fits = tensor.stride() == strides and tensor.shape == shape
    if fits and tensor.dtype is dtype and tensor.device == device:
        return tensor.resolve_neg()
    tensor = restored(tensor, shape, dtype, device)
    out = torch.empty_strided(shape, strides, dtype=dtype, device=device)
    return out.copy_(tensor.detach())


# ---- memory -----------------------------------------------------------------------------------


def image_strides(x: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in the order of x's, of an output whose `shape` ends in (C, H, W).

    Images are channels-last if x's are, and time lies within the batch if it does in x. A stride of
    0, as in expanded tensors, defines no order.
    """
    if len(shape) == 1:
        return (1,)
    *lead, c, h, w = shape
    channels_last = x.stride(-3) == 1 and x.shape[-3] != 1 and not x.is_contiguous()
    channels_last = channels_last and 0 not in (x.stride(-2), x.stride(-1))
    strides = [1, w * c, c] if channels_last else [h * w, w, 1]
    size = c * h * w
    if len(lead) == 2 and x.dim() == 5 and 0 < x.stride(0) < x.stride(1):
        return size, size * lead[0], *strides
    for count in reversed(lead):
        strides.insert(0, size)
        size *= count
    return tuple(strides)


def empty_like_images(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An output of `shape` ending in (C, H, W), or (0,), uninitialised."""
    return x.new_empty_strided(shape, image_strides(x, shape))
