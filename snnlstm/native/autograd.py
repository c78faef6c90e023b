"""The cell as one autograd Function over the native kernels.

Saved for the backward pass: the arguments, and per time step the activated gates and syn.
mem and the reset are recomputed from these (the reset rides in a sign bit of the gates). With
``checkpoint`` the gates are recomputed too: checkpoint.py. A step call leaves the gradients of
weight and bias to its loop: loop.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import reference
from ..call import Call, make_call
from . import checkpoint, kernels, ops
from .loop import Loop, loop_of
from .tensors import Saved, Step, plain, restored

__all__ = ["run"]

_will_run = torch._C._will_engine_execute_node
# Whether the backward pass that runs keeps its graph for another one; older versions do not tell.
_keeps_graph: Callable[[], bool] = getattr(
    torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True
)
# Whether a gradient is one of many at once, as with is_grads_batched=True.
_is_batch: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor


class _SConv2dLSTM(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        syn: Tensor,
        mem: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        threshold: Tensor,
        graded: Tensor,
        call: Call,
        choice: Any,
        loop: Loop | None,
        algorithm: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        saved: Any
        if call.options.checkpoint is True:
            (spk, new_syn, new_mem, _), saved = checkpoint.forward(call, algorithm)
            gates = 0
        else:
            spk, new_syn, new_mem, saved = choice.forward(call, True)
            gates = saved.gates.data_ptr()
        ctx.save_for_backward(x, syn, mem, weight, bias, threshold, graded, *saved)
        ctx.kept = call.options, call.signature, choice, loop, algorithm, gates
        ctx.set_materialize_grads(False)
        if call.options.surrogate.kind == 0:
            ctx.mark_non_differentiable(spk)
        return spk, new_syn, new_mem

    @staticmethod
    def backward(ctx: Any, grad_spk: Any, grad_syn: Any, grad_mem: Any) -> tuple:
        if grad_spk is None and grad_syn is None and grad_mem is None:
            return (None,) * 11
        x, syn, mem, weight, bias, threshold, graded, *saved = ctx.saved_tensors
        options, signature, choice, loop, algorithm, gates = ctx.kept
        of_x, of_syn, of_mem, of_weight, of_bias, of_threshold, *_ = ctx.needs_input_grad
        wanted = (of_x, of_syn, of_mem, of_weight, of_bias, of_threshold)
        grads: Any = (grad_spk, grad_syn, grad_mem)
        if torch.is_grad_enabled() or _beyond_kernels(grads):
            inputs, again = (x, syn, mem, weight, bias, threshold), torch.is_grad_enabled()
            return (*_in_plain_torch(inputs, graded, options, grads, wanted, again), *(None,) * 5)
        grads = [None if grad is None else plain(grad) for grad in grads]
        dtype = signature.dtype
        for t in (x, syn, mem, weight):
            if t.dtype is not dtype or t.is_neg():  # by hooks on saved tensors
                x, syn, mem, weight = (plain(t).to(dtype) for t in (x, syn, mem, weight))
                break
        call = Call(x, syn, mem, weight, bias, threshold, graded, options, signature)
        if options.checkpoint is True:
            if loop is None:
                out = checkpoint.backward(call, saved, grads, wanted, algorithm)
                return (*out, *(None,) * 5)
            kept, own = checkpoint.recompute(call, algorithm), True
        else:
            kept, own = Saved(*saved), saved[0].data_ptr() == gates
            if not own:  # hooks brought them back in other memory
                kept = restored(kept, choice.saved_shapes)
        if loop is None:
            return (*choice.backward(call, kept, grads, wanted), *(None,) * 5)
        bias_here = choice.sums_bias and loop.left.wanted[1]
        here = (of_x, of_syn, of_mem, False, bias_here, of_threshold)
        if not _will_run(loop.node):  # a pass that does not want the weight's gradient
            out = choice.backward(call, kept, grads, here)
            return (*out._replace(bias=None), *(None,) * 5)
        # The gates' memory takes their gradient, unless somebody may still read it: another
        # backward pass over this graph, or a hook that brought it.
        overwrite = own and (options.checkpoint is True or not _keeps_graph())
        d_gates = choice.empty_d_gates(call, kept if overwrite else None)
        out = choice.backward(call, kept, grads, here, d_gates)
        loop.left.add(choice, Step(x, mem, d_gates, out.bias))
        return (*out._replace(bias=None), *(None,) * 5)


# As _SConv2dLSTM.apply, which looks for torch.func's wrappers among all arguments first: a call
# under one of its transforms does not come here.
_apply = super(torch.autograd.Function, _SConv2dLSTM).apply


def _beyond_kernels(grads: tuple[Tensor | None, ...]) -> bool:
    """Whether more than numbers comes with the gradients: tangents, a batch of them, a subclass."""
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return True
    return any(type(grad) is not Tensor or _is_batch(grad) for grad in grads if grad is not None)


@torch.enable_grad()
def _in_plain_torch(
    inputs: tuple[Tensor | None, ...],
    graded: Tensor,
    options: Any,
    grads: tuple[Tensor | None, ...],
    wanted: tuple[bool, ...],
    again: bool,
) -> tuple[Tensor | None, ...]:
    """The same gradients in plain torch; `again`: they can be differentiated in their turn."""
    # Aliases: one input may have been computed from another, and only direct paths count here.
    own: list[Any] = [None if t is None else t.view_as(t) for t in inputs]
    x, syn, mem, weight, bias, threshold = own
    outputs = reference.run(Call(x, syn, mem, weight, bias, threshold, graded, options))
    pairs = [
        (o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad
    ]
    sources: list[Any] = [t for t, want in zip(own, wanted, strict=True) if want]
    if not pairs:
        return (None,) * len(inputs)
    found = iter(
        torch.autograd.grad(
            [o for o, _ in pairs],
            sources,
            [g for _, g in pairs],
            create_graph=again,
            allow_unused=True,
        )
    )
    return tuple(next(found) if want else None for want in wanted)


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
    """Run the native kernels.

    Parameters
    ----------
    call : Call
        The threshold is one number or one a channel, `graded` a single number without gradient.
    algorithm : str
        One of ``snnlstm.settings.ALGORITHMS``; the backward pass keeps to it.

    Returns
    -------
    spk, syn, mem : Tensor
        As :func:`snnlstm.reference.run` returns them.
    name : str or None
        What ran, such as ``"cpu-avx2-winograd4-sparse"``; None while torch.compile traces.
    """
    x, syn, mem, weight, bias, threshold, graded, options = call[:8]
    narrow = x.dtype in (torch.float16, torch.bfloat16)
    if narrow and not kernels.HALVES[x.device.type].half_types:
        return _in_float32(call, algorithm)
    if weight.dtype != x.dtype:  # a half precision module under autocast
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        call = call._replace(weight=weight, bias=bias)
    of_weight = weight.requires_grad or (bias is not None and bias.requires_grad)
    training = torch.is_grad_enabled() and (
        of_weight
        or mem.requires_grad
        or syn.requires_grad
        or x.requires_grad
        or threshold.requires_grad
    )
    if torch.compiler.is_compiling():
        return (*ops.run(call, training, algorithm), None)
    choice = kernels.choose(call, algorithm)
    if not training:
        return (*choice.forward(call, False)[:3], choice.name)
    loop = loop_of(weight, bias) if of_weight and not options.sequence else None
    if loop is not None:
        weight, bias = loop.weight, loop.bias
    out = _apply(x, syn, mem, weight, bias, threshold, graded, call, choice, loop, algorithm)
    return (*out, choice.name)
