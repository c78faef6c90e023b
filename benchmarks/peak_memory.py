"""Measures peak memory: of this process, as Linux counts it, and of a call in a fresh process.

The high-water mark of the resident set (VmHWM) counts all memory that is touched: torch's tensors,
oneDNN's scratch space, a library's own workspace. In the fresh process malloc gives every large
block back at once, so that the resident set is the memory in use: for snnTorch's cell torch's
profiler gives the same within 1 %. With malloc's defaults a process takes more, by fragmentation.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch

GIVE_BACK = {
    "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"
}  # fmt: skip
MIB = 2**20


def watch() -> int:
    """Gives freed memory back and resets the high-water mark; returns the bytes now resident.

    Raises RuntimeError if there is no Linux /proc, or if it is read-only.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # a C library that is not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
    except OSError as error:
        raise RuntimeError(f"peak memory needs Linux's /proc/self/clear_refs ({error})") from None
    return _status("VmRSS")


def _status(field: str) -> int:
    _, _, behind = Path("/proc/self/status").read_text().partition(f"{field}:")
    return int(behind.split()[0]) * 1024


def watching(device: str) -> Callable[[], int]:
    """Returns a function that tells by how many bytes the peak exceeds the memory in use now.

    On the CPU the memory is the process's, on CUDA that of torch's allocator.
    """
    if device == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before, read = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated
    else:
        before, read = watch(), functools.partial(_status, "VmHWM")
    return lambda: max(0, read() - before)


def measure(prepare: Callable[..., Any], *arguments: Any, device: str = "cpu") -> float | str:
    """Returns the peak of a run beyond what was there before, in MiB, or why it is missing.

    prepare(*arguments, small) returns (setup, run). It is called in the process that is measured,
    first with True for a small run, which loads code and starts threads, then with False. On CUDA
    the peak is that of torch's allocator, in this process.
    """
    threads = torch.get_num_threads()
    if device == "cuda":
        return _peak(prepare, arguments, threads, device)
    with (
        mock.patch.dict(os.environ, GIVE_BACK),
        ProcessPoolExecutor(1, get_context("spawn")) as process,
    ):
        try:
            return process.submit(_peak, prepare, arguments, threads, device).result()
        except BrokenProcessPool:
            return "the process was killed, most likely because memory ran out"


def _peak(
    prepare: Callable[..., Any], arguments: tuple[Any, ...], threads: int, device: str
) -> float | str:
    import snnlstm

    torch.set_num_threads(threads)
    try:
        # The small run is another cell's, and makes nothing that belongs to the measured cell,
        # such as its packed weights.
        for function in prepare(*arguments, True):
            function()
        setup, run = prepare(*arguments, False)
        setup()
        snnlstm.empty_cache()  # blocks of the small run would be used again, and not be counted
        grown = watching(device)
        kept = run()  # noqa: F841
        return grown() / MIB
    except (MemoryError, RuntimeError) as error:  # torch's allocator raises RuntimeError
        return f"failed: {str(error).splitlines()[0]}"
