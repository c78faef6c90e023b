"""Settings of the whole process: the convolution algorithm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["ALGORITHMS", "algorithm", "get_algorithm", "set_algorithm"]

ALGORITHMS = (
    "auto", "direct", "winograd", "fused", "hybrid", "cudnn", "measure",
)  # fmt: skip
# What takes the place of names of older versions.
_GONE = {"resident": "fused", "pointwise": "cudnn"}
current = "auto"
"""The name last given to :func:`set_algorithm`."""


def set_algorithm(name: str) -> None:
    """Choose the convolution algorithm of the native kernels, for the whole process.

    The setting is one global (not per thread: the backward pass runs in threads of its own).
    A call reads it once, in its forward pass, and its backward pass keeps to that.

    Parameters
    ----------
    name : str
        One of these names. On a device that has no such algorithm it means ``"auto"``.

        - ``"auto"``, the default, takes the algorithm that should be fastest by shape and device.
        - ``"direct"`` sums products as they stand.
        - ``"winograd"`` (CPU) runs wherever the kernel size allows; it rounds a little more,
          and a NaN or an infinity spreads over the few pixels of the tile in which it lies.
        - ``"fused"`` (CUDA) launches one kernel for each step.
        - ``"hybrid"`` (CUDA) is ``"fused"`` for the steps, and leaves the gradients of weight, bias
          and x to torch (cuDNN), over all steps at once.
        - ``"cudnn"`` (CUDA) leaves all convolutions to torch (cuDNN) and runs the kernels
          behind them.
        - ``"measure"`` (CUDA) times the algorithms when it first meets a shape, forward and
          backward apart, and keeps the fastest for the process. ``"auto"`` does so, too, while
          ``torch.backends.cudnn.benchmark`` is set. While a CUDA graph is being captured, and
          under ``torch.use_deterministic_algorithms``, nothing is timed, and it is ``"auto"``.

    Raises
    ------
    ValueError
        If `name` is none of these.
    """
    global current
    if name not in ALGORITHMS:
        instead = f", which is now {_GONE[name]!r}" if name in _GONE else ""
        raise ValueError(f"name must be one of {', '.join(ALGORITHMS)}, got {name!r}{instead}")
    current = name


def get_algorithm() -> str:
    """Return the name last given to :func:`snnlstm.set_algorithm`, ``"auto"`` by default."""
    return current


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
