"""Large blocks of CPU memory that later calls use again, and the workspaces of calls.

A system clears every page that it hands out, at 2 to 10 GB/s. What a training pass saves, and
results of 4 MiB or more, would go back to the system each time: the forward pass in training of a
cell with 2 -> 32 channels at 32x32 takes 60 ms with these blocks and 92 ms with torch.empty. So
blocks that no tensor uses stay here, as torch keeps them for CUDA. All blocks, used or not, stay
within the most bytes that were in use at once plus 1 GiB.

Garbage collection and signal handlers run anywhere in a thread, and a fork copies other threads in
the middle of their work. So there are no locks, and no counters, which would lose updates: a block
comes and goes by one append or pop, which is atomic, and the lengths of deques and dictionaries
count. When a tensor dies, its block is only noted; the next allocation frees it. What notes it is
deque.append, a function in C: Python would drop what a signal handler raises while a callback in
Python runs.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import mmap
import os
import sys
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

SMALLEST = 256 << 10  # bytes; torch's malloc serves smaller tensors
MAPPED = 4 << 20  # bytes; malloc returns a freed block of this size to the system
SPARE = 1 << 30  # bytes of blocks beyond the most that were in use at once
LARGEST_WORKSPACE = 64 << 20  # bytes; a larger workspace is a block
SMALL_WORKSPACE = 1 << 20  # bytes; a call takes and returns it without a function of this file

_text = os.environ.get("SNNLSTM_CACHE", "")
if _text and not _text.isdecimal():
    raise ValueError(f"SNNLSTM_CACHE must be a whole number of MiB, got {_text!r}")
CACHE = int(_text) << 20 if _text else math.inf  # bytes of free blocks that the user allows
GROUPS = Path("/proc/self/cgroup")  # names the control groups of this process
LIMITS = {
    "": "/sys/fs/cgroup{}/memory.max",
    "memory": "/sys/fs/cgroup/memory{}/memory.limit_in_bytes",  # version 1
}


class _Lent(weakref.ref):
    """Refers to the view of a block that a tensor's storage holds, and has the `block`."""

    block: mmap.mmap


# The blocks of one size: free ones, each with its age, and those in use, by their id().
Blocks = tuple[deque[tuple[int, Any]], dict[int, _Lent]]
_blocks: dict[int, Blocks] = {}  # by size; three sizes lie between two powers of two
_returned: deque[_Lent] = deque()  # blocks that no tensor uses, but that still count as in use
_workspaces: deque[tuple[int, Tensor]] = deque()
# Small workspaces that no call uses, all of one size. They have no limit: there are only as many as
# calls have run at once, and the system gives memory only to pages that were written.
small: deque[Tensor] = deque(maxlen=None if CACHE else 0)
_ages = itertools.count()
_most_used = 0  # bytes in use at once; a thread may overwrite another's number


def empty_cache() -> None:
    """Return the memory that no tensor uses, free blocks and workspaces, to the system."""
    global _most_used
    _take_back()
    _most_used = 0
    for queue in [small, *_queues()]:
        queue.clear()
    with suppress(AttributeError, OSError, TypeError):  # only glibc has malloc_trim
        ctypes.CDLL(None).malloc_trim(0)  # malloc keeps small blocks for each thread


def free_bytes() -> int:
    """Bytes in blocks that no tensor uses, and in large workspaces that no call uses."""
    _take_back()
    blocks = sum(size * len(free) for size, (free, _) in _blocks.copy().items())
    return blocks + sum(memory.nbytes for _, memory in _workspaces.copy())


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A contiguous, uninitialised CPU tensor; its block comes back when nothing refers to it."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < SMALLEST or not CACHE:
        return torch.empty(shape, dtype=dtype, device="cpu")
    _take_back()
    quarter = 1 << (size.bit_length() - 3)
    rounded = -(-size // quarter) * quarter
    free, used = _blocks.get(rounded) or _blocks.setdefault(rounded, (deque(), {}))
    try:
        age, block = free.pop()
    except IndexError:
        age, block = None, _allocate(rounded)
    view = memoryview(block)  # the tensor's storage refers to this view
    lent = _Lent(view, _returned.append)
    lent.block = block
    used[id(lent)] = lent
    if age is None:
        _drop_oldest()
    return torch.frombuffer(view, dtype=dtype, count=count).view(shape)


def workspace(count: int) -> Tensor:
    """`count` uninitialised bytes or more, for a call that gives them back at its end.

    So consecutive calls share one workspace, which stays in the processor's caches. The caller
    returns up to ``SMALL_WORKSPACE`` bytes to :data:`small`, and more by :func:`let_go`.
    """
    if count > LARGEST_WORKSPACE:
        return empty((count,), torch.uint8)
    try:
        if count > SMALL_WORKSPACE:
            memory = _workspaces.pop()[1]
            if memory.nbytes >= count:
                return memory
            del memory  # the old and the new one must not exist at once
    except IndexError:
        pass
    return torch.frombuffer(_allocate(max(count, SMALL_WORKSPACE)), dtype=torch.uint8)


def with_workspace(count: int, run: Callable[[int], R]) -> R:
    """Call a function with the address of a workspace of `count` bytes, and return its result."""
    try:
        memory = small.pop() if count <= SMALL_WORKSPACE else workspace(count)
    except IndexError:
        memory = workspace(count)
    result = run(memory.data_ptr())
    (small.append if count <= SMALL_WORKSPACE else let_go)(memory)
    return result


def let_go(memory: Tensor) -> None:
    """Let the next call have a large workspace."""
    if memory.nbytes <= min(LARGEST_WORKSPACE, CACHE):
        _workspaces.append((next(_ages), memory))
        _drop_oldest()


def may_fit(error: Exception) -> bool:
    """Whether a function that raised an error may find memory once the free blocks are dropped."""
    is_torchs = isinstance(error, RuntimeError)
    return free_bytes() > 0 and (not is_torchs or "DefaultCPUAllocator" in str(error))


def where_it_fits(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function that runs out of memory drop the free blocks and try again."""

    @functools.wraps(function)
    def retrying(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (MemoryError, RuntimeError) as error:
            if not may_fit(error):
                raise
        empty_cache()  # after the error, whose traceback holds what the function allocated
        return function(*args, **kwargs)

    return retrying


def empty_result(
    shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Memory for a result, whose strides leave no gap; on the CPU large results reuse blocks.

    The result is not a view, because users may modify it in place.
    """
    count = math.prod(shape)
    if count * dtype.itemsize < MAPPED or device.type != "cpu":
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)
    flat = empty((count,), dtype)
    storage = flat.untyped_storage(), flat.storage_offset()
    return flat.new_empty(0).set_(*storage, shape, strides)


@where_it_fits
def _allocate(size: int) -> mmap.mmap:
    """A new block, not from malloc, which keeps blocks that other threads have freed."""
    private = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE}
    try:
        block = mmap.mmap(-1, size, **private)
    except OSError as error:
        raise MemoryError(f"no memory for {size} bytes") from error
    with suppress(AttributeError, OSError):  # only Linux has madvise
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _take_back() -> None:
    """Free the blocks that no tensor uses any more, and drop those that exceed the limit."""
    global _most_used
    if not _returned:
        return
    _most_used = max(_most_used, _used_bytes())  # use was highest just before a block came back
    while _returned:
        with suppress(IndexError, ValueError):  # another thread has taken it back
            lent = _returned[0]
            free, used = _blocks[size := len(lent.block)]
            if used.pop(id(lent), None) is not None:
                if size >= MAPPED:
                    with suppress(AttributeError, OSError):  # Windows has no madvise
                        lent.block.madvise(mmap.MADV_FREE)  # the system takes pages if it must
                free.append((next(_ages), lent.block))
            _returned.remove(lent)
    _drop_oldest()


def _used_bytes() -> int:
    return sum(size * len(used) for size, (_, used) in _blocks.copy().items())


def _drop_oldest() -> None:
    """Drop the blocks that came back first, as long as they exceed the limit."""
    global _most_used
    used = _used_bytes()
    _most_used = max(_most_used, used)
    most = max(0, min(CACHE, _most_used + SPARE - used, _memory() // 2 - used))
    while free_bytes() > most:
        with suppress(IndexError, ValueError):  # another thread took the block
            min(filter(None, _queues()), key=lambda queue: queue[0][0]).popleft()


def _queues() -> list[deque[Any]]:
    return [_workspaces, *(free for free, _ in _blocks.copy().values())]


@functools.cache
def _memory() -> float:
    """Bytes of memory that the machine has, or that the process's control groups allow."""
    limits = [math.inf]
    with suppress(AttributeError, OSError, ValueError):  # Windows has no sysconf
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError, ValueError):  # only Linux has control groups
        for line in GROUPS.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            for path in (group, *map(str, Path(group).parents)) if controllers in LIMITS else ():
                with suppress(OSError, ValueError):  # outside of the container; "max"
                    limits.append(int(Path(LIMITS[controllers].format(path)).read_text()))
    return min(limits)
