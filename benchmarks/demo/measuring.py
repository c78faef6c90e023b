"""What the demo measures of a training besides time."""

from __future__ import annotations

import hashlib

import torch

from benchmarks import resident

MIB = 2**20


def digest(model: torch.nn.Module) -> str:
    """A hash of all parameters, names included: equal only if they are equal bit for bit."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        found.update(name.encode())
        found.update(parameter.detach().cpu().numpy().tobytes())
    return found.hexdigest()


def count(model: torch.nn.Module) -> int:
    """Number of trained values."""
    return sum(parameter.numel() for parameter in model.parameters())


class Memory:
    """Peak memory from here on: of the process on the CPU, of torch's allocator on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            self.before = resident.watch()

    def peaks(self) -> tuple[float, float]:
        """MiB in all, and MiB beyond what there was before."""
        peak = torch.cuda.max_memory_allocated() if self.cuda else resident.high_water()
        return peak / MIB, max(0, peak - self.before) / MIB
