"""The user's choice of an algorithm, which holds for the process and is not part of a call."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

ALGORITHMS = "auto", "direct", "winograd", "fused", "cudnn", "reference"


def _checked(what: str, name: str) -> str:
    """Return `name` if it names an algorithm; otherwise the error calls the argument `what`."""
    if name not in ALGORITHMS:
        raise ValueError(f"{what} must be one of {', '.join(ALGORITHMS)}, got {name!r}")
    return name


current = _checked("SNNLSTM_ALGORITHM", os.environ.get("SNNLSTM_ALGORITHM") or "auto")
"""The name of the chosen algorithm."""


def set_algorithm(name: str) -> None:
    """Choose the convolution algorithm of the native kernels, for the whole process.

    A process starts with the name in the environment variable ``SNNLSTM_ALGORITHM``, if it is set.
    The setting holds for all threads, because backward passes run in threads of their own. The
    backward pass of a call uses what its forward pass used.

    Parameters
    ----------
    name : str
        One of these names. On a device without that algorithm the name means ``"auto"``.

        - ``"auto"``, the default, takes the algorithm that should be fastest for the shape and the
          device.
        - ``"direct"`` (CPU) sums the products one by one.
        - ``"winograd"`` (CPU) applies if the kernel size allows it; rounding errors are slightly
          larger, and a NaN or an infinity spreads over the few pixels of its tile.
        - ``"fused"`` (CUDA) convolves in the kernel of each step. ``"auto"`` means it, but for
          float32 on a GPU of compute capability 7.5 whose kernel size times channels of x and mem
          is 800 or more.
        - ``"cudnn"`` (CUDA) leaves all convolutions to torch (cuDNN); the kernels do the rest.
        - ``"reference"`` replaces all kernels with plain torch: the reference path runs all calls
          on all devices, including calls of cells that have run kernels before.

    Raises
    ------
    ValueError
        If `name` is none of these.
    """
    global current
    current = _checked("name", name)


def get_algorithm() -> str:
    """Return the name that :func:`snnlstm.set_algorithm` was last given.

    Before that it is the value of ``SNNLSTM_ALGORITHM`` in the environment, or ``"auto"``.
    """
    return current


@contextmanager
def algorithm(name: str) -> Iterator[None]:
    """Use the algorithm `name` within a ``with`` block; see :func:`snnlstm.set_algorithm`.

    The setting holds for the whole process: other threads see it too while the block runs.
    """
    before = current
    set_algorithm(name)
    try:
        yield
    finally:
        set_algorithm(before)
