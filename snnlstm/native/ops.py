"""The native kernels as torch.library operators, for torch.compile.

``snnlstm::forward`` and ``snnlstm::backward`` are opaque to the compiler: it sees shapes, from
the fake kernels here, and keeps the calls in its graph. Outside of torch.compile
:mod:`snnlstm.native.autograd` calls the kernels directly, which is quicker for small layers.

An operator takes tensors, numbers and strings only, so options travel as a text.
"""

# The annotations are not postponed, and of typing: torch 2.4 reads the operators' signatures from
# them, and knows no others.
from dataclasses import replace
from typing import Any, List  # noqa: UP035

import torch
from torch import Tensor

from ..call import Call, CellOptions, Signature, autocast_dtype, make_call
from . import checkpoint, kernels, tensors
from .tensors import Saved

__all__ = ["run"]

_Three = tuple[Tensor, Tensor, Tensor]
_Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _text(options: CellOptions) -> str:
    # torch.compile keeps graphs on disk. One must not serve where what is kept has another layout.
    return f"{kernels.LAYOUT}|{options.text()}"


def _options(text: str) -> CellOptions:
    return CellOptions.from_text(text.partition("|")[2])


def _without_quantiser(text: str) -> CellOptions:
    """For fake tensors: the levels are a tensor, which among fake ones would have no numbers."""
    return _options(text.rpartition(";")[0] + ";")


def _kept(x: Tensor, saved: Saved | None) -> _Three:
    if saved is None:
        return x.new_empty(0), x.new_empty(0), x.new_empty(0, dtype=torch.int64)
    return saved.gates, saved.syn, saved.winner


@torch.library.custom_op("snnlstm::forward", mutates_args=())
def _forward(
    x: Tensor,
    syn: Tensor,
    mem: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    graded: Tensor,
    options: str,
    training: bool,
    algorithm: str,
) -> _Six:
    call = make_call((x, syn, mem, weight, bias, threshold, graded, _options(options)))
    if training and call.options.checkpoint:
        result, boundaries = checkpoint.forward(call, algorithm)
        first, second, third = _kept(x, None)
        if boundaries:
            first = torch.stack(boundaries)
        return result.spk, result.syn, result.mem, first, second, third
    *out, saved = kernels.choose(call, algorithm).forward(call, training)
    return (*out, *_kept(x, saved))


@_forward.register_fake
def _(x, syn, mem, weight, bias, threshold, graded, options, training, algorithm):
    described = _without_quantiser(options)
    signature = Signature(x, mem, threshold, described, None)
    call = Call(x, syn, mem, weight, bias, threshold, graded, described, signature)
    keeps = training and not described.checkpoint
    *out, saved = kernels.empty_result(call, keeps)
    first, *rest = _kept(x, saved)
    count = checkpoint.boundary_count(call) if training and not keeps else 0
    if count > 0:
        first = x.new_empty((count, *mem.shape))
    return (*out, first, *rest)


@torch.library.custom_op("snnlstm::backward", mutates_args=())
def _backward(
    x: Tensor,
    syn: Tensor,
    mem: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    graded: Tensor,
    options: str,
    kept_gates: Tensor,
    kept_syn: Tensor,
    kept_winner: Tensor,
    grad_spk: Tensor,
    grad_syn: Tensor,
    grad_mem: Tensor,
    wanted: List[bool],  # noqa: UP006
    algorithm: str,
) -> _Six:
    call = make_call((x, syn, mem, weight, bias, threshold, graded, _options(options)))
    grads = (grad_spk, grad_syn, grad_mem)
    if call.options.checkpoint:
        boundaries = kept_gates.unbind() if kept_gates.dim() > 1 else ()
        out = checkpoint.backward(call, boundaries, grads, wanted, algorithm)
    else:
        saved = Saved(kept_gates, kept_syn, kept_winner)
        out = kernels.choose(call, algorithm).backward(call, saved, grads, wanted)
    return _all_gradients(x, out)


def _all_gradients(x: Tensor, out: tensors.Gradients) -> Any:
    return tuple(x.new_empty(0) if grad is None else grad for grad in out)


@_backward.register_fake
def _(
    x,
    syn,
    mem,
    weight,
    bias,
    threshold,
    graded,
    options,
    kept_gates,
    kept_syn,
    kept_winner,
    grad_spk,
    grad_syn,
    grad_mem,
    wanted,
    algorithm,
):
    signature = Signature(x, mem, threshold, _without_quantiser(options), None)
    out = tensors.empty_gradients(x, signature, wanted)
    if wanted[5]:
        out = out._replace(threshold=torch.empty_like(threshold))
    return _all_gradients(x, out)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *saved, options, _training, algorithm = inputs
    ctx.save_for_backward(*saved, *output[3:])
    ctx.options, ctx.algorithm = options, algorithm


def _backward_of_forward(ctx: Any, *grads: Tensor) -> tuple:
    *saved, gates, kept_syn, winner = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:6])
    kept = (gates, kept_syn, winner)
    out = _backward(*saved, ctx.options, *kept, *grads[:3], wanted, ctx.algorithm)
    return (*(g if want else None for g, want in zip(out, wanted, strict=True)), *(None,) * 4)


_forward.register_autograd(_backward_of_forward, setup_context=_setup_context)


def run(call: Call, training: bool, algorithm: str) -> tuple[Tensor, Tensor, Tensor]:
    """The call's spk, syn and mem, in a form that torch.compile keeps in its graph."""
    options = call.options
    narrow = autocast_dtype(call.x.device.type)
    if narrow is not None and narrow != torch.float32 and call.x.dtype == torch.float32:
        options = replace(options, operands=narrow)
    spk, new_syn, new_mem, *_ = _forward(*call[:7], _text(options), training, algorithm)
    if options.surrogate.kind == 0:
        spk = spk.detach()
    return spk, new_syn, new_mem
