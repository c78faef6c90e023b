"""One call of a cell: its checked tensors, and all that is known of them without their values.

:func:`checked_call` checks every tensor of a call, and :func:`make_call` makes a :class:`Call` of
tensors that have been checked. A check returns the tensor in its normal form or raises: TypeError
for a wrong type or dtype, ValueError for a wrong shape, value or device. The message names the
argument, what came and what is accepted. Nothing is modified before all checks have passed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .lengths import checked
from .options import DTYPES, NAMES_OF_DTYPES, CellOptions, flag, in_time, make_options
from .surrogate import is_number

__all__ = ["Call", "Signature", "checked_call", "make_call"]

PLAIN = (Tensor, nn.Parameter)


class Signature:
    """All that is known of a call without looking at values: options, shapes, dtypes, device.

    :func:`make_call` finds one object for equal calls. ``notes`` has what follows from it: the
    plans, by strides and settings, and the reason for a fallback. Neither grows beyond a bound.

    Attributes
    ----------
    options : CellOptions
        Its ``operands`` say what autocast asks for.
    dtype, device, device_type
        Those of the states.
    time, n, cin, h, w, c, ho, wo : int
        Steps (1 for a step call), and the sizes of x and of the states.
    input : tuple of ints
        Shape of x.
    state, state_strides : (int, int, int, int)
        Shape of syn and mem, and its strides where they are contiguous.
    thresholds : int
        How many numbers the threshold has.
    """

    def __init__(
        self, x: Tensor, mem: Tensor, threshold: Tensor, options: CellOptions, autocast: Any
    ) -> None:
        narrow = autocast if x.dtype == torch.float32 and autocast != torch.float32 else None
        self.options = replace(options, operands=narrow) if narrow else options
        self.dtype, self.device, self.device_type = x.dtype, x.device, x.device.type
        self.time = x.shape[0] if options.sequence else 1
        self.n, self.cin, self.h, self.w = x.shape[-4:]
        self.input = tuple(x.shape)
        self.c, self.ho, self.wo = mem.shape[1:]
        pixels = self.ho * self.wo
        self.state = self.n, self.c, self.ho, self.wo
        self.state_strides = self.c * pixels, pixels, self.wo, 1
        self.thresholds = threshold.numel()
        self.notes: dict[Any, Any] = {}


_MOST = 1024  # signatures are kept; one more, and all are forgotten
_signatures: dict[tuple[Any, ...], Signature] = {}


def version(tensor: Tensor) -> int:
    """How often a tensor was written to in place; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast computes in on a device type; None where autocast is off."""
    # torch raises an error if it is asked about a device that has no autocast.
    known = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)
    if known and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]
"""x, syn, mem, weight, bias, threshold and graded: the first fields of a :class:`Call`."""


class Call(NamedTuple):
    """One call of a cell, its arguments checked: what travels from the module to the kernels."""

    x: Tensor  # (N, Cin, H, W), or (T, N, Cin, H, W) with options.sequence
    syn: Tensor  # (N, C, Ho, Wo), as mem: before the first step, of x's dtype and device
    mem: Tensor
    weight: Tensor  # (4C, Cin + C, kh, kw), gates in the order i, f, o, g
    bias: Tensor | None  # (4C,)
    # These broadcast to mem's shape and to the pooled one. Nobody reads those of a cell that does
    # not spike.
    threshold: Tensor
    graded: Tensor
    options: CellOptions
    signature: Signature = None  # type: ignore[assignment]  # None while torch.compile traces
    # The module that takes the place of the convolution, (N, Cin + C, H, W) to (N, 4C, H, W), and
    # the reason why it is called. The kernels run the convolution where the reason is None.
    conv: Callable[[Tensor], Tensor] | None = None
    reason: str | None = None
    # The cell's methods, if a subclass or the cell itself overrides them.
    fire: Callable[[Tensor], Tensor] | None = None
    mem_reset: Callable[[Tensor], Tensor] | None = None
    lengths: Tensor | None = None  # (N,) int64, the steps of each sample; None: all have T

    @property
    def traced(self) -> bool:
        """Whether torch.compile traces the call."""
        return self.signature is None


def _key(tensors: Tensors, options: CellOptions, autocast: bool) -> tuple[Any, ...]:
    """What tells the signatures of calls apart. An argument that is no tensor: AttributeError."""
    x, syn, mem, weight, bias, threshold, graded = tensors
    device = x.device
    counts = autocast and torch._C._is_any_autocast_enabled()
    return (
        options, x.shape, x.dtype, device, syn.shape, syn.dtype, syn.device,
        mem.shape, mem.dtype, mem.device, weight.shape, weight.dtype, weight.device,
        threshold.shape, threshold.dtype, threshold.device, graded.shape, graded.dtype,
        graded.device, None if bias is None else (bias.shape, bias.dtype, bias.device),
        autocast_dtype(device.type) if counts else None,
    )  # fmt: skip


def known_call(tensors: Tensors, options: CellOptions) -> Call | None:
    """A call of tensors that have not been checked, if a call like it was; else None.

    An argument that is no tensor raises AttributeError.
    """
    signature = _signatures.get(_key(tensors, options, True))
    return None if signature is None else Call(*tensors, options, signature)


def make_call(
    tensors: Tensors, options: CellOptions, *, autocast: bool = True, **foreign: Any
) -> Call:
    """A call of tensors that have been checked, or are known to fit together.

    `autocast` says whether torch's autocast counts, and `foreign` has fields behind the signature.
    """
    key = _key(tensors, options, autocast)
    x, _, mem, _, _, threshold, _ = tensors
    plain = type(x) in PLAIN
    signature = _signatures.get(key) if plain else None
    if signature is None:
        signature = Signature(x, mem, threshold, options, key[-1])
        # A foreign conv may have a weight of another shape. The sizes of subclasses of tensors may
        # be symbols. Foreign callables, whose options have no text, are not kept alive.
        if plain and foreign.get("reason") is None and options.text:
            if len(_signatures) >= _MOST:
                _signatures.clear()
            _signatures[key] = signature
    return Call(*tensors, options, signature, **foreign)


def checked_call(
    x: Any,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Any,
    graded: Any,
    channels: tuple[int, int],
    options_of: Callable[[bool, bool], CellOptions],
    state_of: Callable[[str, tuple[int, ...], Tensor], Tensor],
    foreign_of: Callable[[CellOptions], dict[str, Any]] | None = None,
    *,
    record: Any = False,
    lengths: Any = None,
    batch_first: bool = False,
    traced: bool = False,
    dims: int = 2,
    name: str = "x",
) -> Call:
    """Check every tensor of a call, and make it.

    `channels` are Cin and C. `options_of` returns the options by (sequence, record), `state_of` the
    state of a name for a shape and the checked x, and `foreign_of` the fields behind the signature.
    `traced` says whether torch.compile traces the call, and `name` is that of x in errors. With a
    `dims` of 1 all tensors but the weight have a length L in the place of H and W.
    """
    if batch_first and isinstance(x, Tensor) and x.dim() == dims + 3:
        x = x.transpose(0, 1)
    x = input_tensor(x, weight, channels[0], batch_first, dims, name)
    sequence = x.dim() == dims + 3
    if flag("record", record) and not sequence:
        raise ValueError(
            f"record=True needs a sequence: x of shape (T, N, Cin, {_SIZES[dims]}), got one step"
        )
    if lengths is not None:
        if not sequence:
            raise ValueError(
                f"lengths needs a sequence: x of shape (T, N, Cin, {_SIZES[dims]}), got one step"
            )
        lengths = checked(lengths, x.shape[0], x.shape[1], x.device, traced)
    options = options_of(sequence, bool(record))
    shape = state_shape(x, channels[1], options, dims)
    syn, mem = state_of("syn", shape, x), state_of("mem", shape, x)
    if options.spiking:
        threshold = scalar_like("threshold", threshold, x, shape, options)
        graded = scalar_like("graded_spikes_factor", graded, x, shape, options)
    else:
        threshold = graded = x.new_empty(())
    if bias is not None:
        check_dense("bias", bias)
    if dims == 1:
        x, syn, mem, threshold, graded = map(as_image, (x, syn, mem, threshold, graded))
    tensors = x, syn, mem, weight, bias, threshold, graded
    foreign = {"lengths": lengths} | ({} if foreign_of is None else foreign_of(options))
    if traced:
        return Call(*tensors, options, **foreign)
    return make_call(tensors, options, **foreign)


def stateless_call(
    x: Any,
    syn: Any = None,
    mem: Any = None,
    weight: Any = None,
    bias: Any = None,
    *,
    threshold: Any = 1.0,
    graded_spikes_factor: Any = 1.0,
    record: Any = False,
    lengths: Any = None,
    batch_first: Any = False,
    **described: Any,
) -> Call:
    """Check every argument of :func:`snnlstm.functional.sconv2dlstm`, which documents them.

    `described` are arguments of :func:`snnlstm.options.make_options`.
    """
    traced = torch.compiler.is_compiling()
    channels, states = weight_tensors(weight, bias), {"syn": syn, "mem": mem}
    options = make_options(tuple(weight.shape[2:]), traced=traced, **described)
    return checked_call(
        x, weight, bias, threshold, graded_spikes_factor, channels,
        lambda sequence, record: in_time(options, sequence, record, traced),
        lambda name, shape, x: state_tensor(name, states[name], shape, x, weight),
        record=record, lengths=lengths, batch_first=flag("batch_first", batch_first),
        traced=traced,
    )  # fmt: skip


def in_order_of_caller(
    options: CellOptions, batch_first: bool, spk: Tensor, syn: Tensor, mem: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The results, with the batch before time if the caller's sequences have it so."""
    if not batch_first or not options.sequence:
        return spk, syn, mem
    if options.record:
        syn, mem = syn.transpose(0, 1), mem.transpose(0, 1)
    return spk.transpose(0, 1), syn, mem


def as_image(tensor: Tensor) -> Tensor:
    """(..., L) as images of height 1, (..., 1, L); one number, or L of them, broadcast already."""
    return tensor.unsqueeze(-2) if tensor.dim() > 1 else tensor


# ---- checks of tensors ---------------------------------------------------------------------------

# What stands behind the channels in a shape, by the dimensions of an image.
_SIZES = {1: "L", 2: "H, W"}


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
            f"{name} must broadcast to mem's shape (N, {channels}, {_SIZES[dims]}), "
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
        rest = f"{in_channels}, {_SIZES[dims]}"
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
