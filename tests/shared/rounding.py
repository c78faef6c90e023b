"""Derives how far an algorithm's float32 results may lie from exact ones.

docs/accuracy.md has the derivation.
"""

import functools
import re
from collections.abc import Sequence

import numpy as np

UNIT = 2.0**-24  # the largest relative error of one float32 rounding
INFINITE = None
# The points of csrc/cpu/kernels/winograd.h, by the number of inputs of a tile along one axis.
_POINTS = {
    4: (0, 1, -1, INFINITE),
    5: (0, 2 / 3, -2 / 3, 3 / 2, -3 / 2),
    6: (0, 2 / 3, -2 / 3, 3 / 2, -3 / 2, INFINITE),
    7: (0, 1 / 2, -1 / 2, 1, -1, 2, -2),
    8: (0, 1 / 2, -1 / 2, 1, -1, 2, -2, INFINITE),
}


def _powers(inputs: int, count: int) -> np.ndarray:
    """Returns the powers 0 to `count` - 1 of each point; infinity has the last power alone."""
    last = np.eye(count)[-1]
    rows = [last if p is INFINITE else np.power(float(p), range(count)) for p in _POINTS[inputs]]
    return np.stack(rows)


def transforms(inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns AT, G and BT of F(outputs, taps): outputs = AT [(G taps) (BT inputs)]."""
    taps = inputs - outputs + 1
    inverse = np.linalg.inv(_powers(inputs, inputs))
    return _powers(inputs, outputs).T, _powers(inputs, taps), inverse.T


@functools.cache
def growth(inputs: int, outputs: int) -> np.ndarray:
    """Returns for each output of a tile, along one axis, the factor by which rounding errors grow.

    A product at point i of random taps and inputs has the mean square |G_i|^2 |BT_i|^2. AT adds the
    products' errors, and a direct sum would have the mean square `taps`.
    """
    if inputs == 1:
        return np.ones(1)
    at, g, bt = transforms(inputs, outputs)
    products = np.square(g).sum(1) * np.square(bt).sum(1)
    return np.sqrt(np.square(at) @ products / g.shape[1])


def growth_of(path: str, kernel: Sequence[int]) -> np.ndarray:
    """Returns the factors of all outputs of a tile; `path` is a path's name, such as "cpu-avx2-..."

    `kernel` is the part of the kernel that meets the image. Tensor cores that form a float32
    product of three in tf32 leave out 2^-22 of it; the errors that this adds are taken as a factor.
    """
    if "mma" in path:
        return np.full(1, 8.0)
    tile = re.search(r"winograd(\d)(?:x(\d))?", path)
    if tile is None:
        return np.ones(1)
    rows, columns = (
        growth(*_form(taps, int(size)))
        for taps, size in zip(kernel, (tile[1], tile[2] or tile[1]), strict=True)
    )
    return np.outer(rows, columns)


def _form(taps: int, tile: int) -> tuple[int, int]:
    """Returns inputs and outputs of a tile along one axis, as csrc/cpu/tiling.h has them."""
    if taps == 1:
        return 1, 1
    part = 3 if tile == 3 else taps if taps <= 5 else 4  # longer kernels are cut into parts
    return tile + part - 1, tile


def state_error(path: str, kernel: Sequence[int]) -> float:
    """Returns by how much syn and mem may differ between two implementations, after a few steps.

    It holds for states and gates of order 1. The other implementation convolves directly.
    """
    return float(16 + 8 * growth_of(path, kernel).max()) * UNIT


def gradient_error(path: str, kernel: Sequence[int]) -> float:
    """Returns by how much a gradient may differ, relative to its largest element.

    A surrogate of slope 25 makes more of an error in mem than the sums of the gradient add.
    """
    return 3 * state_error(path, kernel)
