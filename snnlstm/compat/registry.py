"""What reaches every layer: snnTorch's list of its neurons, and a weak set of ours.

What changes in snnTorch is changed here, once in a process, also if the package is imported again.
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

_alive: Any = getattr(Neuron, "_of_snnlstm", weakref.WeakValueDictionary())


def _is_ours(neuron: Any) -> bool:
    return getattr(type(neuron), "registers_itself", False)


class Instances(list[Any]):
    """snnTorch's list of neurons, without ours, which it would keep alive."""

    def append(self, neuron: Any) -> None:
        """List a neuron, as snnTorch's constructor does, unless it is one of ours."""
        if not _is_ours(neuron):
            super().append(neuron)


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
    """Make snnTorch's list one that skips ours; ``SpikingNeuron.init()`` makes a plain one."""
    neurons = getattr(Neuron, "instances", None)
    if isinstance(neurons, list) and not isinstance(neurons, Instances):
        Neuron.instances = Instances(neurons)


def clear_registries() -> None:
    """Forget every layer, as ``SpikingNeuron.init()`` does."""
    _alive.clear()
    if Neuron is not None:
        Neuron.instances = []


# ---- walks over all layers -----------------------------------------------------------------------


def _either(eager: Callable[..., Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that is `eager`, but `compiled` in code that torch.compile traces."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.compiler.is_compiling() else eager)(*args, **kwargs)

    # torch.compile bounds how often it compiles one code object.
    run.__code__ = run.__code__.replace(co_name=eager.__name__)
    return wraps(eager)(run)


def untraced(walk: Callable[..., Any]) -> Callable[..., Any]:
    """Let compiled code break its graph at a walk: a graph would guard on all layers."""
    return _either(walk, opaque(walk))


def _with_ours(kind: Any, theirs: Callable[[Any], None], own: str) -> Callable[..., Any]:
    """snnTorch's walk over all neurons of a class; ours have a method for what it does to one."""

    @wraps(theirs)
    def walk(cls: Any) -> None:
        # A copy, because a swap in another thread may make the list shorter meanwhile.
        neurons = [*cls.instances, *alive(kind)]
        for neuron in filter(_is_ours, neurons):
            getattr(neuron, own)()
        # A constructor lists a neuron without a mem, and may fail, or run in another thread.
        rest = [one for one in neurons if not _is_ours(one) and hasattr(one, "mem")]
        theirs(SimpleNamespace(instances=rest))

    return untraced(walk) if kind in (Base, TheirLeaky) else _either(walk, theirs)


def _through_wrapper(reset: Callable[[Any], None]) -> Callable[[Any], None]:
    """snnTorch's reset, also of a network that torch.compile has wrapped.

    snnTorch's looks at the direct children, and the wrapper has one: the network.
    """

    @wraps(reset)
    def run(net: Any) -> None:
        reset(getattr(net, "_modules", {}).get("_orig_mod", net))

    return run


_NEURONS: Any = () if Neuron is None else Neuron


def reset(net: nn.Module) -> None:
    """Set the states of all neurons in a network to zero, so that a new sequence begins.

    The neurons are our cells and Leaky layers, and snnTorch's neurons of every kind, at any depth
    of `net`, also if ``torch.compile``, ``DistributedDataParallel`` or another module wraps it, or
    if `net` is a neuron. Neurons of other networks keep their states. Compiled code may call this
    function, also with ``fullgraph=True``.

    ``snntorch.utils.reset`` 1.0.0 looks at the direct children of `net` alone: it leaves out
    neurons in blocks, and resets those of other networks.

    Parameters
    ----------
    net : nn.Module

    Raises
    ------
    TypeError
        If `net` is not an nn.Module.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be an nn.Module, got {type(net).__name__}")
    for module in net.modules():
        is_neuron = isinstance(module, _NEURONS) or _is_ours(module)
        if is_neuron and hasattr(module, "reset_mem"):  # some of snnTorch's keep no state
            module.reset_mem()


if Neuron is not None and "_of_snnlstm" not in vars(Neuron):
    Neuron._of_snnlstm = _alive
    for _kind in vars(library).values():
        for _name, _own in (("reset_hidden", "reset_mem"), ("detach_hidden", "_detach")):
            if isinstance(_kind, type) and isinstance(vars(_kind).get(_name), classmethod):
                _walk = _with_ours(_kind, vars(_kind)[_name].__func__, _own)
                setattr(_kind, _name, classmethod(_walk))
    with suppress(Exception):  # a broken one may raise anything
        _utils: Any = import_module("snntorch.utils")
        _utils.reset = _either(_through_wrapper(_utils.reset), reset)
