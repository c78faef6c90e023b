"""Weights in the order in which the kernels read them, made once for each of their values.

Kept as long as the weight's storage lives (never in a state_dict, never pickled) and until its
values change: it is compared with the weight byte for byte in every call, one to three hundredths
of a step.
"""

from __future__ import annotations

import threading
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch  # before the core, which uses the OpenMP runtime that torch has loaded
from torch import Tensor

from . import _C, blocks

__all__ = ["Packed", "look_up", "pack"]


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
        self.forms: dict[tuple, Tensor] = {}

    def fits(self, weight: Tensor) -> bool:
        """Whether it was made from just this weight, compared byte for byte.

        Neither the address nor the version counter tells: ``weight.data.add_(...)`` changes
        neither of them.
        """
        own = self.original
        if own.shape != weight.shape or own.dtype != weight.dtype:
            return False
        size = own.numel() * own.element_size()
        return bool(_C.same_bytes(own.data_ptr(), weight.data_ptr(), size))


# By storage and, as many weights may lie in one, by place. Not by tensor: torch refuses to swap the
# contents of tensors that have weak references.
_packed: WeakKeyDictionary[torch.UntypedStorage, dict[tuple, Packed]] = WeakKeyDictionary()
_packed_lock = threading.Lock()


def look_up(weight: Tensor) -> Packed:
    """Everything packed from `weight`'s present values; kept as long as the tensor lives."""
    contiguous = weight.detach().contiguous()
    place = (weight.storage_offset(), weight.shape, weight.stride(), weight.dtype)
    with _packed_lock:
        entries = _packed.setdefault(weight.untyped_storage(), {})
        entry = entries.get(place)
        if entry is None or not entry.fits(contiguous):
            entry = entries[place] = Packed(contiguous)
    return entry


def pack(
    weight: Packed, cell: Any, threads: int, backward: bool, grad_x: bool = False
) -> list[Tensor | None]:
    """The forms of `weight` that a call reads, each made once for each of the weight's values."""
    isa = _C.isa_name()
    out: list[Tensor | None] = []
    for number in range(3, 6) if backward else range(3):  # csrc/cpu/api.h: Form
        if not _C.cpu_reads(cell, number, grad_x):
            out.append(None)
            continue
        key = (isa, number, cell.kernel, cell.tile if number % 3 else None)
        form = weight.forms.get(key)
        if form is None:
            form = blocks.empty((_C.cpu_packed_bytes(cell, number),), torch.uint8)
            _C.cpu_pack_weight(cell, number, threads, weight.original.data_ptr(), form.data_ptr())
            weight.forms[key] = form  # when it is whole: other threads may look
        out.append(form)
    return out
