"""Half types on a device whose kernels have none: each step runs in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..calls.call import Call
from ..reference import over_time

Step = Callable[[Call], tuple[Tensor, Tensor, Tensor, Any]]


def in_float32(call: Call, run_step: Step) -> tuple[Tensor, Tensor, Tensor, Any]:
    """Run each step of a call in a half type in float32; between steps states have that type.

    `run_step` runs a call of one step, and returns what this function returns.
    """
    _, _, _, weight, bias, threshold, graded, _, _ = call
    if call.sequence:  # a float32 weight adds the steps' gradients in float32
        weight, bias = weight.float(), None if bias is None else bias.float()
    threshold, graded = (None if t is None else t.float() for t in (threshold, graded))
    name = None

    def step(x: Tensor, *states: Tensor) -> Any:
        nonlocal name
        x, (syn, mem) = x.float(), (state.float() for state in states)
        part = Call(x[None] if call.sequence else x, syn, mem, weight, bias, threshold, graded)
        spk, syn, mem, name = run_step(part)
        return tuple(t.to(call.x.dtype) for t in (spk[0] if call.sequence else spk, syn, mem))

    out = over_time(call, step) if call.sequence else step(*call[:3])
    return (*out, name)
