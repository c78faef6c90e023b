"""snnTorch's own cell: in the loop that its documentation teaches, and compiled."""

from __future__ import annotations

import math
import os
import shutil

import torch

from benchmarks.cases import Case
from benchmarks.providers.base import Provider, Setting, Spikes, Tensor


class SnnTorchEager(Provider):
    """`spk, syn, mem = cell(x[t], syn, mem)` for each t: what users of snnTorch write."""

    name = "snntorch"
    title = "snnTorch eager, one call a time step"

    def build_cell(self) -> torch.nn.Module:
        import snntorch

        cell = snntorch.SConv2dLSTM(**cell_arguments(self.case))
        # Every cell stays in this list for ever, with its last state (a leak of the library).
        snntorch._neurons.neurons.SpikingNeuron.instances.clear()
        return cell

    @classmethod
    def why_not(cls, case: Case, setting: Setting) -> str | None:
        try:
            import snntorch  # noqa: F401
        except ImportError as error:
            return f"snntorch is not installed ({error}): pip install snntorch==1.0.0"
        return None

    @classmethod
    def bytes_needed(cls, case: Case, setting: Setting, mode: str) -> int:
        needed = super().bytes_needed(case, setting, mode)
        if case.quant_bits:  # the state repeated once a level, thrice: repeat, difference, abs
            levels = 2**case.quant_bits
            needed += 3 * levels * math.prod(case.state_shape) * setting.torch_dtype.itemsize
        return needed

    @property
    def spike_dtype(self) -> torch.dtype:
        return torch.float32  # whatever the type of the cell: snntorch 1.0.0 says .float()

    def step(self, x: Tensor, syn: Tensor, mem: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One time step."""
        return self.cell(x, syn, mem)

    def sequence(self, x: Tensor, syn: Tensor, mem: Tensor) -> tuple[Spikes, Tensor, Tensor]:
        spikes = []
        # unbind, not x[t]: the backward pass of x[t] would fill one whole x of zeros per step.
        for x_t in x.unbind(0):
            spk, syn, mem = self.step(x_t, syn, mem)
            spikes.append(spk)
        return spikes, syn, mem


class SnnTorchCompiled(SnnTorchEager):
    """snnTorch's cell under torch.compile with its default settings, in the same loop."""

    name = "snntorch-compile"
    title = "snnTorch under torch.compile, one call a time step"

    def __init__(self, case: Case, setting: Setting) -> None:
        super().__init__(case, setting)
        torch._dynamo.reset()  # the last case's graphs would count towards the recompile limit
        self.compiled = torch.compile(self.cell, dynamic=False)

    @classmethod
    def why_not(cls, case: Case, setting: Setting) -> str | None:
        reason = super().why_not(case, setting)
        if reason is None and setting.device == "cpu":
            compiler = os.environ.get("CXX", "g++")
            if shutil.which(compiler) is None:
                reason = f"torch.compile needs a C++ compiler on the CPU, and {compiler} is missing"
        return reason

    def step(self, x: Tensor, syn: Tensor, mem: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.compiled(x, syn, mem)


class SnnTorchCompiledLast(SnnTorchCompiled):
    """The same on channels-last tensors, which is how cuDNN's tensor cores like them."""

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


def cell_arguments(case: Case) -> dict[str, object]:
    """Keyword arguments that build the case's cell, for snnTorch's class and for ours."""
    arguments: dict[str, object] = {
        "in_channels": case.cin,
        "out_channels": case.cout,
        "kernel_size": case.kernel,
        "max_pool": case.max_pool,
        "avg_pool": case.avg_pool,
        "threshold": case.threshold,
        "reset_mechanism": case.reset,
    }
    if case.quant_bits:
        from snntorch.functional import quant

        arguments["state_quant"] = quant.state_quant(num_bits=case.quant_bits)
    return arguments
