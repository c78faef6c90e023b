"""Half types on a device whose kernels have none: each step runs in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..calls.call import Call
from ..calls.lengths import recorded_states

Step = Callable[[Call], tuple[Tensor, Tensor, Tensor, Any]]


def in_float32(call: Call, run_step: Step) -> tuple[Tensor, Tensor, Tensor, Any]:
    """Run each step of a call in a half type in float32; between steps states have that type.

    `run_step` runs a call of one step, and returns what this function returns.
    """
    x, syn, mem, weight, bias, threshold, graded, lengths, record = call
    dtype = x.dtype
    if call.sequence:  # a float32 weight adds the steps' gradients in float32
        weight, bias = weight.float(), None if bias is None else bias.float()
    threshold, graded = (None if t is None else t.float() for t in (threshold, graded))
    results: list[tuple[Tensor, ...]] = []
    name = step_lengths = None
    for t, x_t in enumerate(x.split(1) if call.sequence else [x]):
        if lengths is not None:
            step_lengths = (lengths - t).clamp(0, 1)
        states = syn.float(), mem.float()
        *outputs, name = run_step(
            Call(x_t.float(), *states, weight, bias, threshold, graded, step_lengths)
        )
        results.append(tuple(result.to(dtype) for result in outputs))
        _, syn, mem = results[-1]
    if not call.sequence:
        return (*results[0], name)  # type: ignore[return-value]
    spks, syns, mems = zip(*results, strict=True)
    if record:
        syn, mem = torch.stack(syns), torch.stack(mems)
        if lengths is not None:
            syn, mem = recorded_states(call, syn, mem)
    return torch.cat(spks), syn, mem, name
