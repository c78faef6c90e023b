"""Large blocks of CPU memory that the next call uses again, and the workspaces of calls.

A system clears every page that it hands out, at 2 to 10 GB/s. What a training pass saves, and
results of 4 MiB or more, would go back to it each time: training's forward pass of a cell with
2 -> 32 channels at 32x32 takes 60 ms with these blocks and 92 ms with torch.empty. So the blocks
that no tensor uses any more stay here, as torch does it for CUDA.

Garbage collection and signal handlers run anywhere in a thread, and a fork copies what other
threads are doing. So there are no locks and no counters: a block comes and goes by one append to
or pop from a deque, which are atomic.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import mmap
import sys
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

SMALLEST = 256 << 10  # bytes; torch's malloc serves smaller tensors
MAPPED = 4 << 20  # bytes; malloc returns a freed block of this size to the system
LIMIT = 1 << 30  # bytes of free blocks and workspaces in the process
LARGEST_WORKSPACE = 64 << 20  # bytes; a larger workspace is a block
SMALL_WORKSPACE = 1 << 20  # bytes; a check of the limit takes 2 us, much of a smaller call

# Free blocks, each with its age, by size. Three sizes lie between two powers of two. All deques
# exist from the beginning, so the dict never changes.
_free: dict[int, deque[tuple[int, Any]]] = {
    quarters << power: deque() for power in range(16, 28) for quarters in (4, 5, 6, 7)
}
_workspaces: deque[tuple[int, Tensor]] = deque()
_ages = itertools.count()


def empty_cache() -> None:
    """Give the memory that no tensor uses back to the system: free blocks, and workspaces."""
    for blocks in (*_free.values(), _workspaces):
        blocks.clear()
    with suppress(AttributeError, OSError, TypeError):  # glibc alone has malloc_trim
        ctypes.CDLL(None).malloc_trim(0)  # malloc keeps small blocks for each thread


def free_bytes() -> int:
    """Bytes in blocks that no tensor uses, and in workspaces that no call uses."""
    blocks = sum(size * len(blocks) for size, blocks in _free.items())
    return blocks + sum(memory.nbytes for _, memory in _workspaces.copy())


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor, contiguous; its block comes back when nothing refers to it."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < SMALLEST:
        return torch.empty(shape, dtype=dtype, device="cpu")
    quarter = 1 << (size.bit_length() - 3)
    rounded = -(-size // quarter) * quarter
    try:
        block = _free[rounded].pop()[1]
    except (KeyError, IndexError):
        block = _allocate(rounded)
    view = memoryview(block)  # the tensor's storage refers to this view
    weakref.finalize(view, _give_back, block).atexit = False
    return torch.frombuffer(view, dtype=dtype, count=count).view(shape)


def workspace(count: int) -> Tensor:
    """`count` uninitialised bytes or more, for a call that gives them to :func:`let_go` at its end.

    So calls one after the other share one workspace, which stays in the processor's caches.
    """
    if count > LARGEST_WORKSPACE:
        return empty((count,), torch.uint8)
    try:
        memory = _workspaces.pop()[1]
        if memory.nbytes >= count:
            return memory
        del memory  # the old and the new one must not exist at a time
    except IndexError:
        pass
    return torch.frombuffer(_allocate(max(count, 1)), dtype=torch.uint8)


def let_go(memory: Tensor) -> None:
    """Let the next call have a workspace."""
    size = memory.nbytes
    if size <= LARGEST_WORKSPACE:
        _workspaces.append((next(_ages), memory))
        if size > SMALL_WORKSPACE:
            _drop_oldest()


def make_room(error: Exception) -> None:
    """Free what no tensor uses if `error` says that there is no memory; otherwise raise it."""
    unrelated = isinstance(error, RuntimeError) and "DefaultCPUAllocator" not in str(error)
    if unrelated or not free_bytes():
        raise error
    empty_cache()


def where_it_fits(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function that only allocates try again without free blocks if there is no memory."""

    @functools.wraps(function)
    def retrying(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (MemoryError, RuntimeError) as error:
            make_room(error)
        return function(*args, **kwargs)

    return retrying


@where_it_fits
def empty_result(
    shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Memory for a result, whose strides leave no gap; the CPU uses that of large ones again.

    It is no view of another tensor: autograd treats views with suspicion, and users get this one.
    """
    count = math.prod(shape)
    if count * dtype.itemsize < MAPPED or device.type != "cpu":
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)
    flat = empty((count,), dtype)
    storage = flat.untyped_storage(), flat.storage_offset()
    return flat.new_empty(0).set_(*storage, shape, strides)


@where_it_fits
def _allocate(size: int) -> mmap.mmap:
    """A new block. It is not malloc's, which keeps blocks that other threads have freed."""
    private = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE}
    try:
        block = mmap.mmap(-1, size, **private)
    except OSError as error:
        raise MemoryError(f"no memory for {size} bytes") from error
    with suppress(AttributeError, OSError):  # Linux alone has madvise
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _give_back(block: mmap.mmap) -> None:
    if len(block) in _free:
        _free[len(block)].append((next(_ages), block))
        _drop_oldest()


def _drop_oldest() -> None:
    """Drop the blocks that came back first, while there are more than the limit."""
    while free_bytes() > LIMIT:
        with suppress(IndexError, ValueError):  # another thread took the block
            min(filter(None, (*_free.values(), _workspaces)), key=lambda b: b[0][0]).popleft()
