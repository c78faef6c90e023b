"""Leaky as operators, for torch.compile.

Traced code calls ``snnlstm::leaky``, and cannot know which backend compiles its graph. So this
operator is composite: it stays whole in dynamo's graph, and backends take it apart into the plain
operations of its formula. A backend that knows it puts ``snnlstm::leaky_kernels`` in its place, or
what :func:`leaky_in_graph` makes; both run the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..calls.call import LeakyCall
from ..calls.entries import TORCH_TYPES, Entry, backend_of, entry_of
from ..calls.spec import FINITE, LeakySpec
from ..reference import leaky_step, real_dtype
from .function import reached
from .leaky import Plan, argument_gradients, reason_against, run_plan, without_gaps
from .tensors import compute_dtype

NAMESPACE = "snnlstm"
while hasattr(getattr(torch.ops, NAMESPACE), "leaky"):
    # The package was imported before. Its compiled graphs call those operators, and would crash if
    # others took their names.
    NAMESPACE += "_"
OPERATORS: Any = getattr(torch.ops, NAMESPACE)

_SCHEMA = (
    "(Tensor x, Tensor mem, Tensor beta, Tensor threshold, Tensor graded, str text, "
    "bool sequence, bool record) -> (Tensor, Tensor)"
)


def _formula(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Run the steps of x, (...) or (T, ...), in plain torch.

    A mem of another shape than a step's means zeros. The result's mem has every step, or, for a
    sequence without `record`, the last one alone.
    """
    x, mem, beta, threshold, graded, text, sequence, record = arguments
    reset, surrogate, *_ = LeakySpec.from_text(text, sequence)
    dtype, infinite, spks, mems = real_dtype(x, beta), not text.endswith(FINITE), [], []
    for x_t in x.unbind() if sequence else (x,):
        spk, mem = leaky_step(x_t, mem, beta, threshold, graded, surrogate, reset, dtype, infinite)
        spks.append(spk)
        mems.append(mem)
    if not sequence:
        return spk, mem
    return torch.stack(spks), torch.stack(mems) if record else mem


torch.library.define(f"{NAMESPACE}::leaky", _SCHEMA)
torch.library.impl(f"{NAMESPACE}::leaky", "CompositeImplicitAutograd")(_formula)
leaky = OPERATORS.leaky.default


def leaky_in_graph() -> Callable[..., Any]:
    """Make the function that runs one call of ``snnlstm::leaky`` in a graph.

    The kernels run it if they can, without torch's dispatcher. A guard recognises a call like the
    last one.
    """
    last: Any = None  # the entry of the last call

    def run(*arguments: Any) -> tuple[Tensor, Tensor]:
        nonlocal last
        x, mem, beta, threshold, graded, _, sequence, every = arguments
        call = LeakyCall(x, mem, beta, threshold, graded, every)
        if last is None or not last.serves(call, last.spec, *backend_of(x, "auto"), None):
            spec = _spec_of(arguments)
            of_torch = TORCH_TYPES.issuperset(map(type, call[:5]))
            if not of_torch or reason_against(call, spec.sequence):
                return _formula(*arguments)
            last = _entry_of(call, spec)
        plan = last.plan or last.planned(Plan, call)
        spk, after = run_plan(plan, call, last.needs_grad)
        # A copy, because a state that is a view could not be detached in place.
        is_view = sequence and not every and after.dim() == x.dim()
        return spk, after[-1].clone() if is_view else after

    return run


def _spec_of(arguments: Sequence[Any]) -> LeakySpec:
    return LeakySpec.from_text(*arguments[5:7])


def _entry_of(call: LeakyCall, spec: LeakySpec) -> Entry:
    return entry_of(call, spec, *backend_of(call.x, "auto"), None)


# ---- the operator that other compilers call ------------------------------------------------------


@torch.library.custom_op(f"{NAMESPACE}::leaky_kernels", mutates_args=(), schema=_SCHEMA)
def kernels_operator(*arguments: Any) -> tuple[Tensor, Tensor]:
    """What ``snnlstm::leaky`` computes, by the kernels."""
    call = LeakyCall._make((*arguments[:5], arguments[7], None, False))
    spec = _spec_of(arguments)
    reason = reason_against(call, spec.sequence)
    if reason is not None:
        raise ValueError(f"the kernels cannot run this Leaky: {reason}")
    return run_plan(_entry_of(call, spec).planned(Plan, call), call, False)


@kernels_operator.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    x, *_, sequence, record = arguments
    x = without_gaps(x, sequence)
    spk, mem = (_empty_like(x, compute_dtype(x.dtype)) for _ in range(2))
    return spk, _empty_like(mem[0], mem.dtype) if sequence and not record else mem


def _empty_like(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=dtype, device=like.device)


@torch.library.custom_op(
    f"{NAMESPACE}::leaky_backward", mutates_args=(),
    schema="(Tensor? before, Tensor after, Tensor beta, Tensor threshold, Tensor graded, "
    "Tensor? grad_spk, Tensor? grad_mem, str text, bool sequence, ScalarType x_type, "
    "ScalarType mem_type, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
)  # fmt: skip
def _backward_operator(*arguments: Any) -> Sequence[Tensor]:
    before, after, *parameters, grad_spk, grad_mem, text = arguments[:8]
    sequence, *types, wanted = arguments[8:]
    if before is None:
        before = torch.zeros_like(after[0] if sequence else after)
    x = after if types[0] is after.dtype else torch.empty_like(after, dtype=types[0])
    call = LeakyCall(x, before, *parameters)
    plan = _entry_of(call, LeakySpec.from_text(text, sequence)).planned(Plan, call)
    *kept, graded = plan.numbers(parameters)
    grads = plan.backward(before, after, kept, graded, (grad_spk, grad_mem), wanted)
    return _gradient_outputs(grads, after, parameters, types, wanted)


def _gradient_outputs(
    grads: Sequence[Any], after: Tensor, parameters: Sequence[Tensor], types: Any, wanted: Any
) -> Sequence[Tensor]:
    shaped = argument_gradients(grads, parameters, types, wanted)
    return tuple(after.new_empty(0) if grad is None else grad for grad in shaped)


@_backward_operator.register_fake
def _(*arguments: Any) -> Sequence[Tensor]:
    after, *parameters = arguments[1:5]
    sequence, *types, wanted = arguments[8:]
    like = after[0] if sequence else after
    grads = (_empty_like(after, types[0]), *(_empty_like(like, after.dtype) for _ in range(3)))
    kept = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
    return _gradient_outputs(kept, after, parameters, types, wanted)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, mem, *parameters, ctx.text, ctx.sequence, record = inputs
    spec, needs = LeakySpec.from_text(ctx.text, ctx.sequence), ctx.needs_input_grad
    ctx.fits, ctx.types = mem.shape == x.shape[ctx.sequence :], (x.dtype, mem.dtype)
    ctx.last = ctx.sequence and not record
    # The backward pass reads mem of all steps, and computes it again where it is no result.
    kept = (x, mem) if ctx.last else (None, mem if ctx.fits else None)
    ctx.save_for_backward(*kept, None if ctx.last else output[1], *parameters)
    ctx.set_materialize_grads(False)
    constant = [] if spec.surrogate.kind else [output[0]]
    if spec.reset != "subtract" and not any(needs[:3]):
        constant.append(output[1])
    ctx.mark_non_differentiable(*constant)


def _backward_of_operator(ctx: Any, *grads: Tensor | None) -> tuple:
    if grads[0] is grads[1] is None:
        return (None,) * 8
    x, before, after, *parameters = ctx.saved_tensors
    grad_spk, grad_mem = grads
    if ctx.last:
        after = kernels_operator(x, before, *parameters, ctx.text, True, True)[1]
        before = before if ctx.fits else None
        if grad_mem is not None:
            grad_mem = torch.cat([torch.zeros_like(after[1:]), grad_mem[None]])
    needs = ctx.needs_input_grad
    reset = LeakySpec.from_text(ctx.text, ctx.sequence).reset
    wanted = reached((needs[0], needs[1] and ctx.fits, *needs[2:4]), reset, grads)
    out = _backward_operator(
        before, after, *parameters, grad_spk, grad_mem, ctx.text, ctx.sequence, *ctx.types,
        list(wanted),
    )  # fmt: skip
    return (*(g if want else None for g, want in zip(out, wanted, strict=True)), *(None,) * 4)


kernels_operator.register_autograd(_backward_of_operator, setup_context=_setup_context)
