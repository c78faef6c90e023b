"""Operators that run the native kernels, for torch.compile.

``snnlstm::forward`` and ``snnlstm::backward`` are opaque to the compiler: it sees shapes, from the
fake kernels here, and keeps the calls in its graph. An operator takes only tensors, numbers and
strings, so a spec is passed as text.
"""

from __future__ import annotations

import operator
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _C
from ..calls.call import (
    Call,
    autocast_dtype,
    may_require_grad,
    recorded_states,
    state_shape,
    weight_tensor,
)
from ..calls.entries import BACKENDS, Entry, backend_of, entry_of
from ..calls.spec import HALF_TYPES, CellSpec
from . import leaky_operators, lender, pool2d
from .batch_norm import batch_norm_of_step
from .conv2d import conv2d
from .function import constant_states, in_float32, reached, run_plan
from .leaky_operators import NAMESPACE, OPERATORS
from .linear import linear
from .plan import Gradients, Plan, SavedLayout, Sizes, empty_gradients, gradient_memory, operands_of
from .tensors import empty_like_images, restored

_CALL = (
    "Tensor x, Tensor syn, Tensor mem, Tensor weight, Tensor? bias, Tensor? threshold, "
    "Tensor? graded, Tensor? lengths, bool record, str spec, str algorithm"
)
_FIELDS = len(Call._fields)


def layout_checksum() -> int:
    """A number that changes with the shapes of what a forward pass saves.

    They differ between instruction sets, and may differ between versions. torch.compile's cache
    on disk, which outlives both, has graphs that depend on them.
    """
    counts = [_C.cpu_padded_channels(dtype, c) for dtype in (0, 1) for c in range(1, 129)]
    if "cuda" in BACKENDS:
        counts += map(_C.cuda_padded_channels, range(1, 129))
    return zlib.crc32(repr(("gates, syn, argmax", counts)).encode())


LAYOUT_CHECKSUM = layout_checksum()  # dynamo cannot trace a call into the core


def _spec(text: str) -> tuple[CellSpec, torch.dtype | None]:
    _, _, operands, rest = text.split("|", 3)
    return CellSpec.from_text(rest), getattr(torch, operands.removeprefix("torch."), None)


def _traced_spec(text: str) -> tuple[CellSpec, torch.dtype | None]:
    """The spec without a quantiser, whose levels would be fake tensors without numbers."""
    return _spec(text.rpartition(";")[0] + ";")


def _sizes(call: Call, text: str) -> Sizes:
    """The sizes of a call of fake tensors."""
    return Sizes(call, *_traced_spec(text))


def _entry_of(fields: Sequence[Any], text: str, algorithm: str) -> tuple[Entry, Call]:
    """The entry of an operator's call, and the call in the dtype of its text.

    Hooks on the tensors that a compiled graph saves may have changed some dtypes.
    """
    dtype = getattr(torch, text.split("|")[1].removeprefix("torch."))
    call = Call._make((*(t.resolve_neg().to(dtype) for t in fields[:4]), *fields[4:]))
    if call.lengths is not None:
        batch = call.x.shape[1]
        lengths = restored(call.lengths, (batch,), torch.int64, call.x.device)
        call = call._replace(lengths=lengths.contiguous())
    spec, operands = _spec(text)
    _check_fit(call, spec)
    return entry_of(call, spec, *backend_of(call.x, algorithm), operands), call


def _check_fit(call: Call, spec: CellSpec) -> None:
    """Refuse tensors of an operator that do not fit each other: the kernels would read beyond them.

    A module checks its arguments first, but anybody may call the operator.
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
        and all(t is None or t.device == x.device for t in call[1:8])
        and all(t is None or t.layout is torch.strided for t in call[:7])
    )  # fmt: skip
    if not fits:
        shapes = {k: tuple(t.shape) for k, t in call._asdict().items() if isinstance(t, Tensor)}
        raise ValueError(f"the tensors of an operator must fit each other, got shapes {shapes}")


@torch.library.custom_op(
    f"{NAMESPACE}::forward", mutates_args=(),
    schema=f"({_CALL}, bool training) -> ({', '.join(['Tensor'] * 5)})",
)  # fmt: skip
def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    """Run a plan's forward pass; also return what is saved for the backward pass."""
    text, algorithm, training = arguments[_FIELDS:]
    entry, call = _entry_of(arguments[:_FIELDS], text, algorithm)
    run = lender.where_it_fits(entry.planned(Plan, call).forward)
    r, x = run(call, training), call.x
    saved = x.new_empty(0, dtype=torch.uint8) if r.saved is None else r.saved  # not in inference
    # A graph of CUDA operators must have no tensor on the CPU.
    selection = torch.tensor(r.selection, dtype=torch.int64).to(x.device)
    return r.spk, r.syn, r.mem, saved, selection


@_forward.register_fake
def _(*arguments):
    call, (text, _, training) = Call(*arguments[:_FIELDS]), arguments[_FIELDS:]
    _check_fit(call, _traced_spec(text)[0])  # torch.compile does not trace the module's checks
    s, x = _sizes(call, text), call.x
    spk, state = (empty_like_images(x, shape) for shape in s.outputs())
    layout = SavedLayout(BACKENDS[x.device.type].saved_shapes(s) if training else ())
    saved = x.new_empty(layout.bytes, dtype=torch.uint8)
    selection = x.new_empty(2 if x.device.type == "cpu" else 0, dtype=torch.int64)
    return spk, state, torch.empty_like(state), saved, selection


@torch.library.custom_op(
    f"{NAMESPACE}::backward", mutates_args=(),
    schema=f"({_CALL}, Tensor saved, Tensor selection, Tensor? grad_spk, Tensor? grad_syn, "
    f"Tensor? grad_mem, bool[] wanted) -> ({', '.join(['Tensor'] * 6)})",
)  # fmt: skip
def _backward_operator(*arguments: Any) -> tuple[Tensor, ...]:
    text, algorithm, saved, selection, *grads, wanted = arguments[_FIELDS:]
    entry, call = _entry_of(arguments[:_FIELDS], text, algorithm)
    plan = entry.planned(Plan, call)
    spk, state = plan.outputs()
    for grad, shape in zip(grads, (spk, state, state), strict=True):
        if grad is not None and grad.shape != shape:
            raise ValueError(f"a gradient must have shape {shape}, got {tuple(grad.shape)}")
    grads = [None if grad is None else grad.resolve_neg().to(call.x.dtype) for grad in grads]
    run = lender.where_it_fits(plan.backward)
    out = run(call, saved, grads, wanted, selection.tolist(), None)
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
    spec, sequence = _traced_spec(ctx.text)[0], tensors[0].dim() == 5
    constant = () if spec.passes_gradient(sequence) else output[:1]
    if not any(ctx.needs_input_grad[:5]):  # only the threshold wants one
        constant += output[1:3][: constant_states(spec, sequence)]
    ctx.mark_non_differentiable(*constant, *output[3:])


def _backward_of_operator(ctx: Any, *grads: Tensor | None) -> tuple:
    if grads[0] is grads[1] is grads[2] is None:
        return (None,) * len(ctx.needs_input_grad)
    spec, saved = _traced_spec(ctx.text)[0], ctx.saved_tensors
    steps = saved[0].dim() == 5 and saved[0].shape[0] > 1
    wanted = list(reached(ctx.needs_input_grad[:6], spec.reset, grads[:3], steps))
    static = ctx.record, ctx.text, ctx.algorithm
    out = _backward_operator(*saved[:8], *static, *saved[8:], *grads[:3], wanted)
    return (*(g if want else None for g, want in zip(out, wanted, strict=True)), *(None,) * 6)


_forward.register_autograd(_backward_of_operator, setup_context=_setup_context)
_forward_operator = OPERATORS.forward.default  # dynamo traces this one faster


def run_tensors(
    tensors: tuple[Tensor | None, ...],
    record: bool,
    operands: torch.dtype | None,
    serialized: str,
    algorithm: str,
) -> Sequence[Tensor]:
    """The spk, syn and mem of a call whose tensors the kernels can read as they are."""
    # A graph in torch.compile's cache on disk must not serve a build with another layout.
    text = f"{LAYOUT_CHECKSUM}|{tensors[0].dtype}|{operands}|{serialized}"  # type: ignore[union-attr]
    training = may_require_grad(tensors[:6])
    return _forward_operator(*tensors, record, text, algorithm, training)[:3]


def run_operator(call: Call, spec: CellSpec, algorithm: str) -> tuple[Tensor, Tensor, Tensor, None]:
    """The call's spk, syn and mem, in a form that torch.compile keeps in its graph."""
    x, syn, mem, weight, bias, threshold, graded, lengths, record = call
    if x.dtype in HALF_TYPES and not BACKENDS[x.device.type].half_types:
        return in_float32(call, lambda step: run_operator(step, spec, algorithm))
    if weight.dtype != x.dtype:  # autocast makes the states of a half-precision module float32
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    operands = operands_of(call, autocast_dtype(x.device.type))
    tensors = x, syn, mem, weight, bias, threshold, graded, lengths
    spk, new_syn, new_mem = run_tensors(tensors, record, operands, spec.serialized, algorithm)
    if lengths is not None and record:
        new_syn, new_mem = recorded_states(call, new_syn, new_mem)
    return spk, new_syn, new_mem, None


_run_plan = lender.where_it_fits(run_plan)


def cell_in_graph() -> Callable[..., Any]:
    """Make the function that runs one call of ``snnlstm::forward`` in a graph.

    What is saved for the backward pass lies in torch's graph. A guard recognises a call like the
    last one, as in a cell: to find the plan takes longer than all the rest.
    """
    last: Any = None  # the entry of the last call

    def run(*arguments: Any) -> tuple[Any, ...]:
        nonlocal last
        *fields, text, algorithm, training = arguments
        entry, call = last, Call._make(fields)
        known = backend_of(call.x, algorithm)
        if entry is None or not entry.serves(call, entry.spec, *known, entry.autocast):
            entry, call = _entry_of(fields, text, algorithm)
            if all(map(operator.is_, call, fields)):  # nothing had to be converted
                last = entry
        plan = entry.plan or entry.planned(Plan, call)
        spk, syn, mem, _ = _run_plan(plan, call, training)
        return spk, syn, mem, None, None

    return run


# A compiler that runs its graph by itself has, in the place of each call of an operator, a function
# that is made here: torch's dispatcher would take 50 to 100 us a call.
IN_GRAPH: dict[Any, Callable[[], Any]] = {
    _forward_operator: cell_in_graph,
    leaky_operators.leaky: leaky_operators.leaky_in_graph,
    F.max_pool2d: lambda: pool2d.max_pool2d,
    torch.max_pool2d: lambda: pool2d.max_pool2d,
    F.avg_pool2d: lambda: pool2d.avg_pool2d,
    F.batch_norm: lambda: batch_norm_of_step,
    F.linear: lambda: linear,
    F.conv2d: lambda: conv2d,
}
