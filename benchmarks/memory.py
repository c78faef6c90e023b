"""Peak memory, measured and not computed.

On the CPU a fresh process is watched by the kernel: the high-water mark of its resident set
(VmHWM) is reset right before the call and read right after it, and what was resident before is
taken off. This sees all memory that is touched: torch's tensors, oneDNN's scratch space, a
library's own workspace. It is done twice:

- live: malloc is told to take every large block from the system and to give it back at once
  (MALLOC_MMAP_THRESHOLD_), so that the resident set is exactly what is in use. torch's profiler,
  which sees torch's own allocator alone, says the same within 1 % for snnTorch's cell.
- resident: malloc as it comes. It keeps and splits freed blocks; what a process really needs is
  larger by this fragmentation, and varies by a few per cent from run to run.

On CUDA live is torch.cuda.max_memory_allocated and resident is max_memory_reserved, both less what
there was before the call.
"""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from unittest import mock

import torch

import snnlstm
from benchmarks import resident
from benchmarks.cases import Case
from benchmarks.machine import available_bytes
from benchmarks.providers import PROVIDERS, Provider, Setting, Unavailable

GIVE_BACK = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
}

MIB = 2**20


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


@dataclass(frozen=True)
class Found:
    """Peak memory of a job in MiB, or a note that says why there is none."""

    live: float | None = None
    resident: float | None = None
    note: str = ""


def measure(
    jobs: list[Job],
    setting: Setting,
    threads: int,
    tick: Callable[[float], None] = lambda share: None,
) -> list[Found]:
    """Peak memory of each job beyond weights and x.

    tick is told the share of the work (0..1) that is done.
    """
    if setting.device == "cuda":
        found = []
        for done, job in enumerate(jobs, 1):
            answer = _guarded(job, setting, _cuda_peak)
            found.append(Found(*answer) if isinstance(answer, list) else Found(note=answer))
            tick(done / len(jobs))
        return found
    live = _in_children(jobs, setting, threads, GIVE_BACK, lambda share: tick(share / 2))
    resident = _in_children(jobs, setting, threads, {}, lambda share: tick(0.5 + share / 2))
    return [
        Found(note=one if isinstance(one, str) else other)
        if isinstance(one, str) or isinstance(other, str)
        else Found(one[0], other[0])
        for one, other in zip(live, resident, strict=True)
    ]


Answer = list[float] | str
"""Peaks in MiB, or why there are none."""


def _in_children(
    jobs: list[Job],
    setting: Setting,
    threads: int,
    environment: dict[str, str],
    tick: Callable[[float], None],
) -> list[Answer]:
    answers: list[Answer] = []
    while len(answers) < len(jobs):
        # A process that is killed takes one job with it; the next process does the rest.
        with (
            mock.patch.dict(os.environ, environment),
            ProcessPoolExecutor(
                1, get_context("spawn"), initializer=torch.set_num_threads, initargs=(threads,)
            ) as process,
        ):
            try:
                for job in jobs[len(answers) :]:
                    answer = process.submit(_guarded, job, setting, _resident_peak).result()
                    answers.append(answer)
                    tick(len(answers) / len(jobs))
            except BrokenProcessPool:
                answers.append("the process was killed, most likely for want of memory")
                tick(len(answers) / len(jobs))
    return answers


def _guarded(job: Job, setting: Setting, peak: Callable[[Provider, str], list[float]]) -> Answer:
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
    except (Unavailable, resident.Unsupported) as error:
        return str(error)
    except (MemoryError, RuntimeError) as error:  # torch's allocator raises RuntimeError
        return f"failed: {str(error).splitlines()[0]}"


def _cuda_peak(provider: Provider, mode: str) -> list[float]:
    setup, run = Provider.prepare(provider, mode)
    setup()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    with provider.context():
        kept = run()
    torch.cuda.synchronize()
    del kept
    after = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return [(peak - start) / MIB for peak, start in zip(after, before, strict=True)]


def _resident_peak(provider: Provider, mode: str) -> list[float]:
    # Provider.prepare, not the subclass's, which may run the cell once to see what it does.
    setup, run = Provider.prepare(provider, mode)
    setup()
    snnlstm.empty_cache()  # what earlier jobs left would be used again, and not be seen
    before = resident.watch()
    with provider.context():
        kept = run()
    peak = resident.high_water()
    del kept
    gc.collect()
    return [max(0, peak - before) / MIB]
