"""Runs the implementations of the cell on the tensors of :class:`cases.Inputs` and the options."""

from collections.abc import Sequence

import torch
from torch import Tensor

import snnlstm
import snnlstm.path
from snnlstm.call import Call, make_call

_native = snnlstm.path._native
_function = snnlstm.path._function
_last = ""

Three = tuple[Tensor, Tensor, Tensor]


def call_of(arguments: Sequence) -> Call:
    """Makes the call of seven tensors and the options."""
    *tensors, options = arguments
    traced = torch.compiler.is_compiling()
    return Call(*tensors, options) if traced else make_call(tuple(tensors), options)


def reference(*arguments) -> Three:
    """Returns spk, syn and mem, computed by plain torch."""
    return snnlstm.reference.run(call_of(arguments))


def run(*arguments) -> Three:
    """Returns spk, syn and mem of the kernels; the last argument may be an algorithm."""
    global _last
    *_, algorithm = (*arguments, "auto")[:9]
    *out, name = _function.run(call_of(arguments[:8]), algorithm)
    if name is not None:
        _last = name
    return tuple(out)


def last_name() -> str:
    """Returns the path's name of the last call of :func:`run` or :func:`forward`."""
    return _last


def forward(*arguments):
    """Runs the forward kernels alone; `training` and the algorithm follow the other arguments."""
    global _last
    *tensors, training, algorithm = arguments
    call = call_of(tensors)
    result = _native.plan_of(call, algorithm).forward(call, training)
    _last = result.name
    return result


def backward(arguments: Sequence, result, grads: Sequence[Tensor | None], wanted, algorithm: str):
    """Runs the backward kernels alone, behind a call of :func:`forward` with this result."""
    call = call_of(arguments)
    plan = _native.plan_of(call, algorithm)
    return plan.backward(call, result.saved, grads, wanted, result.decided, result.packed)
