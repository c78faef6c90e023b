"""The cell on the native kernels: an autograd Function that runs a plan.

The forward pass saves the arguments, and for each time step the activated gates and syn. From these
the backward pass computes mem and the reset again (a sign bit of the gates holds the reset). It
modifies nothing saved, so it may be interrupted and run again while x and states change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..calls import algorithms
from ..calls.call import Call, recorded_states
from ..calls.spec import CellSpec
from ..compat.torch_private import (
    forward_level,
    is_batch,
    is_tracing,
    keeps_graph,
    modes,
    opaque,
    transforms_are_active,
)
from . import lender
from .plan import Plan
from .tensors import check_memory


def run_plan(plan: Plan, call: Call, needs_grad: bool) -> tuple[Tensor, Tensor, Tensor, str]:
    """Run the native kernels: spk, syn and mem as :func:`snnlstm.reference.run` returns them.

    A caller that runs out of memory should drop the free blocks of :mod:`~snnlstm.native.lender`.

    The fourth result is the name of what ran, such as ``"cpu-avx2-winograd4-sparse"``.
    """
    try:
        if not needs_grad:
            spk, syn, mem, _, name, *_ = plan.forward(call, False)
        else:
            if call.x.is_inference():  # autograd refuses to save it
                call = call._replace(x=call.x.clone())
            spk, syn, mem, name = _apply(plan, call, *call[:6])
    except ValueError:  # the core refuses null addresses
        check_memory(call)
        raise
    if call.lengths is not None and call.record:
        syn, mem = recorded_states(call, syn, mem)
    return spk, syn, mem, name


def in_float32(
    call: Call, run_step: Callable[[Call], tuple[Tensor, Tensor, Tensor, Any]]
) -> tuple[Tensor, Tensor, Tensor, Any]:
    """Run each step of a call in a half type in float32; between steps states have that type.

    `run_step` runs a call of one step, and returns what this function returns.
    """
    _, _, _, weight, bias, threshold, graded, _, _ = call
    if call.sequence:  # a float32 weight adds the steps' gradients in float32
        weight, bias = weight.float(), None if bias is None else bias.float()
    threshold, graded = (None if t is None else t.float() for t in (threshold, graded))
    name = None

    def step(x: Tensor, *states: Tensor) -> Any:
        nonlocal name
        x, (syn, mem) = x.float(), (state.float() for state in states)
        part = Call(x[None] if call.sequence else x, syn, mem, weight, bias, threshold, graded)
        spk, syn, mem, name = run_step(part)
        return tuple(t.to(call.x.dtype) for t in (spk[0] if call.sequence else spk, syn, mem))

    out = reference.over_time(call, step) if call.sequence else step(*call[:3])
    return (*out, name)


# ---- the Function --------------------------------------------------------------------------------


_FORGOTTEN = (
    "(In the second batch of a training this is the first batch's graph, because an SConv2dLSTM or "
    "a Leaky continues from its stored state, and so from that graph. Call reset_mem() before each "
    "new sequence, or SConv2dLSTM.detach_hidden() to keep the state without its history. A second "
    "backward on one loss needs retain_graph=True.)"
)


def _beyond_kernels(grads: Sequence[Tensor | None]) -> bool:
    """Whether the gradients have tangents, are batched or are of a subclass."""
    for grad in grads:
        if grad is not None and (type(grad) is not Tensor or is_batch(grad)):
            return True
    return forward_level() >= 0 or transforms_are_active()


def torch_must_run() -> bool:
    """Whether calls of torch's functions must stay such: something records or transforms them.

    Derivatives in forward mode and the algorithm ``"reference"`` are torch's, too.
    """
    return (
        transforms_are_active()
        or modes()
        or is_tracing()
        or forward_level() >= 0
        or algorithms.current == "reference"
    )


def differentiable(name: str, forward: Callable, gradients: Callable) -> Any:
    """Make an autograd Function called `name` for the kernels: ``apply(plan, call, *tensors)``.

    The tensors are those that may require a gradient. ``forward(ctx, plan, call, *tensors)``
    saves what the other one needs, and returns the results, and which of them are constant.
    ``gradients(ctx, saved, grads, by_torch)`` returns those of the tensors; `by_torch` says that
    the kernels cannot, because derivatives of the gradients may follow, or because a gradient is
    no plain tensor. The Function must not be called under a transform of torch.func.
    """

    def run(ctx: Any, plan: Any, call: Any, *tensors: Tensor | None) -> Any:
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        results, constant = forward(ctx, plan, call, *tensors)
        if constant:
            ctx.mark_non_differentiable(*constant)
        return results

    def run_backward(ctx: Any, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        try:
            saved = ctx.saved_tensors  # torch's checkpoint allows only one read of saved tensors
        except RuntimeError as error:
            if "a second time" in str(error):  # torch: "Trying to backward through the graph ..."
                raise RuntimeError(f"{error} {_FORGOTTEN}") from None
            raise
        by_torch = torch.is_grad_enabled() or _beyond_kernels(grads)
        return None, None, *gradients(ctx, saved, grads, by_torch)

    gradients = lender.where_it_fits(gradients)
    hidden = opaque(run_backward)

    def backward(ctx: Any, *grads: Tensor | None) -> Sequence[Tensor | None]:
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        # Compiled autograd traces this function, and must not trace into the kernels.
        return (hidden if torch.compiler.is_compiling() else run_backward)(ctx, grads)

    methods = {"forward": staticmethod(run), "backward": staticmethod(backward)}
    kind: Any = type(name, (torch.autograd.Function,), methods)
    # This is apply without its search for torch.func's wrappers among all arguments.
    return getattr(super(torch.autograd.Function, kind), "apply", kind.apply)


def _forward(ctx: Any, plan: Plan, call: Call, *_: Tensor | None) -> tuple[Any, Any]:
    """Run the kernels; the results are spk, syn, mem, and the name of what ran."""
    spk, syn, mem, saved, name, selection, packed, copy = plan.forward(call, True)
    # The user may modify a threshold before the backward pass, because snnTorch's graph has none.
    ctx.threshold = threshold = call.threshold
    if threshold is not None:
        ctx.copy = threshold.clone() if copy is None else copy
    ctx.save_for_backward(*call[:5], call.graded, call.lengths, saved)
    ctx.record, ctx.selection, ctx.packed = call.record, selection, packed
    constant = () if plan.passes_gradient else (spk,)
    if not any(ctx.needs_input_grad[2:7]):  # only the threshold wants one
        constant += (syn, mem)[: constant_states(plan.spec, call.sequence)]
    return (spk, syn, mem, name), constant


def constant_states(spec: CellSpec, sequence: bool) -> int:
    """How many of syn and mem, in this order, pass no gradient to a threshold."""
    return 2 if spec.reset != "subtract" else 0 if sequence else 1


def _gradients(
    ctx: Any, everything: Sequence[Any], grads: Sequence[Tensor | None], by_torch: bool
) -> Sequence[Tensor | None]:
    """The gradients of the tensors, in the order of :class:`Gradients`."""
    *tensors, graded, lengths, saved = everything
    grads = grads[:3]
    threshold = None if ctx.threshold is None else ctx.copy
    wanted = reached(ctx.needs_input_grad[2:], ctx.plan.spec.reset, grads, ctx.plan.time > 1)
    create_graph = torch.is_grad_enabled()
    if create_graph and wanted[5]:
        now, then = ctx.threshold, threshold
        if not (now.is_leaf or torch.allclose(now, then, 0, 0, equal_nan=True)):
            raise RuntimeError(
                "the threshold was modified by an inplace operation, which its second derivative "
                "does not allow"
            )
        threshold = connected(now, then)
    call = Call._make((*tensors, threshold, graded, lengths, ctx.record))
    if by_torch:
        return _by_reference(ctx.plan, call, grads, wanted, create_graph)
    packed = ctx.packed
    if not keeps_graph():  # no other backward pass follows, so the packed weight can be freed
        ctx.packed = None
    grads = [grad.resolve_neg() if grad is not None and grad.is_neg() else grad for grad in grads]
    return ctx.plan.backward(call, saved, grads, wanted, ctx.selection, packed)


_apply = differentiable("_SConv2dLSTM", _forward, _gradients)


def reached(
    wanted: Sequence[bool], reset: str, grads: Sequence[Tensor | None], steps: bool = False
) -> Sequence[bool]:
    """Which gradients are wanted and exist.

    The threshold's come only from spk, from mem with "subtract", and through that mem from syn of a
    later step, if there are several `steps`.
    """
    by_mem = reset == "subtract" and (steps or grads[-1] is not None)
    return (*wanted[:-1], wanted[-1] and (grads[0] is not None or by_mem))


def connected(parameter: Tensor, numbers: Tensor) -> Tensor:
    """The `numbers` that were kept of a parameter, whose derivatives reach the parameter."""
    out = parameter.expand_as(numbers).to(numbers.dtype, copy=True)
    out.data = numbers
    return out


@torch.enable_grad()
def _by_reference(
    plan: Any,
    call: Call,
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
    create_graph: bool,
) -> Sequence[Tensor | None]:
    """The same gradients on the reference path; `create_graph` is that of torch.autograd.grad."""
    # The inputs are aliased, so that no gradient flows to one through another that was computed
    # from it. An input may have stopped requiring a gradient since the forward pass.
    aliases: list[Any] = []
    for t, want in zip(call[:6], wanted, strict=True):
        leaf = t is not None and want and not t.requires_grad
        aliases.append(t.detach().requires_grad_() if leaf else t if t is None else t.view_as(t))
    operands = plan.operands
    x, syn, mem, weight, bias, threshold = aliases
    # The forward pass's autocast applies, not that of the code that asks for the gradients.
    with torch.autocast(plan.device.type, operands, enabled=operands is not None):
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        inside = Call(x, syn, mem, weight, bias, threshold, *call[6:])
        outputs = reference.run(inside, plan.spec)
    pairs = [
        (o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad
    ]
    if not pairs:
        return (None,) * len(aliases)
    ends, output_grads = zip(*pairs, strict=True)
    sources = [t for t, want in zip(aliases, wanted, strict=True) if want]
    gradients = torch.autograd.grad(
        ends, sources, output_grads, create_graph=create_graph, allow_unused=True
    )
    rest = iter(gradients)
    return tuple(next(rest) if want else None for want in wanted)
