"""The registries of neurons: snnTorch's list, and ours. Neither keeps a layer of ours alive."""

from __future__ import annotations

import gc
import weakref
from collections import deque
from collections.abc import Iterator, MutableSequence
from typing import Any

import torch
from torch import nn

from . import snntorch


class _Vacancy:
    """What is in a dead layer's place; snnTorch may set states of a layer that has just died."""

    syn = mem = property(lambda _: torch.zeros(0, device="cpu"), lambda _, value: None)


_VACANCY = _Vacancy()


def _found(entry: Any) -> Any:
    """Return the neuron of an entry, or the vacancy that it left."""
    if not isinstance(entry, weakref.ref):  # torch.compile cannot guard the type of a reference
        return entry
    neuron = entry()
    return _VACANCY if neuron is None else neuron


def _collect_garbage() -> None:
    """Let unreachable layers die now: torch.compile fails if one dies while it is compiling."""
    gc.collect()


# torch.compiler.assume_constant_result sets this flag, but its import loads the compiler.
_collect_garbage._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Instances(MutableSequence[Any]):
    """snnTorch's list of neurons, which refers to ours weakly.

    snnTorch's reset_hidden and detach_hidden walk ``SpikingNeuron.instances`` by position, and
    torch.compile traces the walk. Both find the layers themselves. Other threads may make and drop
    layers meanwhile, so a layer that dies leaves its place vacant, and a new one takes it.
    """

    def __init__(self, entries: list[Any]) -> None:
        self._entries = entries
        self._dead: deque[Any] = deque()  # two threads cannot pop the same reference

    def __len__(self) -> int:
        if torch.compiler.is_compiling():
            _collect_garbage()
        return len(self._entries)

    def __iter__(self) -> Iterator[Any]:
        return iter([neuron for neuron in map(_found, self._entries) if neuron is not _VACANCY])

    def __getitem__(self, position: Any) -> Any:
        entry = self._entries[position]
        return [*map(_found, entry)] if isinstance(position, slice) else _found(entry)

    def __setitem__(self, position: Any, neuron: Any) -> None:
        self._entries[position] = neuron

    def __delitem__(self, position: Any) -> None:
        del self._entries[position]

    def insert(self, position: int, neuron: Any) -> None:
        self._entries.insert(position, neuron)

    def append(self, neuron: Any) -> None:
        """List a neuron, in the place of a dead one if there is one; ours `register` themselves.

        snnTorch's constructor lists a neuron before it has a mem, which another thread may read.
        """
        if getattr(type(neuron), "registers_itself", False):
            return
        while self._dead:
            try:
                place = self._place(self._dead.popleft())
            except (IndexError, ValueError):  # another thread was faster, or the list was cleared
                continue
            self._entries[place] = neuron
            return
        self._entries.append(neuron)

    def hold_weakly(self, neuron: Any) -> None:
        """List a neuron once, without keeping it alive."""
        # The callback is compiled code, within which no signal handler can raise.
        entry = weakref.ref(neuron, self._dead.append)
        try:
            self._entries[self._place(neuron)] = entry
        except ValueError:
            self.append(entry)

    def _place(self, sought: Any) -> int:
        """Return the position of a neuron, or of an entry."""
        for position, entry in enumerate(self._entries):
            if entry is sought or _found(entry) is sought:
                return position
        raise ValueError


_alive: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def alive(kind: type[nn.Module] = nn.Module) -> list[Any]:
    """The registered layers of a class that are alive.

    The list is made without a lock, because a fork or a signal handler could find it taken. Other
    threads may make and drop layers meanwhile.
    """
    layers = [reference() for reference in _alive.valuerefs()]
    return [layer for layer in layers if isinstance(layer, kind)]


def register(layer: nn.Module) -> None:
    """Let the classmethods of both libraries reach a layer, without keeping the layer alive."""
    _alive[id(layer)] = layer
    instances().hold_weakly(layer)


def clear_registries() -> None:
    """Forget every layer, as ``SpikingNeuron.init()`` does."""
    _alive.clear()
    if snntorch.Neuron is not None:
        snntorch.Neuron.instances = []


def instances() -> Instances:
    """snnTorch's list of neurons, which becomes an :class:`Instances` with our first layer."""
    neurons = getattr(snntorch.Neuron, "instances", None)
    if isinstance(neurons, list):
        neurons = snntorch.Neuron.instances = Instances(neurons)
    return neurons if isinstance(neurons, Instances) else Instances([])
