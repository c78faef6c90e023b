"""Peak memory, measured and not computed.

On the CPU each case runs in a fresh process whose resident set is watched by the kernel: the
high-water mark (VmHWM) is reset right before the call and read right after it, and what was
resident before is taken off. This sees everything that touches memory: torch's tensors, oneDNN's
scratch space, a library's workspace. For it to be exact, malloc has to take every large block from
the system and give it back at once, which MALLOC_MMAP_THRESHOLD_ makes it do. (torch's profiler,
which sees torch's allocator alone, agrees within 1 % for snnTorch's cell.)

On CUDA it is torch.cuda.max_memory_allocated, less what was allocated before the call.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.cases import Case
from benchmarks.machine import ROOT, available_bytes
from benchmarks.providers import PROVIDERS, Provider, Setting, Unavailable

MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
}

MIB = 2**20

ANSWER = "peak: "
"""What the child's answers begin with, so that nothing a library prints is taken for one."""


def shortage(provider: type[Provider], case: Case, setting: Setting, mode: str) -> str | None:
    """Why a run would not fit into memory, or None if it does."""
    needed = provider.bytes_needed(case, setting, mode)
    if setting.device == "cuda":
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    else:
        free = available_bytes()
    if needed <= 0.8 * free:
        return None
    return f"needs about {needed / 2**30:.1f} GiB, of {free / 2**30:.1f} GiB that are free"


@dataclass(frozen=True)
class Job:
    """One run to measure."""

    case: Case
    mode: str
    provider: str


def measure(
    jobs: list[Job],
    setting: Setting,
    threads: int,
    tick: Callable[[int], None] = lambda done: None,
) -> list[float | str]:
    """Peak MiB of each job beyond weights and x, or why there is no number.

    tick is told how many jobs are done, after each.
    """
    results: list[float | str] = []
    while len(results) < len(jobs):
        if setting.device == "cuda":
            results.append(_guarded(jobs[len(results)], setting, _cuda_peak))
            tick(len(results))
        else:
            # A process that is killed takes one job with it; the next one does the rest.
            _measure_in_child(jobs, results, setting, threads, tick)
    return results


def _measure_in_child(
    jobs: list[Job],
    results: list[float | str],
    setting: Setting,
    threads: int,
    tick: Callable[[int], None],
) -> None:
    request = {
        "jobs": [dataclasses.asdict(job) for job in jobs[len(results) :]],
        "setting": dataclasses.asdict(setting),
        "threads": threads,
    }
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.memory", json.dumps(request)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
            env={**os.environ, **MALLOC},
        )
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith(ANSWER):
                results.append(json.loads(line.removeprefix(ANSWER)))
                tick(len(results))
        status = child.wait()
        if len(results) < len(jobs):
            errors.seek(0)
            last = (errors.read().strip().splitlines() or ["no message"])[-1]
            killed = "the process was killed, most likely for want of memory"
            results.append(killed if status == -9 else f"failed: {last}")
            tick(len(results))


def _guarded(
    job: Job, setting: Setting, peak: Callable[[Provider, str], float]
) -> float | str:
    provider, case, mode = PROVIDERS[job.provider], job.case, job.mode
    reason = provider.why_not(case, setting) or shortage(provider, case, setting, mode)
    if reason:
        return reason
    try:
        # A small run of another cell first: code is loaded and thread pools start, but nothing
        # that belongs to the measured cell (its packed weights, say) exists beforehand.
        small = dataclasses.replace(case, steps=2, batch=1)
        setup, run = provider(small, setting).prepare(mode)
        setup()
        run()
        del setup, run
        return peak(provider(case, setting), mode)
    except Unavailable as error:
        return str(error)
    except (MemoryError, RuntimeError) as error:  # torch's allocator raises RuntimeError
        return f"failed: {str(error).splitlines()[0]}"


def _cuda_peak(provider: Provider, mode: str) -> float:
    setup, run = Provider.prepare(provider, mode)
    setup()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with provider.context():
        kept = run()
    torch.cuda.synchronize()
    del kept
    return (torch.cuda.max_memory_allocated() - before) / MIB


def _resident_peak(provider: Provider, mode: str) -> float:
    # Provider.prepare, not the subclass's, which may run the cell once to see what it does.
    setup, run = Provider.prepare(provider, mode)
    setup()
    gc.collect()
    _trim()
    _reset_high_water()
    before = _status("VmRSS")
    with provider.context():
        kept = run()
    peak = _status("VmHWM")
    del kept
    return max(0, peak - before) / MIB


def _trim() -> None:
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # another C library
        pass


def _reset_high_water() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set
    except OSError as error:
        raise Unavailable(f"peak memory needs Linux's /proc/self/clear_refs ({error})") from None


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise Unavailable(f"/proc/self/status has no {field}")


def _main() -> None:
    request = json.loads(sys.argv[1])
    setting = Setting(**request["setting"])
    torch.set_num_threads(request["threads"])
    for fields in request["jobs"]:
        case = Case(**{**fields["case"], "kernel": tuple(fields["case"]["kernel"])})
        result = _guarded(Job(case, fields["mode"], fields["provider"]), setting, _resident_peak)
        print(ANSWER + json.dumps(result), flush=True)
        gc.collect()


if __name__ == "__main__":
    _main()
