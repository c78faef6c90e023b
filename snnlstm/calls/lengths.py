"""Results and states of padded samples; a sample is padded after its own last step.

Lengths (N,), from :func:`snnlstm.calls.call.checked_lengths`, are the steps of each sample.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .call import Call


def length_mask(lengths: Tensor, time: int, dims: int = 5) -> Tensor:
    """A mask of `dims` dimensions, (T, N, 1, ...): whether a step is one of the sample's own."""
    steps = torch.arange(time, device=lengths.device)[:, None] < lengths
    return steps.reshape(*steps.shape, *(1,) * (dims - 2))


def last_state(recorded: Tensor, before: Tensor, lengths: Tensor) -> Tensor:
    """Each sample's last own state, (N, ...), of `recorded`; `before` if it has no step."""
    state = recorded[(lengths - 1).clamp(min=0), torch.arange(len(lengths), device=lengths.device)]
    return torch.where(length_mask(lengths, 1, recorded.dim())[0], state, before)


def hold_last(recorded: Tensor, before: Tensor, lengths: Tensor) -> Tensor:
    """Make padded samples repeat their last state in the states of all steps, (T, N, ...)."""
    steps = length_mask(lengths, recorded.shape[0], recorded.dim())
    return torch.where(steps, recorded, last_state(recorded, before, lengths))


def held(own: Tensor, new: Any, old: Any, first: bool = False) -> Any:
    """Return `new` for samples where `own`, (N,), is True, and `old` for the padded others.

    Tuples are processed item by item. Padded samples get 0 if there is no `old`, and, with `first`,
    in the first item of a tuple.
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
    """Set the padded samples of a sequence (T, N, ...) to zero."""
    return torch.where(length_mask(lengths, x.shape[0], x.dim()), x, 0)


def recorded_states(call: Call, syn: Tensor, mem: Tensor) -> tuple[Tensor, Tensor]:
    """Make padded samples repeat their last recorded state, which the kernels do not."""
    lengths = call.lengths
    assert lengths is not None
    return hold_last(syn, call.syn, lengths), hold_last(mem, call.mem, lengths)
