"""Tensors as the core sees them: addresses and strides, and the memory of results.

The core takes raw memory and allocates none; everything it reads and writes is a torch tensor
that its caller keeps alive while it runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call import Call, Signature
from ..options import DTYPES, POOLS, RESETS, CellOptions
from . import pool

__all__ = ["Gradients", "Result", "Saved"]


Shapes = Sequence[tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of each tensor of a :class:`Saved`."""


class Saved(NamedTuple):
    """What a forward pass saves for its backward pass, beside its arguments.

    Cp is the number of channels C, rounded up to whole vectors.
    """

    gates: Tensor  # (T, N, Ho * Wo, 4 Cp), activated, of every step, in the kernels' own order
    syn: Tensor  # (T, N, Ho * Wo, Cp), after every step; on CUDA, after every step but the last
    winner: Tensor  # (T, N) int64, the neuron that inhibition let through; (0,) without inhibition
    # For each pooled pixel, in the kernels' own order, the number of the pixel of its window that
    # gets the gradient, row by row; (0,) without max_pool. uint8, or int32 where a window has more
    # than 256 pixels.
    places: Tensor


class Result(NamedTuple):
    """Outputs of a forward pass."""

    spk: Tensor
    syn: Tensor
    mem: Tensor
    saved: Sequence[Tensor] = ()  # a Saved, in inference nothing; checkpoint=True saves states
    name: str = ""  # of what ran, such as "cpu-avx2-winograd4-sparse"
    decided: int = 0  # what values decided, which the backward pass is told
    packed: Any = None  # the weight as the kernels read it, if that is kept


def as_saved(tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """What came back for a tensor that was saved, in its dtype again.

    Hooks on saved tensors, and assignments to ``.data``, may have changed dtype, shape or memory.
    """
    if tensor.shape != shape:
        raise RuntimeError(
            f"a saved tensor has come back as {tuple(tensor.shape)}, not {tuple(shape)}: what was "
            "saved for the backward pass must keep its shape"
        )
    return tensor if tensor.dtype is dtype and not tensor.is_neg() else plain(tensor).to(dtype)


def saved_weight(call: Call) -> Tensor:
    """The weight that a backward pass was given, as :func:`as_saved` returns it."""
    s = call.signature
    return as_saved(call.weight, (4 * s.c, s.cin + s.c, *s.options.kernel_size), s.dtype)


class Gradients(NamedTuple):
    """Gradients of the arguments of a forward pass; None where not wanted."""

    x: Tensor | None
    syn: Tensor | None
    mem: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    threshold: Tensor | None


class Pass(NamedTuple):
    """What a backward pass on CUDA, or behind torch's convolution, is given.

    `parameters` holds the addresses that every kernel takes, by the names of the core's arguments;
    `grads` the gradients of spk, syn and mem; `noise` the stochastic surrogate's numbers.
    """

    call: Call
    parameters: dict[str, int]
    saved: Saved
    grads: Sequence[Tensor | None]
    noise: Tensor | None


def make_cell(core: Any, signature: Signature) -> Any:
    """Describe a call to `core`, a module like snnlstm._C."""
    s, options = signature, signature.options
    surrogate = options.surrogate
    return core.Cell(
        dtype=DTYPES.index(s.dtype),
        T=s.time,
        N=s.n,
        Cin=s.cin,
        C=s.c,
        H=s.h,
        W=s.w,
        kernel=options.kernel_size,
        stride=options.stride,
        dilation=options.dilation,
        pool=POOLS.index(options.pool),
        pool_size=options.pool_size,
        reset=RESETS.index(options.reset),
        surrogate=surrogate.kind,
        p0=surrogate.p0,
        p1=surrogate.p1,
        inhibition=options.inhibition,
        num_levels=0 if options.quant is None else options.quant.levels.numel(),
        spiking=options.spiking,
    )


# ---- addresses ------------------------------------------------------------------------------


def plain(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of a lazily negated one, whose memory holds the negated numbers."""
    return tensor.resolve_neg() if tensor.is_neg() else tensor


def view(tensor: Tensor | None) -> tuple[int, tuple[int, ...]] | None:
    """Address and five strides; None if there is no tensor, or an empty one."""
    if tensor is None or not (address := tensor.data_ptr()):
        return None
    return address, five(tensor.stride())


def five(strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of time, batch, channel, row and column: that of time is 0 where there is none."""
    return strides if len(strides) == 5 else (0, *strides)


def address(tensor: Tensor | None) -> int:
    """Address of the tensor's numbers; 0 if there is no tensor."""
    return 0 if tensor is None else tensor.data_ptr()


def no_memory(**tensors: Tensor | None) -> str:
    """Which of some tensors have numbers but no memory: their storage was freed, or never made."""
    names = [n for n, t in tensors.items() if t is not None and t.numel() and not t.data_ptr()]
    return f"{' and '.join(names)} must have memory, got a tensor whose storage is empty"


def numbers(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor, or a contiguous copy of `dtype` if it is not contiguous or of another dtype."""
    if tensor.dtype == dtype and tensor.is_contiguous() and not tensor.is_neg():
        return tensor
    return plain(tensor.detach()).to(dtype).contiguous()


def backward_arguments(
    call: Call,
    saved: Saved,
    grads: Sequence[Tensor | None],
    noise: Tensor | None,
    out: Gradients,
) -> dict[str, Any]:
    """What both backends' backward kernels take by name, but weight, neurons and workspace."""
    grad_spk, grad_syn, grad_mem = grads
    return {
        "record": call.options.record,
        "x": view(call.x),
        "syn0": view(call.syn),
        "mem0": view(call.mem),
        "saved_gates": saved.gates.data_ptr(),
        "saved_syn": saved.syn.data_ptr(),
        "winner": saved.winner.data_ptr(),
        "places": saved.places.data_ptr(),
        "noise": view(noise),
        "grad_spk": view(grad_spk),
        "grad_syn": view(grad_syn),
        "grad_mem": view(grad_mem),
        "grad_x": view(out.x),
        "grad_syn0": view(out.syn),
        "grad_mem0": view(out.mem),
        "grad_weight": address(out.weight),
        "grad_bias": address(out.bias),
        "grad_threshold": address(out.threshold),
    }


def by_length(call: Call) -> tuple[dict[str, int], Sequence[Tensor]]:
    """Addresses of the samples' lengths and of the samples, longest first, and what holds them."""
    if call.lengths is None:
        return {}, ()
    held = call.lengths, call.lengths.argsort(descending=True, stable=True)
    return dict(zip(("lengths", "order"), map(address, held), strict=True)), held


def keep_empty(call: Call, outs: Sequence[Tensor | None], values: Sequence[Tensor | None]) -> None:
    """Give samples without a step those of `values`, or 0: the kernels leave such samples out."""
    assert call.lengths is not None
    empty = (call.lengths == 0)[:, None, None, None]
    if empty.device.type == "cpu" and not empty.any():
        return
    for out, value in zip(outs, values, strict=True):
        if out is not None:
            out.copy_(torch.where(empty, 0 if value is None else value, out))


# ---- memory -----------------------------------------------------------------------------------


def empty_bytes(count: int, device: torch.device | str = "cpu") -> Tensor:
    """Memory for the kernels alone, uninitialised."""
    return torch.empty(count, dtype=torch.uint8, device=device)


def image_strides(x: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of an output of `shape` ending in (C, H, W), in the order of x's.

    Images are channels-last where x's are, and time lies within the batch where it does in x.
    """
    if len(shape) == 1:
        return (1,)
    *lead, c, h, w = shape
    channels_last = x.stride(-3) == 1 and x.shape[-3] != 1 and not x.is_contiguous()
    strides = [1, w * c, c] if channels_last else [h * w, w, 1]
    size = c * h * w
    if len(lead) == 2 and x.dim() == 5 and x.stride(0) < x.stride(1):
        return size, size * lead[0], *strides
    for count in reversed(lead):
        strides.insert(0, size)
        size *= count
    return tuple(strides)


@pool.where_it_fits
def empty_like_images(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An output of `shape` ending in (C, H, W), or (0,), uninitialised."""
    return x.new_empty_strided(shape, image_strides(x, shape))


def output_shapes(signature: Signature) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of spk, and of syn and mem."""
    s, (ph, pw) = signature, signature.options.pool_size
    time = (s.time,) if s.options.sequence else ()
    spk = (*time, s.n, s.c, s.ho // ph, s.wo // pw)
    if not s.options.spiking and not time:
        spk = (0,)
    return spk, (*(time if s.options.record else ()), s.n, s.c, s.ho, s.wo)


@pool.where_it_fits
def empty_gradients(x: Tensor, signature: Signature, wanted: Sequence[bool]) -> Gradients:
    """Memory for the gradients that are wanted; the threshold's is one number a channel, (C,)."""
    s, gates = signature, 4 * signature.c
    state, strides = s.state, s.state_strides
    of_x, of_syn, of_mem, of_weight, of_bias, of_threshold = wanted
    return Gradients(
        empty_like_images(x, tuple(x.shape)) if of_x else None,
        x.new_empty_strided(state, strides) if of_syn else None,
        x.new_empty_strided(state, strides) if of_mem else None,
        x.new_empty((gates, s.cin + s.c, *s.options.kernel_size)) if of_weight else None,
        x.new_empty_strided((gates,), (1,)) if of_bias else None,
        x.new_empty_strided((s.c,), (1,)) if of_threshold else None,
    )


def of_decisions(signature: Signature, channels: int) -> Shapes:
    """Shapes and dtypes of :class:`Saved`'s winner and places, of images of so many channels."""
    s, (ph, pw) = signature, signature.options.pool_size
    pixels = (s.time, s.n, (s.ho // ph) * (s.wo // pw), channels)
    return (
        ((s.time, s.n) if s.options.inhibition else (0,), torch.int64),
        (
            pixels if s.options.pool == "max" else (0,),
            torch.uint8 if ph * pw <= 256 else torch.int32,
        ),
    )


def shaped_as(threshold: Tensor, out: Gradients) -> Gradients:
    """The gradients; the threshold's, one number a channel, gets the shape of the threshold."""
    if out.threshold is None:
        return out
    total = out.threshold.sum() if threshold.numel() == 1 else out.threshold
    return out._replace(threshold=total.reshape(threshold.shape).to(threshold.dtype))


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dimension + 1 :]) for dimension in range(len(shape)))


class CommonPlan:
    """All that follows for a call from its signature, its strides and the process's settings.

    Attributes
    ----------
    spk, state : (shape, strides)
        Those of spk, and those of syn and mem.
    saved_shapes : Shapes
    """

    def __init__(self, backend: Any, call: Call) -> None:
        s = self.signature = call.signature
        o = s.options
        self.work = o.operands or s.dtype  # in which torch convolves
        self.spk, self.state = ((shape, image_strides(call.x, shape)) for shape in output_shapes(s))
        self.saved_shapes = (gates, of_gates), (syn, _), *decisions = backend.saved_shapes(s)
        # Given strides, torch allocates a tensor in two thirds of the time.
        self._gates, self._syn = ((t, _contiguous_strides(t)) for t in (gates, syn))
        self._of_gates = {} if of_gates is s.dtype else {"dtype": of_gates}
        # Of the gate sums where torch forms them, and of their gradient: (T, N, Ho * Wo, 4 Cp).
        self.of_sums = of_gates if of_gates.is_floating_point else s.dtype
        self.d_gates = s.time, *syn[1:3], 4 * syn[3]
        with torch.inference_mode(False):  # all calls share what is empty
            self._decisions = [
                (shape, dtype, None if math.prod(shape) else call.x.new_empty(shape, dtype=dtype))
                for shape, dtype in decisions
            ]
        # The core takes five strides. A step of a cell that does not spike has no spk.
        self.x5, self.syn5, self.mem5, self.spk5, self.state5 = (
            five(strides)
            for strides in (
                call.x.stride(), call.syn.stride(), call.mem.stride(), self.spk[1], self.state[1]
            )
        )  # fmt: skip
        self.threshold_stride = 0 if s.thresholds == 1 else 1
        self.has_spk = o.spiking or o.sequence

    @pool.where_it_fits
    def empty_results(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Memory for spk, syn and mem."""
        empty = x.new_empty_strided
        return empty(*self.spk), empty(*self.state), empty(*self.state)

    def restored(self, saved: Sequence[Tensor]) -> Saved:
        """What the forward pass saved, in its dtypes and contiguous again."""
        pairs = zip(saved, self.saved_shapes, strict=True)
        return Saved(*(as_saved(t, shape, dtype).contiguous() for t, (shape, dtype) in pairs))

    def empty_saved(self, x: Tensor) -> Saved:
        """Memory for what the forward pass saves in training."""
        winner, places = (
            x.new_empty(shape, dtype=dtype) if shared is None else shared
            for shape, dtype, shared in self._decisions
        )
        gates = x.new_empty_strided(*self._gates, **self._of_gates)
        return Saved(gates, x.new_empty_strided(*self._syn), winner, places)

    def empty_d_gates(self, x: Tensor) -> Tensor:
        """Memory for the gradient of the gate sums of every step."""
        return x.new_empty(self.d_gates, dtype=self.of_sums)


def stochastic_noise(options: CellOptions, grad_spk: Tensor | None) -> Tensor | None:
    """Uniform numbers of the stochastic surrogate, (T, N, C, Hp, Wp), else None.

    Drawn one block a step, last step first, each in the order of (N, C, Hp, Wp): as a loop over
    steps in plain torch draws them.
    """
    if grad_spk is None or options.surrogate.name != "SSO":
        return None
    noise = torch.empty_like(grad_spk, memory_format=torch.contiguous_format)
    for step in reversed(noise.unbind()) if options.sequence else (noise,):
        step.uniform_()
    return noise
