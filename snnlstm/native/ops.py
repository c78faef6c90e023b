"""The native kernels as torch.library operators, for torch.compile.

``snnlstm::forward`` and ``snnlstm::backward`` are opaque to the compiler: it sees shapes, from
the fake kernels here, and keeps the calls in its graph. Outside of torch.compile
:mod:`snnlstm.native.autograd` calls the kernels directly, which is quicker for small layers.

An operator takes tensors, numbers and strings only, so options travel as a text.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..call import Call, CellOptions, Signature, autocast_dtype, make_call
from . import checkpoint, kernels, tensors
from .tensors import Saved

__all__ = ["run"]

_CALL = (
    "Tensor x, Tensor syn, Tensor mem, Tensor weight, Tensor? bias, Tensor threshold, "
    "Tensor graded, str options"
)
_SIX = ", ".join(["Tensor"] * 6)


def _text(options: CellOptions) -> str:
    # torch.compile keeps graphs on disk. A graph must not serve where another layout is kept.
    return f"{kernels.LAYOUT}|{options.text()}"


def _call(*given: Any) -> Call:
    """The call of an operator's first eight arguments."""
    return make_call((*given[:7], CellOptions.from_text(given[7].partition("|")[2])))


def _fake_call(*given: Any) -> Call:
    """The call of fake tensors, without levels: among fake tensors they would have no numbers."""
    x, _, mem, _, _, threshold, _, text, *_ = given
    options = CellOptions.from_text(text.partition("|")[2].rpartition(";")[0] + ";")
    signature = Signature(x, mem, threshold, options, None)
    return Call(*given[:8])._replace(options=options, signature=signature)


def _kept(x: Tensor, saved: Saved | None) -> tuple[Tensor, ...]:
    return saved or (x.new_empty(0), x.new_empty(0), x.new_empty(0, dtype=torch.int64))


@torch.library.custom_op(
    "snnlstm::forward", mutates_args=(),
    schema=f"({_CALL}, bool training, str algorithm) -> ({_SIX})",
)  # fmt: skip
def _forward(*given: Any) -> tuple[Tensor, ...]:
    call, (training, algorithm) = _call(*given), given[8:]
    if training and call.options.checkpoint is True:
        (*out, _), boundaries = checkpoint.forward(call, algorithm)
        first, *rest = _kept(call.x, None)
        return (*out, torch.stack(boundaries) if boundaries else first, *rest)
    *out, saved = kernels.choose(call, algorithm).forward(call, training)
    return (*out, *_kept(call.x, saved))


@_forward.register_fake
def _(*given):
    call, training = _fake_call(*given), given[8]
    keeps = training and call.options.checkpoint is not True
    *out, saved = kernels.empty_result(call, keeps)
    first, *rest = _kept(call.x, saved)
    count = checkpoint.boundary_count(call) if training and not keeps else 0
    if count > 0:
        first = first.new_empty((count, *call.mem.shape))
    return (*out, first, *rest)


@torch.library.custom_op(
    "snnlstm::backward", mutates_args=(),
    schema=f"({_CALL}, Tensor kept_gates, Tensor kept_syn, Tensor kept_winner, Tensor grad_spk, "
    f"Tensor grad_syn, Tensor grad_mem, bool[] wanted, str algorithm) -> ({_SIX})",
)  # fmt: skip
def _backward(*given: Any) -> tuple[Tensor, ...]:
    saved, grads, (wanted, algorithm) = given[8:11], given[11:14], given[14:]
    dtype = grads[0].dtype
    # Hooks on saved tensors may have brought them back in another dtype or other memory.
    call = _call(*(tensors.plain(t).to(dtype) for t in given[:4]), *given[4:])
    if call.options.checkpoint is True:
        boundaries = tensors.plain(saved[0]).to(dtype).unbind() if saved[0].dim() > 1 else ()
        out = checkpoint.backward(call, boundaries, grads, wanted, algorithm)
    else:
        choice = kernels.choose(call, algorithm)
        kept = tensors.restored(Saved(*saved), choice.saved_shapes)
        out = choice.backward(call, kept, grads, wanted)
    return _all_gradients(call.x, out)


def _all_gradients(x: Tensor, out: tensors.Gradients) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(0) if grad is None else grad for grad in out)


@_backward.register_fake
def _(*given):
    call, wanted = _fake_call(*given), given[14]
    out = tensors.empty_gradients(call.x, call.signature, wanted)
    if wanted[5]:
        out = out._replace(threshold=torch.empty_like(call.threshold))
    return _all_gradients(call.x, out)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *saved, options, _training, algorithm = inputs
    ctx.save_for_backward(*saved, *output[3:])
    ctx.options, ctx.algorithm = options, algorithm


def _backward_of_forward(ctx: Any, *grads: Tensor) -> tuple:
    saved, wanted = ctx.saved_tensors, list(ctx.needs_input_grad[:6])
    out = _backward(*saved[:7], ctx.options, *saved[7:], *grads[:3], wanted, ctx.algorithm)
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
