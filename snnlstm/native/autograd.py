"""The cell as one autograd Function over the native kernels.

Saved for the backward pass: the arguments, and per time step the activated gates and syn.
mem and the reset are recomputed from these (the reset rides in a sign bit of the gates). With
``checkpoint`` the gates are recomputed too: checkpoint.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import reference
from ..call import Call, make_call, version
from . import checkpoint, kernels, ops
from .tensors import as_saved, plain, restored

__all__ = ["run"]

# Whether a gradient is one of many at once, as with is_grads_batched=True.
_is_batch: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor


class _SConv2dLSTM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Take a call's seven tensors, and what is no tensor."""
        *tensors, call, choice, algorithm = given
        # A threshold may be written to before the backward pass: snnTorch's graph keeps none.
        ctx.threshold, ctx.version = call.threshold, version(call.threshold)
        tensors[5] = call.threshold.clone()
        saved: Any
        if call.options.checkpoint is True:
            (spk, new_syn, new_mem, _), saved = checkpoint.forward(call, algorithm)
        else:
            spk, new_syn, new_mem, saved = choice.forward(call, True)
        ctx.save_for_backward(*tensors, *saved)
        ctx.kept = call.options, call.signature, choice, algorithm
        ctx.set_materialize_grads(False)
        if call.options.surrogate.kind == 0:
            ctx.mark_non_differentiable(spk)
        return spk, new_syn, new_mem

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        return (*_gradients(ctx, grads), *(None,) * 4)


def _gradients(ctx: Any, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The gradients of a backward pass, in the order of :class:`Gradients`.

    The pass writes to nothing that was saved: it may be interrupted and run again.
    """
    if grads[0] is grads[1] is grads[2] is None:
        return (None,) * 6
    x, syn, mem, weight, bias, threshold, graded, *saved = ctx.saved_tensors
    options, signature, choice, algorithm = ctx.kept
    wanted = ctx.needs_input_grad[:6]
    again = torch.is_grad_enabled()
    if again or _beyond_kernels(grads):
        if wanted[5] and again:
            if version(ctx.threshold) != ctx.version:
                raise RuntimeError(
                    "the threshold was modified by an inplace operation, and its gradient is to "
                    "be differentiated"
                )
            threshold = ctx.threshold
        call = Call(x, syn, mem, weight, bias, threshold, graded, options, signature)
        return _in_plain_torch(call, grads, wanted, again)
    grads = [None if grad is None else plain(grad) for grad in grads]
    s = signature
    x = as_saved(x, (*((s.time,) if options.sequence else ()), s.n, s.cin, s.h, s.w), s.dtype)
    syn, mem = as_saved(syn, s.state, s.dtype), as_saved(mem, s.state, s.dtype)
    call = Call(x, syn, mem, weight, bias, threshold, graded, options, signature)
    if options.checkpoint is True:
        states = [as_saved(state, s.state, s.dtype) for state in saved]
        return checkpoint.backward(call, states, grads, wanted, algorithm)
    return choice.backward(call, restored(saved, choice.saved_shapes), grads, wanted)


# This is _SConv2dLSTM.apply without its search for torch.func's wrappers among all arguments: a
# call under a transform of torch.func does not come here.
_apply = super(torch.autograd.Function, _SConv2dLSTM).apply


def _beyond_kernels(grads: Sequence[Tensor | None]) -> bool:
    """Whether more than numbers comes with the gradients: tangents, a batch of them, a subclass."""
    for grad in grads:
        if grad is not None and (type(grad) is not Tensor or _is_batch(grad)):
            return True
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


@torch.enable_grad()
def _in_plain_torch(
    call: Call, grads: Sequence[Tensor | None], wanted: Sequence[bool], again: bool
) -> Sequence[Tensor | None]:
    """The same gradients in plain torch; with `again` they can be differentiated in their turn."""
    # The inputs are aliased, because one may have been computed from another one, and that path
    # must not count. An input may have stopped to require a gradient since the forward pass.
    own: list[Any] = [
        t if t is None else t.detach().requires_grad_() if want and not t.requires_grad
        else t.view_as(t)
        for t, want in zip(call[:6], wanted, strict=True)
    ]  # fmt: skip
    operands = call.signature.options.operands
    # The forward pass's autocast counts, not that of the code which asks for the gradients.
    with torch.autocast(call.signature.device_type, operands, enabled=operands is not None):
        x, syn, mem, weight, bias, threshold = own
        outputs = reference.run(
            Call(x, syn, mem, weight, bias, threshold, call.graded, call.options)
        )
    pairs = [
        (o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad
    ]
    if not pairs:
        return (None,) * len(own)
    ends, given = zip(*pairs, strict=True)
    sources = [t for t, want in zip(own, wanted, strict=True) if want]
    found = torch.autograd.grad(ends, sources, given, create_graph=again, allow_unused=True)
    rest = iter(found)
    return tuple(next(rest) if want else None for want in wanted)


def _in_float32(call: Call, algorithm: str) -> tuple[Tensor, Tensor, Tensor, str | None]:
    """A call in a half type: each step in float32, between steps states in the half type."""
    x, syn, mem, weight, bias, threshold, graded, options = call[:8]
    dtype = x.dtype
    weight, threshold, graded = weight.float(), threshold.float(), graded.float()
    bias = None if bias is None else bias.float()
    step = replace(options, sequence=False, record=False)
    out: list[tuple[Tensor, ...]] = []
    name = None
    for x_t in x.unbind(0) if options.sequence else [x]:
        states = syn.float(), mem.float()
        wide = make_call((x_t.float(), *states, weight, bias, threshold, graded, step))
        *results, name = run(wide, algorithm)
        out.append(tuple(result.to(dtype) for result in results))
        _, syn, mem = out[-1]
    if not options.sequence:
        return (*out[0], name)  # type: ignore[return-value]
    spks, syns, mems = zip(*out, strict=True)
    if options.record:
        syn, mem = torch.stack(syns), torch.stack(mems)
    return torch.stack(spks), syn, mem, name


def run(call: Call, algorithm: str) -> tuple[Tensor, Tensor, Tensor, str | None]:
    """Run the native kernels: spk, syn and mem as :func:`snnlstm.reference.run` returns them.

    The backward pass keeps to `algorithm`. The fourth result is the name of what ran, such as
    ``"cpu-avx2-winograd4-sparse"``; None while torch.compile traces.
    """
    x, syn, mem, weight, bias, threshold, graded, options = call[:8]
    narrow = x.dtype in (torch.float16, torch.bfloat16)
    if narrow and not kernels.HALVES[x.device.type].half_types:
        return _in_float32(call, algorithm)
    if weight.dtype != x.dtype:  # a half precision module under autocast
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        call = call._replace(weight=weight, bias=bias)
    training = torch.is_grad_enabled() and (
        weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or mem.requires_grad
        or syn.requires_grad
        or x.requires_grad
        or threshold.requires_grad
    )
    if call.signature is None:  # torch.compile traces
        return (*ops.run(call, training, algorithm), None)
    if training and x.is_inference():  # autograd refuses to save it
        x = x.clone()
        call = call._replace(x=x)
    choice = kernels.choose(call, algorithm)
    if not training:
        return (*choice.forward(call, False)[:3], choice.name)
    out = _apply(x, syn, mem, weight, bias, threshold, graded, call, choice, algorithm)
    return (*out, choice.name)
