"""What reaches all layers of the process: snnTorch's list of its neurons, and a weak set of ours.

Everything of snnTorch's that changes in memory is changed here, once in a process, also if the
package is imported again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from .snntorch import Base, Neuron, TheirLeaky, library
from .torch_private import opaque


class Instances(list[Any]):
    """snnTorch's list of neurons, without ours, which it would keep alive."""

    def append(self, neuron: Any) -> None:
        """List a neuron, as snnTorch's constructor does, unless it is one of ours."""
        if not getattr(type(neuron), "registers_itself", False):
            super().append(neuron)


_alive: weakref.WeakValueDictionary[int, Any] = getattr(
    Neuron, "_of_snnlstm", weakref.WeakValueDictionary()
)


def alive(kind: type[nn.Module] = nn.Module) -> list[Any]:
    """The registered layers of a class that are alive: ours, and those that were ours.

    The list is made without a lock, because a fork or a signal handler could find it taken. Other
    threads may make and drop layers meanwhile.
    """
    layers = [reference() for reference in _alive.valuerefs()]
    return [layer for layer in layers if isinstance(layer, kind)]


def register(layer: nn.Module) -> None:
    """Let the classmethods of both libraries reach a layer, without keeping the layer alive."""
    _alive[id(layer)] = layer


def skip_ours() -> None:
    """Make snnTorch's list one that skips ours; ``SpikingNeuron.init()`` replaces the list."""
    neurons = getattr(Neuron, "instances", None)
    if isinstance(neurons, list) and not isinstance(neurons, Instances):
        Neuron.instances = Instances(neurons)


def unlist(layer: nn.Module) -> None:
    """Take a layer that changes its library off snnTorch's list; it is registered instead."""
    with suppress(ValueError):
        Neuron.instances.remove(layer)


def clear_registries() -> None:
    """Forget every layer, as ``SpikingNeuron.init()`` does."""
    _alive.clear()
    if Neuron is not None:
        Neuron.instances = []


# ---- walks over all layers -----------------------------------------------------------------------


def _either(eager: Callable[..., Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that is `eager`, but in code that torch.compile traces `compiled`."""

    @wraps(eager)
    def run(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.compiler.is_compiling() else eager)(*args, **kwargs)

    return run


def _untraced(walk: Callable[[Any], None]) -> Callable[..., Any]:
    """Let compiled code break its graph at a walk: a graph would guard on all layers."""
    return _either(walk, opaque(walk))


@_untraced
def reset_all(kind: type[nn.Module]) -> None:
    """Set the stored states of all registered layers of a class to zero."""
    for layer in alive(kind):
        layer.reset_mem()


@_untraced
def detach_all(kind: type[nn.Module]) -> None:
    """Detach the stored states of all registered layers of a class from the graph."""
    for layer in alive(kind):
        state = layer.__dict__.get("_state")
        if state is None:
            detach_states(layer)
        else:
            state.detach()


def detach_states(owner: Any) -> None:
    """Detach the attributes syn and mem, in place where torch allows that."""
    for name in ("syn", "mem"):
        state = getattr(owner, name, None)
        if state is None:
            continue
        if state.is_leaf or state._is_view():  # detach_ harms a leaf, and a view refuses
            setattr(owner, name, state.detach())
        else:
            state.detach_()


def _wrap_walk(kind: Any, name: str, ours: Callable[[Any], None]) -> None:
    """Let a classmethod that walks snnTorch's list by position reach our layers, too."""
    theirs = vars(kind)[name].__func__

    @wraps(theirs)
    def walk(cls: Any) -> None:
        ours(kind)
        # A swap in another thread may make the list itself shorter meanwhile.
        theirs(SimpleNamespace(instances=[*cls.instances]))

    has_ours = kind in (Base, TheirLeaky)
    setattr(kind, name, classmethod(_untraced(walk) if has_ours else _either(walk, theirs)))


def _reset_traced(net: nn.Module) -> None:
    """Reset the neurons in a network, and guard on no other; snnTorch's function walks the list."""
    for module in net.modules():
        if isinstance(module, Neuron) and hasattr(module, "reset_mem"):
            module.reset_mem()


def _wrap() -> None:
    Neuron._of_snnlstm = _alive
    for kind in vars(library).values():
        if isinstance(kind, type) and issubclass(kind, Neuron):
            for name, ours in (("reset_hidden", reset_all), ("detach_hidden", detach_all)):
                if name in vars(kind):
                    _wrap_walk(kind, name, ours)
    with suppress(ImportError):
        utils = import_module("snntorch.utils")
        utils.reset = _either(utils.reset, _reset_traced)


if Neuron is not None and "_of_snnlstm" not in vars(Neuron):
    _wrap()
