"""What a forward pass saves for its backward pass, in one block of bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Shapes = Sequence[tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of each part of what is saved."""


ALIGNMENT = 64  # bytes; torch aligns blocks so, and every vector is a part of it


class SavedLayout:
    """Where a forward pass leaves what its backward pass needs beside its arguments.

    All of it lies in one block of bytes, which costs autograd the time of one tensor. Cp is the
    number of channels C, rounded up to whole vectors. The parts are

    - gates (T, N, Ho * Wo, 4 Cp), activated, of every step, in the kernels' own order
    - syn (T, N, Ho * Wo, Cp), after every step; on CUDA, after every step but the last
    - winner (T, N) int64, the neuron that inhibition let through; (0,) without inhibition
    - argmax (T, N, Hp * Wp, channels), for each pooled pixel the number of the pixel of its window
      that gets the gradient, row by row; (0,) without max_pool. uint8, or int32 where a window has
      more than 256 pixels.

    Gates and syn are whole vectors, so that each part is aligned where the one before it ends.
    """

    def __init__(self, parts: Shapes) -> None:
        self.parts = parts
        self.bytes = 0
        self._offsets: list[Any] = []  # an int, or None for an empty part
        for shape, dtype in parts:
            size = math.prod(shape) * dtype.itemsize
            self._offsets.append(self.bytes if size else None)
            self.bytes += size

    def addresses(self, block: Tensor | None, step: int = 0) -> tuple[int, ...]:
        """Addresses of the parts, from a step on; 0 for what is not saved."""
        if block is None:
            return 0, 0, 0, 0
        start = block.data_ptr()
        if step == 0:
            gates, syn, winner, argmax = self._offsets
            return (
                start + gates, 0 if syn is None else start + syn,
                0 if winner is None else start + winner, 0 if argmax is None else start + argmax,
            )  # fmt: skip
        return tuple(
            0 if offset is None or step >= shape[0]
            else start + offset + step * math.prod(shape[1:]) * dtype.itemsize
            for offset, (shape, dtype) in zip(self._offsets, self.parts, strict=True)
        )  # fmt: skip

    def part(self, block: Tensor, number: int) -> Tensor:
        """A part of a block, as a tensor of its own shape and dtype."""
        (shape, dtype), start = self.parts[number], self._offsets[number] or 0
        return block[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
