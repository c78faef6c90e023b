"""Runs the implementations of the cell on the tensors of :class:`cases.Inputs` and the options."""

from collections.abc import Sequence

from torch import Tensor

import snnlstm
import snnlstm.run
from snnlstm.call import make_call

_native = snnlstm.run._native
_autograd = snnlstm.run._autograd
_last = ""

Three = tuple[Tensor, Tensor, Tensor]


def reference(*arguments) -> Three:
    """Returns spk, syn and mem, computed by plain torch."""
    return snnlstm.reference.run(make_call(arguments))


def run(*arguments) -> Three:
    """Returns spk, syn and mem of the kernels; the last argument may be an algorithm."""
    global _last
    *_, algorithm = (*arguments, "auto")[:9]
    *out, name = _autograd.run(make_call(arguments[:8]), algorithm)
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
    call = make_call(tuple(tensors))
    choice = _native.choose(call, algorithm)
    _last = choice.name
    return choice.forward(call, training)


def backward(arguments: Sequence, saved, grads: Sequence[Tensor | None], wanted, algorithm: str):
    """Runs the backward kernels alone, on the tensors that :func:`forward` saved."""
    call = make_call(arguments)
    return _native.choose(call, algorithm).backward(call, saved, grads, wanted)
