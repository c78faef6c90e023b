"""Measures peak memory.

On the CPU a call runs in a fresh process. The high-water mark of its resident set (VmHWM) is reset
right before the call and read right after it, and the bytes that were resident before are
subtracted. The mark counts all memory that is touched: torch's tensors, oneDNN's scratch space, a
library's own workspace. Each call is measured twice:

- live: malloc takes every large block from the system and gives it back at once
  (MALLOC_MMAP_THRESHOLD_), so that the resident set is the memory in use. For snnTorch's cell
  torch's profiler, which sees torch's own allocator alone, gives the same within 1 %.
- resident: malloc keeps its defaults. It keeps and splits freed blocks, so a process takes more
  memory by this fragmentation, which varies by a few per cent from run to run.

On CUDA live is torch.cuda.max_memory_allocated and resident is max_memory_reserved, both less their
values before the call.
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
from benchmarks import peak_memory
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
    """Returns why a run would not fit into memory, or None if it does."""
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
    """Names one run to measure."""

    case: Case
    mode: str
    provider: str


@dataclass(frozen=True)
class Found:
    """Holds the peak memory of a job in MiB, or a note that says why it is missing."""

    live: float | None = None
    resident: float | None = None
    note: str = ""


def measure(
    jobs: list[Job],
    setting: Setting,
    threads: int,
    tick: Callable[[float], None] = lambda share: None,
) -> list[Found]:
    """Measures the peak memory of each job beyond weights and x.

    tick is called with the share of the work (0..1) that is done.
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
"""An answer has peaks in MiB, or the reason why they are missing."""


def _in_children(
    jobs: list[Job],
    setting: Setting,
    threads: int,
    environment: dict[str, str],
    tick: Callable[[float], None],
) -> list[Answer]:
    answers: list[Answer] = []
    while len(answers) < len(jobs):
        # A process that is killed loses one job; the next process does the jobs after it.
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
        # A small run of another cell loads code and starts threads, but makes nothing that belongs
        # to the measured cell, such as its packed weights.
        small = dataclasses.replace(case, steps=2, batch=1)
        setup, run = provider(small, setting).prepare(mode)
        setup()
        run()
        del setup, run
        return peak(provider(case, setting), mode)
    except (Unavailable, peak_memory.Unsupported) as error:
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
    # A subclass's prepare may run the cell, so Provider's is called.
    setup, run = Provider.prepare(provider, mode)
    setup()
    snnlstm.empty_cache()  # blocks of earlier jobs would be used again, and not be counted
    before = peak_memory.watch()
    with provider.context():
        kept = run()
    peak = peak_memory.high_water()
    del kept
    gc.collect()
    return [max(0, peak - before) / MIB]
