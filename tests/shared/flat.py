"""Runs the implementations of the cell on the tensors of :class:`cases.Inputs` and the options."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import snnlstm
import snnlstm.dispatch.reasons
import snnlstm.dispatch.run
from snnlstm.calls.call import Call, autocast_dtype
from snnlstm.calls.entries import backend_of, entry_of
from snnlstm.native.plan import Plan

_native = snnlstm.dispatch.reasons.backends
_last = ""

Three = tuple[Tensor, Tensor, Tensor]


def call_of(arguments: Sequence) -> Call:
    """Makes the call of seven tensors and the options."""
    *tensors, options = arguments
    if not options.spiking:
        tensors[5:7] = None, None
    lengths = None if options.lengths is None else torch.tensor(options.lengths)
    return Call(*tensors, lengths, options.record)


def plan_of(arguments: Sequence, algorithm: str) -> Any:
    """Returns the plan of a call of seven tensors and the options."""
    call, spec = call_of(arguments), arguments[-1].spec
    settings = backend_of(call.x, algorithm)
    return entry_of(call, spec, *settings, autocast_dtype(call.x.device.type)).planned(Plan, call)


def reference(*arguments) -> Three:
    """Returns spk, syn and mem, computed by plain torch."""
    return snnlstm.reference.run(call_of(arguments), arguments[-1].spec)


def run(*arguments) -> Three:
    """Returns spk, syn and mem of the kernels; the last argument may be an algorithm."""
    global _last
    *_, algorithm = (*arguments, "auto")[:9]
    call, spec = call_of(arguments[:8]), arguments[7].spec
    with snnlstm.algorithm(algorithm):
        if torch.compiler.is_compiling():
            *out, path = snnlstm.dispatch.run.run_traced(call, spec, None)
        else:
            entry = snnlstm.calls.entries.find_entry((), call, spec)
            *out, path = snnlstm.dispatch.run.run_call(entry, call, None)
            assert path.native, path
            _last = path.name
    return tuple(out)


def last_name() -> str:
    """Returns the path's name of the last call of :func:`run` or :func:`forward`."""
    return _last


def forward(*arguments):
    """Runs the forward kernels alone; `training` and the algorithm follow the other arguments."""
    global _last
    *tensors, training, algorithm = arguments
    result = plan_of(tensors, algorithm).forward(call_of(tensors), training)
    _last = result.name
    return result


def backward(arguments: Sequence, result, grads: Sequence[Tensor | None], wanted, algorithm: str):
    """Runs the backward kernels alone, behind a call of :func:`forward` with this result."""
    plan = plan_of(arguments, algorithm)
    call = call_of(arguments)
    return plan.backward(call, result.saved, grads, wanted, result.selection, result.packed)
