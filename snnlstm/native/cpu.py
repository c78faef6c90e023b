"""The CPU half of the core: plans and calls. Twin of :mod:`snnlstm.native.cuda`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch  # before the core, which uses the OpenMP runtime that torch has loaded
from torch import Tensor

from .. import _C
from ..call import DTYPES, Call, Signature
from . import memory, tensors
from .packing import Packed, look_up
from .tensors import Gradients, Result, Saved, Shapes, address

__all__ = ["ALGORITHMS", "Kernels", "set_isa"]

ALGORITHMS = ("auto", "direct", "winograd")  # the numbers of csrc/cpu/api.h

# What is done once for a weight is taken to serve so many step calls, where their loop is longer or
# not known.
_STEPS_OF_LOOP = 16

isa = _C.isa_name()


def set_isa(name: str) -> None:
    """Use the kernels of an instruction set that ``_C.isa_names()`` lists, in the whole process."""
    global isa
    _C.set_isa(name)
    isa = name


@contextmanager
def profile() -> Iterator[dict[str, float]]:
    """Within the block, count the time of the kernels' parts, of all threads.

    Afterwards the dict has the seconds of products, transforms, pointwise work, copies, waiting for
    other threads, and "all", which is more than their sum.
    """
    parts = ("products", "transforms", "pointwise", "copies", "waiting", "all")
    seconds: dict[str, float] = {}
    _C.cpu_profile(True)
    try:
        yield seconds
    finally:
        seconds |= zip(parts, (spent / 1e9 for spent in _C.cpu_profile(False)), strict=True)


class _Way:
    """One choice of algorithms for the calls of a plan, by the density of x and the weight."""

    def __init__(self, plan: Plan, percent: int, most_inputs: int) -> None:
        self._plan, self._by = plan, (percent / 100, most_inputs)
        self.core = self._make(plan.cell, backward=False)
        self.forms = self._forms_of(self.core, backward=False, grad_x=False)
        self.workspace = self.core.forward_workspace
        self.name = f"cpu-{plan.isa}-{self.core.name}"
        self.gradients: dict[Any, Any] = {}

    def _make(self, cell: Any, backward: bool) -> Any:
        density, most_inputs = self._by
        plan = self._plan
        return _C.CpuPlan(cell, plan.algorithm, density, most_inputs, backward, plan.threads)

    def _forms_of(self, core: Any, **which: bool) -> list[tuple[int, str, int]]:
        """Number, name and bytes of the forms of the weight that a plan of the core reads."""
        isa = self._plan.isa
        return [(number, f"{isa}:{name}", size) for number, name, size in core.forms(**which)]

    def backward(
        self, grad_x: bool, weight: bool, steps: int = _STEPS_OF_LOOP
    ) -> tuple[Any, Any, int]:
        """The core's plan of the backward pass, the forms that it reads, bytes of its workspace.

        A step call is one of `steps` that share the forms.
        """
        found = self.gradients.get((grad_x, weight, steps))
        if found is None:
            plan = self._plan
            cell = plan.cell if plan.signature.options.sequence else plan.cell_of(steps)
            core = self._make(cell, backward=True).with_time(plan.time)
            forms = self._forms_of(core, backward=True, grad_x=grad_x)
            found = core, forms, core.backward_workspace(weight)
            self.gradients[grad_x, weight, steps] = found
        return found


class Plan(tensors.Plan):
    """The plan of a call on the CPU; the values of x and weight decide a :class:`Choice` of it."""

    def __init__(self, half: Kernels, call: Call, algorithm: str, threads: int, isa: str) -> None:
        number = ALGORITHMS.index(algorithm) if algorithm in ALGORITHMS else 0
        super().__init__(half, call, number, threads, isa)
        s, o = self.signature, self.signature.options
        self.algorithm, self.threads, self.isa, self.time = number, threads, isa, s.time
        self.cell = self.cell_of(s.time)
        # The core takes five strides.
        self.x5, self.syn5, self.mem5, self.spk5, self.state5 = (
            tensors.five(strides)
            for strides in (
                call.x.stride(), call.syn.stride(), call.mem.stride(), self.spk[1], self.state[1]
            )
        )  # fmt: skip
        self.half_gates = o.checkpoint == "gates"
        largest = max(math.prod(shape) * dtype.itemsize for shape, dtype in self.saved_shapes)
        self.huge = largest >= memory.SMALLEST
        self.record = o.record
        self.levels = None if o.quant is None else o.quant.levels.to(s.dtype).contiguous()
        self.levels_address = address(self.levels)
        self.has_winner = o.inhibition
        # An x of few channels gains nothing from lists of nonzeros, so its zeros are not counted.
        x = call.x
        self.counts_zeros = s.cin > 2
        dense = x.is_contiguous() or (
            x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        )
        self.count = x.numel() if self.counts_zeros and dense else 0
        self.dtype = DTYPES.index(s.dtype)
        self._ways: dict[tuple[int, int], _Way] = {}

    def cell_of(self, time: int) -> Any:
        """The core's description of a call of so many steps."""
        return tensors.make_cell(_C, self.signature, time)

    def choose(self, call: Call) -> Choice:
        """Decide what depends on the values of x and weight."""
        x = call.x.data_ptr() if self.count else 0
        packed, percent = look_up(call.weight, x, self.dtype, self.count)
        if self.counts_zeros and not self.count:
            percent = round(100 * int(torch.count_nonzero(call.x)) / max(call.x.numel(), 1))
        key = percent, packed.most_inputs
        way = self._ways.get(key)
        if way is None:
            way = self._ways[key] = _Way(self, *key)
        return Choice(self, way, packed)

    def empty_saved(self, x: Tensor) -> Saved:
        """What the forward pass keeps in training, uninitialised."""
        if self.huge:
            return Saved(*(memory.empty(shape, kind) for shape, kind in self.saved_shapes))
        return super().empty_saved(x)


class Choice:
    """The kernels that run one call and its backward pass.

    ``packed`` is the weight. The backward pass lets go of it: a graph that is kept keeps no weight
    alive.
    """

    __slots__ = ("loop_key", "name", "packed", "plan", "saved_shapes", "way")
    sums_bias = True  # a loop's step forms its part of the bias gradient in its backward pass

    def __init__(self, plan: Plan, way: _Way, packed: Packed | None) -> None:
        self.plan, self.way, self.packed, self.name = plan, way, packed, way.name
        self.loop_key, self.saved_shapes = plan.loop_key, plan.saved_shapes

    def forward(self, call: Call, training: bool) -> Result:
        """Run the forward kernels; `training`: keep what :meth:`backward` needs."""
        plan, way = self.plan, self.way
        x = call.x
        spk, new_syn, new_mem = plan.empty_results(x)
        if plan.huge:
            _prefer_huge_pages(spk, new_syn, new_mem)
        saved = plan.empty_saved(x) if training else None
        dtype = x.dtype
        bias = None if call.bias is None else tensors.numbers(call.bias, dtype)
        threshold = tensors.numbers(call.threshold, dtype)
        graded = tensors.numbers(call.graded, dtype)
        workspace = memory.workspace(way.workspace)
        assert self.packed is not None
        way.core.forward(
            **self.packed.addresses(way.core, way.forms),
            record=plan.record,
            x=(x.data_ptr(), plan.x5),
            syn0=(call.syn.data_ptr(), plan.syn5),
            mem0=(call.mem.data_ptr(), plan.mem5),
            bias=address(bias),
            threshold=threshold.data_ptr(),
            threshold_stride=plan.threshold_stride,
            graded=graded.data_ptr(),
            levels=plan.levels_address,
            spk=(spk.data_ptr(), plan.spk5),
            syn=(new_syn.data_ptr(), plan.state5),
            mem=(new_mem.data_ptr(), plan.state5),
            saved_gates=0 if saved is None else saved.gates.data_ptr(),
            saved_syn=0 if saved is None else saved.syn.data_ptr(),
            half_gates=plan.half_gates,
            winner=saved.winner.data_ptr() if saved is not None and plan.has_winner else 0,
            workspace=workspace.data_ptr(),
        )
        return Result(spk, new_syn, new_mem, saved)

    def backward(
        self,
        call: Call,
        saved: Saved,
        grads: Sequence[Tensor | None],
        wanted: Sequence[bool],
        d_gates: Tensor | None = None,
        steps: int = _STEPS_OF_LOOP,
    ) -> Gradients:
        """Run the backward kernels on what :meth:`forward` was given and kept.

        `grads`, of spk, syn and mem, may have any memory layout, and None stands for zeros.
        `wanted` says which gradients are computed, in the order of :class:`Gradients`. `d_gates`,
        if given, has the shape of ``saved.gates``, may be that, and gets the gradient of the gate
        sums. A step call's loop has so many `steps`.
        """
        plan, x = self.plan, call.x
        dtype = x.dtype
        steps = 1 << min(steps, _STEPS_OF_LOOP).bit_length() - 1  # a power of two: few plans
        core, forms, size = self.way.backward(wanted[0], wanted[3], steps)
        packed, self.packed = self.packed, None
        if packed is None:  # a second backward pass over the same graph
            packed, _ = look_up(call.weight)
        out = tensors.empty_gradients(x, plan.signature, wanted)
        if plan.huge:
            _prefer_huge_pages(*out)
        threshold = tensors.numbers(call.threshold, dtype)
        graded = tensors.numbers(call.graded, dtype)
        noise = tensors.stochastic_noise(x, call.options, grads[0])
        workspace = memory.workspace(size)
        core.backward(
            **packed.addresses(core, forms),
            **tensors.backward_arguments(call, saved, grads, noise, out, None),
            half_gates=plan.half_gates,
            threshold=threshold.data_ptr(),
            threshold_stride=plan.threshold_stride,
            graded=graded.data_ptr(),
            levels=plan.levels_address,
            workspace=workspace.data_ptr(),
        )
        return tensors.shaped_as(call.threshold, out)


def _prefer_huge_pages(*results: Tensor | None) -> None:
    """Let huge pages back those tensors that are large; nobody must have written to them yet."""
    for result in results:
        if result is not None and result.nbytes >= memory.SMALLEST:
            _C.prefer_huge_pages(result.data_ptr(), result.nbytes)


class Kernels:
    """The CPU half of the core."""

    half_types = False  # whether float16 and bfloat16 run as they are

    def name(self) -> str:
        """Name of the kernels, such as ``"cpu-avx2"``; a call's :class:`Choice` says more."""
        return f"cpu-{isa}"

    def reason_against(self, signature: Signature) -> str | None:
        """Why these kernels cannot run a call; None if they can.

        Under autocast they compute in float32, and half types come as that (autograd.run).
        """
        dtype = signature.dtype
        return None if dtype in DTYPES else f"there are no CPU kernels for {dtype}"

    def settings(self, signature: Signature) -> tuple[Any, ...]:
        """The process's settings that a plan depends on."""
        return torch.get_num_threads(), isa

    def plan(self, call: Call, algorithm: str, settings: tuple[Any, ...]) -> Plan:
        """The plan of calls like this one."""
        return Plan(self, call, algorithm, *settings)

    def saved_shapes(self, signature: Signature) -> Shapes:
        """Shapes and dtypes of what a forward pass keeps."""
        s = signature
        padded = _C.cpu_padded_channels(DTYPES.index(s.dtype), s.c)
        images = (s.time, s.n, s.ho * s.wo)
        gates = (*images, 4 * padded), s.dtype
        if s.options.checkpoint == "gates":  # words, which a hook on saved tensors must not round
            gates = (*images, 2 * padded), torch.int64 if s.dtype == torch.float64 else torch.int32
        return (
            gates,
            ((*images, padded), s.dtype),
            ((s.time, s.n) if s.options.inhibition else (0,), torch.int64),
        )
