"""snntorch.Leaky on the native kernels: an autograd Function that runs a plan, as for the cell.

The kernels see the n neurons of a step in the order of memory, whatever the dimensions are. So
tensors are read without a copy if they have no gaps and all have the same order.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..calls.call import LEAKY_PARAMETERS, LeakyCall, broadcasts
from ..calls.entries import BACKENDS, TORCH_TYPES, Entry
from ..calls.spec import DTYPES, RESETS, LeakySpec
from . import lender
from .cpu import Copies
from .function import connected, differentiable, reached
from .tensors import compute_dtype, contiguous_as, laid_out, pointer


def reason_against(call: LeakyCall, sequence: bool) -> str | None:
    """Why the kernels cannot run a layer that is known to them; None if they can."""
    x, mem, *parameters = call[:5]
    device, one = x.device, x.dim() == sequence  # a step's only number
    if device.type not in BACKENDS:
        return f"there are none for device {device.type}"
    if x.dtype not in DTYPES or mem.dtype not in DTYPES:
        return f"x is of {x.dtype} and mem of {mem.dtype}"
    graded = call.graded
    if graded.requires_grad or graded.numel() != 1:
        return "graded_spikes_factor is learned, or is not a single number"
    for name, tensor in zip(LEAKY_PARAMETERS, parameters, strict=True):
        # A number on x's device needs no closer look, which torch.compile would trace for long.
        if one or tensor.dim() or tensor.device != device or type(tensor) not in TORCH_TYPES:
            reason = _parameter_against(name, tensor, x, sequence)
            if reason is not None:
                return reason
    wider = mem.dtype is torch.float64 and x.dtype is not torch.float64
    if (wider or mem.device != device) and mem.shape == x.shape[sequence:]:
        return "mem is on another device, or of torch.float64, which x is not"
    return None


def _parameter_against(name: str, tensor: Any, x: Tensor, sequence: bool) -> str | None:
    """Why the kernels cannot read a parameter in a call with x."""
    if type(tensor) not in TORCH_TYPES or tensor.device != x.device:
        return f"{name} is on another device, or of a subclass of Tensor"
    step = x.shape[sequence:]
    if tensor.numel() == 0 or not broadcasts(tensor.shape, step):
        return f"{name} is empty, or does not broadcast to x"
    dtype = compute_dtype(x.dtype)
    # torch ignores the dtype of a number beside a tensor with dimensions.
    if (tensor.dim() or not step) and torch.promote_types(tensor.dtype, dtype) is not dtype:
        return f"{name} is of {tensor.dtype}, which results would also have"
    return None


def grouping(parameter: Tensor, shape: Sequence[int], strides: Sequence[int]) -> Any:
    """How many numbers a parameter has in a step of `shape`, and how many neurons share each.

    The neurons that share a number are adjacent in memory, and consecutive numbers belong to
    consecutive such groups. The result is None if the memory has another order, or if the
    parameter does not broadcast.
    """
    dims = parameter.dim()
    if dims == 0 or 0 in shape:
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
    return count, strides[varies[-1]]


def _without_gaps(x: Tensor, sequence: bool) -> Tensor:
    """x, or a copy of it without gaps in memory, in any order but with time outermost."""
    if not x.is_contiguous():
        kept = torch.empty_like(x, device="meta").stride() == x.stride()  # True without gaps
        if not kept or (sequence and x.stride(0) * x.shape[0] != x.numel()):
            return x.contiguous()
    return x.resolve_neg()


def fitting(mem: Tensor, x: Tensor, sequence: bool) -> Tensor:
    """The mem before the first step; a mem of another shape than a step of x means zeros."""
    if mem.shape == x.shape[sequence:]:
        return mem
    return torch.zeros_like(x[0] if sequence else x, dtype=compute_dtype(x.dtype))


# ---- plans ---------------------------------------------------------------------------------------


class Plan:
    """Both passes of the calls of a Leaky with the same spec, sizes, strides and types.

    Attributes
    ----------
    whole, step : (shape, strides, dtype, device)
        The memory of all steps and of one, as the kernels read and write it.
    fits : bool
        Whether mem has the shape of a step.
    groupings : list
        What :func:`grouping` returns for beta and threshold.
    copies : bool
        Whether the core cannot read every tensor as it is.
    """

    def __init__(self, entry: Entry, call: LeakyCall) -> None:
        self.backend, self.spec, self.name = entry.backend, entry.spec, entry.backend.name()
        spec, surrogate, sequence = self.spec, self.spec.surrogate, self.spec.sequence
        x = _without_gaps(call.x, sequence)
        self.types = x.dtype, call.mem.dtype
        how = self.dtype, self.device = compute_dtype(x.dtype), x.device
        self.whole = x.shape, x.stride(), *how
        self.step = step = x.shape[sequence:], x.stride()[sequence:], *how
        self.fits = call.mem.shape == step[0]
        self.groupings = [grouping(parameter, *step[:2]) for parameter in call[2:4]]
        # What equal calls share of the fields (csrc/args.h).
        self.first = (
            DTYPES.index(x.dtype), RESETS.index(spec.reset), surrogate.kind, surrogate.p0,
            surrogate.p1, x.shape[0] if sequence else 1, math.prod(step[0]),
        )  # fmt: skip
        self._groups = [at or (self.first[-1], 1) for at in self.groupings]
        small = x.dtype is self.dtype and x.nbytes < lender.SMALLEST
        self._empty_like = torch.empty_like if small else partial(_empty_like, dtype=self.dtype)
        call = self.fitted(call)
        readable = self._readable(call)
        self.copies = not all(map(operator.is_, readable[:5], call))
        self._copies = Copies()
        self._on_cpu = self.device.type == "cpu"

    def fitted(self, call: LeakyCall) -> LeakyCall:
        """The call with a mem of the shape of a step."""
        if self.fits:
            return call
        return call._replace(mem=fitting(call.mem, call.x, self.spec.sequence))

    def _readable(self, call: LeakyCall) -> LeakyCall:
        """The call with tensors that the core reads as they are."""
        x = _without_gaps(call.x, self.spec.sequence)
        mem = laid_out(call.mem, *self.step)
        return LeakyCall(x, mem, *self.numbers(call[2:5]))

    def numbers(self, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """beta, threshold and graded as the core reads them.

        A parameter that varies in another order than x becomes one with a number for each neuron.
        """
        beta, threshold, graded = (
            laid_out(parameter.detach().expand(self.step[0]), *self.step)
            if at is None
            else contiguous_as(parameter, self.dtype)
            for parameter, at in zip(parameters, (*self.groupings, (1, 1)), strict=True)
        )
        return beta, threshold, graded

    def _fields(
        self, beta: int, threshold: int, graded: Tensor, before: Tensor | None
    ) -> tuple[Any, ...]:
        """Both passes' fields (csrc/args.h); `beta` and `threshold` are addresses."""
        groups = self._groups
        return (
            *self.first, beta, *groups[0], threshold, *groups[1], graded.data_ptr(),
            pointer(before),
        )  # fmt: skip

    def forward(self, call: LeakyCall, record: bool, save: bool) -> tuple[Tensor, Tensor, Any]:
        """Run the forward kernels.

        Returns
        -------
        spk : Tensor
            Spikes of each step.
        mem : Tensor
            mem of each step, or only the last one unless `record`.
        kept : tuple of Tensor, optional
            beta and threshold for the backward pass, with `save`.
        """
        if self.copies:
            call = self._readable(call)
        x, mem, beta, threshold, graded = call[:5]
        spk, after = self._empty_like(x), self._empty_like(x if record else mem)
        into = x.data_ptr(), spk.data_ptr(), after.data_ptr(), record
        first, second = beta.data_ptr(), threshold.data_ptr()
        self.backend.leaky((*self._fields(first, second, graded, mem), *into), False, self.device)
        if not save:
            return spk, after, None
        if not self._on_cpu:
            return spk, after, (beta.data, threshold.data)  # survives what is assigned to .data
        return spk, after, self._copies.of(beta, threshold)

    def backward(
        self,
        before: Tensor | None,
        after: Tensor,
        kept: Sequence[Tensor],
        graded: Tensor,
        grads: Sequence[Tensor | None],
        wanted: Sequence[bool],
    ) -> Sequence[Tensor | None]:
        """The gradients of x and mem, and those of beta and threshold, per neuron.

        `before` and `after`, mem of all steps, may have another layout than in the forward pass.
        `kept` is what :meth:`forward` returned.
        """
        sequence = self.spec.sequence
        after = laid_out(after, *self.whole)
        like = after[0] if sequence else after
        before = None if before is None else laid_out(before, *self.step)
        laid = [None if grad is None else laid_out(grad, *self.whole) for grad in grads]
        x = _empty_like(after, self.types[0]) if wanted[0] else None
        mem = _empty_like(like, self.dtype) if wanted[1] or sequence else None
        sums = [_empty_like(like, self.dtype) if want else None for want in wanted[2:]]
        graded = contiguous_as(graded, self.dtype)  # it must live while the kernels run
        beta, threshold = map(pointer, kept)
        fields = self._fields(beta, threshold, graded, before)
        others = map(pointer, (after, *laid, x, mem, *sums))
        self.backend.leaky((*fields, *others), True, self.device)
        return x, mem, *sums


@lender.where_it_fits
def run_plan(plan: Plan, call: LeakyCall, needs_grad: bool) -> tuple[Tensor, Tensor]:
    """Run the kernels; return spk and mem of each step.

    mem is the last one alone if a sequence does not record it, and has no gradients.

    Returns
    -------
    spk, mem : Tensor
        Of x's shape, in float32, or float64 if x is.
    """
    call = plan.fitted(call)
    if not needs_grad:
        return plan.forward(call, call.every, False)[:2]
    if call.mem.is_inference():  # autograd refuses to save it
        call = call._replace(mem=call.mem.clone())
    return _apply(plan, call, *call[:4])


def _empty_like(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory in the order of a tensor; a small one takes half the time of empty_strided."""
    if like.dtype is dtype and like.nbytes < lender.SMALLEST:
        return torch.empty_like(like)
    return lender.empty_result(like.shape, like.stride(), dtype, like.device)


# ---- the Function --------------------------------------------------------------------------------


def _forward(ctx: Any, plan: Plan, call: LeakyCall, *_: Tensor) -> tuple[Any, Any]:
    """Run the kernels; the results are spk and mem."""
    spk, after, ctx.kept = plan.forward(call, True, True)
    _, _, *others, beta, threshold = ctx.needs_input_grad
    reset = plan.spec.reset
    is_read = beta or threshold or reset == "zero"
    ctx.save_for_backward(call.mem if is_read else None, after, *call[2:5])
    constant = () if plan.spec.surrogate.kind else (spk,)
    if reset != "subtract" and not (any(others) or beta):
        constant += (after,)  # the threshold affects only spk
    return (spk, after), constant


def _gradients(
    ctx: Any, saved: Sequence[Any], grads: Sequence[Tensor | None], by_torch: bool
) -> Sequence[Tensor | None]:
    """The gradients of x, mem, beta and threshold, in the shapes and dtypes of these."""
    before, after, *parameters = saved
    plan, kept = ctx.plan, ctx.kept
    wanted = reached(ctx.needs_input_grad[2:], plan.spec.reset, grads)
    per_neuron: Sequence[Any]
    if by_torch:
        numbers = *map(connected, parameters, kept), parameters[2]
        per_neuron = _by_formula(plan.spec, before, after, numbers, grads, wanted)
    else:
        per_neuron = plan.backward(before, after, kept, parameters[2], grads, wanted)
    x, mem, *sums = per_neuron
    return (
        x.to(plan.types[0]) if wanted[0] else None,
        mem.to(plan.types[1]) if wanted[1] else None,
        *(
            None if total is None else total.sum_to_size(parameter.shape).to(parameter.dtype)
            for total, parameter in zip(sums, parameters[:2], strict=True)
        ),
    )


_apply = differentiable("_Leaky", _forward, _gradients)


def _by_formula(
    spec: LeakySpec,
    before: Tensor | None,
    after: Tensor,
    parameters: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> Sequence[Tensor | None]:
    """The same gradients in plain torch, which can be differentiated again."""
    beta, threshold, graded = parameters
    reset, surrogate, sequence = spec.reset, spec.surrogate, spec.sequence
    mems = after.unbind() if sequence else (after,)
    spks, others = (
        [None] * len(mems) if g is None else g.unbind() if sequence else (g,) for g in grads
    )
    if before is not None:
        before = before.to(after.dtype)
    inside, decay = (beta >= 0) & (beta <= 1), beta.clamp(0, 1)
    carried: Any = 0
    x_grads: list[Tensor] = []
    d_beta: Any = 0
    d_threshold: Any = 0
    for t in reversed(range(len(mems))):
        through_spk: Any = 0
        if spks[t] is not None:
            through_spk = spks[t] * graded * surrogate.factor(mems[t] - threshold)
        grad = through_spk + carried + (0 if others[t] is None else others[t])
        carried, previous = decay * grad, mems[t - 1] if t else before
        x_grads.append(grad)
        if previous is not None:
            signal = (previous - threshold > 0).to(previous.dtype).detach()
            if reset == "zero":
                carried, previous = carried * (1 - signal), previous * (1 - signal)
            d_beta = d_beta + torch.where(inside, grad * previous, 0)  # mem may be infinite
            d_threshold = d_threshold - through_spk
            if reset == "subtract":
                d_threshold = d_threshold - grad * signal
    x = torch.stack(x_grads[::-1]) if sequence else x_grads[0]
    return x, carried, d_beta if wanted[2] else None, d_threshold if wanted[3] else None
