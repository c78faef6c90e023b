"""What only makes sense with snnTorch installed.

The base class of our cell, the recognition of snnTorch's closures, and the registry
through which snnTorch's own ``reset_hidden`` and ``detach_hidden`` reach our cells.
snnTorch is optional; a missing or broken install costs no more than the features above.
"""

from __future__ import annotations

import functools
import logging
import types
import weakref
from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, nn

from . import surrogate
from .quant import StateQuant

__all__ = ["recognise_quant", "recognise_surrogate"]

logger = logging.getLogger("snnlstm")


def _captured(function: object, module: str, qualname: str | None = None) -> dict[str, Any] | None:
    """Closure variables of a function of that module (and name); None for anything else."""
    if not isinstance(function, types.FunctionType) or function.__module__ != module:
        return None
    if qualname is not None and function.__qualname__ != qualname:
        return None
    cells = function.__closure__ or ()
    names = function.__code__.co_freevars
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


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
    captured = _captured(state_quant, "snntorch.functional.quant", "state_quant.<locals>.inner")
    if captured is None or "levels" not in captured:
        return state_quant
    try:
        return StateQuant(captured["levels"])
    except (TypeError, ValueError):
        return state_quant


# ---- base class and registry --------------------------------------------------------------


def _import_snntorch() -> types.ModuleType | None:
    try:
        import snntorch
    except ModuleNotFoundError as error:
        if error.name != "snntorch":
            logger.warning("snntorch is installed but does not import: %s", error)
        return None
    except Exception as error:  # whatever a broken install raises must not break ours
        logger.warning("snntorch is installed but does not import: %r", error)
        return None
    return snntorch


_snntorch = _import_snntorch()
_Theirs: Any = getattr(_snntorch, "SConv2dLSTM", None)
_Neuron: Any = getattr(_snntorch, "SpikingNeuron", None)

Neuron: Any = _Neuron if isinstance(_Neuron, type) else None
"""snnTorch's base class of all neurons, or None."""

Base: Any = _Theirs if isinstance(_Theirs, type) and issubclass(_Theirs, nn.Module) else nn.Module
"""snnTorch's cell, so that isinstance, utils.reset and BPTT know ours; else nn.Module."""

live: weakref.WeakSet[Any] = weakref.WeakSet()
"""Our cells that are alive, for the classmethods of our class."""


def register(cell: nn.Module) -> None:
    """Enter a new cell in both registries, without keeping it alive.

    snnTorch walks ``SpikingNeuron.instances`` in its reset_hidden and detach_hidden. It gets a
    weak proxy there, which leaves the list with the cell.
    """
    live.add(cell)
    instances = getattr(_Neuron, "instances", None)
    if isinstance(instances, list):
        instances.append(weakref.proxy(cell, functools.partial(_forget, instances)))


def _forget(instances: list[Any], entry: object) -> None:
    # By identity: comparing dead proxies raises ReferenceError.
    for position, other in enumerate(instances):
        if other is entry:
            del instances[position]
            return


def forget(cells: Collection[nn.Module]) -> None:
    """Take cells, of either library, out of both registries.

    snnTorch's list would hold its own for ever, with their last states.
    """
    references = [id(ref) for cell in cells for ref in weakref.getweakrefs(cell)]
    gone = {id(cell) for cell in cells} | set(references)
    for cell in cells:
        live.discard(cell)
    instances = getattr(_Neuron, "instances", None)
    if isinstance(instances, list):
        instances[:] = [entry for entry in instances if id(entry) not in gone]


def clear_registries() -> None:
    """Forget every cell, as ``SpikingNeuron.init()`` does."""
    live.clear()
    if _Neuron is not None:
        _Neuron.instances = []
