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
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from . import surrogate
from .quant import StateQuant

__all__ = ["accelerate", "recognise_quant", "recognise_surrogate"]

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


def clear_registries() -> None:
    """Forget every cell, as ``SpikingNeuron.init()`` does."""
    live.clear()
    if _Neuron is not None:
        _Neuron.instances = []


# ---- accelerate ---------------------------------------------------------------------------


def accelerate(model: nn.Module) -> nn.Module:
    """Replace every ``snntorch.SConv2dLSTM`` in a model by ours, in place.

    The replacement shares the parameters, buffers, submodules, state and hooks of the cell
    that it stands in for, so that optimizers and checkpoints keep working. A cell that occurs
    in several places is replaced by one. Instances of subclasses are left alone: they may
    compute something else. Two things that snnTorch's cell accepts and ignores take effect:
    ``inhibition`` and a changed ``reset_mechanism``.

    Parameters
    ----------
    model : nn.Module
        A model, or a bare cell.

    Returns
    -------
    nn.Module
        `model`, or the new cell if `model` is itself a cell.

    Raises
    ------
    ImportError
        If snntorch is not installed.
    TypeError
        If `model` is not an nn.Module.
    ValueError
        If a cell cannot work in snnTorch either, such as one with an even kernel. Nothing is
        replaced then.
    """
    if Base is nn.Module:
        raise ImportError(
            "accelerate() replaces cells of snntorch, which is not installed (or has no "
            "SConv2dLSTM): pip install snntorch"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    # Everything is built before anything is replaced, so that an error leaves the model whole.
    ours = {id(module): _adopt(module) for module in model.modules() if type(module) is _Theirs}
    if not ours:
        logger.warning("accelerate found no snntorch.SConv2dLSTM to replace")
        return model
    replaced = [module for module in model.modules() if id(module) in ours]
    parents = list(model.modules())
    for parent in parents:
        for name, child in parent._modules.items():
            if id(child) in ours:
                parent._modules[name] = ours[id(child)]
    # snnTorch's list holds its cells for ever, with their last states.
    instances = getattr(_Neuron, "instances", [])
    instances[:] = [entry for entry in instances if not any(entry is old for old in replaced)]
    logger.info("accelerate replaced %d snntorch.SConv2dLSTM", len(ours))
    return ours.get(id(model), model)


def _adopt(old: Any) -> nn.Module:
    """Make a cell that shares everything with one of snnTorch."""
    from .sconv2dlstm import SConv2dLSTM  # which is derived from this module's Base

    cell = SConv2dLSTM(
        old.in_channels,
        old.out_channels,
        old.kernel_size,
        bool(old.bias),
        old.max_pool,
        old.avg_pool,
        0.1,  # as all tensors, replaced below
        None if old.surrogate_disable else old.spike_grad,
        old.surrogate_disable,
        old.init_hidden,
        old.inhibition,
        state_quant=old.state_quant,
        output=old.output,
        device="meta",
    )
    states = {name: old._buffers[name] for name in ("syn", "mem")}
    # The very dictionaries of the hooks, because their handles know those.
    shared = {key for key in old.__dict__ if "hook" in key} | {"training"}
    extra = set(old.__dict__) - set(cell.__dict__) - {"state_function", "reset"}
    cell.__dict__.update({key: old.__dict__[key] for key in shared | extra})
    cell._parameters = old._parameters.copy()
    cell._modules = old._modules.copy()
    cell._buffers = {key: buffer for key, buffer in old._buffers.items() if key not in states}
    cell._non_persistent_buffers_set = old._non_persistent_buffers_set - set(states)
    cell._initial_threshold = cell.threshold.detach().clone()
    cell.syn, cell.mem = states["syn"], states["mem"]
    cell.reset_mechanism_val = cell.reset_mechanism_val  # which sets what runs, too
    return cell
