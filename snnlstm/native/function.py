"""The cell over the native kernels: an autograd Function, and operators for torch.compile.

Both run a call by :func:`_forward`, and its backward pass by :func:`_backward`. Saved for the
backward pass are the arguments, and per time step the activated gates and syn. The backward pass
computes mem and the reset from these again (the reset rides in a sign bit of the gates). It writes
to nothing that was saved, so it may be interrupted and run again, and x, states and weights may
change while it runs.

``snnlstm::forward`` and ``snnlstm::backward`` are opaque to the compiler: it sees shapes, from the
fake kernels here, and keeps the calls in its graph. An operator takes tensors, numbers and strings
only, so options travel as a text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import reference
from ..call import Call, Signature, make_call, version
from ..checks import autocast_dtype
from ..lengths import repeated
from ..options import CellOptions
from . import backend, checkpoint, tensors
from .backend import Plan
from .tensors import Gradients, Result, as_saved, plain

__all__ = ["run"]

# Whether a gradient is one of many at once, as with is_grads_batched=True.
_is_batch: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor


# ---- the two passes ------------------------------------------------------------------------------


def _forward(plan: Plan, call: Call, training: bool, algorithm: str) -> Result:
    """Run the forward kernels; in training the result has what the backward pass needs."""
    if training and call.options.checkpoint is True:
        return checkpoint.forward(call, algorithm)
    return plan.forward(call, training)


def _backward(
    plan: Plan,
    call: Call,
    saved: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
    algorithm: str,
    decided: int,
    packed: Any = None,
) -> Gradients:
    """Run the backward kernels.

    Hooks on saved tensors may have brought x, syn, mem and `saved` back in another dtype or other
    memory. `plan`, `decided` and `packed` are the forward pass's; `packed` may be None.
    """
    s, options = call.signature, call.options
    x, syn, mem = (
        as_saved(call.x, s.input, s.dtype),
        as_saved(call.syn, s.state, s.dtype),
        as_saved(call.mem, s.state, s.dtype),
    )
    if x is not call.x or syn is not call.syn or mem is not call.mem:
        call = call._replace(x=x, syn=syn, mem=mem)
    grads = [None if grad is None else plain(grad) for grad in grads]
    if options.checkpoint is True:
        states = [as_saved(state, s.state, s.dtype) for state in saved]
        call = call._replace(weight=tensors.saved_weight(call))
        return checkpoint.backward(call, states, grads, wanted, algorithm)
    return plan.backward(call, plan.restored(saved), grads, wanted, decided, packed)


def _in_float32(call: Call, algorithm: str) -> tuple[Tensor, Tensor, Tensor, str | None]:
    """A call in a half type: each step in float32, between steps states in the half type."""
    x, syn, mem, weight, bias, threshold, graded, options = call[:8]
    dtype = x.dtype
    weight, threshold, graded = weight.float(), threshold.float(), graded.float()
    bias = None if bias is None else bias.float()
    step = replace(options, record=False)
    out: list[tuple[Tensor, ...]] = []
    name = lengths = None
    for t, x_t in enumerate(x.split(1) if options.sequence else [x]):
        states = syn.float(), mem.float()
        tensors = x_t.float(), *states, weight, bias, threshold, graded
        if call.lengths is not None:
            lengths = (call.lengths - t).clamp(0, 1)
        if call.traced:
            wide = Call(*tensors, step, lengths=lengths)
        else:
            wide = make_call(tensors, step, lengths=lengths)
        *results, name = run(wide, algorithm)
        out.append(tuple(result.to(dtype) for result in results))
        _, syn, mem = out[-1]
    if not options.sequence:
        return (*out[0], name)  # type: ignore[return-value]
    spks, syns, mems = zip(*out, strict=True)
    if options.record:
        syn, mem = torch.stack(syns), torch.stack(mems)
    return torch.cat(spks), syn, mem, name


def run(call: Call, algorithm: str) -> tuple[Tensor, Tensor, Tensor, str | None]:
    """Run the native kernels: spk, syn and mem as :func:`snnlstm.reference.run` returns them.

    The backward pass keeps to `algorithm`. The fourth result is the name of what ran, such as
    ``"cpu-avx2-winograd4-sparse"``; None while torch.compile traces.
    """
    spk, syn, mem, name = _run(call, algorithm)
    if call.lengths is not None and call.options.record:
        syn, mem = repeated(syn, call.syn, call.lengths), repeated(mem, call.mem, call.lengths)
    return spk, syn, mem, name


def _run(call: Call, algorithm: str) -> tuple[Tensor, Tensor, Tensor, str | None]:
    """The same, but for recorded states behind a sample's last step, which may be anything."""
    x, syn, mem, weight, bias, threshold, graded, options = call[:8]
    narrow = x.dtype in (torch.float16, torch.bfloat16)
    if narrow and not backend.BACKENDS[x.device.type].half_types:
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
    if call.traced:
        return (*_run_operator(call, training, algorithm), None)
    if training and x.is_inference():  # autograd refuses to save it
        call = call._replace(x=x.clone())
    plan = backend.plan_of(call, algorithm)
    if not training:
        result = _forward(plan, call, False, algorithm)
        return result.spk, result.syn, result.mem, result.name
    with torch.no_grad():
        result = _forward(plan, call, True, algorithm)
    given = *call[:7], call.lengths, call.options, call.signature, plan, algorithm, result
    return (*_apply(*given), result.name)


# ---- the Function --------------------------------------------------------------------------------


class _SConv2dLSTM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Take a call's tensors, what is no tensor, and the result of the kernels."""
        x, syn, mem, weight, bias, threshold, graded, lengths, *others = given
        options, signature, plan, algorithm, r = others
        # A threshold may be written to before the backward pass: snnTorch's graph keeps none.
        ctx.threshold, ctx.version = threshold, version(threshold)
        if options.spiking:
            threshold = threshold.clone()
        ctx.save_for_backward(x, syn, mem, weight, bias, threshold, graded, lengths, *r.saved)
        ctx.facts = options, signature, plan, algorithm, r.decided
        ctx.packed = r.packed
        ctx.set_materialize_grads(False)
        if not options.passes_gradient:
            ctx.mark_non_differentiable(r.spk)
        return r.spk, r.syn, r.mem

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        return (*_gradients(ctx, grads), *(None,) * 7)


_FORGOTTEN = (
    "(This is the graph of an earlier call of an SConv2dLSTM. A cell goes on from its stored "
    "state, and so from that call's graph: call reset_mem() before each new sequence, or "
    "SConv2dLSTM.detach_hidden() to keep the state without its history.)"
)


def _gradients(ctx: Any, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The gradients of a backward pass, in the order of :class:`Gradients`."""
    if grads[0] is grads[1] is grads[2] is None:
        return (None,) * 6
    try:
        x, syn, mem, weight, bias, threshold, graded, lengths, *saved = ctx.saved_tensors
    except RuntimeError as error:
        if "a second time" in str(error):  # torch's "Trying to backward through the graph ..."
            raise RuntimeError(f"{error} {_FORGOTTEN}") from None
        raise
    options, signature, plan, algorithm, decided = ctx.facts
    wanted = ctx.needs_input_grad[:6]
    again = torch.is_grad_enabled()
    if again and wanted[5]:
        if version(ctx.threshold) != ctx.version:
            raise RuntimeError(
                "the threshold was modified by an inplace operation, and its gradient is to be "
                "differentiated"
            )
        threshold = ctx.threshold
    tensors = x, syn, mem, weight, bias, threshold, graded
    call = Call(*tensors, options, signature, lengths=lengths)
    if again or _beyond_kernels(grads):
        return _in_plain_torch(call, grads, wanted, again)
    packed, ctx.packed = ctx.packed, None  # a graph that is kept keeps no packed weight alive
    return _backward(plan, call, saved, grads, wanted, algorithm, decided, packed)


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
        tensors = x, syn, mem, weight, bias, threshold, call.graded
        outputs = reference.run(Call(*tensors, call.options, lengths=call.lengths))
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


# ---- the operators -------------------------------------------------------------------------------

_CALL = (
    "Tensor x, Tensor syn, Tensor mem, Tensor weight, Tensor? bias, Tensor threshold, "
    "Tensor graded, Tensor? lengths, str options"
)


def _results(count: int) -> str:
    return f"({', '.join(['Tensor'] * count)})"


def _text(options: CellOptions, operands: torch.dtype | None) -> str:
    # torch.compile keeps graphs on disk. A graph must not serve where another layout is saved.
    return f"{backend.LAYOUT}|{operands}|{options.text}"


def _options(text: str) -> CellOptions:
    _, operands, rest = text.split("|", 2)
    return CellOptions.from_text(rest, getattr(torch, operands.removeprefix("torch."), None))


def _call(*given: Any) -> Call:
    """The call of an operator's first nine arguments."""
    return make_call(given[:7], _options(given[8]), autocast=False, lengths=given[7])


def _fake_call(*given: Any) -> Call:
    """The call of fake tensors, without levels: among fake tensors they would have no numbers."""
    x, syn, mem, weight, bias, threshold, graded, lengths, text = given[:9]
    options = _options(text.rpartition(";")[0] + ";")
    signature = Signature(x, mem, threshold, options, None)
    tensors = x, syn, mem, weight, bias, threshold, graded
    return Call(*tensors, options, signature, lengths=lengths)


def _four(x: Tensor, saved: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What was saved, as four tensors: checkpoint=True saves states, as many as it has segments.

    Nothing is saved in inference.
    """
    if len(saved) == 4 and saved[2].dtype == torch.int64:
        return tuple(saved)
    first = torch.stack(list(saved)) if saved else x.new_empty(0)
    none = [x.new_empty(0, dtype=dtype) for dtype in (x.dtype, torch.int64, torch.uint8)]
    return first, *none


def _number(x: Tensor, decided: int) -> Tensor:
    """What the forward pass decided by values. CUDA's decides nothing, and a graph of CUDA's
    operators is to have no tensor on the CPU."""
    count = 1 if x.device.type == "cpu" else 0
    return torch.full((count,), decided, dtype=torch.int64, device=x.device)


@torch.library.custom_op(
    "snnlstm::forward", mutates_args=(),
    schema=f"({_CALL}, bool training, str algorithm) -> {_results(8)}",
)  # fmt: skip
def _forward_operator(*given: Any) -> tuple[Tensor, ...]:
    call, (training, algorithm) = _call(*given), given[9:]
    r = _forward(backend.plan_of(call, algorithm), call, training, algorithm)
    return r.spk, r.syn, r.mem, *_four(call.x, r.saved), _number(call.x, r.decided)


@_forward_operator.register_fake
def _(*given):
    call, training = _fake_call(*given), given[9]
    saves = training and call.options.checkpoint is not True
    r = backend.empty_result(call, saves)
    first, *rest = _four(call.x, r.saved)
    count = checkpoint.boundary_count(call) if training and not saves else 0
    if count > 0:
        first = first.new_empty((count, *call.mem.shape))
    return r.spk, r.syn, r.mem, first, *rest, _number(call.x, 0)


@torch.library.custom_op(
    "snnlstm::backward", mutates_args=(),
    schema=f"({_CALL}, Tensor saved_gates, Tensor saved_syn, Tensor saved_winner, "
    "Tensor saved_places, Tensor decided, Tensor grad_spk, Tensor grad_syn, Tensor grad_mem, "
    f"bool[] wanted, str algorithm) -> {_results(6)}",
)  # fmt: skip
def _backward_operator(*given: Any) -> tuple[Tensor, ...]:
    saved, decided, grads, (wanted, algorithm) = given[9:13], given[13], given[14:17], given[17:]
    dtype = grads[0].dtype
    call = _call(*(plain(t).to(dtype) for t in given[:4]), *given[4:])
    if call.options.checkpoint is True:
        saved = saved[0].unbind() if saved[0].dim() > 1 else ()
    plan, number = backend.plan_of(call, algorithm), int(decided) if decided.numel() else 0
    return _six(call.x, _backward(plan, call, saved, grads, wanted, algorithm, number))


def _six(x: Tensor, out: Gradients) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(0) if grad is None else grad for grad in out)


@_backward_operator.register_fake
def _(*given):
    call, wanted = _fake_call(*given), given[17]
    out = tensors.empty_gradients(call.x, call.signature, wanted)
    if wanted[5]:
        out = out._replace(threshold=torch.empty_like(call.threshold))
    return _six(call.x, out)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *saved, options, _training, algorithm = inputs
    ctx.save_for_backward(*saved, *output[3:])
    ctx.options, ctx.algorithm = options, algorithm


def _backward_of_operator(ctx: Any, *grads: Tensor) -> tuple:
    saved, wanted = ctx.saved_tensors, list(ctx.needs_input_grad[:6])
    out = _backward_operator(*saved[:8], ctx.options, *saved[8:], *grads[:3], wanted, ctx.algorithm)
    return (*(g if want else None for g, want in zip(out, wanted, strict=True)), *(None,) * 5)


_forward_operator.register_autograd(_backward_of_operator, setup_context=_setup_context)


def _run_operator(call: Call, training: bool, algorithm: str) -> tuple[Tensor, Tensor, Tensor]:
    """The call's spk, syn and mem, in a form that torch.compile keeps in its graph."""
    options, narrow = call.options, autocast_dtype(call.x.device.type)
    if narrow == torch.float32 or call.x.dtype != torch.float32:
        narrow = None
    text = _text(options, narrow)
    given = *call[:7], call.lengths, text, training, algorithm
    spk, new_syn, new_mem, *_ = _forward_operator(*given)
    if not options.passes_gradient:
        spk = spk.detach()
    return spk, new_syn, new_mem
