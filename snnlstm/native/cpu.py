"""The CPU backend: its passes, and packed weights; twin of :mod:`snnlstm.native.cuda`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, ClassVar
from weakref import WeakKeyDictionary, ref

import torch  # torch must load its OpenMP runtime before the core uses it
from torch import Tensor

from .. import _C
from ..calls.call import Call, Outputs
from ..calls.entries import BoundedDict, Settings
from ..calls.spec import DTYPES, HALF_TYPES
from . import lender
from .plan import (
    BackwardInputs,
    CommonBackend,
    Fields,
    Gradients,
    Plan,
    Shapes,
    Sizes,
    make_cell,
)
from .tensors import pointer, readable, restored

ALGORITHMS = ("auto", "direct", "winograd")  # the numbers of csrc/args.h

isa = _C.isa_name()


def set_isa(name: str) -> None:
    """Use the kernels of an instruction set that ``_C.isa_names()`` lists, in the whole process."""
    global isa
    _C.set_isa(name)
    isa = Backend.isa = name


# ---- packed weights ------------------------------------------------------------------------------


class PackedWeight:
    """A copy of a weight, and the layouts made from it, which the kernels read.

    ``gain`` is the gates' root mean square per unit of input, 0.58 for nn.Conv2d's initial weights.
    ``LIMITS`` has the largest gain that a Winograd tile of each side admits, and the largest
    product of gain and magnitude of x: rounding errors beside large values grow with this product.
    Infinite and NaN weights, which a tile would spread, have no gain that is admitted.
    """

    LIMITS: ClassVar = {8: (1.5, 30.0), 6: (16.0, 300.0)}

    def __init__(self, weight: Tensor) -> None:
        self.copy = lender.empty(weight.shape, weight.dtype)
        self.address, self.bytes = self.copy.data_ptr(), self.copy.nbytes
        self.copy.copy_(readable(weight))
        # The values are the addresses and the memory of layouts.
        self.layouts: dict[Any, tuple[int, Tensor]] = {}

    @cached_property
    def gain(self) -> float:
        """The gates' root mean square per unit of input."""
        if self.copy.dtype in HALF_TYPES:
            squares = self.copy.double().square().sum().item()
        else:
            dtype = DTYPES.index(self.copy.dtype)
            squares = _C.sum_of_squares(self.address, dtype, self.copy.numel())
        return (squares / max(self.copy.shape[0], 1)) ** 0.5

    @cached_property
    def has_few_digits(self) -> bool:
        """Whether float32 weights leave half of their digits 0, so that sums of some are exact."""
        digits = self.copy.view(torch.int32).flatten()
        return not any((part & 0xFFF).any() for part in (digits[:64], digits[64:]))

    def max_tile_inputs(self, largest: float) -> int:
        """The side of the largest tile with admissible rounding errors, or 0 if there is none.

        `largest` is the largest magnitude in x, or 1 if that is more.
        """
        gain = self.gain
        for side, (max_gain, max_product) in self.LIMITS.items():
            if gain <= max_gain and gain * largest <= max_product:
                return side
        return 0

    def holds(self, weight: Tensor) -> bool:
        """Whether a contiguous weight of this shape has the copied values."""
        same = weight.dtype is self.copy.dtype
        return same and _C.same(weight.data_ptr(), self.address, self.bytes)

    def pack(self, key: Any, size: int, run: Callable[[int, int], None]) -> tuple[int, Tensor]:
        """Keep a layout of `size` bytes, which `run` makes, and return its address and memory."""
        source = self.copy.float() if self.copy.dtype in HALF_TYPES else self.copy
        layout = lender.empty((size,), torch.uint8)
        run(source.data_ptr(), layout.data_ptr())
        # A layout is published after packing; setdefault keeps the first of two threads' layouts.
        return self.layouts.setdefault(key, (layout.data_ptr(), layout))


# The packed weights in use, by storage and view: one storage may hold many weights. Tensors cannot
# be keys, because torch refuses to swap the contents of tensors with weak references.
_packed: WeakKeyDictionary[torch.UntypedStorage, BoundedDict[Any, PackedWeight]] = (
    WeakKeyDictionary()
)


def packed_weight(weight: Tensor, last: PackedWeight | None = None) -> PackedWeight:
    """The packed copy of a weight, looked up or made; `last` is a guess, which saves the look-up.

    Neither addresses nor version counters show whether the weight's values are the packed ones:
    ``weight.data.add_(...)`` changes neither of them. So the values are compared byte by byte,
    which takes 1 to 3 % of a step, or more if a wide layer has small images.
    """
    dense = weight if weight.is_contiguous() else readable(weight).contiguous()
    if last is not None and last.holds(dense):
        return last
    storage = weight.untyped_storage()
    entries = _packed.get(storage)
    if entries is None:
        entries = _packed.setdefault(storage, BoundedDict())
    view = weight.storage_offset(), weight.shape, weight.stride(), weight.dtype
    packed = entries.get(view)
    if packed is not None and packed.holds(dense):
        return packed
    entries.pop(view, None)
    packed = PackedWeight(dense)
    entries.keep(view, packed)
    return packed


class Copies:
    """Copies of the parameters of a plan's calls, for backward passes.

    Users may assign to the ``.data`` of a parameter, or write to it, which autograd does not
    notice. Parameters with the numbers that they had share their last copies.
    """

    def __init__(self) -> None:
        self._kept: BoundedDict[Any, Any] = BoundedDict(32)  # by the addresses of the parameters

    def of(self, *parameters: Tensor) -> tuple[Tensor, ...]:
        """Return a copy of each."""
        at = tuple(map(Tensor.data_ptr, parameters))
        found = self._kept.get(at)
        if found is not None and _C.same(*found[1]):
            return found[0]
        copies = tuple([parameter.detach().clone() for parameter in parameters])
        places = zip(at, copies, strict=True)
        compared = [number for a, copy in places for number in (a, copy.data_ptr(), copy.nbytes)]
        self._kept.pop(at, None)
        self._kept.keep(at, (copies, compared))
        return copies


# ---- passes --------------------------------------------------------------------------------------


class Pass:
    """One pass of a plan: the core's pass, the weight layouts that it reads, and its workspace.

    `selection` has the value-dependent facts that choose a call's algorithms: the percentage of x's
    numbers that are not zero, and what :meth:`PackedWeight.max_tile_inputs` returned. `wanted` has
    the gradients that a backward pass computes.
    """

    def __init__(self, passes: Passes, selection: Any, wanted: Sequence[bool] | None) -> None:
        percent, max_tile_inputs = selection
        arguments = passes.algorithm, percent / 100, max_tile_inputs, passes.threads
        grad_x, grad_weight = (False, False) if wanted is None else (wanted[0], wanted[3])
        self.core_pass = _C.CpuPass(
            passes.cell, *arguments, wanted is not None, grad_x, grad_weight
        )
        self.selection, self.name = selection, f"cpu-{passes.isa}-{self.core_pass.name}"
        self._levels, self._bytes = pointer(passes.levels), self.core_pass.workspace
        self._is_small = self._bytes <= lender.SMALL_WORKSPACE
        # Each layout's key, which is its number and name, and its size in bytes.
        self.layouts = tuple(
            ((number, f"{passes.isa}:{name}"), size)
            for number, name, size in self.core_pass.layouts
        )

    def run_kernels(self, call: Call, packed: PackedWeight, fields: Fields) -> None:
        """Run the pass; `fields` are those from x on (csrc/args.h)."""
        weights = [0, 0, 0]
        for key, size in self.layouts:
            layout = packed.layouts.get(key)
            if layout is None:
                layout = packed.pack(key, size, partial(self.core_pass.pack, key[0]))
            weights[key[0] % 3] = layout[0]
        order = None if call.lengths is None else longest_first(call.lengths)
        try:
            workspace = lender.small.pop() if self._is_small else lender.workspace(self._bytes)
        except IndexError:  # all small workspaces are in use
            workspace = lender.workspace(self._bytes)
        order_at = 0 if order is None else order.data_ptr()
        self.core_pass.run((workspace.data_ptr(), *weights, self._levels, order_at, *fields))
        (lender.small.append if self._is_small else lender.let_go)(workspace)


class Passes:
    """The passes of a plan; the values of x and the gain of the weight choose one for a call."""

    def __init__(self, plan: Plan, settings: Settings) -> None:
        algorithm, self.threads, self.isa = settings[:3]
        self.algorithm = ALGORITHMS.index(algorithm) if algorithm in ALGORITHMS else 0
        self.cell, self.weight_shape = make_cell(_C, plan), plan.gradient_memory[3][0]
        levels = plan.spec.quant
        self.levels = None if levels is None else levels.levels.to(plan.dtype).contiguous()
        # Nobody needs to look at an x whose zeros and size would leave all sums direct.
        best = self.algorithm, 0.0, max(PackedWeight.LIMITS), 1
        names = {_C.CpuPass(self.cell, *best, backward).name for backward in (False, True)}
        self.looks_at_x = self.algorithm == 0 and names != {"direct"}
        # This guess saves the look-up of the packed weight, 1 us of a step.
        self._last_packed: Callable[[], PackedWeight | None] = lambda: None
        self._copies = Copies()
        self._passes: dict[Any, Pass] = {}

    def reason_against(self, backward: bool) -> None:
        """Why no call of the plan can run: the CPU's kernels run every call."""

    def _pass_of(self, selection: Any, wanted: Sequence[bool] | None) -> Pass:
        """Look up a pass, or make it."""
        key = selection, None if wanted is None else (wanted[0], wanted[3])
        return self._passes.get(key) or self._passes.setdefault(key, Pass(self, selection, wanted))

    def forward(
        self, call: Call, outs: Outputs, saved: Tensor | None, fields: Fields
    ) -> tuple[Any, ...]:
        """Run the forward pass; also returns a copy of the threshold, for training."""
        threshold, lengths = call.threshold, call.lengths
        packed = packed_weight(call.weight, self._last_packed())
        if packed is not self._last_packed():
            self._last_packed = ref(packed)
        selection = 100, 0
        if self.looks_at_x:
            at = 0 if lengths is None else lengths.data_ptr()
            percent, largest = _C.facts(self.cell, fields[0], at)
            selection = percent, packed.max_tile_inputs(largest)
        a_pass = self._passes.get((selection, None)) or self._pass_of(selection, None)
        a_pass.run_kernels(call, packed, fields)
        keeps = saved is not None and threshold is not None
        copy = self._copies.of(threshold)[0] if keeps else None  # type: ignore[arg-type]
        return a_pass.name, a_pass.selection, packed, copy

    def backward(self, inputs: BackwardInputs, out: Gradients, fields: Fields) -> Gradients:
        """Run the backward pass of a forward pass's selection and packed weight."""
        packed = inputs.packed
        if packed is None:  # a graph of torch.compile keeps only tensors
            x, weight = inputs.call.x, inputs.call.weight
            packed = packed_weight(restored(weight, self.weight_shape, x.dtype, x.device))
        self._pass_of(tuple(inputs.selection), inputs.wanted).run_kernels(
            inputs.call, packed, fields
        )
        return out


def longest_first(lengths: Tensor) -> Tensor:
    """The indices of the samples by their numbers of steps, longest first."""
    return lengths.argsort(descending=True, stable=True)


class Backend(CommonBackend):
    """The CPU backend."""

    half_types, passes = False, Passes
    isa = isa
    # Where no OpenMP runtime of torch's was found, the kernels use one thread.
    threads: ClassVar = staticmethod(torch.get_num_threads if _C.openmp_library() else lambda: 1)

    def name(self) -> str:
        """Name of the kernels, such as ``"cpu-avx2"``; the name in a call's result says more."""
        return f"cpu-{isa}"

    def saved_shapes(self, s: Sizes) -> Shapes:
        padded = _C.cpu_padded_channels(DTYPES.index(s.dtype), s.c)
        images = (s.time, s.n, s.ho * s.wo)
        return (
            ((*images, 4 * padded), s.dtype),
            ((*images, padded), s.dtype),
            s.argmax(padded),
        )

    def leaky(self, fields: Fields, backward: bool, device: torch.device) -> None:
        (_C.leaky_backward if backward else _C.leaky_forward)(fields)
