"""Settings of the whole process: the convolution algorithm."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["ALGORITHMS", "algorithm", "get_algorithm", "set_algorithm"]

ALGORITHMS = ("auto", "direct", "winograd", "pointwise")
_algorithm = "auto"
_lock = threading.Lock()


def set_algorithm(name: str) -> None:
    """Choose the convolution algorithm of the native kernels, for the whole process.

    The setting is one global (not per thread: the backward pass runs in threads of its own).
    A call reads it once, in its forward pass, and its backward pass keeps to that.

    Parameters
    ----------
    name : {"auto", "direct", "winograd", "pointwise"}
        ``"auto"``, the default, takes the fastest by shape. ``"direct"`` sums products as they
        stand. ``"winograd"`` is used wherever the kernel size allows; it rounds a little more,
        and a NaN or an infinity spreads over the few pixels of the tile in which it lies.
        ``"pointwise"`` leaves the convolution to torch (cuDNN) and runs the kernels behind it.
        Where a device has no such algorithm (the CPU no ``"pointwise"``, CUDA no
        ``"winograd"``) the name means ``"auto"``.

    Raises
    ------
    ValueError
        If `name` is none of these.
    """
    global _algorithm
    if name not in ALGORITHMS:
        raise ValueError(f"name must be one of {', '.join(ALGORITHMS)}, got {name!r}")
    with _lock:
        _algorithm = name


def get_algorithm() -> str:
    """Return the name last given to :func:`snnlstm.set_algorithm`, ``"auto"`` by default."""
    return _algorithm


@contextmanager
def algorithm(name: str) -> Iterator[None]:
    """Use the algorithm `name` within a ``with`` block; see :func:`snnlstm.set_algorithm`.

    The setting is process-wide: other threads see it too while the block runs.
    """
    before = get_algorithm()
    set_algorithm(name)
    try:
        yield
    finally:
        set_algorithm(before)
