"""Padded samples in a stack, for layers that know no lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..calls.lengths import hold_last, mask_padding
from ..neurons.sconv2dlstm import SConv2dLSTM


def pad(out: Any, lengths: Tensor) -> Any:
    """What a neuron returned of all steps, spk or spk and mem, as steps with :class:`Frozen`."""
    if isinstance(out, Tensor):
        return mask_padding(out, lengths)
    spk, mem = out
    return mask_padding(spk, lengths), hold_last(mem, mem.new_zeros(()), lengths)


class Frozen:
    """Calls a layer step by step, and leaves padded samples as they are.

    `call` calls the layer. The layer computes padded samples, too, but its first result is 0 there.
    Its other results stay as they were, and so do the states that it keeps of a sample, in tensors
    (N, ...) that are attributes or non-persistent buffers.
    """

    def __init__(self, layer: nn.Module, call: Callable[[Tensor], Any], lengths: Tensor) -> None:
        self._layer, self._call, self._lengths, self._step = layer, call, lengths, 0
        self._returned: Any = None

    def __call__(self, x: Tensor) -> Any:
        live = self._lengths > self._step
        before = {id(owner): _kept(owner) for owner in self._layer.modules()}
        out = self._call(x)
        olds = {}  # what a stored state was before the call, which may return that state
        for owner in self._layer.modules():
            for name, after in _kept(owner).items():
                if after.dim() > 1 and after.shape[0] == len(live):
                    olds[id(after)] = old = before[id(owner)].get(name)
                    setattr(owner, name, _stay(live, after, old, first=False))
        if self._returned is None and isinstance(out, tuple | list):
            self._returned = tuple(olds.get(id(item)) for item in out)
        self._step, self._returned = self._step + 1, _stay(live, out, self._returned, True)
        return self._returned


def _stay(live: Tensor, new: Any, old: Any, first: bool) -> Any:
    """Return `new` for the active samples, and `old` for the padded ones, or 0 if there is none.

    Tuples are taken item by item. Padded samples get 0 for the first item.
    """
    if isinstance(new, tuple | list):
        olds = old if isinstance(old, tuple) else (None,) * len(new)
        pairs = enumerate(zip(new, olds, strict=True))
        return tuple(_stay(live, *pair, first and k == 0) for k, pair in pairs)
    if not isinstance(new, Tensor):
        return new
    if first or old is None or old.shape != new.shape:
        old = torch.zeros_like(new)
    return torch.where(live.reshape(-1, *(1,) * (new.dim() - 1)), new, old)


def _kept(owner: nn.Module) -> dict[str, Tensor]:
    """The tensors in which a module may keep something from step to step."""
    if isinstance(owner, SConv2dLSTM):
        return {"syn": owner._state.syn, "mem": owner._state.mem}
    temporary = owner._non_persistent_buffers_set
    tensors = owner.__dict__ | {k: v for k, v in owner._buffers.items() if k in temporary}
    return {k: v for k, v in tensors.items() if isinstance(v, Tensor)}
