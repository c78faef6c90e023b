"""Weights in the order in which the CPU kernels read them, made once for each of their values.

They are kept as long as the weight's storage lives (never in a state_dict, never pickled) and until
its values change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch  # before the core, which uses the OpenMP runtime that torch has loaded
from torch import Tensor

from .. import _C
from ..call import DTYPES
from . import memory

__all__ = ["Packed", "look_up"]

_WEIGHTS = ("weight", "weight_mem", "weight_x")  # the places of the forms, csrc/cpu/api.h: Form


class Packed:
    """A weight in the kernels' forms, and a copy of the weight that they were made from.

    ``most_inputs`` is the side of the largest Winograd tile whose rounding errors stay small over
    long sequences, or 0 if there is none. ``GAINS`` has the sides, each with the largest gain that
    it admits: the gates' root mean square per unit of input. nn.Conv2d's initial weights have 0.58.
    """

    GAINS: ClassVar = {8: 1.5, 6: 3.0}

    def __init__(self, weight: Tensor) -> None:
        self.original = memory.empty(weight.shape, weight.dtype)
        self.address = self.original.data_ptr()
        dtype, count = DTYPES.index(weight.dtype), weight.numel()
        squares = _C.copy_weight(weight.data_ptr(), self.address, dtype, count)
        gain = (squares / max(weight.shape[0], 1)) ** 0.5
        self.most_inputs = max((s for s, most in self.GAINS.items() if gain <= most), default=0)
        self.bytes = self.original.nbytes
        self.forms: dict[tuple[int, str], Tensor] = {}
        self._found: dict[Any, dict[str, int]] = {}  # addresses by the core's plan

    def addresses(self, core: Any, forms: Sequence[tuple[int, str, int]]) -> dict[str, int]:
        """Addresses of the forms that a plan of the core reads, by the names of its arguments.

        Each form, told by its number and name, is made once for each of the weight's values.
        """
        found = self._found.get(core)
        if found is not None:
            return found
        found = {}
        for number, name, size in forms:
            key = number, name
            form = self.forms.get(key)
            if form is None:
                form = memory.empty((size,), torch.uint8)
                core.pack(number, self.address, form.data_ptr())
                # Other threads may look, so the form is kept when it is whole; and the first stays,
                # because another thread may have taken its address meanwhile.
                form = self.forms.setdefault(key, form)
            found[_WEIGHTS[number % 3]] = form.data_ptr()
        if len(self._found) >= _MOST_PLACES:
            self._found.clear()
        self._found[core] = found
        return found


# Weights are told by storage and, as many may lie in one, by place. Tensors do not serve as keys:
# torch refuses to swap the contents of tensors that have weak references. There is no lock: the
# worst that two threads do to each other is to pack a weight twice, while a lock could be held
# across a fork or a signal.
_packed: WeakKeyDictionary[torch.UntypedStorage, dict[tuple[Any, ...], Packed]] = (
    WeakKeyDictionary()
)
_MOST_PLACES = 16  # weights of one storage whose forms are kept


def look_up(weight: Tensor, x: int = 0, dtype: int = 0, count: int = 0) -> tuple[Packed, int]:
    """What is packed of `weight`'s present values, and the percentage of x that is not zero.

    x comes as the address, dtype and number of its values; no values count as 100 per cent. Neither
    the address nor the version counter tells whether the weight's values are those that were
    packed: ``weight.data.add_(...)`` changes neither of them. So the values are compared byte for
    byte, which takes one to three hundredths of a step, or more if a wide layer has small images.
    """
    contiguous = weight if weight.is_contiguous() else weight.detach().contiguous()
    storage = weight.untyped_storage()
    entries = _packed.get(storage)
    if entries is None:
        entries = _packed.setdefault(storage, {})
    place = weight.storage_offset(), weight.shape, weight.stride(), weight.dtype
    packed = entries.get(place)
    if packed is not None:
        own = packed.address, packed.bytes
        percent = _C.inspect(x, dtype, count, contiguous.data_ptr(), *own)
        if percent >= 0:
            return packed, percent
    entries.pop(place, None)
    for oldest in list(entries)[: max(len(entries) - _MOST_PLACES + 1, 0)]:  # a copy: threads drop
        entries.pop(oldest, None)
    packed = entries[place] = Packed(contiguous)
    return packed, _C.inspect(x, dtype, count, 0, 0, 0)
