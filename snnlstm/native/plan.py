"""A plan: both passes of equal calls. It owns their memory, their fields, and what one saves."""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..calls.call import Call, Outputs
from ..calls.entries import Entry
from ..calls.spec import DTYPES, POOLS, RESETS, CellSpec
from ..compat.torch_private import guard_of, matches
from . import lender
from .tensors import (
    image_strides,
    keep_empty,
    needs_no_copy,
    restored,
    strided,
    with_copies,
    with_time,
)

Shapes = Sequence[tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of each part of what is saved."""

ALIGNMENT = 64  # bytes, as torch aligns blocks; every vector's size divides it


class SavedLayout:
    """Where a forward pass stores what its backward pass needs besides its arguments.

    All of it lies in one block of bytes, which costs autograd the time of one tensor. Cp is the
    number of channels C, rounded up to whole vectors. The parts are

    - gates (T, N, Ho * Wo, 4 Cp), activated, of every step, in the kernels' own order
    - syn (T, N, Ho * Wo, Cp), after every step; on CUDA, after every step but the last
    - argmax (T, N, Hp * Wp, channels), for each pooled pixel, the row-major index of the pixel in
      its window that gets the gradient; (0,) without max_pool. uint8, or int32 where a window has
      more than 256 pixels.

    Gates and syn are whole vectors, so the part behind each of them is aligned.
    """

    def __init__(self, parts: Shapes) -> None:
        self.parts = parts
        self.bytes = 0
        self._offsets: list[Any] = []  # an int, or None for an empty part
        for shape, dtype in parts:
            size = math.prod(shape) * dtype.itemsize
            self._offsets.append(self.bytes if size else None)
            self.bytes += size

    def addresses(self, block: Tensor | None, step: int = 0) -> tuple[int, ...]:
        """Addresses of the parts, from `step` on; 0 for a part that is not saved."""
        if block is None:
            return 0, 0, 0
        start = block.data_ptr()
        if step == 0:
            gates, syn, argmax = self._offsets
            return (
                start + gates,
                0 if syn is None else start + syn,
                0 if argmax is None else start + argmax,
            )
        addresses = []
        for offset, (shape, dtype) in zip(self._offsets, self.parts, strict=True):
            is_saved = offset is not None and step < shape[0]
            bytes_before = step * math.prod(shape[1:]) * dtype.itemsize
            addresses.append(start + offset + bytes_before if is_saved else 0)
        return tuple(addresses)

    def part(self, block: Tensor, number: int) -> Tensor:
        """A part of a block, as a tensor of its own shape and dtype."""
        (shape, dtype), start = self.parts[number], self._offsets[number] or 0
        return block[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


Fields = tuple[Any, ...]
"""The core's arguments in a call: the fields of a struct of csrc/args.h, in its order."""


class Result(NamedTuple):
    """Outputs of a forward pass."""

    spk: Tensor
    syn: Tensor
    mem: Tensor
    saved: Tensor | None = None  # a block of a SavedLayout; None in inference
    name: str = ""  # names what ran, such as "cpu-avx2-winograd4-sparse"
    selection: Sequence[int] = ()  # the value-dependent facts, for the backward pass
    # The weight in the kernels' layouts, if a backward pass may use it; autograd saves tensors.
    packed: Any = None
    threshold: Tensor | None = None  # training's copy, which nobody modifies


class Gradients(NamedTuple):
    """Gradients of the arguments of a forward pass; None if not wanted."""

    x: Tensor | None
    syn: Tensor | None
    mem: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    threshold: Tensor | None


class BackwardInputs(NamedTuple):
    """The inputs of a backward pass."""

    call: Call
    views: Sequence[Any]  # addresses and strides of x, syn and mem
    saved: Tensor
    grads: Sequence[Tensor | None]  # the gradients of spk, syn and mem
    wanted: Sequence[bool] = ()  # whether each of Gradients is computed
    selection: Sequence[int] = ()  # as in the forward pass's Result
    packed: Any = None  # as in the forward pass's Result; None if it was not kept


def operands_of(call: Call, autocast: torch.dtype | None) -> torch.dtype | None:
    """The convolution's type under autocast, if that is a half type."""
    narrows = call.x.dtype == torch.float32 and autocast != torch.float32
    return autocast if narrows else None


class Sizes:
    """The static properties of a call: sizes, types, device.

    `operands` is the convolution's type under autocast, if that is a half type; `dtype` is that of
    the states, and `state_strides` are those of contiguous states. A step call has a `time` of 1.
    """

    def __init__(self, call: Call, spec: CellSpec, operands: torch.dtype | None) -> None:
        x = call.x
        self.spec, self.operands = spec, operands
        self.dtype, self.device = x.dtype, x.device
        self.sequence, self.record = call.sequence, call.record
        self.has_lengths = call.lengths is not None
        self.time = x.shape[0] if call.sequence else 1
        self.n, self.cin, self.h, self.w = x.shape[-4:]
        self.c, self.ho, self.wo = call.mem.shape[1:]
        pixels = self.ho * self.wo
        self.state = self.n, self.c, self.ho, self.wo
        self.state_strides = self.c * pixels, pixels, self.wo, 1
        self.thresholds = 1 if call.threshold is None else call.threshold.numel()

    def outputs(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of spk, and of syn and mem."""
        ph, pw = self.spec.pool_size
        time = (self.time,) if self.sequence else ()
        spk = (*time, self.n, self.c, self.ho // ph, self.wo // pw)
        if not self.spec.spiking and not time:
            spk = (0,)
        return spk, (*(time if self.record else ()), *self.state)

    def argmax(self, channels: int) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of the saved argmax, of images of `channels`."""
        ph, pw = self.spec.pool_size
        pixels = (self.time, self.n, (self.ho // ph) * (self.wo // pw), channels)
        dtype = torch.uint8 if ph * pw <= 256 else torch.int32
        return pixels if self.spec.pool == "max" else (0,), dtype


def make_cell(core: Any, s: Sizes) -> Any:
    """Describe a call to `core`, a module like snnlstm._C."""
    spec = s.spec
    surrogate = spec.surrogate
    return core.Cell(
        dtype=DTYPES.index(s.dtype),
        T=s.time,
        N=s.n,
        Cin=s.cin,
        C=s.c,
        H=s.h,
        W=s.w,
        kernel=spec.kernel_size,
        stride=spec.stride,
        dilation=spec.dilation,
        pool=POOLS.index(spec.pool),
        pool_size=spec.pool_size,
        reset=RESETS.index(spec.reset),
        surrogate=surrogate.kind,
        p0=surrogate.p0,
        p1=surrogate.p1,
        num_levels=0 if spec.quant is None else spec.quant.levels.numel(),
        spiking=spec.spiking,
    )


def gradient_memory(x: Tensor, s: Sizes) -> Sequence[tuple[Any, Any]]:
    """Shapes and strides of :class:`Gradients`; the threshold's is (C,), one number per channel."""
    gates, inputs, (kh, kw) = 4 * s.c, s.cin + s.c, s.spec.kernel_size
    weight = (gates, inputs, kh, kw), (inputs * kh * kw, kh * kw, kw, 1)
    shape, state = tuple(x.shape), (s.state, s.state_strides)
    strides = image_strides(x, shape)
    return (shape, strides), state, state, weight, ((gates,), (1,)), ((s.c,), (1,))


def empty_of(x: Tensor, largest: int) -> Any:
    """Return what makes a tensor like x from a shape and strides; large ones reuse blocks."""
    if largest < lender.MAPPED:
        return x.new_empty_strided
    return partial(lender.empty_result, dtype=x.dtype, device=x.device)


def empty_gradients(
    x: Tensor, memory: Sequence[tuple[Any, Any]], wanted: Sequence[bool], largest: int = 0
) -> Gradients:
    """Memory for the gradients that are wanted, of the shapes of :func:`gradient_memory`."""
    empty = empty_of(x, largest)
    return Gradients._make(
        [empty(*layout) if want else None for layout, want in zip(memory, wanted, strict=True)]
    )


class Plan(Sizes):
    """Both passes of the calls with the same sizes, strides and settings, in any thread.

    Attributes
    ----------
    spk_memory, state_memory : (shape, strides)
        Those of spk, and those of syn and mem.
    saved : SavedLayout
    passes : Passes
        The device's part (:mod:`~snnlstm.native.cpu`, :mod:`~snnlstm.native.cuda`): it makes the
        passes, and chooses and runs one for each call.
    reason : str or None
        Why the kernels cannot run the calls.
    """

    def __init__(self, entry: Entry, call: Call) -> None:
        spec, backend = entry.spec, entry.backend
        super().__init__(call, spec, operands_of(call, entry.autocast))
        self.backend = backend
        spk, state = self.outputs()
        self.spk_memory, self.state_memory = (
            (shape, image_strides(call.x, shape)) for shape in (spk, state)
        )
        self.saved = SavedLayout(backend.saved_shapes(self))
        self.largest_result = self._largest(self.spk_memory, self.state_memory)
        as_mem = tuple(call.mem.shape), call.mem.stride()
        self.results_like_mem = (
            self.spk_memory == self.state_memory == as_mem and self.largest_result < lender.MAPPED
        )
        # The core takes five strides; `out_strides` are those of the new syn and mem.
        strides = *(t.stride() for t in call[:3]), self.spk_memory[1], self.state_memory[1]
        self.x_strides, self.syn_strides, self.mem_strides, *results = map(with_time, strides)
        self.spk_strides, self.out_strides = results
        self._saved_shapes = [tuple(tensor.shape) for tensor in call[:3]]
        # It recognises the tensors of a backward pass that were saved as those of an earlier one.
        self._guard: Any = None
        self.gradient_memory = gradient_memory(call.x, self)
        self.largest_gradient = self._largest(*self.gradient_memory)
        self._gradient_strides = [with_time(strides) for _, strides in self.gradient_memory[:3]]
        self.threshold_stride = 0 if self.thresholds == 1 else 1
        # The kernels may be able to read bias, threshold and graded factor without a copy.
        self.needs_no_copy = needs_no_copy(call)
        self.has_spk = spec.spiking or self.sequence
        self.passes_gradient = spec.passes_gradient(self.sequence)
        self.passes = backend.passes(self, entry.settings)
        self.reason = self.passes.reason_against(entry.needs_grad)

    def _largest(self, *memory: tuple[Any, Any]) -> int:
        """Bytes of the largest tensor of these shapes."""
        return self.dtype.itemsize * max(math.prod(shape) for shape, _ in memory)

    def call_fields(
        self, views: Sequence[Any], call: Call, saved: Tensor | None, step: int = 0
    ) -> Fields:
        """The fields of PassArgs (csrc/args.h) from x on; each device adds those before.

        `views` are those of x, syn and mem. The saved parts begin at `step`.
        """
        _, _, _, _, _, threshold, graded, lengths, record = call
        return (
            *views,
            0 if threshold is None else threshold.data_ptr(),
            self.threshold_stride,
            0 if graded is None else graded.data_ptr(),
            0 if lengths is None else lengths.data_ptr(),
            record,
            *self.saved.addresses(saved, step),
        )

    def backward_fields(
        self, inputs: BackwardInputs, out: Gradients, last: Fields = (0, 0), step: int = 0
    ) -> Fields:
        """The fields of BackwardArgs from x on; `last` are d_gates and mem_after."""
        call, views, saved, grads = inputs[:4]
        (x, syn, mem, *others), (x_strides, syn_strides, mem_strides) = out, self._gradient_strides
        return (
            *self.call_fields(views, call, saved, step),
            *strided(*grads),
            None if x is None else (x.data_ptr(), x_strides),
            None if syn is None else (syn.data_ptr(), syn_strides),
            None if mem is None else (mem.data_ptr(), mem_strides),
            *[0 if other is None else other.data_ptr() for other in others],
            *last,
        )

    def restore(self, call: Call, saved: Tensor) -> tuple[Call, Tensor, Sequence[Any]]:
        """Restore the dtypes and shapes of a call and of what its forward pass saved.

        The third result has the pointers and strides of x, syn and mem. Hooks on saved tensors may
        have moved any of them to other memory.
        """
        if call.lengths is not None:
            lengths = restored(call.lengths, (self.n,), torch.int64, self.device)
            call = call._replace(lengths=lengths.contiguous())
        x, syn, mem, _, *numbers = call[:7]
        guarded = saved, x, syn, mem, *(t for t in numbers if t is not None)
        if self._guard is not None and matches(self._guard, guarded):
            x_at, syn_at, mem_at = x.data_ptr(), syn.data_ptr(), mem.data_ptr()
            if x_at and syn_at and mem_at and saved.data_ptr() % ALIGNMENT == 0:
                at = (x_at, self.x_strides), (syn_at, self.syn_strides), (mem_at, self.mem_strides)
                return call, saved, at
        block = restored(saved, (self.saved.bytes,), torch.uint8, self.device).contiguous()
        block = block.clone() if block.data_ptr() % ALIGNMENT else block
        states = [
            restored(tensor, shape, self.dtype, self.device)
            for tensor, shape in zip(call[:3], self._saved_shapes, strict=True)
        ]
        views = strided(*states)
        readable = with_copies(Call._make((*states, *call[3:])))
        strides = [self.x_strides, self.syn_strides, self.mem_strides]
        is_kept = all(map(operator.is_, (*readable, block), (*call, saved)))
        if self._guard is None and is_kept and strides == [view and view[1] for view in views]:
            self._guard = guard_of(guarded)
        return readable, block, views

    def forward(self, call: Call, save: bool) -> Result:
        """Run the forward kernels, and `save` what :meth:`backward` needs."""
        if not self.needs_no_copy:
            call = with_copies(call)
        x, syn, mem, bias = call.x, call.syn, call.mem, call.bias
        outs: Outputs
        if self.results_like_mem:  # empty_like takes two thirds of new_empty_strided's time
            outs = torch.empty_like(mem), torch.empty_like(mem), torch.empty_like(mem)
        else:
            empty, state = empty_of(x, self.largest_result), self.state_memory
            outs = empty(*self.spk_memory), empty(*state), empty(*state)
        saved = None
        if save:
            size = self.saved.bytes
            lent = size >= lender.SMALLEST and self.device.type == "cpu"
            kind = torch.uint8
            saved = lender.empty((size,), kind) if lent else x.new_empty(size, dtype=kind)
        bias_at = 0 if bias is None else bias.data_ptr()
        if not bias_at and bias is not None:
            raise ValueError("bias has no memory")
        x_at, syn_at, mem_at = x.data_ptr(), syn.data_ptr(), mem.data_ptr()
        views = (x_at, self.x_strides), (syn_at, self.syn_strides), (mem_at, self.mem_strides)
        spk, new_syn, new_mem = outs
        fields = (
            *self.call_fields(views, call, saved),
            bias_at,
            None,
            (spk.data_ptr(), self.spk_strides) if self.has_spk else None,
            (new_syn.data_ptr(), self.out_strides),
            (new_mem.data_ptr(), self.out_strides),
        )
        ran = self.passes.forward(call, outs, saved, fields)
        if call.lengths is not None and not call.record:
            keep_empty(call, outs[1:], (syn, mem))
        return Result(spk, new_syn, new_mem, saved, *ran)

    def backward(
        self,
        call: Call,
        saved: Tensor,
        grads: Sequence[Tensor | None],
        wanted: Sequence[bool],
        selection: Sequence[int],
        packed: Any,
    ) -> Gradients:
        """Run the backward kernels on what :meth:`forward` was given and saved.

        `grads`, of spk, syn and mem, may have any memory layout, and None stands for zeros.
        `wanted` says which gradients are computed, in the order of :class:`Gradients`. `selection`
        and `packed` are from the forward pass's result; `packed` may be None.
        """
        call, saved, views = self.restore(call, saved)
        inputs = BackwardInputs(call, views, saved, grads, wanted, selection, packed)
        out = empty_gradients(call.x, self.gradient_memory, wanted, self.largest_gradient)
        fields = self.backward_fields(inputs, out)
        out = self.passes.backward(inputs, out, fields)
        if call.lengths is not None:
            keep_empty(call, (out.syn, out.mem), (None, None) if call.record else grads[1:])
        if out.threshold is None or call.threshold is None:
            return out
        # The kernels compute one number per channel.
        total = out.threshold.sum() if self.thresholds == 1 else out.threshold
        return out._replace(threshold=total.reshape(call.threshold.shape).to(self.dtype))


class CommonBackend(ABC):
    """The kernels of a device type."""

    half_types: ClassVar[bool]
    """Whether float16 and bfloat16 run without conversion."""

    # What the backend adds to the settings.
    threads: ClassVar[Callable[[], int]] = int
    isa = ""
    tf32: Any = False

    passes: ClassVar[Any]
    """The class of its passes, made from a plan and the settings.

    ``reason_against(backward)`` says why no call can run, forward or also backward, and returns
    None if all can.
    ``forward(call, outs, saved, fields)`` fills in spk, syn, mem and what is saved, and
    returns a :class:`Result` from the name on. ``backward(inputs, out, fields)`` fills in and
    returns the gradients, the threshold's with one number per channel. `fields` are those from x
    on.
    """

    @abstractmethod
    def name(self) -> str:
        """Name of the kernels, as a path has it before a call has run."""

    @abstractmethod
    def saved_shapes(self, s: Sizes) -> Shapes:
        """Shapes and dtypes of what a forward pass saves."""

    @abstractmethod
    def leaky(self, fields: Fields, backward: bool, device: torch.device) -> None:
        """Run a pass of a Leaky with the arguments `fields` (csrc/args.h)."""
