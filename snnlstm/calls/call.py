"""One call of a cell, and the checks of its tensors.

A wrong dtype raises TypeError, a wrong shape or device ValueError, as in :mod:`snnlstm.calls.spec`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..compat.torch_private import has_ended
from ..surrogate import is_number
from .lengths import checked_lengths, hold_last
from .spec import DTYPES, NAMES_OF_DTYPES, CellSpec, check_dense, flag

# The sizes that follow the channels in a shape, by the number of an image's dimensions.
SIZES = {1: "L", 2: "H, W"}


Outputs = tuple[Tensor, Tensor, Tensor]
"""spk, syn and mem of a call."""


class Call(NamedTuple):
    """The checked tensors of one call, which the module passes to the kernels."""

    x: Tensor  # (N, Cin, H, W), one step, or (T, N, Cin, H, W), a sequence
    syn: Tensor  # (N, C, Ho, Wo), before the first step, in x's dtype and on its device
    mem: Tensor  # as syn
    weight: Tensor  # (4C, Cin + C, kh, kw), gates in the order i, f, o, g
    bias: Tensor | None  # (4C,)
    # Both broadcast to mem's shape and to that of the pooled mem; a cell without spikes has none.
    threshold: Tensor | None
    graded: Tensor | None
    lengths: Tensor | None = None  # (N,) int64, the steps of each sample; None: all have T
    record: bool = False  # whether syn and mem of every step are returned, (T, N, C, Ho, Wo)

    @property
    def sequence(self) -> bool:
        """Whether the call runs a sequence rather than one step."""
        return self.x.dim() == 5


class LeakyCall(NamedTuple):
    """The tensors of one call of a Leaky; beta and threshold broadcast to a step of x."""

    x: Tensor  # (...), one step, or (T, ...), a sequence
    mem: Tensor  # (...) before the first step; another shape means zeros
    beta: Tensor
    threshold: Tensor
    graded: Tensor
    every: bool = True  # whether mem of every step is returned, (T, ...)


def recorded_states(call: Call, syn: Tensor, mem: Tensor) -> tuple[Tensor, Tensor]:
    """Make padded samples repeat their last recorded state, which the kernels do not."""
    lengths = call.lengths
    assert lengths is not None
    return hold_last(syn, call.syn, lengths), hold_last(mem, call.mem, lengths)


LEAKY_PARAMETERS = ("beta", "threshold", "graded_spikes_factor")
"""The layer's names of a call's beta, threshold and graded."""


def checked_call(
    x: Any,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Any,
    graded: Any,
    channels: tuple[int, int],
    spec: CellSpec,
    state_of: Callable[[str, tuple[int, ...], Tensor], Tensor],
    *,
    record: Any,
    lengths: Any,
    traced: bool,
    batch_first: bool = False,
    dims: int = 2,
    name: str = "x",
) -> Call:
    """Check all tensors of a call, and return the call.

    `channels` are Cin and C. `state_of` takes a state's name, its shape and the checked x, and
    returns the state. `traced` says whether torch.compile traces the call. Errors call x `name`. If
    `dims` is 1, all tensors but the weight have a length L instead of H and W.
    """
    check_transforms(x)
    if batch_first and isinstance(x, Tensor) and x.dim() == dims + 3:
        x = x.transpose(0, 1)
    x = input_tensor(x, weight, channels[0], batch_first, dims, name)
    sequence = x.dim() == dims + 3
    record = flag("record", record)
    for argument, is_set in ("record=True", record), ("lengths", lengths is not None):
        if is_set and not sequence:
            needed = f"(T, N, Cin, {SIZES[dims]})"
            raise ValueError(f"{argument} needs a sequence: {name} of shape {needed}, got one step")
    if lengths is not None:
        lengths = checked_lengths(lengths, x.shape[0], x.shape[1], x.device, traced)
    shape = state_shape(x, channels[1], spec, dims)
    syn, mem = state_of("syn", shape, x), state_of("mem", shape, x)
    if spec.spiking:
        threshold = scalar_like("threshold", threshold, x, shape, spec)
        graded = scalar_like("graded_spikes_factor", graded, x, shape, spec)
    if bias is not None:
        check_bias(bias, weight, 4 * channels[1])
    if dims == 1:
        x, syn, mem, threshold, graded = map(as_image, (x, syn, mem, threshold, graded))
    return Call(x, syn, mem, weight, bias, threshold, graded, lengths, record)


def may_require_grad(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a result of a call with these tensors may require a gradient."""
    if torch.is_grad_enabled():
        for tensor in tensors:  # dynamo traces a loop faster than any()
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def as_image(tensor: Tensor) -> Tensor:
    """View (..., L) as images of height 1, (..., 1, L); a number and (L,) broadcast as they are."""
    return tensor.unsqueeze(-2) if tensor.dim() > 1 else tensor


def batch_before_time(
    call: Call, batch_first: bool, spk: Tensor, syn: Tensor, mem: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a call's results, with the batch before time if the caller's sequences are so."""
    if not batch_first or not call.sequence:
        return spk, syn, mem
    if call.record:
        syn, mem = syn.transpose(0, 1), mem.transpose(0, 1)
    return spk.transpose(0, 1), syn, mem


# ---- checks of single tensors -------------------------------------------------------------------


def check_transforms(x: Any, **states: Any) -> None:
    """Refuse tensors of a transform of torch.func that has ended: the kernels cannot read them."""
    for name, tensor in {"x": x, **states}.items():
        if isinstance(tensor, Tensor) and has_ended(tensor):
            other_way = "" if name == "x" else ", or call reset_mem() to start from zeros"
            raise RuntimeError(
                f"{name} belongs to a transform of torch.func that has ended: return it from the "
                f"transformed function, and pass what the transform returns{other_way}"
            )


def real_tensor(name: str, value: Any) -> Tensor:
    """Check that a number, a tensor or other input of torch.as_tensor is real and not empty."""
    if value is None or isinstance(value, (bool, str)):
        raise TypeError(f"{name} must be a number or a tensor, got {value!r}")
    if isinstance(value, Tensor):
        check_dense(name, value)
    else:
        try:
            value = torch.as_tensor(value, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{name} must be a number or a tensor, got {value!r}") from error
    if value.dtype is torch.bool or value.dtype.is_complex:
        raise TypeError(f"{name} must be real, got a tensor of {value.dtype}")
    if value.numel() == 0:
        raise ValueError(f"{name} must not be empty, got shape {tuple(value.shape)}")
    return value


def check_threshold(value: Any) -> None:
    """Refuse the number NaN, and a tensor without numbers; those of other tensors are not read."""
    if value.is_meta if isinstance(value, Tensor) else is_number(value) and math.isnan(value):
        raise ValueError(f"threshold must be a number, or a tensor of numbers, got {value!r}")


def values(value: Any) -> Tensor:
    """Return a checked tensor detached, or a checked number as a tensor on the CPU."""
    return (value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")).detach()


def broadcasts(shape: Sequence[int], target: Sequence[int]) -> bool:
    """Whether a shape broadcasts to another one."""
    return len(shape) <= len(target) and all(
        size == 1 or size == want
        for size, want in zip(reversed(shape), reversed(target), strict=False)
    )


def channel_broadcast(name: str, shape: Sequence[int], channels: int, dims: int) -> None:
    """Check, before sizes are known, that a shape can broadcast to (N, C, H, W) or (N, C, L)."""
    if len(shape) > dims + 2 or (len(shape) > dims and shape[-dims - 1] not in (1, channels)):
        raise ValueError(
            f"{name} must broadcast to mem's shape (N, {channels}, {SIZES[dims]}), "
            f"got shape {tuple(shape)}"
        )


def state_broadcast(name: str, shape: Sequence[int], state: Sequence[int], spec: CellSpec) -> None:
    """Check that a shape broadcasts to the shapes of mem and of the pooled mem."""
    windows = spec.pool_size[4 - len(state) :]
    pooled = (*state[:2], *(size // w for size, w in zip(state[2:], windows, strict=True)))
    if not broadcasts(shape, state) or not broadcasts(shape, pooled):
        both = f"mem's shape {tuple(state)}"
        if spec.pool != "none":
            both += f" and to the pooled one {pooled}"
        raise ValueError(f"{name} must broadcast to {both}, got shape {tuple(shape)}")


def state_shape(x: Tensor, channels: int, spec: CellSpec, dims: int) -> tuple[int, ...]:
    """Return the shape of syn and mem for a checked input; a pooling window must fit into it."""
    height, width = spec.state_size(x.shape[-2] if dims == 2 else 1, x.shape[-1])
    size = (height, width)[-dims:]
    if height < spec.pool_size[0] or width < spec.pool_size[1]:
        raise ValueError(
            f"{spec.pool}_pool must not be larger than the state, got "
            f"{spec.pool_size[-dims:]} for a state of {' x '.join(map(str, size))}"
        )
    return x.shape[-dims - 2], channels, *size


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype of autocast on a device type; None if autocast is off."""
    # For a device type without autocast, is_autocast_enabled raises an error.
    has_autocast = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)
    if has_autocast and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def input_tensor(
    x: Any, weight: Tensor, in_channels: int, batch_first: bool, dims: int, name: str
) -> Tensor:
    """Check the input, and return it in the dtype of the states.

    `batch_first` says that the caller's sequence was (N, T, ...); here x is (T, N, ...).
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    check_dense(name, x)
    shape = tuple(x.shape)
    if batch_first and x.dim() == dims + 3:
        shape = (shape[1], shape[0], *shape[2:])
    if x.dim() not in (dims + 2, dims + 3):
        rest = f"{in_channels}, {SIZES[dims]}"
        raise ValueError(
            f"{name} must have shape (N, {rest}) for one step or "
            f"({'N, T' if batch_first else 'T, N'}, {rest}) for a sequence, got {shape}"
        )
    channels = x.shape[-dims - 1]
    if channels != in_channels:
        raise ValueError(f"{name} must have {in_channels} channels, got {channels}: shape {shape}")
    if x.shape[-dims] == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name} must have at least one pixel, got shape {shape}")
    return _converted(name, x, weight)


def _converted(name: str, tensor: Tensor, weight: Tensor) -> Tensor:
    """Convert `tensor` without loss to weight's dtype, or to at least float32 under autocast."""
    if tensor.device != weight.device:
        raise ValueError(
            f"{name} must be on weight's device {weight.device}, got one on {tensor.device}"
        )
    dtype = weight.dtype
    if autocast_dtype(weight.device.type) is not None:
        dtype = torch.promote_types(dtype, torch.float32)
    if tensor.dtype != dtype:
        if not _converts(tensor.dtype, dtype):
            raise TypeError(
                f"{name} must be {dtype} like the weight, or a type that converts losslessly, "
                f"got {tensor.dtype}"
            )
        tensor = tensor.to(dtype)
    return tensor


def _converts(dtype: torch.dtype, to: torch.dtype) -> bool:
    """Whether torch's type promotion converts `dtype` to the dtype `to`."""
    try:
        return torch.promote_types(dtype, to) == to
    except RuntimeError:  # torch has no rule for float8, nor for wide unsigned integers
        return True


def state_tensor(name: str, state: Any, shape: Sequence[int], x: Tensor, weight: Tensor) -> Tensor:
    """Check a state of `shape`; None, and a tensor of shape (0,), become zeros like x."""
    if state is not None and not isinstance(state, Tensor):
        raise TypeError(f"{name} must be a tensor or None, got {type(state).__name__}")
    if state is None:
        return x.new_zeros(shape)
    check_dense(name, state)
    if state.dim() == 1 and state.shape[0] == 0:
        return x.new_zeros(shape)
    if tuple(state.shape) != tuple(shape):
        hint = ""
        if x.dim() > len(shape) and tuple(state.shape) == (x.shape[0], *shape[1:]):
            hint = "; x is read as (T, N, ...): for (N, T, ...) use batch_first=True"
        raise ValueError(
            f"{name} must have shape {tuple(shape)} (or (0,), which means zeros), "
            f"got {tuple(state.shape)}{hint}"
        )
    return _converted(name, state, weight)


def scalar_like(name: str, value: Any, x: Tensor, state: Sequence[int], spec: CellSpec) -> Tensor:
    """Check a threshold or graded factor, and return it in x's dtype and on x's device."""
    if is_number(value):
        return torch.full((), float(value), dtype=x.dtype, device=x.device)
    if isinstance(value, Tensor):
        tensor = value
        check_dense(name, tensor)
    else:  # a number has no device
        tensor = real_tensor(name, value).to(x.device)
    if tensor.dim():
        real_tensor(name, tensor)
        state_broadcast(name, tensor.shape, state, spec)
    if tensor.dtype == x.dtype and tensor.device == x.device:
        return tensor
    real_tensor(name, tensor)
    if tensor.device != x.device and tensor.dim():
        raise ValueError(f"{name} must be on x's device {x.device}, got one on {tensor.device}")
    return tensor.to(x.device, x.dtype)


def dtype_source(conv: Any, x: Any, default: Any) -> Tensor:
    """A tensor with the dtype and device of the user's conv: a parameter, x, or `default`."""
    for parameter in conv.parameters() if isinstance(conv, nn.Module) else ():
        if parameter.dtype in DTYPES:
            return parameter
    return x if isinstance(x, Tensor) and x.dtype in DTYPES else default


def weight_tensor(weight: Any) -> tuple[int, int]:
    """Check a weight, and return (Cin, C)."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor, got {weight!r}")
    if weight.dtype not in DTYPES:
        raise TypeError(f"weight must have one of the dtypes {NAMES_OF_DTYPES}, got {weight.dtype}")
    channels = weight.shape[0] // 4 if weight.dim() == 4 else 0
    if channels == 0 or weight.shape[0] % 4 or weight.shape[1] < channels:
        raise ValueError(f"weight must have shape (4C, Cin + C, kh, kw), got {tuple(weight.shape)}")
    return weight.shape[1] - channels, channels


def check_bias(bias: Any, weight: Tensor, gates: int) -> None:
    """Check a bias, (4C,), where `gates` is 4C; autocast accepts any floating dtype."""
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias must be a tensor or None, got {bias!r}")
    check_dense("bias", bias)
    if tuple(bias.shape) != (gates,):
        raise ValueError(f"bias must have shape ({gates},), got {tuple(bias.shape)}")
    casts = bias.is_floating_point() and autocast_dtype(weight.device.type) is not None
    if bias.dtype != weight.dtype and not casts:
        raise TypeError(f"bias must be {weight.dtype} like the weight, got {bias.dtype}")
    if bias.device != weight.device:
        raise ValueError(
            f"bias must be on weight's device {weight.device}, got one on {bias.device}"
        )
