"""Checks of tensors: each returns the tensor in its normal form, or raises an error.

TypeError stands for a wrong type or dtype, ValueError for a wrong shape, value or device. The
message names the argument, what came and what is accepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .options import DTYPES, NAMES_OF_DTYPES, CellOptions
from .surrogate import is_number

# What stands behind the channels in a shape, by the dimensions of an image.
SIZES = {1: "L", 2: "H, W"}


def real_tensor(name: str, value: Any) -> Tensor:
    """Check a number, a tensor or what torch.as_tensor takes: real, and not empty."""
    if value is None or isinstance(value, (bool, str)):
        raise TypeError(f"{name} must be a number or a tensor, got {value!r}")
    if not isinstance(value, Tensor):
        try:
            value = torch.as_tensor(value, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{name} must be a number or a tensor, got {value!r}") from error
    if value.dtype is torch.bool or value.dtype.is_complex:
        raise TypeError(f"{name} must be real, got a tensor of {value.dtype}")
    if value.numel() == 0:
        raise ValueError(f"{name} must not be empty, got shape {tuple(value.shape)}")
    return value


def values(value: Any) -> Tensor:
    """The numbers of a checked number or tensor, detached; not on torch's default device."""
    return (value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")).detach()


def _broadcasts(shape: Sequence[int], target: Sequence[int]) -> bool:
    return len(shape) <= len(target) and all(
        size == 1 or size == want
        for size, want in zip(reversed(shape), reversed(target), strict=False)
    )


def channel_broadcast(name: str, shape: Sequence[int], channels: int, dims: int) -> None:
    """Check, before any image is known, that a shape can broadcast to (N, C, H, W) or (N, C, L)."""
    if len(shape) > dims + 2 or (len(shape) > dims and shape[-dims - 1] not in (1, channels)):
        raise ValueError(
            f"{name} must broadcast to mem's shape (N, {channels}, {SIZES[dims]}), "
            f"got shape {tuple(shape)}"
        )


def state_broadcast(
    name: str, shape: Sequence[int], state: Sequence[int], options: CellOptions
) -> None:
    """Check that a shape broadcasts to that of mem, and to that of the pooled mem."""
    windows = options.pool_size[4 - len(state) :]
    pooled = (*state[:2], *(size // w for size, w in zip(state[2:], windows, strict=True)))
    if not _broadcasts(shape, state) or not _broadcasts(shape, pooled):
        both = f"mem's shape {tuple(state)}"
        if options.pool != "none":
            both += f" and to the pooled one {pooled}"
        raise ValueError(f"{name} must broadcast to {both}, got shape {tuple(shape)}")


def state_shape(x: Tensor, channels: int, options: CellOptions, dims: int) -> tuple[int, ...]:
    """Shape of syn and mem for a checked input, into which a pooling window must fit."""
    height, width = options.state_size(x.shape[-2] if dims == 2 else 1, x.shape[-1])
    size = (height, width)[-dims:]
    if height < options.pool_size[0] or width < options.pool_size[1]:
        raise ValueError(
            f"{options.pool}_pool must not be larger than the state, got "
            f"{options.pool_size[-dims:]} for a state of {' x '.join(map(str, size))}"
        )
    return x.shape[-dims - 2], channels, *size


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast computes in on a device type; None where autocast is off."""
    # torch raises an error if it is asked about a device that has no autocast.
    known = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)
    if known and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def state_dtype(weight: Tensor) -> torch.dtype:
    """Dtype of the states and of spk: weight's, but at least float32 under autocast."""
    if autocast_dtype(weight.device.type) is not None:
        return torch.promote_types(weight.dtype, torch.float32)
    return weight.dtype


def input_tensor(
    x: Any, weight: Tensor, in_channels: int, batch_first: bool, dims: int, name: str
) -> Tensor:
    """Check the input; returns it in the dtype of the states.

    `batch_first` says that the caller gave a sequence as (N, T, ...); here x is (T, N, ...).
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    check_dense(name, x)
    given = tuple(x.shape)
    if batch_first and x.dim() == dims + 3:
        given = (given[1], given[0], *given[2:])
    if x.dim() not in (dims + 2, dims + 3):
        rest = f"{in_channels}, {SIZES[dims]}"
        raise ValueError(
            f"{name} must have shape (N, {rest}) for one step or "
            f"({'N, T' if batch_first else 'T, N'}, {rest}) for a sequence, got {given}"
        )
    channels = x.shape[-dims - 1]
    if channels != in_channels:
        raise ValueError(f"{name} must have {in_channels} channels, got {channels}: shape {given}")
    if x.shape[-dims] == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name} must have at least one pixel, got shape {given}")
    return _converted(name, x, weight)


def check_dense(name: str, tensor: Tensor) -> None:
    """Refuse sparse tensors and those of MKL-DNN."""
    if tensor.layout is not torch.strided:
        raise TypeError(
            f"{name} must be dense, as {name}.to_dense() is, got layout {tensor.layout}"
        )


def _converted(name: str, tensor: Tensor, weight: Tensor) -> Tensor:
    """`tensor` in the dtype of the states, where the conversion loses nothing."""
    if tensor.device != weight.device:
        raise ValueError(
            f"{name} must be on weight's device {weight.device}, got one on {tensor.device}"
        )
    dtype = state_dtype(weight)
    if tensor.dtype != dtype:
        if not _converts(tensor.dtype, dtype):
            raise TypeError(
                f"{name} must be of {dtype}, as weight is, or convert to it without loss, "
                f"got {tensor.dtype}"
            )
        tensor = tensor.to(dtype)
    return tensor


def _converts(dtype: torch.dtype, to: torch.dtype) -> bool:
    """Whether numbers of `dtype` become numbers of the dtype `to` by themselves."""
    try:
        return torch.promote_types(dtype, to) == to
    except RuntimeError:  # torch has no rule for float8, nor for wide unsigned integers
        return True


def state_tensor(name: str, state: Any, shape: Sequence[int], x: Tensor, weight: Tensor) -> Tensor:
    """Check a state of `shape`; None, and a tensor of shape (0,), become zeros like x."""
    if state is not None and not isinstance(state, Tensor):
        raise TypeError(f"{name} must be a tensor or None, got {type(state).__name__}")
    if state is None or (state.dim() == 1 and state.shape[0] == 0):
        return x.new_zeros(shape)
    if tuple(state.shape) != tuple(shape):
        raise ValueError(
            f"{name} must have shape {tuple(shape)} (or (0,), which means zeros), "
            f"got {tuple(state.shape)}"
        )
    check_dense(name, state)
    return _converted(name, state, weight)


def scalar_like(
    name: str, value: Any, x: Tensor, state: Sequence[int], options: CellOptions
) -> Tensor:
    """Check a threshold or graded factor; returns it in x's dtype and on x's device."""
    if is_number(value):
        return torch.full((), float(value), dtype=x.dtype, device=x.device)
    if isinstance(value, Tensor):
        tensor = value
        check_dense(name, tensor)
    else:  # what is no tensor has no device either
        tensor = real_tensor(name, value).to(x.device)
    if tensor.dim():
        real_tensor(name, tensor)
        state_broadcast(name, tensor.shape, state, options)
    if tensor.dtype == x.dtype and tensor.device == x.device:
        return tensor
    real_tensor(name, tensor)
    if tensor.device != x.device and tensor.dim():
        raise ValueError(f"{name} must be on x's device {x.device}, got one on {tensor.device}")
    return tensor.to(x.device, x.dtype)


def weight_tensors(weight: Any, bias: Any) -> tuple[int, int]:
    """Check weight and bias; returns (Cin, C)."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor, got {weight!r}")
    if weight.dtype not in DTYPES:
        raise TypeError(f"weight must be of one of {NAMES_OF_DTYPES}, got {weight.dtype}")
    channels = weight.shape[0] // 4 if weight.dim() == 4 else 0
    if channels == 0 or weight.shape[0] % 4 or weight.shape[1] < channels:
        raise ValueError(f"weight must have shape (4C, Cin + C, kh, kw), got {tuple(weight.shape)}")
    if bias is not None:
        if not isinstance(bias, Tensor):
            raise TypeError(f"bias must be a tensor or None, got {bias!r}")
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must have shape ({4 * channels},), got {tuple(bias.shape)}")
        if bias.dtype != weight.dtype:
            raise TypeError(f"bias must be of {weight.dtype}, as weight is, got {bias.dtype}")
        if bias.device != weight.device:
            raise ValueError(
                f"bias must be on weight's device {weight.device}, got one on {bias.device}"
            )
    return weight.shape[1] - channels, channels


def never_spikes(threshold: Any) -> bool:
    """Whether no mem can exceed the threshold: mem = o * tanh(syn) is at most 1."""
    if isinstance(threshold, Tensor):
        return not threshold.is_meta and bool((threshold.detach() >= 1).all())
    return is_number(threshold) and bool(threshold >= 1)
