"""Runs snnTorch's cell in the loop that its documentation teaches, compiled, and rearranged."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from typing import Any

import snntorch
import torch
import torch.nn.functional as F
from snntorch.functional import quant

from benchmarks.cases import Case
from benchmarks.providers.base import Provider, Setting, Spikes, Tensor


def loop(step: Callable, x: Tensor, syn: Tensor, mem: Tensor) -> tuple[Spikes, Tensor, Tensor]:
    """Calls `step` once a time step; returns the list of spikes and the last states."""
    spikes = []
    # The backward pass of x[t] in the place of unbind would fill one whole x of zeros per step.
    for x_t in x.unbind(0):
        spk, syn, mem = step(x_t, syn, mem)
        spikes.append(spk)
    return spikes, syn, mem


class SnnTorchEager(Provider):
    """Calls snnTorch's cell once a time step, as its users do."""

    name = "snntorch"
    title = "snnTorch eager, one call a time step"
    spike_dtype = torch.float32  # snntorch 1.0.0 returns such spikes from a cell of any type

    def build_cell(self) -> torch.nn.Module:
        cell = snntorch.SConv2dLSTM(**cell_arguments(self.case))
        # The list would keep every cell and its last state for ever.
        snntorch._neurons.neurons.SpikingNeuron.instances.clear()
        return cell

    @classmethod
    def bytes_needed(cls, case: Case, setting: Setting, mode: str) -> int:
        needed = super().bytes_needed(case, setting, mode)
        if case.quant_bits:  # repeat, difference and abs each take the state once a level
            levels = 2**case.quant_bits
            needed += 3 * levels * math.prod(case.state_shape) * setting.torch_dtype.itemsize
        return needed

    def step(self, x: Tensor, syn: Tensor, mem: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Runs one time step."""
        return self.cell(x, syn, mem)

    def sequence(self, x: Tensor, syn: Tensor, mem: Tensor) -> tuple[Spikes, Tensor, Tensor]:
        return loop(self.step, x, syn, mem)


class SnnTorchCompiled(SnnTorchEager):
    """Runs the same loop with snnTorch's cell under torch.compile with default settings."""

    name = "snntorch-compile"
    title = "snnTorch under torch.compile, one call a time step"

    def __init__(self, case: Case, setting: Setting) -> None:
        super().__init__(case, setting)
        torch._dynamo.reset()  # graphs of the case before would count towards the recompile limit
        self.step = torch.compile(self.cell, dynamic=False)

    @classmethod
    def why_not(cls, case: Case, setting: Setting) -> str | None:
        compiler = os.environ.get("CXX", "g++")
        if setting.device != "cuda" and shutil.which(compiler) is None:
            return f"torch.compile needs a C++ compiler on the CPU, and {compiler} is missing"
        return super().why_not(case, setting)


class SnnTorchCompiledLast(SnnTorchCompiled):
    """Runs the compiled cell on channels-last tensors, for which cuDNN uses tensor cores best."""

    name = "snntorch-compile-last"
    title = "snnTorch under torch.compile, channels-last"

    def __init__(self, case: Case, setting: Setting) -> None:
        super().__init__(case, setting)
        self.cell.to(memory_format=torch.channels_last)

    @classmethod
    def why_not(cls, case: Case, setting: Setting) -> str | None:
        if setting.device != "cuda":
            return "it is timed with --device cuda"
        return super().why_not(case, setting)

    def inputs(self, mode: str, steps: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        x, syn, mem = super().inputs(mode, steps)
        last = x.detach().flatten(0, 1).contiguous(memory_format=torch.channels_last)
        states = (state.contiguous(memory_format=torch.channels_last) for state in (syn, mem))
        return last.unflatten(0, x.shape[:2]).requires_grad_(x.requires_grad), *states


class Hoisted(SnnTorchEager):
    """Computes the cell by plain torch that was rearranged by hand for speed.

    - The input half of the convolution runs once, over T * N images, and the loop has the recurrent
      half alone. The two halves are added, where snnTorch concatenates x and mem.
    - The sigmoids of i, f and o run as one operation over adjoining channels.
    - Pooling, its quantisation and the spikes run once, over all T.
    """

    name = "hoisted"
    title = "plain torch by hand: input convolution over all T at once"
    states = 18

    def sequence(self, x: Tensor, syn: Tensor, mem: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        case, cell = self.case, self.cell
        weight, padding, quantised = cell.conv.weight, cell.padding, cell.state_quant
        w_x, w_mem = weight[:, : case.cin], weight[:, case.cin :].contiguous()
        steps, batch = x.shape[:2]
        hoisted = F.conv2d(x.flatten(0, 1), w_x, cell.conv.bias, padding=padding)
        mems = []
        for gates_x in hoisted.unflatten(0, (steps, batch)).unbind(0):
            gates = gates_x + F.conv2d(mem, w_mem, None, padding=padding)
            i, f, o = torch.sigmoid(gates[:, : 3 * case.cout]).chunk(3, dim=1)
            g = torch.tanh(gates[:, 3 * case.cout :])
            if case.reset != "none":
                reset = (mem.detach() > cell.threshold).to(mem.dtype)
            syn = torch.addcmul(f * syn, i, g)
            mem = o * torch.tanh(syn)
            if case.reset == "subtract":
                mem = mem - reset * cell.threshold
            elif case.reset == "zero":
                mem = mem * (1 - reset)
            if quantised:
                syn, mem = quantised(syn), quantised(mem)
            mems.append(mem)
        pooled = case.pool(torch.stack(mems).flatten(0, 1))
        if quantised and case.avg_pool:  # without avg_pool the values are levels already
            pooled = quantised(pooled)
        spikes = cell.spike_grad(pooled - cell.threshold)
        return spikes.unflatten(0, (steps, batch)), syn, mem


def cell_arguments(case: Case) -> dict[str, Any]:
    """Returns the keyword arguments of the case's cell, for snnTorch's class and for ours."""
    return {
        "in_channels": case.cin,
        "out_channels": case.cout,
        "kernel_size": case.kernel,
        "max_pool": case.max_pool,
        "avg_pool": case.avg_pool,
        "threshold": case.threshold,
        "reset_mechanism": case.reset,
        "state_quant": quant.state_quant(case.quant_bits) if case.quant_bits else False,
    }
