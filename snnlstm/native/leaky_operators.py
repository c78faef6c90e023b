"""Leaky as operators, for torch.compile.

Traced code calls ``snnlstm::leaky``, and cannot know which backend compiles its graph. So this
operator is composite: it stays whole in dynamo's graph, and backends take it apart into the plain
operations of its formula. A backend that knows it puts ``snnlstm::leaky_kernels`` in its place, or
calls :func:`run_plainly`; both run the kernels.
"""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..calls.keys import OF_TORCH
from ..reference import leaky_step, real_dtype
from ..surrogate import Surrogate
from .backends import BACKENDS
from .function import reached
from .leaky import (
    Neurons,
    by_kernels,
    forward,
    of_arguments,
    reason_against,
    run_neurons,
    without_gaps,
)
from .tensors import real

_SCHEMA = (
    "(Tensor x, Tensor mem, Tensor beta, Tensor threshold, Tensor graded, str text, "
    "bool sequence, bool record) -> (Tensor, Tensor)"
)


@lru_cache(maxsize=256)
def _options(text: str) -> tuple[str, Surrogate]:
    """The reset mechanism and the surrogate of an operator's text."""
    reset, _, surrogate = text.partition(" ")
    return reset, Surrogate(*literal_eval(surrogate))


def _neurons(text: str, parameters: Sequence[Tensor], sequence: bool) -> Neurons:
    beta, threshold, graded = parameters
    return Neurons(*_options(text), beta, threshold, graded, sequence)


def _formula(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Run the steps of x, (...) or (T, ...), in plain torch.

    A mem of another shape than a step's means zeros. The result's mem has every step, or, for a
    sequence without `record`, the last one alone.
    """
    x, mem, beta, threshold, graded, text, sequence, record = arguments
    reset, surrogate = _options(text)
    dtype, spks, mems = real_dtype(x, beta), [], []
    for x_t in x.unbind() if sequence else (x,):
        spk, mem = leaky_step(x_t, mem, beta, threshold, graded, surrogate, reset, dtype)
        spks.append(spk)
        mems.append(mem)
    if not sequence:
        return spk, mem
    return torch.stack(spks), torch.stack(mems) if record else mem


torch.library.define("snnlstm::leaky", _SCHEMA)
torch.library.impl("snnlstm::leaky", "CompositeImplicitAutograd")(_formula)
leaky = torch.ops.snnlstm.leaky.default


def run_plainly(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Compute what the operators do, by the kernels if they can, without torch's dispatcher."""
    x, mem, *parameters, text, sequence, record = arguments
    if not OF_TORCH.issuperset(map(type, arguments[:5])) or _reason_against(*arguments):
        return _formula(*arguments)
    neurons = _neurons(text, parameters, sequence)
    spk, after = run_neurons(neurons, x, _fitting(mem, x, sequence), record)
    # A copy, because a state that is a view could not be detached in place.
    return spk, after[-1].clone() if sequence and not record and after.dim() == x.dim() else after


def _reason_against(x: Tensor, mem: Tensor, *others: Any) -> str | None:
    """Why the kernels cannot run an operator's call."""
    *parameters, _, sequence, _ = others
    if x.device.type not in BACKENDS:
        return f"there are none for device {x.device.type}"
    return reason_against(x, mem, parameters, sequence)


def _fitting(mem: Tensor, x: Tensor, sequence: bool) -> Tensor:
    """The mem before the first step; a mem of another shape than a step of x means zeros."""
    if mem.shape == x.shape[sequence:]:
        return mem
    return torch.zeros_like(x[0] if sequence else x, dtype=real(x.dtype))


# ---- the operator that other compilers call ------------------------------------------------------


@torch.library.custom_op("snnlstm::leaky_kernels", mutates_args=(), schema=_SCHEMA)
def kernels_operator(*arguments: Any) -> tuple[Tensor, Tensor]:
    """What ``snnlstm::leaky`` computes, by the kernels."""
    x, mem, *parameters, text, sequence, record = arguments
    reason = _reason_against(*arguments)
    if reason is not None:
        raise ValueError(f"the kernels cannot run this Leaky: {reason}")
    neurons = _neurons(text, parameters, sequence)
    return forward(neurons, x, _fitting(mem, x, sequence), record)


@kernels_operator.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    x, *_, sequence, record = arguments
    x = without_gaps(x, sequence)
    spk, mem = (_empty_like(x, real(x.dtype)) for _ in range(2))
    return spk, _empty_like(mem[0], mem.dtype) if sequence and not record else mem


def _empty_like(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=dtype, device=like.device)


@torch.library.custom_op(
    "snnlstm::leaky_backward", mutates_args=(),
    schema="(Tensor? before, Tensor after, Tensor beta, Tensor threshold, Tensor graded, "
    "Tensor? grad_spk, Tensor? grad_mem, str text, bool sequence, ScalarType x_type, "
    "ScalarType mem_type, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
)  # fmt: skip
def _backward_operator(*arguments: Any) -> Sequence[Tensor]:
    before, after, *parameters, grad_spk, grad_mem, text = arguments[:8]
    sequence, x_type, mem_type, wanted = arguments[8:]
    neurons = _neurons(text, parameters, sequence)
    if before is None:
        before = torch.zeros_like(after[0] if sequence else after)
    layout = after.shape, after.stride(), after.device
    grads = grad_spk, grad_mem
    found = by_kernels(neurons, x_type, *layout, before, after, grads, wanted)
    return _gradient_outputs(found, after, parameters, mem_type, wanted)


def _gradient_outputs(
    found: Sequence[Any], after: Tensor, parameters: Sequence[Tensor], mem_type: Any, wanted: Any
) -> Sequence[Tensor]:
    grads = of_arguments(found, wanted, mem_type, *parameters[:2])
    return tuple(after.new_empty(0) if grad is None else grad for grad in grads)


@_backward_operator.register_fake
def _(*arguments: Any) -> Sequence[Tensor]:
    after, *parameters = arguments[1:5]
    sequence, x_type, mem_type, wanted = arguments[8:]
    like = after[0] if sequence else after
    found = (_empty_like(after, x_type), *(_empty_like(like, after.dtype) for _ in range(3)))
    kept = [grad if want else None for grad, want in zip(found, wanted, strict=True)]
    return _gradient_outputs(kept, after, parameters, mem_type, wanted)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, mem, *parameters, ctx.text, ctx.sequence, record = inputs
    (reset, surrogate), needs = _options(ctx.text), ctx.needs_input_grad
    ctx.fits, ctx.types = mem.shape == x.shape[ctx.sequence :], (x.dtype, mem.dtype)
    ctx.last = ctx.sequence and not record
    # The backward pass reads mem of all steps, and computes it again where it is no result.
    kept = (x, mem) if ctx.last else (None, mem if ctx.fits else None)
    ctx.save_for_backward(*kept, None if ctx.last else output[1], *parameters)
    ctx.set_materialize_grads(False)
    constant = [output[0]] if surrogate.kind == 0 else []
    if reset != "subtract" and not any(needs[:3]):
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
    wanted = reached((needs[0], needs[1] and ctx.fits, *needs[2:4]), _options(ctx.text)[0], grads)
    out = _backward_operator(
        before, after, *parameters, grad_spk, grad_mem, ctx.text, ctx.sequence, *ctx.types,
        list(wanted),
    )  # fmt: skip
    return (*(g if want else None for g, want in zip(out, wanted, strict=True)), *(None,) * 4)


kernels_operator.register_autograd(_backward_of_operator, setup_context=_setup_context)
