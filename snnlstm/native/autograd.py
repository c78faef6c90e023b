"""The cell as one autograd Function over the native kernels.

Saved for the backward pass: the arguments, and per time step the activated gates and syn.
mem and the reset are recomputed from these (the reset rides in a sign bit of the gates). With
``checkpoint`` the gates are recomputed too: checkpoint.py. A step call leaves the gradients of
weight and bias to its loop: loop.py.
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
from .loop import loop_of
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
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Take a call's seven tensors, with its loop's weight and bias, and what is no tensor."""
        *tensors, call, choice, loop, algorithm = given
        # A threshold may be written to before the backward pass: snnTorch's graph keeps none.
        ctx.threshold, ctx.version = call.threshold, version(call.threshold)
        tensors[5] = call.threshold.clone()
        saved: Any
        if call.options.checkpoint is True:
            (spk, new_syn, new_mem, _), saved = checkpoint.forward(call, algorithm)
            addresses: tuple[int, ...] = ()
        else:
            spk, new_syn, new_mem, saved = choice.forward(call, True)
            addresses = tuple(map(Tensor.data_ptr, saved))
        ctx.save_for_backward(*tensors, *saved)
        ctx.kept = call.options, call.signature, choice, loop, algorithm, addresses
        ctx.set_materialize_grads(False)
        if call.options.surrogate.kind == 0:
            ctx.mark_non_differentiable(spk)
        return spk, new_syn, new_mem

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        return (*_gradients(ctx, grads), *(None,) * 5)


def _gradients(ctx: Any, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The gradients of a backward pass, in the order of :class:`Gradients`."""
    if grads[0] is grads[1] is grads[2] is None:
        return (None,) * 6
    x, syn, mem, weight, bias, threshold, graded, *saved = ctx.saved_tensors
    options, signature, choice, loop, algorithm, addresses = ctx.kept
    wanted = ctx.needs_input_grad[:6]
    if torch.is_grad_enabled() or _beyond_kernels(grads):
        again = torch.is_grad_enabled()
        if wanted[5] and not again:
            threshold = threshold.detach().requires_grad_()  # the copy was made without gradients
        elif wanted[5]:
            if version(ctx.threshold) != ctx.version:
                raise RuntimeError(
                    "the threshold was modified by an inplace operation, and its gradient is to "
                    "be differentiated"
                )
            threshold = ctx.threshold
        inputs = x, syn, mem, weight, bias, threshold
        return _in_plain_torch(inputs, graded, options, grads, wanted, again)
    grads = [None if grad is None else plain(grad) for grad in grads]
    dtype = signature.dtype
    for t in (x, syn, mem, weight):
        if t.dtype is not dtype or t.is_neg():  # hooks on saved tensors changed it
            x, syn, mem, weight = (plain(t).to(dtype) for t in (x, syn, mem, weight))
            break
    call = Call(x, syn, mem, weight, bias, threshold, graded, options, signature)
    if options.checkpoint is True:
        if loop is None:
            states = [plain(t).to(dtype) for t in saved]
            return checkpoint.backward(call, states, grads, wanted, algorithm)
        kept, own = checkpoint.recompute(call, algorithm), True
    else:
        kept, own = Saved(*saved), tuple(map(Tensor.data_ptr, saved)) == addresses
        if not own:  # hooks brought them back in other memory
            kept = restored(kept, choice.saved_shapes)
    if loop is None:
        return choice.backward(call, kept, grads, wanted)
    bias_here = choice.sums_bias and loop.left.wanted[1]
    here = (*wanted[:3], False, bias_here, wanted[5])
    if not _will_run(loop.node):  # a pass that does not want the weight's gradient
        return choice.backward(call, kept, grads, here, steps=loop.steps)._replace(bias=None)
    # The gates' memory takes their gradient, unless somebody may still read it: another backward
    # pass over this graph, or a hook that brought it.
    overwrite = own and (options.checkpoint is True or not _keeps_graph())
    d_gates = choice.empty_d_gates(call, kept if overwrite else None)
    out = choice.backward(call, kept, grads, here, d_gates, loop.steps)
    loop.left.add(choice, Step(x, mem, d_gates, out.bias))
    return out._replace(bias=None)


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
    inputs: Sequence[Tensor | None], graded: Tensor, options: Any,
    grads: Sequence[Tensor | None], wanted: Sequence[bool], again: bool,
) -> Sequence[Tensor | None]:  # fmt: skip
    """The same gradients in plain torch; with `again` they can be differentiated in their turn."""
    # The inputs are aliased, because one may have been computed from another one, and that path
    # must not count.
    own: list[Any] = [None if t is None else t.view_as(t) for t in inputs]
    x, syn, mem, weight, bias, threshold = own
    outputs = reference.run(Call(x, syn, mem, weight, bias, threshold, graded, options))
    pairs = [
        (o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad
    ]
    if not pairs:
        return (None,) * len(inputs)
    ends, given = zip(*pairs, strict=True)
    sources: list[Any] = [t for t, want in zip(own, wanted, strict=True) if want]
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
    of_weight = training = False
    if torch.is_grad_enabled():
        of_weight = weight.requires_grad or (bias is not None and bias.requires_grad)
        of_states = mem.requires_grad or syn.requires_grad
        training = of_weight or of_states or x.requires_grad or threshold.requires_grad
    if call.signature is None:  # torch.compile traces
        return (*ops.run(call, training, algorithm), None)
    if training and x.is_inference():  # autograd refuses to save it
        x = x.clone()
        call = call._replace(x=x)
    choice = kernels.choose(call, algorithm)
    if not training:
        return (*choice.forward(call, False)[:3], choice.name)
    loop = loop_of(weight, bias) if of_weight and not options.sequence and x.is_cuda else None
    if loop is not None:
        loop.steps += 1
        weight, bias = loop.weight, loop.bias
    out = _apply(x, syn, mem, weight, bias, threshold, graded, call, choice, loop, algorithm)
    return (*out, choice.name)
