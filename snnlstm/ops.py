"""The native kernels as torch.library operators, for torch.compile.

``snnlstm::forward`` and ``snnlstm::backward`` are opaque to the compiler: it sees shapes, from
the fake kernels here, and keeps the calls in its graph. Outside of torch.compile
:mod:`snnlstm.autograd` calls the kernels directly, which is quicker for small layers.

An operator takes tensors, numbers and lists of numbers only, so a CellOptions travels as three
of them: see :func:`_encode`.
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import native
from .options import CellOptions, Pool, Reset
from .quant import StateQuant
from .surrogate import Surrogate

__all__ = ["run"]

_RESETS: tuple[Reset, ...] = ("subtract", "zero", "none")
_POOLS: tuple[Pool, ...] = ("none", "max", "avg")
_OPERANDS = (None, torch.float16, torch.bfloat16)


def _encode(options: CellOptions) -> tuple[list[int], list[float], Tensor | None]:
    surrogate = options.surrogate
    numbers = [
        *options.kernel_size,
        *options.stride,
        *options.dilation,
        *options.pool_size,
        _RESETS.index(options.reset),
        _POOLS.index(options.pool),
        surrogate.kind,
        int(options.inhibition),
        int(options.sequence),
        int(options.record),
        int(options.checkpoint),
        _OPERANDS.index(options.operands),
        native.LAYOUT,
    ]
    levels = None if options.quant is None else options.quant.levels
    return numbers, [surrogate.p0, surrogate.p1], levels


_CHECKPOINT = 14  # its place in the numbers


def _decode(numbers: list[int], parameters: list[float], levels: Tensor | None) -> CellOptions:
    kh, kw, sh, sw, dh, dw, ph, pw, reset, pool, kind, *flags, operands, _ = numbers
    p0, p1 = parameters
    inhibition, sequence, record, checkpoint = map(bool, flags)
    return CellOptions(
        (kh, kw),
        (sh, sw),
        (dh, dw),
        _RESETS[reset],
        _POOLS[pool],
        (ph, pw),
        Surrogate(kind, p0, p1),
        None if levels is None else StateQuant(levels),
        inhibition,
        sequence,
        record,
        checkpoint,
        _OPERANDS[operands],
    )


def _saved_or_empty(x: Tensor, saved: native.Saved | None) -> tuple[Tensor, Tensor, Tensor]:
    if saved is None:
        return x.new_empty(0), x.new_empty(0), x.new_empty(0, dtype=torch.int64)
    return saved.gates, saved.syn, saved.winner


def _gradients_or_empty(x: Tensor, grads: native.Gradients) -> Any:
    return tuple(x.new_empty(0) if grad is None else grad for grad in grads)


_LIST: Any = typing.List  # noqa: UP006


def _operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: a torch.library operator whose schema is that of the function's annotations."""

    def define(function: Callable[..., Any]) -> Any:
        # torch 2.4 knows neither annotations that are strings nor list[int].
        function.__annotations__ = {
            key: _LIST[typing.get_args(hint)] if typing.get_origin(hint) is list else hint
            for key, hint in typing.get_type_hints(function).items()
        }
        return torch.library.custom_op(name, function, mutates_args=())

    return define


@_operator("snnlstm::forward")
def _forward(
    x: Tensor,
    syn: Tensor,
    mem: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    graded: Tensor,
    levels: Tensor | None,
    numbers: list[int],
    parameters: list[float],
    training: bool,
    algorithm: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = _decode(numbers, parameters, levels)
    spk, new_syn, new_mem, saved = native.forward(
        x, syn, mem, weight, bias, threshold, graded, options, training, algorithm
    )
    return (spk, new_syn, new_mem, *_saved_or_empty(x, saved))


@_forward.register_fake
def _(
    x, syn, mem, weight, bias, threshold, graded, levels, numbers, parameters, training, algorithm
):
    options = _decode(numbers, parameters, None)
    *out, saved = native.empty_result(x, mem, options, training)
    return (*out, *_saved_or_empty(x, saved))


@_operator("snnlstm::backward")
def _backward(
    x: Tensor,
    syn: Tensor,
    mem: Tensor,
    weight: Tensor,
    threshold: Tensor,
    graded: Tensor,
    levels: Tensor | None,
    numbers: list[int],
    parameters: list[float],
    gates: Tensor,
    saved_syn: Tensor,
    winner: Tensor,
    grad_spk: Tensor,
    grad_syn: Tensor,
    grad_mem: Tensor,
    wanted: list[bool],
    algorithm: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    out = native.backward(
        x,
        syn,
        mem,
        weight,
        threshold,
        graded,
        _decode(numbers, parameters, levels),
        native.Saved(gates, saved_syn, winner),
        grad_spk,
        grad_syn,
        grad_mem,
        wanted,
        algorithm,
    )
    return _gradients_or_empty(x, out)


@_backward.register_fake
def _(
    x,
    syn,
    mem,
    weight,
    threshold,
    graded,
    levels,
    numbers,
    parameters,
    gates,
    saved_syn,
    winner,
    grad_spk,
    grad_syn,
    grad_mem,
    wanted,
    algorithm,
):
    out = native.empty_gradients(x, syn, mem, weight, wanted)
    if wanted[5]:
        out = out._replace(threshold=torch.empty_like(threshold))
    return _gradients_or_empty(x, out)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, syn, mem, weight, bias, threshold, graded, levels, numbers, parameters, _, algorithm = inputs
    ctx.save_for_backward(x, syn, mem, weight, threshold, graded, levels, bias, *output[3:])
    ctx.numbers, ctx.parameters, ctx.algorithm = numbers, parameters, algorithm


def _backward_of_forward(ctx: Any, *grads: Tensor) -> tuple:
    *saved, bias, gates, saved_syn, winner = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:6])
    if ctx.numbers[_CHECKPOINT]:  # nothing was kept: compute the gates again
        *first, threshold, graded, levels = saved
        gates, saved_syn, winner = _forward(
            *first,
            bias,
            threshold,
            graded,
            levels,
            ctx.numbers,
            ctx.parameters,
            True,
            ctx.algorithm,
        )[3:]
    out = _backward(
        *saved,
        ctx.numbers,
        ctx.parameters,
        gates,
        saved_syn,
        winner,
        *grads[:3],
        wanted,
        ctx.algorithm,
    )
    return (*(g if want else None for g, want in zip(out, wanted, strict=True)), *(None,) * 6)


_forward.register_autograd(_backward_of_forward, setup_context=_setup_context)


def run(
    x: Tensor,
    syn: Tensor,
    mem: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    graded: Tensor,
    options: CellOptions,
    training: bool,
    algorithm: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`snnlstm.autograd.run`, in a form that torch.compile keeps in its graph."""
    numbers, parameters, levels = _encode(options)
    training = training and not options.checkpoint
    spk, new_syn, new_mem, *_ = _forward(
        x,
        syn,
        mem,
        weight,
        bias,
        threshold,
        graded,
        levels,
        numbers,
        parameters,
        training,
        algorithm,
    )
    if options.surrogate.kind == 0:
        spk = spk.detach()
    return spk, new_syn, new_mem
