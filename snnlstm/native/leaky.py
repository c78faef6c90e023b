"""snntorch.Leaky over the native kernels: an autograd Function, for a step and for a sequence.

The kernels see the n neurons of a step in the order of memory, whatever the dimensions are. So a
tensor is read where it lies, if it has no gaps and all have one order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..spec import DTYPES, RESETS
from ..surrogate import Surrogate
from . import pool
from .function import BACKENDS, beyond_kernels
from .plan import address, as_saved, numbers, plain

__all__ = ["Neurons", "place", "run"]


class Neurons(NamedTuple):
    """What a layer computes of x and mem.

    beta, threshold and graded are numbers, or vary along one dimension of a step (:func:`place`).
    """

    reset: str
    surrogate: Surrogate
    beta: Tensor
    threshold: Tensor
    graded: Tensor
    sequence: bool = False
    """Whether x has all steps, (T, ...)."""

    def wants_before(self) -> bool:
        """Whether the backward pass reads the mem before each step."""
        return self.reset == "zero" or self.beta.requires_grad or self.threshold.requires_grad


def real(x: Tensor) -> torch.dtype:
    """The dtype of the computation, of spk and of mem: float64 or float32."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def place(parameter: Tensor, shape: Sequence[int], strides: Sequence[int]) -> Any:
    """How many numbers a parameter has in a step of `shape`, and how many neurons share each.

    The neurons that share one follow each other in memory. None: it varies along more than one
    dimension, or does not broadcast.
    """
    missing = len(shape) - parameter.dim()
    if missing < 0:
        return None
    if parameter.numel() == 1:
        return 1, 1
    varies = [d for d, size in enumerate(parameter.shape, missing) if size != 1]
    if len(varies) != 1 or shape[varies[0]] != parameter.numel():
        return None
    return parameter.numel(), strides[varies[0]]


def run(neurons: Neurons, x: Tensor, mem: Tensor, record: bool = True) -> tuple[Tensor, Tensor]:
    """Run the kernels: spk and mem of each step, or, without `record`, mem after the last one.

    Parameters
    ----------
    x : Tensor
        (...), or (T, ...) for a sequence, of a float dtype.
    mem : Tensor
        (...) before the first step, of any float dtype.

    Returns
    -------
    spk, mem : Tensor
        Of x's shape and of :func:`real`. While gradients are computed mem has every step.
    """
    tensors = x, mem, neurons.beta, neurons.threshold
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _apply(neurons, *tensors)
    return _forward(neurons, x, mem, record)[:2]


def _forward(
    neurons: Neurons, x: Tensor, mem: Tensor, record: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`run`; the third result is the mem that the kernels read."""
    x = plain(x) if x.is_contiguous() or _has_no_gaps(x, neurons.sequence) else x.contiguous()
    shape, strides = x.shape, x.stride()
    if neurons.sequence:
        shape, strides = shape[1:], strides[1:]
    before = _laid_out(mem, shape, strides, real(x))
    spk = _empty(x.shape, x.stride(), x, real(x))
    out = x if record or not neurons.sequence else before
    after = _empty(out.shape, out.stride(), x, real(x))
    fields, _held = _fields(neurons, x.dtype, x.shape, strides, before)
    into = x.data_ptr(), spk.data_ptr(), after.data_ptr(), record
    BACKENDS[x.device.type].leaky((*fields, *into), False, x.device)
    return spk, after, before


def _fields(
    neurons: Neurons,
    x_type: torch.dtype,
    shape: Sequence[int],
    strides: Sequence[int],
    before: Tensor | None,
) -> tuple[tuple[Any, ...], Any]:
    """The fields that both passes have (csrc/args.h), and what holds their numbers.

    `shape` is x's, `strides` are those of a step.
    """
    reset, surrogate, beta, threshold, graded, sequence = neurons
    dtype = torch.float64 if x_type is torch.float64 else torch.float32
    held = numbers(beta, dtype), numbers(threshold, dtype), numbers(graded, dtype)
    time, shape = (shape[0], shape[1:]) if sequence else (1, shape)
    return (
        DTYPES.index(x_type), RESETS.index(reset), surrogate.kind, surrogate.p0, surrogate.p1,
        time, math.prod(shape), held[0].data_ptr(), *place(beta, shape, strides),
        held[1].data_ptr(), *place(threshold, shape, strides),
        held[2].data_ptr(), address(before),
    ), held  # fmt: skip


def _has_no_gaps(x: Tensor, sequence: bool) -> bool:
    """Whether the numbers of x fill its memory, in any order, but with time outermost."""
    shape, strides, size = x.shape, x.stride(), x.numel()
    if sequence:
        if size and shape[0] > 1 and strides[0] != size // shape[0]:
            return False
        shape, strides = shape[1:], strides[1:]
    count = 1
    for stride, length in sorted(zip(strides, shape, strict=True)):
        if length != 1 and stride != count:
            return False
        count *= length
    return True


def _laid_out(
    tensor: Tensor, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The tensor, or a copy of it, in a memory layout and a dtype."""
    tensor = as_saved(tensor, shape, dtype)
    if tensor.stride() == strides:
        return tensor
    return torch.empty_strided(shape, strides, dtype=dtype, device=tensor.device).copy_(
        tensor.detach()
    )


@pool.where_it_fits
def _empty(shape: Sequence[int], strides: Sequence[int], like: Tensor, dtype: Any) -> Tensor:
    """Memory for a result; a large one lies in a block that is used again."""
    if like.numel() * dtype.itemsize >= pool.MAPPED and like.device.type == "cpu":
        return pool.empty_strided(shape, strides, dtype)
    return torch.empty_strided(shape, strides, dtype=dtype, device=like.device)


# ---- the Function --------------------------------------------------------------------------------


class _Leaky(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, neurons: Neurons, x: Tensor, mem: Tensor, beta: Tensor, threshold: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run the kernels; the tensors are those that may require a gradient."""
        spk, after, before = _forward(neurons, x, mem, True)
        ctx.save_for_backward(
            before if neurons.wants_before() else None, after, beta, threshold, neurons.graded
        )
        ctx.neurons, ctx.dtypes, ctx.strides = neurons[:2], (x.dtype, mem.dtype), after.stride()
        ctx.sequence, ctx.shape = neurons.sequence, after.shape
        ctx.set_materialize_grads(False)
        if neurons.surrogate.kind == 0:
            ctx.mark_non_differentiable(spk)
        return spk, after

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """The gradients of x, mem, beta and threshold, behind a None for the neurons."""
        if grads[0] is grads[1] is None:
            return (None,) * 5
        before, after, *parameters = ctx.saved_tensors
        neurons = Neurons(*ctx.neurons, *parameters, ctx.sequence)
        *given, of_threshold = ctx.needs_input_grad[1:]
        # A threshold gets a gradient only from spk and from "subtract".
        given.append(of_threshold and (grads[0] is not None or neurons.reset == "subtract"))
        if torch.is_grad_enabled() or beyond_kernels(grads):
            found = _by_formula(neurons, before, after, grads, given)
        else:
            found = _by_kernels(ctx, neurons, before, after, grads, given)
        wanted = (*ctx.dtypes, parameters[0].dtype, parameters[1].dtype)
        return None, *(
            None if grad is None or not want else grad.to(dtype)
            for grad, dtype, want in zip(found, wanted, given, strict=True)
        )


# This is _Leaky.apply without its search for torch.func's wrappers; see function.py.
_apply: Any = super(torch.autograd.Function, _Leaky).apply


def _by_kernels(
    ctx: Any,
    neurons: Neurons,
    before: Tensor | None,
    after: Tensor,
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> Sequence[Tensor | None]:
    """The gradients of x, mem, beta and threshold."""
    (x_type, _), strides, dtype = ctx.dtypes, ctx.strides, real(after)
    of_step, step = (strides[1:], ctx.shape[1:]) if neurons.sequence else (strides, ctx.shape)
    after = _laid_out(after, ctx.shape, strides, dtype)
    if before is not None:
        before = _laid_out(before, step, of_step, dtype)
    laid = [None if g is None else _laid_out(plain(g), ctx.shape, strides, dtype) for g in grads]
    noise = None
    if grads[0] is not None and neurons.surrogate.name == "SSO":
        noise = _laid_out(_noise(after, neurons.sequence), ctx.shape, strides, dtype)

    x = _empty(ctx.shape, strides, after, x_type) if wanted[0] else None
    kinds = (wanted[1] or neurons.sequence, *wanted[2:])
    sums = [_empty(step, of_step, after, dtype) if want else None for want in kinds]
    fields, _held = _fields(neurons, x_type, ctx.shape, of_step, before)
    others = after, noise, *laid, x, *sums
    BACKENDS[after.device.type].leaky((*fields, *map(address, others)), True, after.device)
    mem, beta, threshold = sums
    return (
        x, mem,
        None if beta is None else beta.sum_to_size(neurons.beta.shape),
        None if threshold is None else threshold.sum_to_size(neurons.threshold.shape),
    )  # fmt: skip


def _noise(like: Tensor, sequence: bool) -> Tensor:
    """Uniform numbers of the stochastic surrogate, drawn step by step, the last step first."""
    noise = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    for step in reversed(noise.unbind()) if sequence else (noise,):
        step.uniform_()
    return noise


def _by_formula(
    neurons: Neurons,
    before: Tensor | None,
    after: Tensor,
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> Sequence[Tensor | None]:
    """The same gradients in plain torch, which can be differentiated again."""
    reset, surrogate, beta, threshold, graded, sequence = neurons
    mems = after.unbind() if sequence else (after,)
    spks, others = (
        [None] * len(mems) if g is None else g.unbind() if sequence else (g,) for g in grads
    )
    inside, decay = (beta >= 0) & (beta <= 1), beta.clamp(0, 1)
    carried: Any = 0
    found: list[Tensor] = []
    of_beta: Any = 0
    of_threshold: Any = 0
    for t in reversed(range(len(mems))):
        through_spk: Any = 0
        if spks[t] is not None:
            through_spk = spks[t] * graded * surrogate.factor(mems[t] - threshold)
        grad = through_spk + carried + (0 if others[t] is None else others[t])
        carried, previous = decay * grad, mems[t - 1] if t else before
        found.append(grad)
        if previous is not None:
            signal = (previous - threshold > 0).to(previous.dtype).detach()
            if reset == "zero":
                carried, previous = carried * (1 - signal), previous * (1 - signal)
            of_beta = of_beta + grad * previous * inside
            of_threshold = of_threshold - through_spk
            if reset == "subtract":
                of_threshold = of_threshold - grad * signal
    x = torch.stack(found[::-1]) if sequence else found[0]
    return (
        x, carried,
        of_beta.sum_to_size(beta.shape) if wanted[2] else None,
        of_threshold.sum_to_size(threshold.shape) if wanted[3] else None,
    )  # fmt: skip
