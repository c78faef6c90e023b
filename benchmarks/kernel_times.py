"""Measures the time of each CUDA kernel, or on the CPU of each operator, by torch's profiler."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.devices import torch_device
from benchmarks.providers.base import Runner
from benchmarks.rows import Row


class KernelTime(NamedTuple):
    """Sums all calls of one kernel in one run of a sequence; `share` is of all kernels' time."""

    dtype: str
    case: str
    mode: str
    provider: str
    kernel: str
    calls: int
    microseconds: float
    share: float


def kernel_times(row: Row, runner: Runner, device: str) -> list[KernelTime]:
    """Returns the kernels of one run, the longest first; `row` names the run."""
    setup, run = runner
    setup()
    if device == "cuda":
        torch.cuda.synchronize()
    with profile(activities=[getattr(ProfilerActivity, torch_device(device).upper())]) as profiled:
        result = run()
        if device == "cuda":
            torch.cuda.synchronize()
    del result
    field = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    events = [(event, float(getattr(event, field))) for event in profiled.key_averages()]
    total = sum(time for _, time in events) or 1.0
    what = (row.dtype, row.case, row.mode, row.provider)
    found = [KernelTime(*what, e.key, e.count, time, time / total) for e, time in events if time]
    return sorted(found, key=lambda kernel: -kernel.microseconds)
