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
from . import memory

__all__ = ["Packed", "look_up"]

_WEIGHTS = ("weight", "weight_mem", "weight_x")  # the places of the forms, csrc/cpu/api.h: Form


class Packed:
    """A weight in the kernels' forms, and a copy of the weight that they were made from.

    Attributes
    ----------
    most_inputs : int
        Side of the largest Winograd tile whose rounding errors stay small over long sequences: of
        those in ``GAINS`` whose limit the gates' root mean square per unit of input does not
        exceed; 0 if none. nn.Conv2d's initial weights have 0.58.
    """

    GAINS: ClassVar = {8: 1.5, 6: 3.0}

    def __init__(self, weight: Tensor) -> None:
        self.original = weight.detach().clone(memory_format=torch.contiguous_format)
        gain = float(self.original.norm()) / max(weight.shape[0], 1) ** 0.5
        self.most_inputs = max(
            (side for side, most in self.GAINS.items() if gain <= most), default=0
        )
        self.address = self.original.data_ptr()
        self.bytes = self.original.nbytes
        self.forms: dict[tuple[int, str], Tensor] = {}
        self._found: dict[Any, dict[str, int]] = {}  # by the core's plan

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
                # When it is whole, as other threads may look; and the first stays, whose address
                # another thread may have taken meanwhile.
                form = self.forms.setdefault(key, form)
            found[_WEIGHTS[number % 3]] = form.data_ptr()
        if len(self._found) >= _MOST_PLACES:
            self._found.clear()
        self._found[core] = found
        return found


# By storage and, as many weights may lie in one, by place. Not by tensor: torch refuses to swap the
# contents of tensors that have weak references. No lock: the worst that two threads do to each
# other is to pack a weight twice, while a lock would be held across a fork or a signal.
_packed: WeakKeyDictionary[torch.UntypedStorage, dict[tuple[Any, ...], Packed]] = (
    WeakKeyDictionary()
)
_MOST_PLACES = 16  # weights of one storage whose forms are kept


def _entries(weight: Tensor) -> dict[tuple[Any, ...], Packed]:
    storage = weight.untyped_storage()
    entries = _packed.get(storage)
    return _packed.setdefault(storage, {}) if entries is None else entries


def _place(weight: Tensor) -> tuple[Any, ...]:
    return weight.storage_offset(), weight.shape, weight.stride(), weight.dtype


def look_up(weight: Tensor, x: int = 0, dtype: int = 0, count: int = 0) -> tuple[Packed, int]:
    """Everything packed from `weight`'s present values; kept as long as its storage lives.

    Neither the address nor the version counter tells whether they are those that were packed:
    ``weight.data.add_(...)`` changes neither of them. They are compared byte for byte, one to three
    hundredths of a step.

    Parameters
    ----------
    weight : Tensor
    x, dtype, count
        Address, dtype and number of values of which the part that is not zero is wanted.

    Returns
    -------
    packed : Packed
    percent : int
        The part of x that is not zero, in hundredths; 100 if `count` is 0.
    """
    contiguous = weight if weight.is_contiguous() else weight.detach().contiguous()
    entries, place = _entries(weight), _place(weight)
    packed = entries.get(place)
    if packed is not None:
        own = packed.address, packed.bytes
        percent = _C.inspect(x, dtype, count, contiguous.data_ptr(), *own)
        if percent >= 0:
            return packed, percent
    entries.pop(place, None)
    while len(entries) >= _MOST_PLACES:
        del entries[next(iter(entries))]
    packed = entries[place] = Packed(contiguous)
    return packed, _C.inspect(x, dtype, count, 0, 0, 0)
