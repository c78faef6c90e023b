"""One call of a cell: its checked tensors, and all that is known of them without their values.

:func:`checked_call` checks every tensor of a call (:mod:`snnlstm.checks`), and :func:`make_call`
makes a :class:`Call` of tensors that have been checked. Nothing is modified before all checks have
passed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .checks import (
    SIZES,
    autocast_dtype,
    check_dense,
    input_tensor,
    scalar_like,
    state_shape,
    state_tensor,
    weight_tensors,
)
from .lengths import checked
from .options import CellOptions, flag, in_time, make_options

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
    record: Any,
    lengths: Any,
    traced: bool,
    batch_first: bool = False,
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
            f"record=True needs a sequence: x of shape (T, N, Cin, {SIZES[dims]}), got one step"
        )
    if lengths is not None:
        if not sequence:
            raise ValueError(
                f"lengths needs a sequence: x of shape (T, N, Cin, {SIZES[dims]}), got one step"
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
