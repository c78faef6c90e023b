"""The cell in plain PyTorch, for any device, dtype and order of differentiation.

This is the reference path: it runs every call that the native kernels do not cover, and tests
compare the kernels with it. ``_step`` computes one step like snntorch 1.0.0's ``SConv2dLSTM``, with
its defects repaired.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .calls.call import Call, Outputs
from .calls.lengths import held, mask_padding
from .calls.spec import CellSpec
from .surrogate import Surrogate, heaviside_step

__all__ = ["Overrides", "called", "fire", "reset_signal", "run"]


class Overrides(NamedTuple):
    """Users' functions that replace parts of a call."""

    conv: Callable[[Tensor], Tensor] | None = None
    """Replaces the convolution, from (N, Cin + C, H, W) to (N, 4C, H, W)."""
    reason: str | None = None
    """Why `conv` is called."""
    fire: Callable[[Tensor], Tensor] | None = None
    mem_reset: Callable[[Tensor], Tensor] | None = None


def called(name: str, function: Callable[[Tensor], Tensor], argument: Tensor) -> Tensor:
    """Call a user's function, whose result must be a tensor."""
    out: Any = function(argument)
    if not isinstance(out, Tensor):
        raise TypeError(f"{name} must return a tensor, got {type(out).__name__}")
    return out


def reset_signal(mem: Tensor, threshold: Tensor, surrogate: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a step's reset signal: 1 where ``mem`` before the step exceeds the threshold, else 0.

    It carries no gradient. mem is (N, C, H, W), threshold broadcasts to that shape, and `surrogate`
    is the cell's ``spike_grad``.
    """
    if type(surrogate) is Surrogate:  # dynamo need not trace its autograd.Function
        return heaviside_step(mem.detach() - threshold.detach()).to(mem.dtype)
    spk = called("spike_grad", surrogate, mem - threshold)
    return spk.detach().to(mem.dtype)


def fire(
    mem: Tensor,
    threshold: Tensor,
    graded: Tensor,
    surrogate: Callable[[Tensor], Tensor],
    quant: Callable[[Tensor], Tensor] | None = None,
    inhibition: bool = False,
) -> Tensor:
    """Return the spikes of a (pooled) membrane potential (N, C, H, W), times the graded factor.

    threshold and graded broadcast to the shape of mem. `quant`, if given, is applied to mem first;
    `surrogate` is applied to ``mem - threshold``. With `inhibition` only the neuron with the
    highest mem of each sample may spike; a tie goes to the lowest index, and NaN counts as the
    highest, as in torch.argmax.
    """
    if quant is not None:
        mem = called("state_quant", quant, mem)
    spk = called("spike_grad", surrogate, mem - threshold)
    spk = spk.to(mem.dtype)  # snnTorch's surrogates always return float32
    if inhibition:
        flat = mem.detach().flatten(1)
        winner = flat.argmax(1, keepdim=True)
        # The mask is multiplied, not selected with, so that suppressed neurons get a zero gradient.
        spk = spk * torch.zeros_like(flat).scatter(1, winner, 1).view_as(mem)
    return spk * graded


def _gates(call: Call, spec: CellSpec, conv: Any, x: Tensor, mem: Tensor) -> Tensor:
    """Return the pre-activations of the gates of one step, (N, 4C, Ho, Wo)."""
    weight, bias = call.weight, call.bias
    if spec.stride == (1, 1):
        both = torch.cat([x, mem], 1)
        if conv is not None:
            return conv(both)
        return F.conv2d(both, weight, bias, 1, spec.padding, spec.dilation)
    # Only the input's half has a stride, because the recurrent half keeps the size of the state.
    x_weight, mem_weight = weight.split([x.shape[1], mem.shape[1]], 1)
    return F.conv2d(x, x_weight, bias, spec.stride, spec.padding, spec.dilation) + F.conv2d(
        mem, mem_weight, None, 1, spec.padding, spec.dilation
    )


def _step(
    call: Call, spec: CellSpec, overrides: Overrides, x: Tensor, syn: Tensor, mem: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one time step, and return spk, syn and mem."""
    threshold: Any = call.threshold
    graded: Any = call.graded
    surrogate, quant = spec.surrogate, spec.quant
    reset: Any = None
    # A user's function may draw random numbers, so it is called as often as in snnTorch.
    if overrides.mem_reset is not None:
        reset = overrides.mem_reset(mem)
    elif spec.reset != "none" or type(surrogate) is not Surrogate:
        reset = reset_signal(mem, threshold, surrogate)

    # Under autocast the gates have the autocast dtype; the states keep theirs.
    gates = _gates(call, spec, overrides.conv, x, mem).to(mem.dtype)
    i, f, o, g = gates.chunk(4, 1)
    syn = torch.sigmoid(f) * syn + torch.sigmoid(i) * torch.tanh(g)
    mem = torch.sigmoid(o) * torch.tanh(syn)
    if not spec.spiking:
        return (mem if call.sequence else mem.new_empty(0)), syn, mem

    if spec.reset == "subtract":
        # The threshold may be infinite where nothing is reset: 0 * inf must not give NaN.
        mem = mem - torch.where(reset.bool(), reset * threshold, 0)
    elif spec.reset == "zero":
        mem = mem * (1 - reset)
    if quant is not None:
        syn, mem = (called("state_quant", quant, state) for state in (syn, mem))

    pooled = mem
    if spec.pool == "max":
        pooled = F.max_pool2d(mem, spec.pool_size)
    elif spec.pool == "avg":
        pooled = F.avg_pool2d(mem, spec.pool_size)
    if overrides.fire is not None:
        return overrides.fire(pooled), syn, mem
    return fire(pooled, threshold, graded, surrogate, quant, spec.inhibition), syn, mem


def run(
    call: Call, spec: CellSpec, overrides: Overrides | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one step or a whole sequence, and return spk, syn and mem.

    `overrides` replace the cell's own functions; ``overrides.conv`` needs a stride of 1. spk is
    (N, C, Hp, Wp) or (T, N, C, Hp, Wp); syn and mem are (N, C, Ho, Wo), or (T, N, C, Ho, Wo) with
    ``call.record``. The steps also compute padded samples, and drop their results. No result is a
    view.
    """
    step = partial(_step, call, spec, overrides or Overrides())
    if not call.sequence:
        return step(*call[:3])
    return _no_steps(call, spec) if call.x.shape[0] == 0 else over_time(call, step)


def over_time(call: Call, step: Callable[..., Outputs]) -> Outputs:
    """Run the steps of a sequence one by one: each by `step`, which gets x, syn and mem."""
    x, syn, mem = call[:3]
    spks, syns, mems = [], [], []
    if call.lengths is not None:  # a NaN in the padding must not reach a gradient
        x = mask_padding(x, call.lengths)
    for t, x_t in enumerate(x):
        before = None, syn, mem
        spk, syn, mem = step(x_t, syn, mem)
        if call.lengths is not None:
            spk, syn, mem = held(call.lengths > t, (spk, syn, mem), before, first=True)
        spks.append(spk)
        if call.record:
            syns.append(syn)
            mems.append(mem)
    if call.record:
        return torch.stack(spks), torch.stack(syns), torch.stack(mems)
    return torch.stack(spks), syn, mem


def _no_steps(call: Call, spec: CellSpec) -> tuple[Tensor, Tensor, Tensor]:
    (ph, pw), (n, c, h, w) = spec.pool_size, call.mem.shape
    spk = call.x.new_empty((0, n, c, h // ph, w // pw))
    if call.record:
        return spk, call.x.new_empty((0, n, c, h, w)), call.x.new_empty((0, n, c, h, w))
    return spk, call.syn.clone(), call.mem.clone()


# ---- Leaky ---------------------------------------------------------------------------------------


def real_dtype(x: Tensor, beta: Tensor) -> torch.dtype:
    """The dtype of a Leaky's spikes: at least float32; integers are numbers beside beta."""
    if x.dtype is torch.float32:
        return x.dtype
    real = x.is_floating_point() or x.is_complex()
    return torch.promote_types(x.dtype if real else beta.dtype, torch.float32)


def leaky_step(
    x: Tensor,
    mem: Tensor,
    beta: Tensor,
    threshold: Tensor,
    graded: Tensor,
    surrogate: Callable[[Tensor], Tensor],
    reset: str,
    dtype: torch.dtype,
    infinite: bool = True,
) -> tuple[Tensor, Tensor]:
    """One step of Leaky, written as in snnTorch 1.0.0; the results are spk and mem.

    spk is of `dtype`, :func:`real_dtype`'s. mem is promoted as in snnTorch, whose spikes and resets
    are always float32. `infinite` says whether the threshold may be infinite.
    """
    x = x.to(dtype)
    if mem.shape != x.shape:
        mem = torch.zeros_like(x)
    mem = mem.to(torch.promote_types(mem.dtype, torch.float32))

    signal: Any = None
    # A user's function may draw random numbers, so it is called as often as in snnTorch.
    if reset != "none" or type(surrogate) is not Surrogate:
        signal = reset_signal(mem, threshold, surrogate)
    if reset == "zero":
        mem = (1 - signal) * mem
    mem = beta.clamp(0, 1) * mem + x
    if reset == "subtract":
        amount = signal * threshold
        mem = mem - (amount.nan_to_num(0, math.inf, -math.inf) if infinite else amount)
    return fire(mem, threshold, graded, surrogate).to(dtype), mem
