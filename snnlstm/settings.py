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

    The setting holds for all threads, because backward passes run in threads of their own.
    A call reads it once, in its forward pass, and its backward pass uses the same.

    Parameters
    ----------
    name : str
        One of these names. On a device that has no such algorithm it means ``"auto"``.

        - ``"auto"``, the default, takes the algorithm that should be fastest for the shape and the
          device.
        - ``"direct"`` sums the products one by one.
        - ``"winograd"`` (CPU) is taken if the kernel size allows it; it rounds a little more,
          and a NaN or an infinity spreads over the few pixels of its tile.
        - ``"fused"`` (CUDA) launches one kernel for each step.
        - ``"hybrid"`` (CUDA) runs the steps like ``"fused"``, and lets torch (cuDNN) form the
          gradients of weight, bias and x over all steps at once.
        - ``"cudnn"`` (CUDA) lets torch (cuDNN) form all convolutions; the kernels do the rest.
        - ``"measure"`` (CUDA) times the algorithms at the first call of a shape, forward and
          backward passes by themselves, and keeps the fastest for the process. ``"auto"`` does so,
          too, while ``torch.backends.cudnn.benchmark`` is set. While a CUDA graph is being
          captured, and under ``torch.use_deterministic_algorithms``, nothing is timed, and
          ``"measure"`` means ``"auto"``.

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

    The setting holds for the whole process: other threads see it too while the block runs.
    """
    before = get_algorithm()
    set_algorithm(name)
    try:
        yield
    finally:
        set_algorithm(before)
