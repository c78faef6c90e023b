"""The cell with ``checkpoint=True``: less memory for the backward pass, one more forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ..calls.call import Call, Outputs
from ..compat.torch_private import transforms_are_active
from ..native.tensors import restored


def may_checkpoint() -> bool:
    """Whether a backward pass may follow, and torch's checkpoint works: torch.func refuses it."""
    return torch.is_grad_enabled() and not transforms_are_active()


def in_segments(call: Call, run: Callable[[Call], Outputs], foreign: bool, traced: bool) -> Outputs:
    """Run a call in segments of about sqrt(T) steps, each by `run`; return spk, syn and mem.

    Only the states between segments are saved for the backward pass, which computes the gates of
    one segment at a time again, just before their gradients (Chen et al. 2016, "Training deep nets
    with sublinear memory cost"). `foreign` says that the user's code takes part; if it draws random
    numbers, they are the same in both passes.
    """

    def segment(time: int, *tensors: Any) -> Outputs:
        part = Call._make((*tensors, call.record))
        return run(part if traced else _restored(part, call, time))

    weight, bias, threshold, graded, lengths = call[3:8]
    if threshold is not None:  # the user may modify the threshold before the backward pass
        threshold = threshold.clone()
    # A step saves 5 state-sized tensors and a boundary 2; this segment length saves the fewest.
    steps = max(1, round((0.4 * call.x.shape[0]) ** 0.5)) if call.sequence else 1
    pieces = call.x.split(steps) if call.sequence and call.x.shape[0] else (call.x,)
    syn, mem, results = call.syn, call.mem, []
    for k, x in enumerate(pieces):
        left = None if lengths is None else (lengths - k * steps).clamp(0, x.shape[0])
        # All tensors are arguments, so that torch notices if one is modified meanwhile.
        tensors = x, syn, mem, weight, bias, threshold, graded, left
        out = checkpoint(
            segment, x.shape[0], *tensors, use_reentrant=False, preserve_rng_state=foreign
        )
        results.append(out)
        syn, mem = (s[-1] for s in out[1:]) if call.record and x.shape[0] else out[1:]
    if len(results) == 1:
        return results[0]
    spks, syns, mems = zip(*results, strict=True)
    if call.record:
        syn, mem = torch.cat(syns), torch.cat(mems)
    return torch.cat(spks), syn, mem


def _restored(part: Call, call: Call, time: int) -> Call:
    """Restore the tensors of a call's segment, which hooks on saved tensors may have changed."""
    shapes: list[Any] = [None if t is None else t.shape for t in call[:8]]
    if call.sequence:
        shapes[0] = (time, *call.x.shape[1:])
    tensors: list[Any] = [
        t if t is None else restored(t, shape, before.dtype, call.x.device)
        for t, shape, before in zip(part[:8], shapes, call[:8], strict=True)
    ]
    if tensors[7] is not None:
        tensors[7] = tensors[7].contiguous()
    return Call._make((*tensors, call.record))
