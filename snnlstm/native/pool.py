"""Large blocks of CPU memory, used again by the next call.

A system clears every page that it hands out. What a training pass keeps for its backward pass, and
results of 4 MiB or more, go back to it each time: clearing took up to a third of a forward pass.
Blocks that tensors have let go of are kept here instead, as torch keeps CUDA's. When a block of
another size is needed, those that nobody has used for a while are dropped first.

Each thread also keeps one workspace, which holds no result. A workspace stays in the thread's
caches, and a block that another thread has used does not.
"""

from __future__ import annotations

import functools
import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

try:
    import resource
except ImportError:  # on Windows
    resource = None  # type: ignore[assignment]

__all__ = [
    "MAPPED", "SMALLEST", "empty", "empty_cache", "empty_strided", "free_bytes", "where_it_fits",
    "workspace",
]  # fmt: skip

P = ParamSpec("P")
R = TypeVar("R")

SMALLEST = 256 << 10  # bytes; less comes from torch, that is, from malloc
MAPPED = 4 << 20  # bytes; malloc gives a block of this size back to the system when it is freed
CACHE_LINE = 64  # bytes; vectors that lie across two cost twice
FITTING = 1.25  # a block serves for a tensor that is smaller by this factor at most

LARGEST_WORKSPACE = 64 << 20  # bytes; larger workspaces are not kept
IDLE = 10.0  # seconds without use, after which a block makes room for one of another size

_NOTHING = torch.empty(0, dtype=torch.uint8, device="cpu")


def _limits(proc: Path = Path("/proc"), root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """Bytes that the process may use, by each of the cgroups that it is in."""
    try:
        groups = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if not controllers:
            directory, name = root, "memory.max"
        elif "memory" in controllers.split(","):  # the first version of cgroups
            directory, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        inner = directory / path.lstrip("/")
        for place in (inner, *inner.parents):
            with suppress(OSError, ValueError):  # "max" is no number
                yield int((place / name).read_text())


def _most_kept() -> int:
    """Bytes in blocks that nobody uses: a gibibyte, or an eighth of what the process may use."""
    limits = [*_limits()]
    if resource is not None:
        limits.append(resource.getrlimit(resource.RLIMIT_AS)[0])  # ulimit -v
    return min([1 << 30, *(limit // 8 for limit in limits if limit != -1)])


KEPT = _most_kept()


class _Workspace:
    """The workspace that a thread keeps."""

    memory = _NOTHING


_thread = threading.local()
# The workspaces of the threads that live, by id.
_workspaces: weakref.WeakValueDictionary[int, _Workspace] = weakref.WeakValueDictionary()
_free: dict[int, deque[tuple[float, np.ndarray]]] = {}  # by size: since when; oldest first
_free_bytes = 0
_lock = threading.Lock()  # of the free blocks
_to_empty = False  # empty_cache was called where it could not wait for the lock

# Garbage collection may let go of a tensor anywhere, also while its thread holds the lock.
_returned: deque[tuple[float, np.ndarray]] = deque()


def empty_cache() -> None:
    """Give the memory that no tensor uses back to the system: free blocks, and workspaces."""
    global _to_empty
    for reference in _workspaces.valuerefs():
        workspace = reference()
        if workspace is not None:
            workspace.memory = _NOTHING  # its block comes back
    _to_empty = True
    # Another thread holds the lock for a moment only. If this thread holds it, and a signal handler
    # has interrupted it, the thread empties the cache when it goes on.
    if _lock.acquire(timeout=0.1):
        _lock.release()
    _sort_returned()


def free_bytes() -> int:
    """Bytes in blocks that no tensor uses."""
    return _free_bytes


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor, contiguous; its block comes back when nothing refers to it."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < SMALLEST:
        return torch.empty(shape, dtype=dtype, device="cpu")
    block = _take(size + CACHE_LINE)
    begin = -block.ctypes.data % CACHE_LINE
    view = block[begin : begin + size]
    weakref.finalize(view, _give_back, block).atexit = False
    return torch.from_numpy(view).view(dtype).view(shape)


def empty_strided(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
    """As :func:`empty`, but with strides that leave no gap, and no view of another tensor.

    Autograd treats views with suspicion, and users get this one.
    """
    flat = empty((math.prod(shape),), dtype)
    of = flat.untyped_storage(), flat.storage_offset()
    return flat.new_empty(0).set_(*of, shape, strides)


def workspace(count: int) -> Tensor:
    """Uninitialised bytes, `count` or more: this thread's workspace, until it asks again."""
    if count > LARGEST_WORKSPACE:
        return empty((count,), torch.uint8)
    kept = getattr(_thread, "workspace", None)
    if kept is None:
        kept = _thread.workspace = _Workspace()
        _workspaces[id(kept)] = kept
    memory = kept.memory  # read once: another thread may call empty_cache
    if memory.numel() < count:
        kept.memory = memory = _NOTHING  # not two at a time
        kept.memory = memory = empty((count,), torch.uint8)
    return memory


def where_it_fits(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function that only allocates try again without free blocks if torch has no memory."""

    @functools.wraps(function)
    def again(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:  # torch's
            if "DefaultCPUAllocator" not in str(error) or not _free_bytes:
                raise
        empty_cache()
        return function(*args, **kwargs)

    return again


def _take(size: int) -> np.ndarray:
    block = None
    # Nobody waits here: a signal handler may call a cell while its own thread holds the lock.
    if _lock.acquire(blocking=False):
        try:
            block = _find(size)
        finally:
            _lock.release()
    _sort_returned()
    if block is not None:
        return block
    try:
        return np.empty(size, np.uint8)  # a large one: in huge pages, by NumPy
    except MemoryError:
        empty_cache()
        return np.empty(size, np.uint8)


def _find(size: int) -> np.ndarray | None:
    """A free block that serves for `size` bytes; without one, blocks that lie idle are dropped."""
    fitting = min((s for s in _free if size <= s <= FITTING * size), default=None)
    if fitting is not None:
        return _remove(fitting, newest=True)
    now = time.monotonic()
    for other in list(_free):
        while other in _free and now - _free[other][0][0] >= IDLE:
            _remove(other)
    return None


def _give_back(block: np.ndarray) -> None:
    _returned.append((time.monotonic(), block))
    _sort_returned()


def _sort_returned() -> None:
    """Put the blocks that came back among the free ones, or drop all if that is wanted.

    This does not wait for the lock: the thread that holds it sorts them when it has released it.
    """
    global _free_bytes, _to_empty
    while (_returned or _to_empty) and _lock.acquire(blocking=False):
        try:
            while _returned:
                since, block = _returned.popleft()
                _free.setdefault(block.nbytes, deque()).append((since, block))
                _free_bytes += block.nbytes
            while _free_bytes > KEPT:
                _remove(min(_free, key=lambda size: _free[size][0][0]))
            if _to_empty:
                _free.clear()
                _free_bytes, _to_empty = 0, False
        finally:
            _lock.release()


def _remove(size: int, newest: bool = False) -> np.ndarray:
    global _free_bytes
    blocks = _free[size]
    _, block = blocks.pop() if newest else blocks.popleft()
    if not blocks:
        del _free[size]
    _free_bytes -= size
    return block


def _after_fork() -> None:
    """In a child process: a thread that no longer exists may have held the lock."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
