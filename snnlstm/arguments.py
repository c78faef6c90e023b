"""Every check of an argument: of the constructor, of forward and of the functional form.

A check returns the argument in its normal form or raises: TypeError for a wrong type or
dtype, ValueError for a wrong value. The message names the argument, what came and what is
accepted. Nothing is modified before all checks have passed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, cast

import torch
from torch import Tensor, nn

from .call import DTYPES, RESETS, CellOptions, Checkpoint, Pool, Reset, autocast_dtype
from .quant import StateQuant
from .snntorch import recognise_quant, recognise_surrogate
from .surrogate import NONE, Surrogate, atan, is_number

__all__ = ["make_options"]

_DTYPES = ", ".join(map(str, DTYPES))

# ---- values -----------------------------------------------------------------------------


def _is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def flag(name: str, value: Any) -> bool:
    """Check a yes-or-no argument: a bool, or one of the ints 0 and 1."""
    if isinstance(value, bool) or (isinstance(value, Integral) and value in (0, 1)):
        return bool(value)
    if type(value).__name__ in ("bool", "bool_"):  # NumPy's bools, whose import this spares
        return bool(value)
    raise TypeError(f"{name} must be a bool, got {value!r}")


def a_module(name: str, value: Any) -> nn.Module:
    """Check a model."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be an nn.Module, got {type(value).__name__}")
    return value


def integer(name: str, value: Any) -> int:
    """Check an int that is at least 1."""
    if not _is_int(value):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value)


def pair(name: str, value: Any, lengths: tuple[int, ...] = (2,), also: str = "") -> tuple[int, int]:
    """Check an int or a sequence of ints, each at least 1; returns (height, width).

    `also` says what else the argument accepts.
    """
    both = (value, value) if _is_int(value) else value
    ints = isinstance(both, (tuple, list)) and all(map(_is_int, both))
    if not ints or len(both) not in lengths:
        kind = ValueError if ints else TypeError
        raise kind(f"{name} must be an int or a tuple of two ints, got {value!r}")
    if min(both) < 1:
        raise ValueError(f"{name} must be at least 1{also}, got {value!r}")
    if max(both) >= 2**31:  # the core's ints
        raise ValueError(f"{name} must be less than 2**31, got {value!r}")
    return int(both[0]), int(both[-1])


def kernel(name: str, value: Any) -> tuple[int, int]:
    """Check a kernel size: odd, so that one padding keeps the size of the state."""
    size = pair(name, value)
    if size[0] % 2 == 0 or size[1] % 2 == 0:
        raise ValueError(
            f"{name} must be odd, got {value!r}: the recurrent convolution has to keep the "
            "size of the state, and with an even kernel no symmetric padding does"
        )
    return size


def pooling(max_pool: Any, avg_pool: Any) -> tuple[Pool, tuple[int, int]]:
    """Check both pooling arguments; anything falsy is off."""
    if max_pool and avg_pool:
        raise ValueError(
            "Only one of either `max_pool` or `avg_pool` may be specified, not both: got "
            f"max_pool={max_pool!r} and avg_pool={avg_pool!r}"
        )
    for kind, value in (("max", max_pool), ("avg", avg_pool)):
        if value:
            # torch's pools accept one int in a tuple, too.
            size = pair(f"{kind}_pool", value, lengths=(1, 2), also=", or 0 for none")
            if size != (1, 1):
                return cast(Pool, kind), size
    return "none", (1, 1)


def reset_mechanism(value: Any) -> Reset:
    """Check the name of a reset mechanism."""
    if value not in RESETS:
        raise ValueError(
            f"reset_mechanism must be set to either 'subtract', 'zero', or 'none', got {value!r}"
        )
    return cast(Reset, value)


def reset_mechanism_val(value: Tensor) -> Reset | None:
    """Check the number of a reset mechanism; None for a tensor without data."""
    if value.is_meta:
        return None
    if value.numel() != 1 or value.item() not in range(len(RESETS)):
        raise ValueError(f"reset_mechanism_val must be 0, 1 or 2, got {value}")
    return RESETS[int(value)]


def checkpoint_way(value: Any) -> Checkpoint:
    """Check `checkpoint`: a yes-or-no argument, or "gates"."""
    if isinstance(value, str) and value == "gates":
        return "gates"
    try:
        return flag("checkpoint", value)
    except TypeError:
        raise TypeError(f"checkpoint must be a bool or 'gates', got {value!r}") from None


def surrogate(spike_grad: Any, disable: bool = False) -> Surrogate | Callable[[Tensor], Tensor]:
    """Check `spike_grad`; snnTorch's closures become the :class:`Surrogate` of their kind."""
    if spike_grad is not None and not callable(spike_grad):
        raise TypeError(
            "spike_grad must be a callable such as snnlstm.surrogate.atan(), or None, "
            f"got {spike_grad!r}"
        )
    if disable:
        return NONE
    return atan() if spike_grad is None else recognise_surrogate(spike_grad)


def quantiser(state_quant: Any) -> StateQuant | Callable[[Tensor], Tensor] | None:
    """Check `state_quant`; None, False and 0 are off, snnTorch's closures are recognised."""
    if state_quant is None or (isinstance(state_quant, int) and not state_quant):
        return None
    if not callable(state_quant):
        raise TypeError(
            "state_quant must be a callable such as snnlstm.quant.state_quant(), or False, "
            f"got {state_quant!r}"
        )
    return recognise_quant(state_quant)


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


def dtype_or_none(name: str, value: Any) -> torch.dtype | None:
    """Check a dtype of the module."""
    if value is not None and not isinstance(value, torch.dtype):
        raise TypeError(f"{name} must be a torch.dtype or None, got {value!r}")
    if value is not None and value not in DTYPES:
        raise ValueError(f"{name} must be one of {_DTYPES}, got {value}")
    return value


def device_or_none(name: str, value: Any) -> torch.device | None:
    """Check a device of the module."""
    if value is None:
        return None
    try:
        return torch.device(value)
    except (TypeError, RuntimeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name} must be a torch.device or its name, got {value!r}") from error


# ---- shapes -----------------------------------------------------------------------------


def _broadcasts(shape: Sequence[int], target: Sequence[int]) -> bool:
    return len(shape) <= len(target) and all(
        size == 1 or size == want
        for size, want in zip(reversed(shape), reversed(target), strict=False)
    )


def channel_broadcast(name: str, shape: Sequence[int], channels: int) -> None:
    """Check, before any image is known, that a shape can broadcast to (N, C, H, W)."""
    if len(shape) > 4 or (len(shape) >= 3 and shape[-3] not in (1, channels)):
        raise ValueError(
            f"{name} must broadcast to mem's shape (N, {channels}, H, W), got shape {tuple(shape)}"
        )


def state_broadcast(
    name: str, shape: Sequence[int], state: Sequence[int], options: CellOptions
) -> None:
    """Check that a shape broadcasts to that of mem, and to that of the pooled mem."""
    pooled = (*state[:2], state[2] // options.pool_size[0], state[3] // options.pool_size[1])
    if not _broadcasts(shape, state) or not _broadcasts(shape, pooled):
        both = f"mem's shape {tuple(state)}"
        if options.pool != "none":
            both += f" and to the pooled one {pooled}"
        raise ValueError(f"{name} must broadcast to {both}, got shape {tuple(shape)}")


def state_shape(x: Tensor, channels: int, options: CellOptions) -> tuple[int, int, int, int]:
    """Shape of syn and mem for a checked input, into which a pooling window must fit."""
    height, width = options.state_size(x.shape[-2], x.shape[-1])
    if height < options.pool_size[0] or width < options.pool_size[1]:
        raise ValueError(
            f"{options.pool}_pool must not be larger than the state, got {options.pool_size} "
            f"for a state of {height} x {width}"
        )
    return x.shape[-4], channels, height, width


# ---- tensors ----------------------------------------------------------------------------


def state_dtype(weight: Tensor) -> torch.dtype:
    """Dtype of the states and of spk: weight's, but at least float32 under autocast."""
    if autocast_dtype(weight.device.type) is not None:
        return torch.promote_types(weight.dtype, torch.float32)
    return weight.dtype


def input_tensor(x: Any, weight: Tensor, in_channels: int, batch_first: bool = False) -> Tensor:
    """Check the input; returns it in the dtype of the states.

    `batch_first` says that the caller gave a sequence as (N, T, ...); here x is (T, N, ...).
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.layout is not torch.strided:
        raise TypeError(f"x must be dense, as x.to_dense() is, got layout {x.layout}")
    given = tuple(x.shape)
    if batch_first and x.dim() == 5:
        given = (given[1], given[0], *given[2:])
    if x.dim() not in (4, 5):
        raise ValueError(
            f"x must have shape (N, {in_channels}, H, W) for one step or "
            f"({'N, T' if batch_first else 'T, N'}, {in_channels}, H, W) for a sequence, "
            f"got {given}"
        )
    if x.shape[-3] != in_channels:
        raise ValueError(f"x must have {in_channels} channels, got {x.shape[-3]}: shape {given}")
    if x.shape[-2] == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have at least one pixel, got shape {given}")
    return _converted("x", x, weight)


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
    return _converted(name, state, weight)


def scalar_like(
    name: str, value: Any, x: Tensor, state: Sequence[int], options: CellOptions
) -> Tensor:
    """Check a threshold or graded factor; returns it in x's dtype and on x's device."""
    if is_number(value):
        return torch.full((), float(value), dtype=x.dtype, device=x.device)
    if isinstance(value, Tensor):
        tensor = value
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
        raise TypeError(f"weight must be of one of {_DTYPES}, got {weight.dtype}")
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


# ---- the whole ------------------------------------------------------------------------


def make_options(
    kernel_size: Any,
    *,
    stride: Any,
    dilation: Any,
    reset: Any,
    max_pool: Any,
    avg_pool: Any,
    surrogate: Surrogate | Callable[[Tensor], Tensor],
    quant: StateQuant | Callable[[Tensor], Tensor] | None,
    inhibition: Any,
    checkpoint: Any,
    sequence: bool = False,
    record: bool = False,
) -> CellOptions:
    """Check what describes a cell, and put it into its normal form.

    `surrogate` and `quant` come from the checks of these names.
    """
    pool, pool_size = pooling(max_pool, avg_pool)
    return CellOptions(
        kernel_size=kernel("kernel_size", kernel_size),
        stride=pair("stride", stride),
        dilation=pair("dilation", dilation),
        reset=reset_mechanism(reset),
        pool=pool,
        pool_size=pool_size,
        surrogate=surrogate,
        quant=quant,
        inhibition=flag("inhibition", inhibition),
        sequence=sequence,
        record=record,
        checkpoint=checkpoint_way(checkpoint),
    )


def check_record(record: Any, sequence: bool) -> bool:
    """Check `record`, which only a sequence has."""
    if flag("record", record) and not sequence:
        raise ValueError("record=True needs a sequence: x of shape (T, N, Cin, H, W), got one step")
    return bool(record)


def never_spikes(threshold: Any) -> bool:
    """Whether no mem can exceed the threshold: mem = o * tanh(syn) is at most 1."""
    if isinstance(threshold, Tensor):
        return not threshold.is_meta and bool((threshold.detach() >= 1).all())
    return is_number(threshold) and bool(threshold >= 1)
