"""The CPU backend: plans, and weights in the kernels' order. Twin of :mod:`snnlstm.native.cuda`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar
from weakref import WeakKeyDictionary, ref

import torch  # torch must load its OpenMP runtime before the core uses it
from torch import Tensor

from .. import _C
from ..calls.call import Call
from ..calls.keys import BoundedDict
from ..calls.spec import DTYPES, HALF_TYPES, CellSpec
from . import pool
from .plan import (
    BackwardInputs,
    CommonBackend,
    CommonPlan,
    Gradients,
    Result,
    Shapes,
    Sizes,
    contiguous_as,
    empty_gradients,
    keep_empty,
    make_cell,
    pointer,
    readable,
)

ALGORITHMS = ("auto", "direct", "winograd")  # the numbers of csrc/args.h

ONE_THREAD = not _C.openmp_library()
"""Whether no OpenMP runtime of torch's was found, whose threads the kernels would use."""

isa = _C.isa_name()


def set_isa(name: str) -> None:
    """Use the kernels of an instruction set that ``_C.isa_names()`` lists, in the whole process."""
    global isa
    _C.set_isa(name)
    isa = name


# ---- packed weights ------------------------------------------------------------------------------


class PackedWeight:
    """A weight in the layouts that the kernels read, and the copy of it that they are made from.

    ``max_tile_inputs`` is the side of the largest Winograd tile whose rounding errors stay small
    over long sequences, or 0 if there is none. ``GAINS`` has the sides, each with the largest gain
    that it admits: the gates' root mean square per unit of input. nn.Conv2d's initial weights have
    0.58.
    """

    GAINS: ClassVar = {8: 1.5, 6: 3.0}

    def __init__(self, weight: Tensor) -> None:
        self.copy, count = pool.empty(weight.shape, weight.dtype), weight.numel()
        self.address, self.bytes = self.copy.data_ptr(), self.copy.nbytes
        if weight.dtype in HALF_TYPES:
            self.copy.copy_(readable(weight))
            squares = self.copy.double().square().sum().item()
        else:
            dtype = DTYPES.index(weight.dtype)
            squares = _C.copy_weight(weight.data_ptr(), self.address, dtype, count)
        gain = (squares / max(weight.shape[0], 1)) ** 0.5
        self.max_tile_inputs = max(
            (s for s, max_gain in self.GAINS.items() if gain <= max_gain), default=0
        )
        # The keys are numbers and names of layouts, the values their addresses and memory.
        self._layouts: dict[tuple[int, str], tuple[int, Tensor]] = {}

    def holds(self, weight: Tensor) -> bool:
        """Whether these are the values of a contiguous weight of this shape."""
        same = weight.dtype is self.copy.dtype
        return same and _C.same(weight.data_ptr(), self.address, self.bytes)

    def layouts(self, a_pass: Pass) -> list[int]:
        """Addresses of weight, weight_mem and weight_x for a pass; 0 for what it does not read.

        Each layout is made once for each of the weight's values, and lives as long as this object.
        """
        addresses = [0, 0, 0]
        for key, size in a_pass.layouts:
            packed = self._layouts.get(key) or self._pack(a_pass, key, size)
            addresses[key[0] % 3] = packed[0]
        return addresses

    def _pack(self, a_pass: Pass, key: tuple[int, str], size: int) -> tuple[int, Tensor]:
        source = self.copy.float() if self.copy.dtype in HALF_TYPES else self.copy
        layout = pool.empty((size,), torch.uint8)
        a_pass.core.pack(key[0], source.data_ptr(), layout.data_ptr())
        # A layout is published after packing; setdefault keeps the first of two racers'.
        return self._layouts.setdefault(key, (layout.data_ptr(), layout))


# The living packed weights, by storage and by place: many weights may lie in one storage.
# Tensors do not serve as keys, because torch refuses to swap the contents of tensors that have weak
# references.
_packed: WeakKeyDictionary[torch.UntypedStorage, BoundedDict[Any, PackedWeight]] = (
    WeakKeyDictionary()
)


def packed_weight(weight: Tensor, last: PackedWeight | None = None) -> PackedWeight:
    """The packed form of a weight, looked up or made; `last` is a guess, which saves the look-up.

    Neither addresses nor version counters tell whether the weight's values are those that were
    packed: ``weight.data.add_(...)`` changes neither of them. So the values are compared byte for
    byte, which takes one to three hundredths of a step, or more if a wide layer has small images.
    """
    contiguous = weight if weight.is_contiguous() else readable(weight).contiguous()
    if last is not None and last.holds(contiguous):
        return last
    storage = weight.untyped_storage()
    entries = _packed.get(storage)
    if entries is None:
        entries = _packed.setdefault(storage, BoundedDict())
    place = weight.storage_offset(), weight.shape, weight.stride(), weight.dtype
    packed = entries.get(place)
    if packed is not None and packed.holds(contiguous):
        return packed
    entries.pop(place, None)
    packed = PackedWeight(contiguous)
    entries.keep(place, packed)
    return packed


# ---- plans ---------------------------------------------------------------------------------------


Selection = tuple[int, int]
"""What the values of a call select its algorithms by.

The percentage of x's numbers that are not zero, and :attr:`PackedWeight.max_tile_inputs`.
"""


class Pass:
    """One pass of a plan: the core's plan, the weight's layouts that it reads, its workspace."""

    def __init__(
        self, plan: Plan, selection: Selection, backward: bool, grad_x: bool, weight: bool
    ) -> None:
        percent, max_tile_inputs = selection
        arguments = plan.algorithm, percent / 100, max_tile_inputs, plan.threads
        self.core = core = _C.CpuPlan(plan.cell, *arguments)
        self.selection, self.name = selection, f"cpu-{plan.isa}-{core.name}"
        self.run = core.backward if backward else core.forward
        self.workspace = core.backward_workspace(weight) if backward else core.forward_workspace
        # Each layout's key, its number and name, and its bytes.
        self.layouts = tuple(
            ((number, f"{plan.isa}:{name}"), size)
            for number, name, size in core.forms(backward, grad_x)
        )


class Plan(CommonPlan):
    """The plan of a call on the CPU; see :class:`snnlstm.native.plan.CommonPlan`.

    The density of x and the gain of the weight select the algorithms of a call.
    """

    def __init__(
        self, backend: Backend, call: Call, spec: CellSpec, operands: Any, settings: Any
    ) -> None:
        super().__init__(backend, call, spec, operands)
        _, algorithm, self.threads, self.isa = settings
        self.algorithm = ALGORITHMS.index(algorithm) if algorithm in ALGORITHMS else 0
        self.cell = make_cell(_C, self)
        self.largest_result, self.largest_gradient = (
            self.dtype.itemsize * max(math.prod(shape) for shape, _ in memory)
            for memory in ((self.spk_memory, self.state_memory), self.gradient_memory)
        )
        quant = spec.quant
        self.levels = None if quant is None else quant.levels.to(self.dtype).contiguous()
        self.levels_pointer = pointer(self.levels)
        # An x of few channels gains nothing from lists of nonzeros, so its zeros are not counted.
        self.counts_zeros = self.cin > 2
        # This guess saves the look-up of the packed weight, 1 us of a step.
        self._last_packed: Callable[[], PackedWeight | None] = lambda: None
        self._threshold: Tensor | None = None
        self._passes: dict[Any, Pass] = {}

    def _new_pass(self, key: tuple[Any, ...]) -> Pass:
        """Make the pass of the arguments of :class:`Pass` after the plan."""
        return self._passes.setdefault(key, Pass(self, *key))

    def empty_results(self, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """Memory for spk, syn and mem; large ones lie in blocks that are used again."""
        if self.largest_result < pool.MAPPED:
            return super().empty_results(call)
        x, kinds = call.x, (self.spk_memory, self.state_memory, self.state_memory)
        return tuple(pool.empty_result(*kind, x.dtype, x.device) for kind in kinds)  # type: ignore[return-value]

    def _empty_saved(self, x: Tensor) -> Tensor:
        size = self.saved.bytes
        if size >= pool.SMALLEST:
            return pool.empty((size,), torch.uint8)
        return x.new_empty(size, dtype=torch.uint8)

    def _copy_of(self, threshold: Tensor) -> Tensor:
        """A copy of the threshold; the last one serves for equal values."""
        copy = self._threshold
        if (
            copy is None
            or copy.shape != threshold.shape
            or not self.are_contiguous
            or not _C.same(threshold.data_ptr(), copy.data_ptr(), copy.nbytes)
        ):
            copy = self._threshold = threshold.clone()
        return copy

    @pool.where_it_fits
    def forward(self, call: Call, training: bool) -> Result:
        x, syn, mem, weight, bias, threshold, graded, lengths, record = call
        x_at = x.data_ptr()
        packed = packed_weight(weight, self._last_packed())
        if packed is not self._last_packed():
            self._last_packed = ref(packed)
        percent, lengths_at, order, order_at = 100, 0, None, 0
        if lengths is not None:
            lengths_at, order = lengths.data_ptr(), longest_first(lengths)
            order_at = order.data_ptr()
        if self.counts_zeros:
            percent = _C.density(self.cell, (x_at, self.x_strides), lengths_at)
        key = (percent, packed.max_tile_inputs), False, False, False
        a_pass = self._passes.get(key) or self._new_pass(key)
        layouts = packed.layouts(a_pass)
        spk, new_syn, new_mem = self.empty_results(call)
        saved = self._empty_saved(x) if training else None
        if not self.are_contiguous:
            bias, threshold, graded = (
                None if t is None else contiguous_as(t, self.dtype) for t in call[4:7]
            )
        bias_at = 0 if bias is None else bias.data_ptr()
        threshold_at = 0 if threshold is None else threshold.data_ptr()
        graded_at = 0 if graded is None else graded.data_ptr()
        if not bias_at and bias is not None:
            raise ValueError("bias has no memory")
        workspace = pool.workspace(a_pass.workspace)
        addresses = (
            (x_at, self.x_strides), (syn.data_ptr(), self.syn_strides),
            (mem.data_ptr(), self.mem_strides),
            *layouts, threshold_at, self.threshold_stride, graded_at, self.levels_pointer, record,
            *self.saved.addresses(saved),
            lengths_at, order_at, workspace.data_ptr(), bias_at, None, None,
            (spk.data_ptr(), self.spk_strides) if self.has_spk else None,
            (new_syn.data_ptr(), self.out_strides), (new_mem.data_ptr(), self.out_strides),
        )  # fmt: skip
        a_pass.run(addresses)
        pool.let_go(workspace)
        if lengths is not None and not record:
            keep_empty(call, (new_syn, new_mem), (syn, mem))
        copy = self._copy_of(call.threshold) if training and call.threshold is not None else None
        return Result(spk, new_syn, new_mem, saved, a_pass.name, a_pass.selection, packed, copy)

    def _backward(
        self, given: BackwardInputs, selection: Sequence[int], packed: PackedWeight | None
    ) -> Gradients:
        call, views, saved, grads, noise, wanted = given
        order = None if call.lengths is None else longest_first(call.lengths)
        key = tuple(selection), True, wanted[0], wanted[3]
        a_pass = self._passes.get(key) or self._new_pass(key)
        if packed is None:  # a graph of torch.compile keeps tensors alone
            packed = packed_weight(self.restored_weight(call))
        layouts = packed.layouts(a_pass)
        threshold, graded = (None if t is None else contiguous_as(t, self.dtype) for t in call[5:7])
        workspace = pool.workspace(a_pass.workspace)
        pooled = self.largest_gradient >= pool.MAPPED
        out = empty_gradients(call.x, self.gradient_memory, wanted, pooled)
        addresses = (
            *views, *layouts,
            pointer(threshold), self.threshold_stride, pointer(graded), self.levels_pointer,
            call.record, *self.saved.addresses(saved), pointer(call.lengths), pointer(order),
            workspace.data_ptr(), *self.gradient_addresses(grads, noise, out), 0, 0,
        )  # fmt: skip
        a_pass.run(addresses)
        pool.let_go(workspace)
        return out


def longest_first(lengths: Tensor) -> Tensor:
    """The samples in the order of their numbers of steps, the longest first."""
    return lengths.argsort(descending=True, stable=True)


class Backend(CommonBackend):
    """The CPU backend."""

    half_types, plan = False, Plan

    def name(self) -> str:
        """Name of the kernels, such as ``"cpu-avx2"``; that of a call's result says more."""
        return f"cpu-{isa}"

    def settings(self, algorithm: str) -> tuple[Any, ...]:
        return self, algorithm, 1 if ONE_THREAD else torch.get_num_threads(), isa

    def reason_against(self, s: Sizes) -> str | None:
        """Why these kernels cannot run a call; None if they can.

        Under autocast they compute in float32, and so do steps of half types (half_types.py).
        """
        return None if s.dtype in DTYPES else f"there are no CPU kernels for {s.dtype}"

    def saved_shapes(self, s: Sizes) -> Shapes:
        padded = _C.cpu_padded_channels(DTYPES.index(s.dtype), s.c)
        images = (s.time, s.n, s.ho * s.wo)
        return (
            ((*images, 4 * padded), s.dtype),
            ((*images, padded), s.dtype),
            *s.decisions(padded),
        )

    def leaky(self, fields: tuple[Any, ...], backward: bool, device: torch.device) -> None:
        (_C.leaky_backward if backward else _C.leaky_forward)(fields)
