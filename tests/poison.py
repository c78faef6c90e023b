"""Memory that shows what is done to it: outputs and workspaces are poisoned, and fenced in.

The core takes all its memory from torch.empty and its relatives, and from memory.empty. In
:func:`poisoned` these return memory filled with a pattern, between two fences: a result that was
not written keeps the pattern, one that was computed from memory nobody wrote is wrong, and a write
past the end breaks a fence.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from torch import Tensor

from snnlstm.native import cpu, memory, packing, tensors

NAN = 0xFF  # as float32, float64: NaN; as int64: -1
HUGE = 0x7F  # as float32, float64: 3.4e38, 1.4e306; as int64: 9.2e18
_FENCE = 256  # bytes
_FENCE_BYTE = 0xA5


def _storage_bytes(shape: tuple[int, ...], strides: tuple[int, ...], item: int) -> int:
    if 0 in shape:
        return 0
    return item * (1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)))


class _Fenced:
    """Allocator of poisoned tensors; `blocks` remembers their memory, fences included."""

    def __init__(self, pattern: int) -> None:
        self.pattern = pattern
        self.blocks: list[np.ndarray] = []

    def new(self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        item = dtype.itemsize
        size = _storage_bytes(shape, strides, item)
        block = np.full(size + 2 * _FENCE, self.pattern, np.uint8)
        block[:_FENCE] = block[-_FENCE:] = _FENCE_BYTE
        self.blocks.append(block)
        storage = torch.from_numpy(block).untyped_storage()
        # The tensor is no view: autograd treats views among a Function's outputs differently.
        return torch.tensor([], dtype=dtype).set_(storage, _FENCE // item, shape, strides)

    def check(self) -> None:
        for block in self.blocks:
            for fence in (block[:_FENCE], block[-_FENCE:]):
                assert (fence == _FENCE_BYTE).all(), "memory beside a tensor was written"


@contextmanager
def poisoned(pattern: int) -> Iterator[_Fenced]:
    """Poison what the core is given to write to while the block runs, then check the fences."""
    fenced = _Fenced(pattern)

    def contiguous(*shape, dtype=None, device=None, **_):
        shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if device == "meta":  # asked for its strides
            return torch.empty(shape, device=device)
        return fenced.new(shape, torch.empty(shape, device="meta").stride(), dtype)

    class Torch:
        """What these modules see as torch."""

        empty = staticmethod(contiguous)

        def __getattr__(self, name):
            return getattr(torch, name)

        @staticmethod
        def empty_strided(shape, strides, *, dtype, device=None):
            return fenced.new(tuple(shape), tuple(strides), dtype)

    def new_empty(self, *shape, dtype=None, **_):
        return contiguous(*shape, dtype=dtype or self.dtype)

    def new_empty_strided(self, shape, strides, dtype=None, **_):
        return fenced.new(tuple(shape), tuple(strides), dtype or self.dtype)

    with pytest.MonkeyPatch.context() as patch:
        for module in (cpu, packing, tensors):
            patch.setattr(module, "torch", Torch())
        patch.setattr(memory, "empty", lambda shape, dtype: contiguous(shape, dtype=dtype))
        patch.setattr(Tensor, "new_empty", new_empty)
        patch.setattr(Tensor, "new_empty_strided", new_empty_strided)
        patch.setattr(memory, "_thread", threading.local())  # nothing kept from before
        patch.setattr(packing, "_packed", WeakKeyDictionary())
        yield fenced
    fenced.check()
