"""What only makes sense with snnTorch installed.

The base class of our cell, the recognition of snnTorch's closures, and the registry
through which snnTorch's own ``reset_hidden`` and ``detach_hidden`` reach our cells.
snnTorch is optional; a missing or broken install costs no more than the features above.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import surrogate
from .quant import StateQuant

__all__ = ["recognise_quant", "recognise_surrogate"]


def _captured(function: object, module: str, qualname: str | None = None) -> dict[str, Any] | None:
    """Closure variables of a function of that module (and name); None for anything else."""
    if not isinstance(function, types.FunctionType) or function.__module__ != module:
        return None
    if qualname is not None and function.__qualname__ != qualname:
        return None
    cells = function.__closure__ or ()
    return {
        name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells)
    }


def recognise_surrogate(
    spike_grad: Callable[[Tensor], Tensor],
) -> surrogate.Surrogate | Callable[[Tensor], Tensor]:
    """Our surrogate for a closure of ``snntorch.surrogate``; anything else as it came.

    snnTorch's surrogates are closures called ``NAME.<locals>.inner`` that hold their
    parameters. One whose parameters are not the plain numbers of the table stays foreign.
    """
    captured = _captured(spike_grad, "snntorch.surrogate")
    name, _, rest = getattr(spike_grad, "__qualname__", "").partition(".")
    if captured is None or rest != "<locals>.inner":
        return spike_grad
    for kind in surrogate.KINDS[1:]:
        if kind.name == name and set(kind.parameters) == set(captured):
            try:
                return surrogate.make(name, **{key: captured[key] for key in kind.parameters})
            except (TypeError, ValueError):
                return spike_grad
    return spike_grad


def recognise_quant(
    state_quant: Callable[[Tensor], Tensor],
) -> StateQuant | Callable[[Tensor], Tensor]:
    """Our quantiser for one of ``snntorch.functional.quant``; anything else as it came."""
    captured = _captured(
        state_quant, "snntorch.functional.quant", "state_quant.<locals>.inner"
    )
    if captured is None or "levels" not in captured:
        return state_quant
    try:
        return StateQuant(captured["levels"])
    except (TypeError, ValueError):
        return state_quant
