"""Measures the time of each CUDA kernel, or on the CPU of each operator, by torch's profiler."""

from __future__ import annotations

import time
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


def shares(runner: Runner, threads: int, seconds: float = 1.0) -> str:
    """Returns a line with the share of the threads' time of each part of the CPU kernels.

    "rest" is the kernels' time outside of the parts; "outside" is the time of torch and Python.
    """
    from snnlstm.native import cpu

    setup, run = runner
    wall = 0.0
    with cpu.profile() as spent:
        while wall < seconds:
            setup()
            begin = time.perf_counter()
            result = run()
            wall += time.perf_counter() - begin
            del result
    everything = spent.pop("all")
    spent |= {"rest": everything - sum(spent.values()), "outside": wall * threads - everything}
    return ", ".join(f"{part} {time / wall / threads:.0%}" for part, time in spent.items())
