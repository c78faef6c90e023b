"""The cell over the native kernels: an autograd Function, and operators for torch.compile.

Both run the plan of a call. Saved for the backward pass are the arguments, and per time step the
activated gates and syn. The backward pass computes mem and the reset from these again (the reset
rides in a sign bit of the gates). It writes to nothing that was saved, so it may be interrupted and
run again, and x and states may change while it runs.

``snnlstm::forward`` and ``snnlstm::backward`` are opaque to the compiler: it sees shapes, from the
fake kernels here, and keeps the calls in its graph. An operator takes tensors, numbers and strings
only, so a spec travels as a text.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _C, reference
from ..calls.call import Call, autocast_dtype, restored, state_shape, weight_tensor
from ..calls.keys import BoundedDict, plan_key
from ..calls.lengths import recorded_states
from ..calls.spec import HALF_TYPES, CellSpec
from ..compat.torch_private import (
    forward_level,
    is_batch,
    keeps_graph,
    opaque,
    transforms_are_active,
)
from . import cpu, cuda, cuda_check
from .half_types import in_float32
from .plan import (
    CommonBackend,
    CommonPlan,
    Gradients,
    Result,
    SavedLayout,
    Sizes,
    check_memory,
    empty_gradients,
    empty_like_images,
    gradient_memory,
)

# ---- backends and plans --------------------------------------------------------------------------


BACKENDS: dict[str, CommonBackend] = {"cpu": cpu.Backend()}  # by device type
_NO_CUDA = cuda_check.without_kernels(_C.build_info())
if _NO_CUDA is None:
    BACKENDS["cuda"] = cuda.Backend(_C)
DEVICES = frozenset(BACKENDS)

_plans: BoundedDict[Any, CommonPlan] = BoundedDict()


def reason_against_device(device: torch.device, traced: bool) -> str | None:
    """Why no kernels can run on a device; None if they can, or if the call is traced."""
    if device.type == "cpu":
        return None
    if _NO_CUDA or traced:  # dynamo cannot ask the driver; the call itself raises
        return _NO_CUDA
    index = torch.cuda.current_device() if device.index is None else device.index
    return cuda_check.trouble(index)


def operands_of(call: Call, autocast: torch.dtype | None) -> torch.dtype | None:
    """The convolution's type under autocast, if that is a half type."""
    narrows = call.x.dtype == torch.float32 and autocast != torch.float32
    return autocast if narrows else None


def plan_of(
    call: Call, spec: CellSpec, operands: torch.dtype | None, settings: tuple[Any, ...]
) -> CommonPlan:
    """The plan of a call, which like cells share, looked up or made.

    `settings` are those of the backend for an algorithm.
    """
    key = plan_key(call, spec, operands, settings)
    plan = _plans.get(key)
    if plan is None:
        backend = settings[0]
        plan = _plans.keep(key, backend.plan(backend, call, spec, operands, settings))
    return plan


# ---- running -------------------------------------------------------------------------------------


def run(plan: CommonPlan, call: Call, training: bool) -> tuple[Tensor, Tensor, Tensor, str]:
    """Run the native kernels: spk, syn and mem as :func:`snnlstm.reference.run` returns them.

    The fourth result is the name of what ran, such as ``"cpu-avx2-winograd4-sparse"``.
    """
    try:
        if not training:
            result = plan.forward(call, False)
            spk, syn, mem, name = result.spk, result.syn, result.mem, result.name
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


# ---- the Function --------------------------------------------------------------------------------


class _SConv2dLSTM(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plan: Any, call: Call, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, str]:
        """Run the kernels; `tensors` are those of the call that may require a gradient.

        Returns also the name of what ran.
        """
        result = plan.forward(call, True)
        # A threshold may be written to before the backward pass: snnTorch's graph keeps none.
        ctx.threshold = threshold = call.threshold
        if threshold is not None:
            ctx.copy = threshold.clone() if result.threshold is None else result.threshold
        packed = result.packed
        kept = packed if isinstance(packed, Tensor) else None
        ctx.save_for_backward(*call[:5], call.graded, call.lengths, result.saved, kept)
        ctx.plan, ctx.record = plan, call.record
        ctx.selection, ctx.packed = result.selection, packed if kept is None else None
        ctx.set_materialize_grads(False)
        constant = [] if plan.passes_gradient else [result.spk]
        constant += [result.syn, result.mem][: _constant_states(call, plan.spec)]
        ctx.mark_non_differentiable(*constant)
        return result.spk, result.syn, result.mem, result.name

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        # Compiled autograd traces this, and must not trace into the kernels.
        run = _opaque_gradients if torch.compiler.is_compiling() else _gradients
        return None, None, *run(ctx, grads[:3])


def _constant_states(call: Call, spec: CellSpec) -> int:
    """How many of syn and mem, in this order, pass no gradient on: a threshold alone wants one."""
    if any(t is not None and t.requires_grad for t in call[:5]):
        return 0
    return 2 if spec.reset != "subtract" else 0 if call.sequence else 1


_FORGOTTEN = (
    "(In the second batch of a training this is the graph of the first one: an SConv2dLSTM goes on "
    "from its stored state, and so from that call's graph. Call reset_mem() before each new "
    "sequence, or SConv2dLSTM.detach_hidden() to keep the state without its history. A second "
    "backward on one loss needs retain_graph=True.)"
)


def _gradients(ctx: Any, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The gradients of a backward pass, in the order of :class:`Gradients`."""
    if grads[0] is grads[1] is grads[2] is None:
        return (None,) * 6
    try:
        everything = ctx.saved_tensors  # torch's checkpoint allows one read of saved tensors
    except RuntimeError as error:
        if "a second time" in str(error):  # torch: "Trying to backward through the graph ..."
            raise RuntimeError(f"{error} {_FORGOTTEN}") from None
        raise
    *tensors, graded, lengths, saved, kept = everything
    threshold = None if ctx.threshold is None else ctx.copy
    wanted = _reached(ctx.needs_input_grad[2:], ctx.plan.spec, grads)
    create_graph = torch.is_grad_enabled()
    if create_graph and wanted[5]:
        if not torch.allclose(ctx.threshold, threshold, 0, 0, equal_nan=True):
            raise RuntimeError(
                "the threshold was modified by an inplace operation, which its second derivative "
                "does not allow"
            )
        threshold = ctx.threshold
    call = Call._make((*tensors, threshold, graded, lengths, ctx.record))
    if create_graph or beyond_kernels(grads):
        return _by_reference(ctx.plan, call, grads, wanted, create_graph)
    packed = ctx.packed if kept is None else kept
    if not keeps_graph():  # no other backward pass comes, so the packed weight can go
        ctx.packed = None
    grads = [grad.resolve_neg() if grad is not None and grad.is_neg() else grad for grad in grads]
    return ctx.plan.backward(call, saved, grads, wanted, ctx.selection, packed)


_opaque_gradients = opaque(_gradients)


def _reached(
    wanted: Sequence[bool], spec: CellSpec, grads: Sequence[Tensor | None]
) -> Sequence[bool]:
    """Which gradients are wanted and exist: a threshold gets one only from spk and "subtract"."""
    reached = grads[0] is not None or spec.reset == "subtract"
    return (*wanted[:5], wanted[5] and reached)


# This is _SConv2dLSTM.apply without its search for torch.func's wrappers among all arguments: a
# call under a transform of torch.func does not come here.
_apply: Any = getattr(super(torch.autograd.Function, _SConv2dLSTM), "apply", _SConv2dLSTM.apply)


def beyond_kernels(grads: Sequence[Tensor | None]) -> bool:
    """Whether more than numbers comes with the gradients: tangents, a batch of them, a subclass."""
    for grad in grads:
        if grad is not None and (type(grad) is not Tensor or is_batch(grad)):
            return True
    return forward_level() >= 0 or transforms_are_active()


@torch.enable_grad()
def _by_reference(
    plan: Any,
    call: Call,
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
    create_graph: bool,
) -> Sequence[Tensor | None]:
    """The same gradients on the reference path; `create_graph` is that of torch.autograd.grad."""
    # The inputs are aliased, because one may have been computed from another one, and that path
    # must not count. An input may have stopped to require a gradient since the forward pass.
    aliases: list[Any] = [
        t if t is None else t.detach().requires_grad_() if want and not t.requires_grad
        else t.view_as(t)
        for t, want in zip(call[:6], wanted, strict=True)
    ]  # fmt: skip
    operands = plan.operands
    x, syn, mem, weight, bias, threshold = aliases
    # The forward pass's autocast counts, not that of the code which asks for the gradients.
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


# ---- the operators -------------------------------------------------------------------------------

_CALL = (
    "Tensor x, Tensor syn, Tensor mem, Tensor weight, Tensor? bias, Tensor? threshold, "
    "Tensor? graded, Tensor? lengths, bool record, str spec, str algorithm"
)
_FIELDS = len(Call._fields)


def layout() -> int:
    """A number that changes with the shapes of what a forward pass saves.

    They differ between instruction sets, and may between versions. torch.compile writes graphs
    that hold them to a cache on disk, which outlives both.
    """
    counts = [_C.cpu_padded_channels(dtype, c) for dtype in (0, 1) for c in range(1, 129)]
    if "cuda" in BACKENDS:
        counts += map(_C.cuda_padded_channels, range(1, 129))
    return zlib.crc32(repr(("gates, syn, winner, places", counts)).encode())


LAYOUT = layout()  # dynamo cannot trace a call into the core


def _spec(text: str) -> tuple[CellSpec, torch.dtype | None]:
    _, _, operands, rest = text.split("|", 3)
    return CellSpec.from_text(rest), getattr(torch, operands.removeprefix("torch."), None)


def _traced_spec(text: str) -> tuple[CellSpec, torch.dtype | None]:
    """The spec without a quantiser, whose levels would have no numbers among fake tensors."""
    return _spec(text.rpartition(";")[0] + ";")


def _sizes(call: Call, text: str) -> Sizes:
    """The sizes of a call of fake tensors."""
    return Sizes(call, *_traced_spec(text))


def _planned(fields: Sequence[Any], text: str, algorithm: str) -> tuple[CommonPlan, Call]:
    """The plan of an operator's call, and the call in the dtype of its text.

    Hooks on the tensors that a compiled graph saves may have brought some back in another dtype.
    """
    dtype = getattr(torch, text.split("|")[1].removeprefix("torch."))
    call = Call._make((*(t.resolve_neg().to(dtype) for t in fields[:4]), *fields[4:]))
    if call.lengths is not None:
        batch = call.x.shape[1]
        lengths = restored(call.lengths, (batch,), torch.int64, call.x.device)
        call = call._replace(lengths=lengths.contiguous())
    spec, operands = _spec(text)
    _check_fit(call, spec)
    settings = BACKENDS[call.x.device.type].settings(algorithm)
    return plan_of(call, spec, operands, settings), call


def _check_fit(call: Call, spec: CellSpec) -> None:
    """Refuse tensors of an operator that do not fit each other: the kernels would read beyond them.

    A module checks its arguments before, but anybody may call the operator.
    """
    x, weight, bias, threshold, graded = call.x, *call[3:7]
    cin, channels = weight_tensor(weight)
    fits = x.dim() in (4, 5) and x.shape[-3] == cin
    state = state_shape(x, channels, spec, 2) if fits else ()
    fits = (
        fits and call.syn.shape == call.mem.shape == state
        and weight.shape[2:] == spec.kernel_size
        and (bias is None or bias.shape == (4 * channels,))
        and (threshold is None or threshold.numel() in (1, channels))
        and (graded is None or graded.numel() == 1)
    )  # fmt: skip
    if not fits:
        shapes = {k: tuple(t.shape) for k, t in call._asdict().items() if isinstance(t, Tensor)}
        raise ValueError(f"the tensors of an operator must fit each other, got shapes {shapes}")


@torch.library.custom_op(
    "snnlstm::forward", mutates_args=(),
    schema=f"({_CALL}, bool training) -> ({', '.join(['Tensor'] * 5)})",
)  # fmt: skip
def _forward_operator(*arguments: Any) -> tuple[Tensor, ...]:
    text, algorithm, training = arguments[_FIELDS:]
    plan, call = _planned(arguments[:_FIELDS], text, algorithm)
    result = plan.forward(call, training)
    return _forward_outputs(call.x, result)


def _forward_outputs(x: Tensor, r: Result) -> tuple[Tensor, ...]:
    """A forward pass's results, as its operator returns them; nothing is saved in inference."""
    saved = x.new_empty(0, dtype=torch.uint8) if r.saved is None else r.saved
    # A graph of CUDA's operators must have no tensor on the CPU.
    selection = torch.tensor(r.selection, dtype=torch.int64).to(x.device)
    return r.spk, r.syn, r.mem, saved, selection


@_forward_operator.register_fake
def _(*arguments):
    call, (text, _, training) = Call(*arguments[:_FIELDS]), arguments[_FIELDS:]
    s, x = _sizes(call, text), call.x
    spk, state = (empty_like_images(x, shape) for shape in s.outputs())
    layout = SavedLayout(BACKENDS[x.device.type].saved_shapes(s) if training else ())
    saved = x.new_empty(layout.bytes, dtype=torch.uint8)
    selection = (0, 0) if x.device.type == "cpu" else ()
    return _forward_outputs(
        x, Result(spk, state, torch.empty_like(state), saved, selection=selection)
    )


@torch.library.custom_op(
    "snnlstm::backward", mutates_args=(),
    schema=f"({_CALL}, Tensor saved, Tensor selection, Tensor? grad_spk, Tensor? grad_syn, "
    f"Tensor? grad_mem, bool[] wanted) -> ({', '.join(['Tensor'] * 6)})",
)  # fmt: skip
def _backward_operator(*arguments: Any) -> tuple[Tensor, ...]:
    text, algorithm, saved, selection, *grads, wanted = arguments[_FIELDS:]
    plan, call = _planned(arguments[:_FIELDS], text, algorithm)
    spk, state = plan.outputs()
    for grad, shape in zip(grads, (spk, state, state), strict=True):
        if grad is not None and grad.shape != shape:
            raise ValueError(f"a gradient must have shape {shape}, got {tuple(grad.shape)}")
    grads = [None if grad is None else grad.resolve_neg().to(call.x.dtype) for grad in grads]
    out = plan.backward(call, saved, grads, wanted, selection.tolist(), None)
    return _gradient_outputs(call.x, out)


def _gradient_outputs(x: Tensor, out: Gradients) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(0) if grad is None else grad for grad in out)


@_backward_operator.register_fake
def _(*arguments):
    call, text, wanted = Call(*arguments[:_FIELDS]), arguments[_FIELDS], arguments[-1]
    out = empty_gradients(call.x, gradient_memory(call.x, _sizes(call, text)), wanted)
    if wanted[5]:
        threshold: Any = call.threshold
        out = out._replace(threshold=torch.empty_like(threshold))
    return _gradient_outputs(call.x, out)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.record, ctx.text, ctx.algorithm, _training = inputs
    ctx.save_for_backward(*tensors, *output[3:])
    ctx.set_materialize_grads(False)


def _backward_of_operator(ctx: Any, *grads: Tensor | None) -> tuple:
    if grads[0] is grads[1] is grads[2] is None:
        return (None,) * len(ctx.needs_input_grad)
    spec, saved = _traced_spec(ctx.text)[0], ctx.saved_tensors
    wanted = list(_reached(ctx.needs_input_grad[:6], spec, grads))
    static = ctx.record, ctx.text, ctx.algorithm
    out = _backward_operator(*saved[:8], *static, *saved[8:], *grads[:3], wanted)
    return (*(g if want else None for g, want in zip(out, wanted, strict=True)), *(None,) * 6)


_forward_operator.register_autograd(_backward_of_operator, setup_context=_setup_context)


def run_operator(call: Call, spec: CellSpec, algorithm: str) -> tuple[Tensor, Tensor, Tensor, None]:
    """The call's spk, syn and mem, in a form that torch.compile keeps in its graph."""
    x, syn, mem, weight, bias, threshold, graded, lengths, record = call
    if x.dtype in HALF_TYPES and not BACKENDS[x.device.type].half_types:
        return in_float32(call, lambda step: run_operator(step, spec, algorithm))
    if weight.dtype != x.dtype:  # autocast makes the states of a half-precision module float32
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    training = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, syn, mem, weight, bias, threshold)
    )
    # A graph in torch.compile's cache on disk must not serve a build with another layout.
    operands = operands_of(call, autocast_dtype(x.device.type))
    text = f"{LAYOUT}|{x.dtype}|{operands}|{spec.serialized}"
    tensors = x, syn, mem, weight, bias, threshold, graded, lengths
    spk, new_syn, new_mem, *_ = _forward_operator(*tensors, record, text, algorithm, training)
    if not spec.passes_gradient(call.sequence):
        spk = spk.detach()
    constant = _constant_states(call, spec)
    new_syn = new_syn.detach() if constant > 0 else new_syn
    new_mem = new_mem.detach() if constant > 1 else new_mem
    if lengths is not None and record:
        new_syn, new_mem = recorded_states(call, new_syn, new_mem)
    return spk, new_syn, new_mem, None
