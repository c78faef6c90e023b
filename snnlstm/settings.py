"""Settings of the whole process: the convolution algorithm."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .measured import choices

__all__ = ["ALGORITHMS", "algorithm", "get_algorithm", "set_algorithm"]

ALGORITHMS = (
    "auto", "direct", "winograd", "fused", "resident", "hybrid", "pointwise", "measure",
)  # fmt: skip
_algorithm = "auto"


def set_algorithm(name: str, file: str | os.PathLike[str] | None = None) -> None:
    """Choose the convolution algorithm of the native kernels, for the whole process.

    The setting is one global (not per thread: the backward pass runs in threads of its own).
    A call reads it once, in its forward pass, and its backward pass keeps to that.

    Parameters
    ----------
    name : str
        One of these names. A name that a device has no algorithm for means ``"auto"``.

        - ``"auto"``, the default, takes what is estimated to be fastest by shape.
        - ``"direct"`` sums products as they stand.
        - ``"winograd"`` (CPU) is used wherever the kernel size allows; it rounds a little more,
          and a NaN or an infinity spreads over the few pixels of the tile in which it lies.
        - ``"fused"`` (CUDA) launches one kernel for each step.
        - ``"resident"`` (CUDA) runs a sequence in one launch, where an image and the weights fit
          into the shared memory of a block; elsewhere it is ``"fused"``.
        - ``"hybrid"`` (CUDA) is ``"fused"`` for the steps, and leaves the gradients of weight, bias
          and x to torch (cuDNN), over all steps at once.
        - ``"pointwise"`` (CUDA) leaves all convolutions to torch (cuDNN) and runs the kernels
          behind them.
        - ``"measure"`` (CUDA) times the algorithms when it first meets a shape, forward and
          backward apart, and keeps the fastest for the process; so does ``"auto"`` where
          ``torch.backends.cudnn.benchmark`` is set. Nothing is timed while a CUDA graph is being
          captured, nor under ``torch.use_deterministic_algorithms``: there the estimate decides.
    file : path, optional
        A JSON file in which ``"measure"`` keeps its choices for other processes. It is read now,
        if it exists, and written after each measurement.

    Raises
    ------
    TypeError
        If `file` is no path.
    ValueError
        If `name` is none of these, if `file` is given with another name than ``"measure"``, or
        if it holds something else.
    """
    global _algorithm
    if name not in ALGORITHMS:
        raise ValueError(f"name must be one of {', '.join(ALGORITHMS)}, got {name!r}")
    if file is not None and not isinstance(file, str | os.PathLike):
        raise TypeError(f"file must be a path, got {file!r}")
    if file is not None and name != "measure":
        raise ValueError(f"file is for the algorithm 'measure' alone, got name={name!r}")
    choices.keep_in(None if file is None else Path(file))
    _algorithm = name


def get_algorithm() -> str:
    """Return the name last given to :func:`snnlstm.set_algorithm`, ``"auto"`` by default."""
    return _algorithm


@contextmanager
def algorithm(name: str, file: str | os.PathLike[str] | None = None) -> Iterator[None]:
    """Use the algorithm `name` within a ``with`` block; see :func:`snnlstm.set_algorithm`.

    The setting is process-wide: other threads see it too while the block runs.
    """
    before = get_algorithm(), choices.file
    set_algorithm(name, file)
    try:
        yield
    finally:
        set_algorithm(*before)
