"""What padded samples get: a sample is padded after its own last step.

Lengths (N,) are the steps of each sample, as :func:`snnlstm.calls.call.checked_lengths` returns
them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .call import Call


def length_mask(lengths: Tensor, time: int, dims: int = 5) -> Tensor:
    """Whether each of `time` steps is one of the sample's own, (T, N, 1, ...) of `dims`."""
    steps = torch.arange(time, device=lengths.device)[:, None] < lengths
    return steps.reshape(*steps.shape, *(1,) * (dims - 2))


def last_state(recorded: Tensor, before: Tensor, lengths: Tensor) -> Tensor:
    """Each sample's state after its own last step, (N, ...), of those of all steps, (T, N, ...).

    `before` is the state before the first step.
    """
    state = recorded[(lengths - 1).clamp(min=0), torch.arange(len(lengths), device=lengths.device)]
    return torch.where(length_mask(lengths, 1, recorded.dim())[0], state, before)


def hold_last(recorded: Tensor, before: Tensor, lengths: Tensor) -> Tensor:
    """The states of all steps, (T, N, ...); padded samples repeat their last state."""
    steps = length_mask(lengths, recorded.shape[0], recorded.dim())
    return torch.where(steps, recorded, last_state(recorded, before, lengths))


def held(own: Tensor, new: Any, old: Any, first: bool = False) -> Any:
    """Return `new` for the samples whose `own` step it is, (N,), and `old` for padded samples.

    Tuples are taken item by item. Padded samples get 0 if there is no `old`, and for the `first`
    item of a tuple.
    """
    if isinstance(new, tuple | list):
        olds = old if isinstance(old, tuple | list) else (None,) * len(new)
        pairs = enumerate(zip(new, olds, strict=True))
        return tuple(held(own, *pair, first and k == 0) for k, pair in pairs)
    if not isinstance(new, Tensor):
        return new
    if first or old is None or old.shape != new.shape:
        old = torch.zeros_like(new)
    return torch.where(own.reshape(-1, *(1,) * (new.dim() - 1)), new, old)


def mask_padding(x: Tensor, lengths: Tensor) -> Tensor:
    """A sequence (T, N, ...), with zeros for padded samples."""
    return torch.where(length_mask(lengths, x.shape[0], x.dim()), x, 0)


def recorded_states(call: Call, syn: Tensor, mem: Tensor) -> tuple[Tensor, Tensor]:
    """Recorded states in which padded samples repeat their last one; kernels leave others there."""
    lengths = call.lengths
    assert lengths is not None
    return hold_last(syn, call.syn, lengths), hold_last(mem, call.mem, lengths)
