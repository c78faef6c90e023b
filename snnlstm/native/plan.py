"""What the plans of both devices share: sizes, addresses, results and what is saved.

The core takes raw memory and allocates none; everything it reads and writes is a torch tensor
that its caller keeps alive while it runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..calls.call import Call, restored
from ..calls.keys import are_contiguous
from ..calls.spec import DTYPES, POOLS, RESETS, CellSpec
from ..compat.torch_private import guard_of
from ..surrogate import Surrogate
from . import pool
from .saved import ALIGNMENT, SavedLayout, Shapes


class Result(NamedTuple):
    """Outputs of a forward pass."""

    spk: Tensor
    syn: Tensor
    mem: Tensor
    saved: Tensor | None = None  # a block of a SavedLayout; None in inference
    name: str = ""  # names what ran, such as "cpu-avx2-winograd4-sparse"
    selection: Sequence[int] = ()  # the backward pass runs what the values selected here
    # The weight in the kernels' layouts, if a backward pass may use it; autograd saves a tensor.
    packed: Any = None
    threshold: Tensor | None = None  # training's copy, to which nobody writes


class Gradients(NamedTuple):
    """Gradients of the arguments of a forward pass; None where not wanted."""

    x: Tensor | None
    syn: Tensor | None
    mem: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    threshold: Tensor | None


class BackwardInputs(NamedTuple):
    """What a backward pass is given."""

    call: Call
    views: Sequence[Any]  # addresses and strides of x, syn and mem
    saved: Tensor
    grads: Sequence[Tensor | None]  # the gradients of spk, syn and mem
    noise: Tensor | None  # the stochastic surrogate's numbers
    wanted: Sequence[bool]  # whether each of Gradients is computed


class Sizes:
    """All that is static of a call: sizes, types, device.

    `operands` is the convolution's type under autocast, if it is a half type; `dtype` is that of
    the states, and `state_strides` are those of contiguous ones. A step call has a `time` of 1.
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

    def decisions(self, channels: int) -> Shapes:
        """Shapes and dtypes of the saved winner and argmax, of images of `channels`."""
        ph, pw = self.spec.pool_size
        pixels = (self.time, self.n, (self.ho // ph) * (self.wo // pw), channels)
        return (
            ((self.time, self.n) if self.spec.inhibition else (0,), torch.int64),
            (
                pixels if self.spec.pool == "max" else (0,),
                torch.uint8 if ph * pw <= 256 else torch.int32,
            ),
        )


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
        inhibition=spec.inhibition,
        num_levels=0 if spec.quant is None else spec.quant.levels.numel(),
        spiking=spec.spiking,
    )


# ---- tensors that the core reads ------------------------------------------------------------


def readable(tensor: Tensor, name: str = "a tensor") -> Tensor:
    """The tensor, detached, for torch to read: a read of freed memory would end the process."""
    if tensor.numel() and not tensor.data_ptr():
        raise ValueError(f"{name} must have memory, got a tensor whose storage is empty")
    return tensor.detach()


def contiguous_as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor, or a copy whose memory holds its numbers in order, without gaps, in `dtype`."""
    if tensor.dtype == dtype and tensor.is_contiguous() and not tensor.is_neg():
        return tensor
    return readable(tensor).resolve_neg().to(dtype).contiguous()


def pointer(tensor: Tensor | None) -> int:
    """Address of the tensor's numbers; 0 if there is no tensor."""
    return 0 if tensor is None else tensor.data_ptr()


def strided(tensor: Tensor | None) -> tuple[int, tuple[int, ...]] | None:
    """Address and five strides; None if there is no tensor, or an empty one."""
    if tensor is None or not (address := tensor.data_ptr()):
        return None
    return address, with_time(tensor.stride())


def with_time(strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of time, batch, channel, row and column: that of time is 0 where there is none."""
    return strides if len(strides) == 5 else (0, *strides)


def check_memory(call: Call) -> None:
    """Refuse tensors with numbers but no memory: their storage was freed, or never made."""
    for name, tensor in zip((*Call._fields[:6], "graded_spikes_factor"), call[:7], strict=True):
        if tensor is not None:
            readable(tensor, name)


def keep_empty(call: Call, outs: Sequence[Tensor | None], values: Sequence[Tensor | None]) -> None:
    """Give samples without a step those of `values`, or 0: the kernels skip such samples."""
    assert call.lengths is not None
    empty = (call.lengths == 0)[:, None, None, None]
    if empty.device.type == "cpu" and not empty.any():
        return
    for out, value in zip(outs, values, strict=True):
        if out is not None:
            out.copy_(torch.where(empty, 0 if value is None else value, out))


# ---- memory -----------------------------------------------------------------------------------


def empty_bytes(count: int, device: torch.device | str = "cpu") -> Tensor:
    """Uninitialised memory that only the kernels use."""
    return torch.empty(count, dtype=torch.uint8, device=device)


def image_strides(x: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of an output of `shape` ending in (C, H, W), in the order of x's.

    Images are channels-last where x's are, and time lies within the batch where it does in x. A
    stride of 0, as expanded tensors have, is no order.
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


def gradient_memory(x: Tensor, s: Sizes) -> Sequence[tuple[Any, Any]]:
    """Shapes and strides of :class:`Gradients`; the threshold's is one number a channel, (C,)."""
    gates, inputs, (kh, kw) = 4 * s.c, s.cin + s.c, s.spec.kernel_size
    weight = (gates, inputs, kh, kw), (inputs * kh * kw, kh * kw, kw, 1)
    shape, state = tuple(x.shape), (s.state, s.state_strides)
    strides = image_strides(x, shape)
    return (shape, strides), state, state, weight, ((gates,), (1,)), ((s.c,), (1,))


def empty_gradients(
    x: Tensor, memory: Sequence[tuple[Any, Any]], wanted: Sequence[bool], pooled: bool = False
) -> Gradients:
    """Memory for the gradients that are wanted, of the shapes of :func:`gradient_memory`.

    Large gradients that are `pooled` lie in blocks that are used again.
    """
    empty: Any = x.new_empty_strided
    if pooled:
        empty = partial(pool.empty_result, dtype=x.dtype, device=x.device)
    return Gradients._make(
        [empty(*layout) if want else None for layout, want in zip(memory, wanted, strict=True)]
    )


class CommonPlan(Sizes, ABC):
    """All that follows for a call from its sizes, its strides and the process's settings.

    It serves all such calls, in any thread. This is the part on which both devices agree.

    Attributes
    ----------
    spk_memory, state_memory : (shape, strides)
        Those of spk, and those of syn and mem.
    saved : SavedLayout
    """

    def __init__(
        self,
        backend: CommonBackend,
        call: Call,
        spec: CellSpec,
        operands: torch.dtype | None,
    ) -> None:
        super().__init__(call, spec, operands)
        self.work = operands or self.dtype  # torch convolves in this dtype
        spk, state = self.outputs()
        self.spk_memory, self.state_memory = (
            (shape, image_strides(call.x, shape)) for shape in (spk, state)
        )
        self.saved = SavedLayout(backend.saved_shapes(self))
        (_, gates_dtype), (syn, _), *_ = self.saved.parts
        # The gate sums that torch forms have this dtype, and so has their gradient, d_gates.
        self.sums_dtype = gates_dtype
        self.d_gates_shape = self.time, *syn[1:3], 4 * syn[3]
        as_mem = tuple(call.mem.shape), call.mem.stride()
        self.results_like_mem = self.spk_memory == self.state_memory == as_mem
        # The core takes five strides; `out_strides` are those of the new syn and mem.
        self.x_strides, self.syn_strides, self.mem_strides, self.spk_strides, self.out_strides = (
            with_time(strides)
            for strides in (
                call.x.stride(), call.syn.stride(), call.mem.stride(),
                self.spk_memory[1], self.state_memory[1],
            )
        )  # fmt: skip
        self._saved_as = [(t.shape, self.dtype, self.device) for t in call[:3]]
        self._guard: Any = None  # knows x, syn, mem and the saved block of a call before
        self.gradient_memory = gradient_memory(call.x, self)
        self._gradient_strides = [with_time(strides) for _, strides in self.gradient_memory[:3]]
        self.threshold_stride = 0 if self.thresholds == 1 else 1
        # Bias, threshold and graded factor may already be as the kernels read them.
        self.are_contiguous = are_contiguous(call)
        self.has_spk = spec.spiking or self.sequence
        self.passes_gradient = spec.passes_gradient(self.sequence)

    def empty_results(self, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """Memory for spk, syn and mem."""
        x, like, empty = call.x, call.mem, torch.empty_like
        if self.results_like_mem:  # empty_like takes two thirds of new_empty_strided's time
            return empty(like), empty(like), empty(like)
        strided, spk, state = x.new_empty_strided, self.spk_memory, self.state_memory
        return strided(*spk), strided(*state), strided(*state)

    def restore(self, call: Call, saved: Tensor) -> tuple[Call, Tensor, Sequence[Any]]:
        """The call and what its forward pass saved, in their dtypes and shapes again.

        The third result are pointers and strides of x, syn and mem. Hooks on saved tensors may have
        brought any of them back in other memory.
        """
        if call.lengths is not None:
            lengths = restored(call.lengths, (self.n,), torch.int64, self.device)
            call = call._replace(lengths=lengths.contiguous())
        x, syn, mem = tensors = call[:3]
        if self._guard is not None and self._guard.check(x, syn, mem, saved):
            x_at, syn_at, mem_at = x.data_ptr(), syn.data_ptr(), mem.data_ptr()
            if x_at and syn_at and mem_at and saved.data_ptr() % ALIGNMENT == 0:
                at = (x_at, self.x_strides), (syn_at, self.syn_strides), (mem_at, self.mem_strides)
                return call, saved, at
        block = self.restored_block(saved, self.saved.bytes)
        x, syn, mem = (restored(t, *kind) for t, kind in zip(tensors, self._saved_as, strict=True))
        views = [*map(strided, (x, syn, mem))]
        strides = self.x_strides, self.syn_strides, self.mem_strides
        if (
            self._guard is None
            and block is saved
            and strides == tuple(view and view[1] for view in views)
        ):
            self._guard = guard_of((x, syn, mem, saved))
        return call._replace(x=x, syn=syn, mem=mem), block, views

    def restored_block(self, saved: Tensor, size: int) -> Tensor:
        """A saved block of `size` bytes, as :meth:`restore` returns tensors."""
        block = restored(saved, (size,), torch.uint8, self.device).contiguous()
        return block.clone() if block.data_ptr() % ALIGNMENT else block

    def restored_weight(self, call: Call) -> Tensor:
        """The weight that a backward pass was given, as :meth:`restore` returns tensors."""
        return restored(call.weight, self.gradient_memory[3][0], self.dtype, self.device)

    def gradient_addresses(
        self, grads: Sequence[Tensor | None], noise: Tensor | None, out: Gradients
    ) -> tuple[Any, ...]:
        """The last part of a backward pass's addresses, but d_gates and mem_after."""
        (x, syn, mem, *others), (x_strides, syn_strides, mem_strides) = out, self._gradient_strides
        return (
            strided(noise), *map(strided, grads),
            None if x is None else (x.data_ptr(), x_strides),
            None if syn is None else (syn.data_ptr(), syn_strides),
            None if mem is None else (mem.data_ptr(), mem_strides), *map(pointer, others),
        )  # fmt: skip

    @abstractmethod
    def forward(self, call: Call, training: bool) -> Result:
        """Run the forward kernels; in training, save what :meth:`backward` needs."""

    @pool.where_it_fits
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
        and `packed` are the forward pass's result's; `packed` may be None.
        """
        call, saved, views = self.restore(call, saved)
        noise = stochastic_noise(self.spec.surrogate, grads[0], self.sequence)
        out = self._backward(
            BackwardInputs(call, views, saved, grads, noise, wanted), selection, packed
        )
        if call.lengths is not None:
            keep_empty(call, (out.syn, out.mem), (None, None) if call.record else grads[1:])
        if out.threshold is None or call.threshold is None:
            return out
        # The kernels form one number a channel.
        total = out.threshold.sum() if self.thresholds == 1 else out.threshold
        return out._replace(threshold=total.reshape(call.threshold.shape).to(self.dtype))

    @abstractmethod
    def _backward(self, given: BackwardInputs, selection: Sequence[int], packed: Any) -> Gradients:
        """The gradients that are wanted; that of the threshold has one number a channel, (C,)."""


class CommonBackend(ABC):
    """The kernels of a device type."""

    half_types: ClassVar[bool]
    """Whether float16 and bfloat16 run as they are."""

    plan: ClassVar[Any]
    """The class of its plans, whose arguments are those of :class:`CommonPlan` and the settings."""

    @abstractmethod
    def name(self) -> str:
        """Name of the kernels, as a path has it before a call has run."""

    @abstractmethod
    def settings(self, algorithm: str) -> tuple[Any, ...]:
        """The backend, and the process's settings that a plan depends on."""

    @abstractmethod
    def reason_against(self, s: Sizes) -> str | None:
        """Why these kernels cannot run a call; None if they can."""

    @abstractmethod
    def saved_shapes(self, s: Sizes) -> Shapes:
        """Shapes and dtypes of what a forward pass saves."""

    @abstractmethod
    def leaky(self, fields: tuple[Any, ...], backward: bool, device: torch.device) -> None:
        """Run a pass of a Leaky, whose arguments are `fields` (csrc/args.h)."""


def stochastic_noise(
    surrogate: Surrogate, grad_spk: Tensor | None, sequence: bool
) -> Tensor | None:
    """Uniform numbers of the stochastic surrogate, contiguous and like the gradient, else None.

    They are drawn one block a step, last step first, each in the order of the dimensions, as in a
    loop over steps on the reference path.
    """
    if grad_spk is None or surrogate.name != "SSO":
        return None
    noise = torch.empty_like(grad_spk, memory_format=torch.contiguous_format)
    for step in reversed(noise.unbind()) if sequence else (noise,):
        step.uniform_()
    return noise
