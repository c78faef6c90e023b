"""How long each kernel takes, by torch's profiler; on the CPU each operator of torch."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.rows import Row
from benchmarks.timing import Runner


@dataclass(frozen=True)
class KernelTime:
    """All calls of one kernel in one run of a sequence; `share` is of all kernels' time."""

    dtype: str
    case: str
    mode: str
    provider: str
    kernel: str
    calls: int
    microseconds: float
    share: float


def kernel_times(row: Row, runner: Runner, device: str) -> list[KernelTime]:
    """The kernels of one run, the longest first; `row` says of what."""
    setup, run = runner
    setup()
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    if device == "cuda":
        torch.cuda.synchronize()
    with profile(activities=[activity]) as profiled:
        result = run()
        if device == "cuda":
            torch.cuda.synchronize()
    del result
    field = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    events = [(event, float(getattr(event, field))) for event in profiled.key_averages()]
    total = sum(time for _, time in events) or 1.0
    found = [
        KernelTime(
            row.dtype, row.case, row.mode, row.provider, event.key, event.count, time, time / total
        )
        for event, time in events
        if time > 0
    ]
    return sorted(found, key=lambda kernel: -kernel.microseconds)


def write_kernel_times(found: Iterable[KernelTime], directory: Path) -> Path:
    """Write kernels.csv into `directory`, which is made."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "kernels.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(KernelTime)])
        writer.writeheader()
        writer.writerows(map(asdict, found))
    return path
