"""Fills the outputs and workspaces of the core with a pattern, and puts fences around them.

The core takes all its memory from torch.empty and its relatives, and from lender.py. Within
:func:`poisoned` these return memory that holds a pattern and lies between two fences. A result that
the core does not write keeps the pattern. A result of memory that nobody wrote is wrong. A write
past the end changes a fence.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from torch import Tensor

from snnlstm.native import cpu, lender, plan, tensors

NAN = 0xFF  # as float32, float64: NaN; as int64: -1
HUGE = 0x7F  # as float32, float64: 3.4e38, 1.4e306; as int64: 9.2e18
_FENCE = 256  # bytes
_FENCE_BYTE = 0xA5


class _Fenced:
    """Allocates poisoned tensors; `blocks` holds their memory with its fences."""

    def __init__(self, pattern: int) -> None:
        self.pattern = pattern
        self.blocks: list[np.ndarray] = []

    def new(self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        meta = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
        size = meta.untyped_storage().nbytes()
        block = np.full(size + 2 * _FENCE, self.pattern, np.uint8)
        block[:_FENCE] = block[-_FENCE:] = _FENCE_BYTE
        self.blocks.append(block)
        storage = torch.from_numpy(block).untyped_storage()
        # The tensor must not be a view: autograd treats views among a Function's outputs otherwise.
        start = _FENCE // dtype.itemsize
        return torch.tensor([], dtype=dtype).set_(storage, start, shape, strides)

    def check(self) -> None:
        for block in self.blocks:
            for fence in (block[:_FENCE], block[-_FENCE:]):
                assert (fence == _FENCE_BYTE).all(), "memory beside a tensor was written"


@contextmanager
def poisoned(pattern: int) -> Iterator[_Fenced]:
    """Within the block the core writes to poisoned memory; at its end the fences are checked."""
    fenced = _Fenced(pattern)

    def contiguous(*shape, dtype=None, device=None, **_):
        shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if device == "meta":  # the caller reads the strides alone
            return torch.empty(shape, device=device)
        return fenced.new(shape, torch.empty(shape, device="meta").stride(), dtype)

    class Torch:
        """This object takes torch's place in the core's modules."""

        empty = staticmethod(contiguous)

        def __getattr__(self, name):
            return getattr(torch, name)

        @staticmethod
        def empty_strided(shape, strides, *, dtype, device=None):
            return fenced.new(tuple(shape), tuple(strides), dtype)

        @staticmethod
        def empty_like(like, memory_format=None):
            strides = like.stride() if memory_format is None else like.contiguous().stride()
            return fenced.new(tuple(like.shape), strides, like.dtype)

    def new_empty(self, *shape, dtype=None, **_):
        return contiguous(*shape, dtype=dtype or self.dtype)

    def new_empty_strided(self, shape, strides, dtype=None, **_):
        return fenced.new(tuple(shape), tuple(strides), dtype or self.dtype)

    with pytest.MonkeyPatch.context() as patch:
        for module in (cpu, lender, plan, tensors):
            patch.setattr(module, "torch", Torch())
        patch.setattr(lender, "empty", lambda shape, dtype: contiguous(shape, dtype=dtype))
        patch.setattr(lender, "small", deque(maxlen=0))
        patch.setattr(lender, "workspace", lambda count: contiguous(count, dtype=torch.uint8))
        patch.setattr(Tensor, "new_empty", new_empty)
        patch.setattr(Tensor, "new_empty_strided", new_empty_strided)
        patch.setattr(cpu, "_packed", WeakKeyDictionary())
        yield fenced
    fenced.check()
