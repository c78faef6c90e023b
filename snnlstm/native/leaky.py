"""snntorch.Leaky on the native kernels: an autograd Function, for a step and for a sequence.

The kernels see the n neurons of a step in the order of memory, whatever the dimensions are. So
tensors are read without a copy if they have no gaps and all have the same order.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..calls.call import broadcasts, may_require_grad
from ..calls.keys import OF_TORCH
from ..calls.spec import DTYPES, RESETS
from ..surrogate import Surrogate
from . import pool
from .backends import BACKENDS
from .function import beyond_kernels, differentiable, reached
from .tensors import contiguous_as, pointer, real, restored, stochastic_noise

PARAMETERS = ("beta", "threshold", "graded_spikes_factor")


class Neurons(NamedTuple):
    """What a layer computes from x and mem.

    beta and threshold are numbers, or vary along adjacent dimensions of a step (:func:`place`).
    """

    reset: str
    surrogate: Surrogate
    beta: Tensor
    threshold: Tensor
    graded: Tensor
    sequence: bool = False
    """Whether x has all steps, (T, ...)."""
    static: Any = None
    """What :func:`static_fields` returns, if the layer has asked for it."""


def place(parameter: Tensor, shape: Sequence[int], strides: Sequence[int]) -> Any:
    """How many numbers a parameter has in a step of `shape`, and how many neurons share each.

    The neurons that share a number are adjacent in memory, and consecutive numbers belong to
    consecutive such groups. The result is None if the memory has another order, or if the
    parameter does not broadcast.
    """
    dims = parameter.dim()
    if dims == 0:
        return 1, 1
    missing, count = len(shape) - dims, parameter.numel()
    if missing < 0:
        return None
    if count == 1:
        return 1, 1
    varies = [d for d, size in enumerate(parameter.shape, missing) if size != 1]
    if count == 0 or any(shape[d] != parameter.shape[d - missing] for d in varies):
        return None
    for outer, inner in pairwise(varies):
        if strides[outer] != strides[inner] * shape[inner]:
            return None
    return count, max(1, strides[varies[-1]])  # an empty x may have a stride of 0


def reason_against(x: Tensor, mem: Tensor, parameters: Sequence[Any], sequence: bool) -> str | None:
    """Why the kernels cannot run a layer on its backend; None if they can.

    `parameters` are beta, threshold and graded.
    """
    if x.dtype not in DTYPES or mem.dtype not in DTYPES:
        return f"x is of {x.dtype} and mem of {mem.dtype}"
    graded = parameters[2]
    if graded.requires_grad or graded.numel() != 1:
        return "graded_spikes_factor is learned, or is not a single number"
    device, one = x.device, x.dim() == sequence  # a step's only number
    for name, tensor in zip(PARAMETERS, parameters, strict=True):
        # A number on x's device needs no closer look, which would take half a microsecond.
        if one or tensor.dim() or tensor.device != device or type(tensor) not in OF_TORCH:
            reason = _parameter_against(name, tensor, x, sequence)
            if reason is not None:
                return reason
    wider = mem.dtype is torch.float64 and x.dtype is not torch.float64
    if (wider or mem.device != device) and mem.shape == x.shape[sequence:]:
        return "mem is on another device, or of torch.float64, which x is not"
    return None


def _parameter_against(name: str, tensor: Any, x: Tensor, sequence: bool) -> str | None:
    """Why the kernels cannot read a parameter in a call with x."""
    if type(tensor) not in OF_TORCH or tensor.device != x.device:
        return f"{name} is on another device, or of a subclass of Tensor"
    step = x.shape[sequence:]
    if tensor.numel() == 0 or not broadcasts(tensor.shape, step):
        return f"{name} is empty, or does not broadcast to x"
    dtype = real(x.dtype)
    # torch ignores the dtype of a number beside a tensor with dimensions.
    if (tensor.dim() or not step) and torch.promote_types(tensor.dtype, dtype) is not dtype:
        return f"{name} is of {tensor.dtype}, which results would also have"
    return None


def run_neurons(
    neurons: Neurons, x: Tensor, mem: Tensor, record: bool = True
) -> tuple[Tensor, Tensor]:
    """Run the kernels; return spk and mem of each step, or, without `record`, the last mem.

    Parameters
    ----------
    x : Tensor
        (...), or (T, ...) for a sequence, of a float dtype.
    mem : Tensor
        (...) before the first step, of any float dtype.

    Returns
    -------
    spk, mem : Tensor
        Of x's shape, in float32, or float64 if x is. With gradients, mem has every step.
    """
    tensors = x, mem, neurons.beta, neurons.threshold
    if may_require_grad(tensors):
        if mem.is_inference():  # autograd refuses to save it
            tensors = x, mem.clone(), *tensors[2:]
        return _apply(neurons, *tensors)
    return forward(neurons, x, mem, record)


@pool.where_it_fits
def forward(neurons: Neurons, x: Tensor, mem: Tensor, record: bool) -> tuple[Tensor, Tensor]:
    """As :func:`run_neurons`, without gradients."""
    before, dtype, whole = mem, real(x.dtype), neurons.sequence
    static: Any = neurons.static
    parameters: Sequence[Tensor] = neurons[2:5]
    if static is None:
        x = without_gaps(x, whole)
        strides = x.stride()[whole:]
        before = _laid_out(mem, x.shape[whole:], strides, dtype, x.device)
        static, parameters = _prepared(neurons, x.dtype, x.shape, strides)
    spk = _empty_like(x, dtype)
    after = _empty_like(x if record or not whole else before, dtype)
    into = x.data_ptr(), spk.data_ptr(), after.data_ptr(), record
    fields = *_fields(static, parameters, before), *into
    BACKENDS[x.device.type].leaky(fields, False, x.device)
    return spk, after


def _fields(static: Any, parameters: Sequence[Tensor], before: Tensor | None) -> tuple[Any, ...]:
    """Both passes' fields (csrc/args.h), of what :func:`_prepared` returns."""
    first, of_beta, of_threshold = static
    beta, threshold, graded = parameters
    return (
        *first, beta.data_ptr(), *of_beta, threshold.data_ptr(), *of_threshold, graded.data_ptr(),
        pointer(before),
    )  # fmt: skip


def _prepared(
    neurons: Neurons, x_type: torch.dtype, shape: Sequence[int], strides: Sequence[int]
) -> tuple[Any, Sequence[Tensor]]:
    """What equal calls share of the fields, and beta, threshold and graded as the core reads them.

    `shape` is x's, and `strides` are those of a step.
    """
    surrogate, step = neurons.surrogate, shape[neurons.sequence :]
    first = (
        DTYPES.index(x_type), RESETS.index(neurons.reset), surrogate.kind, surrogate.p0,
        surrogate.p1, shape[0] if neurons.sequence else 1, math.prod(step),
    )  # fmt: skip
    dtype = real(x_type)
    of_beta, beta = _placed(neurons.beta, step, strides, dtype)
    of_threshold, threshold = _placed(neurons.threshold, step, strides, dtype)
    parameters = beta, threshold, contiguous_as(neurons.graded, dtype)
    return (first, of_beta, of_threshold), parameters


def _placed(
    parameter: Tensor, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype
) -> tuple[Any, Tensor]:
    """What :func:`place` returns, and the parameter as the core reads it.

    A parameter that varies in another order than x becomes one with a number for each neuron.
    """
    found = place(parameter, shape, strides)
    if found is not None:
        return found, contiguous_as(parameter, dtype)
    whole = parameter.detach().expand(shape)
    return (whole.numel(), 1), _laid_out(whole, shape, strides, dtype, whole.device)


def static_fields(neurons: Neurons, x: Tensor, mem: Tensor) -> Any:
    """What equal calls share of the fields; None if a tensor must be copied in each call."""
    shape, strides = x.shape[neurons.sequence :], x.stride()[neurons.sequence :]
    if (
        without_gaps(x, neurons.sequence) is not x
        or _laid_out(mem, shape, strides, real(x.dtype), x.device) is not mem
    ):
        return None
    static, parameters = _prepared(neurons, x.dtype, x.shape, strides)
    return static if all(map(operator.is_, parameters, neurons[2:5])) else None


def without_gaps(x: Tensor, sequence: bool) -> Tensor:
    """x, or a copy of it without gaps in memory, in any order but with time outermost."""
    if not x.is_contiguous():
        kept = torch.empty_like(x, device="meta").stride() == x.stride()  # True without gaps
        if not kept or (sequence and x.stride(0) * x.shape[0] != x.numel()):
            return x.contiguous()
    return x.resolve_neg()


def _laid_out(
    tensor: Tensor,
    shape: Sequence[int],
    strides: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """The tensor, or a copy of it, in a memory layout, a dtype and on a device."""
    fits = tensor.stride() == strides and tensor.shape == shape
    if fits and tensor.dtype is dtype and tensor.device == device:
        return tensor.resolve_neg()
    tensor = restored(tensor, shape, dtype, device)
    out = torch.empty_strided(shape, strides, dtype=dtype, device=device)
    return out.copy_(tensor.detach())


def _empty_like(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory in the order of a tensor; a small one takes half the time of empty_strided."""
    if like.dtype is dtype and like.nbytes < pool.SMALLEST:
        return torch.empty_like(like)
    return pool.empty_result(like.shape, like.stride(), dtype, like.device)


# ---- the Function --------------------------------------------------------------------------------


def _differentiable_forward(
    ctx: Any, neurons: Neurons, x: Tensor, mem: Tensor, beta: Tensor, threshold: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the kernels; the tensors are those that may require a gradient."""
    spk, after = forward(neurons, x, mem, True)
    learned = beta.requires_grad or threshold.requires_grad
    before = mem if learned or neurons.reset == "zero" else None  # whether it is read
    ctx.save_for_backward(before, after, beta, threshold, neurons.graded)
    ctx.neurons, ctx.dtypes, ctx.strides = neurons[:2], (x.dtype, mem.dtype), after.stride()
    ctx.sequence, ctx.shape, ctx.device = neurons.sequence, after.shape, after.device
    ctx.set_materialize_grads(False)
    constant = [spk] if neurons.surrogate.kind == 0 else []
    if neurons.reset != "subtract" and not any(t.requires_grad for t in (x, mem, beta)):
        constant.append(after)  # the threshold affects only spk
    ctx.mark_non_differentiable(*constant)
    return spk, after


def _gradients(ctx: Any, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The gradients of neurons, x, mem, beta and threshold."""
    before, after, *parameters = ctx.saved_tensors
    beta, threshold, graded = parameters
    reset, surrogate = ctx.neurons
    neurons = Neurons(reset, surrogate, beta, threshold, graded, ctx.sequence)
    given = reached(ctx.needs_input_grad[1:], reset, grads)
    found: Any
    if torch.is_grad_enabled() or beyond_kernels(grads):
        found = _by_formula(neurons, before, after, grads, given)
        found = found[0].to(ctx.dtypes[0]), *found[1:]
    else:
        kept = ctx.dtypes[0], ctx.shape, ctx.strides, ctx.device
        found = by_kernels(neurons, *kept, before, after, grads, given)
    return None, *of_arguments(found, given, ctx.dtypes[1], beta, threshold)


_apply = differentiable("_Leaky", _differentiable_forward, _gradients)


def of_arguments(
    found: Sequence[Any],
    wanted: Sequence[bool],
    mem_type: torch.dtype,
    beta: Tensor,
    threshold: Tensor,
) -> Sequence[Tensor | None]:
    """The gradients of x, mem, beta and threshold, in the shapes and dtypes of these."""
    x, mem, *sums = found
    return (
        x if wanted[0] else None,
        mem.to(mem_type) if wanted[1] else None,
        *(
            None if total is None else total.sum_to_size(parameter.shape).to(parameter.dtype)
            for total, parameter in zip(sums, (beta, threshold), strict=True)
        ),
    )


@pool.where_it_fits
def by_kernels(
    neurons: Neurons,
    x_type: torch.dtype,
    shape: Sequence[int],
    strides: Sequence[int],
    device: torch.device,
    before: Tensor | None,
    after: Tensor,
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> Sequence[Tensor | None]:
    """The gradients of x and mem, and those of beta and threshold, per neuron.

    `shape`, `strides` and `device` are those that `after`, mem of all steps, had when it was saved.
    """
    step, step_strides, dtype = shape, strides, real(x_type)
    after = _laid_out(after, shape, strides, dtype, device)
    like = after
    if neurons.sequence:
        step, step_strides, like = shape[1:], strides[1:], after[0]
    if before is not None:
        before = _laid_out(before, step, step_strides, dtype, device)
    laid = [None if g is None else _laid_out(g, shape, strides, dtype, device) for g in grads]
    noise = stochastic_noise(neurons.surrogate, laid[0], neurons.sequence)
    if noise is not None:
        noise = _laid_out(noise, shape, strides, dtype, device)
    x = _empty_like(after, x_type) if wanted[0] else None
    mem = _empty_like(like, dtype) if wanted[1] or neurons.sequence else None
    beta, threshold = (_empty_like(like, dtype) if want else None for want in wanted[2:])
    static, parameters = _prepared(neurons, x_type, shape, step_strides)
    fields = _fields(static, parameters, before)
    others = after, noise, *laid, x, mem, beta, threshold
    BACKENDS[device.type].leaky((*fields, *map(pointer, others)), True, device)
    return x, mem, beta, threshold


def _by_formula(
    neurons: Neurons,
    before: Tensor | None,
    after: Tensor,
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> Sequence[Tensor | None]:
    """The same gradients in plain torch, which can be differentiated again."""
    reset, surrogate, beta, threshold, graded, sequence, _ = neurons
    mems = after.unbind() if sequence else (after,)
    spks, others = (
        [None] * len(mems) if g is None else g.unbind() if sequence else (g,) for g in grads
    )
    if before is not None:
        before = before.to(after.dtype)
    inside, decay = (beta >= 0) & (beta <= 1), beta.clamp(0, 1)
    carried: Any = 0
    found: list[Tensor] = []
    d_beta: Any = 0
    d_threshold: Any = 0
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
            d_beta = d_beta + grad * previous * inside
            d_threshold = d_threshold - through_spk
            if reset == "subtract":
                d_threshold = d_threshold - grad * signal
    x = torch.stack(found[::-1]) if sequence else found[0]
    return x, carried, d_beta if wanted[2] else None, d_threshold if wanted[3] else None
