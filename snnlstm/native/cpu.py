"""The CPU backend: plans, and weights in the kernels' order. Twin of :mod:`snnlstm.native.cuda`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch  # before the core, which uses the OpenMP runtime that torch has loaded
from torch import Tensor

from .. import _C
from ..call import Call
from ..spec import DTYPES, HALF_TYPES, CellSpec
from . import pool
from .plan import (
    CommonPlan,
    Gradients,
    Result,
    Shapes,
    Sizes,
    address,
    address_of_numbers,
    check_memory,
    empty_gradients,
    keep_empty,
    make_cell,
    numbers,
    shaped_as,
    stochastic_noise,
)

__all__ = ["ALGORITHMS", "Backend", "PackedWeight", "packed_weight", "set_isa"]

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

_MOST = 1024  # weights of one storage, and sets of forms of a weight; one more, and all are dropped


class Forms(NamedTuple):
    """Forms of a weight that one pass reads."""

    addresses: tuple[int, ...]  # of weight, weight_mem and weight_x; 0 for what is not read
    tensors: Sequence[Tensor]  # which hold them


class PackedWeight:
    """A weight in the forms that the kernels read, and the copy of it that they are made from.

    ``most_inputs`` is the side of the largest Winograd tile whose rounding errors stay small over
    long sequences, or 0 if there is none. ``GAINS`` has the sides, each with the largest gain that
    it admits: the gates' root mean square per unit of input. nn.Conv2d's initial weights have 0.58.
    """

    GAINS: ClassVar = {8: 1.5, 6: 3.0}

    def __init__(self, weight: Tensor) -> None:
        self.copy, count = pool.empty(weight.shape, weight.dtype), weight.numel()
        self.address, self.bytes = self.copy.data_ptr(), self.copy.nbytes
        if weight.dtype in HALF_TYPES:
            self.copy.copy_(weight.detach())
            squares = self.copy.double().square().sum().item()
        else:
            dtype = DTYPES.index(weight.dtype)
            squares = _C.copy_weight(weight.data_ptr(), self.address, dtype, count)
        gain = (squares / max(weight.shape[0], 1)) ** 0.5
        self.most_inputs = max((s for s, most in self.GAINS.items() if gain <= most), default=0)
        self._sets: dict[Any, Forms] = {}  # by numbers, names and sizes
        self._forms: dict[tuple[int, str], Tensor] = {}

    def holds(self, weight: Tensor) -> bool:
        """Whether these are the values of a contiguous weight of this shape."""
        same = weight.dtype is self.copy.dtype
        return same and _C.same(weight.data_ptr(), self.address, self.bytes)

    def forms(self, a_pass: Pass) -> Forms:
        """What a pass reads. Each form is made once for each of the weight's values.

        Forms outside the last sets are freed as soon as no call uses them.
        """
        known = self._sets.get(a_pass.forms)
        if known is not None:
            return known
        if len(self._sets) >= _MOST:
            self._sets, self._forms = {}, {}
        forms = self._forms
        addresses, held = [0, 0, 0], []
        source: Tensor | None = None
        for number, name, size in a_pass.forms:
            form = forms.get((number, name))
            if form is None:
                if source is None:
                    half = self.copy.dtype in HALF_TYPES
                    source = self.copy.float() if half else self.copy
                form = pool.empty((size,), torch.uint8)
                a_pass.core.pack(number, source.data_ptr(), form.data_ptr())
                # Other threads may look, so the form is kept when it is whole; and the first stays,
                # because another thread may have taken its address meanwhile.
                form = forms.setdefault((number, name), form)
            addresses[number % 3] = form.data_ptr()
            held.append(form)
        read = self._sets[a_pass.forms] = Forms(tuple(addresses), held)
        return read


# The packed weights that live, by storage and by place: many weights may lie in one storage.
# Tensors do not serve as keys, because torch refuses to swap the contents of tensors that have weak
# references. There is no lock: the worst that two threads do to each other is to pack a weight
# twice, while a lock could be held across a fork or a signal.
_packed: WeakKeyDictionary[torch.UntypedStorage, dict[tuple[Any, ...], PackedWeight]] = (
    WeakKeyDictionary()
)


def packed_weight(weight: Tensor, last: PackedWeight | None = None) -> PackedWeight:
    """The packed form of a weight, looked up or made; `last` is a guess, which saves the look-up.

    Neither addresses nor version counters tell whether the weight's values are those that were
    packed: ``weight.data.add_(...)`` changes neither of them. So the values are compared byte for
    byte, which takes one to three hundredths of a step, or more if a wide layer has small images.
    """
    contiguous = weight if weight.is_contiguous() else weight.detach().contiguous()
    if last is not None and last.holds(contiguous):
        return last
    storage = weight.untyped_storage()
    entries = _packed.get(storage)
    if entries is None:
        entries = _packed.setdefault(storage, {})
    place = weight.storage_offset(), weight.shape, weight.stride(), weight.dtype
    packed = entries.get(place)
    if packed is not None and packed.holds(contiguous):
        return packed
    if packed is None and len(entries) >= _MOST:
        entries.clear()
    packed = entries[place] = PackedWeight(contiguous)
    return packed


# ---- plans ---------------------------------------------------------------------------------------


Decided = tuple[int, int]
"""What the values of a call decide of its algorithms.

The percentage of x's numbers that are not zero, and :attr:`PackedWeight.most_inputs`.
"""


class Pass:
    """One pass of a plan: the core's plan, the forms of the weight that it reads, its workspace."""

    def __init__(
        self, core: Any, isa: str, decided: Decided, backward: bool, grad_x: bool, weight: bool
    ) -> None:
        self.core, self.decided = core, decided
        self.name = f"cpu-{isa}-{core.name}"
        self.run = core.backward if backward else core.forward
        self.workspace = core.backward_workspace(weight) if backward else core.forward_workspace
        # The number, the name and the bytes of each form.
        self.forms = tuple(
            (number, f"{isa}:{name}", size) for number, name, size in core.forms(backward, grad_x)
        )


class Plan(CommonPlan):
    """The plan of a call on the CPU; see :class:`snnlstm.native.plan.Plan`.

    The density of x and the gain of the weight decide the algorithms of a call.
    """

    def __init__(
        self, backend: Backend, call: Call, spec: CellSpec, operands: Any, settings: Any
    ) -> None:
        super().__init__(backend, call, spec, operands)
        _, algorithm, self.threads, self.isa = settings
        self.algorithm = ALGORITHMS.index(algorithm) if algorithm in ALGORITHMS else 0
        self.cell = make_cell(_C, self)
        results = math.prod(self.spk_memory[0]), math.prod(self.state_memory[0])
        self.largest_result = self.dtype.itemsize * max(results)
        quant = spec.quant
        self.levels = None if quant is None else quant.levels.to(self.dtype).contiguous()
        self.levels_address = address(self.levels)
        # An x of few channels gains nothing from lists of nonzeros, so its zeros are not counted.
        self.counts_zeros = self.cin > 2
        self._last_packed: Callable[[], PackedWeight | None] = lambda: None
        self._threshold: Tensor | None = None
        self._cores: dict[Decided, Any] = {}
        self._passes: dict[Any, Pass] = {}
        self._forward_passes: dict[tuple[int, int], Pass] = {}

    def _pass(self, decided: Decided, backward: bool, grad_x: bool, weight: bool) -> Pass:
        key = decided, backward, grad_x, weight
        known = self._passes.get(key)
        if known is None:
            core = self._cores.get(decided)
            if core is None:
                percent, most = decided
                arguments = self.cell, self.algorithm, percent / 100, most, self.threads
                core = self._cores[decided] = _C.CpuPlan(*arguments)
            known = Pass(core, self.isa, decided, backward, grad_x, weight)
            self._passes[key] = known
            if not backward:
                self._forward_passes[decided] = known
        return known

    def empty_results(self, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """Memory for spk, syn and mem; large ones lie in blocks that are used again."""
        if self.largest_result < pool.MAPPED:
            return super().empty_results(call)
        kinds = self.spk_memory, self.state_memory, self.state_memory
        return tuple(self._empty_result(call.x, *kind) for kind in kinds)  # type: ignore[return-value]

    def _empty_saved(self, x: Tensor) -> Tensor:
        size = self.saved.bytes
        if size >= pool.SMALLEST:
            return pool.empty((size,), torch.uint8)
        return x.new_empty(size, dtype=torch.uint8)

    def _empty_result(self, x: Tensor, shape: Any, strides: Any) -> Tensor:
        if math.prod(shape) * x.itemsize >= pool.MAPPED:
            return pool.empty_strided(shape, strides, x.dtype)
        return x.new_empty_strided(shape, strides)

    def copy_of(self, threshold: Tensor) -> Tensor:
        """A copy of the threshold, for the backward pass; the last one serves for equal values."""
        copy = self._threshold
        if (
            copy is None
            or copy.shape != threshold.shape
            or not self.reads_as_is
            or not _C.same(threshold.data_ptr(), copy.data_ptr(), copy.nbytes)
        ):
            copy = self._threshold = threshold.clone()
        return copy

    def forward(self, call: Call, training: bool) -> Result:
        """Run the forward kernels; in training, save what :meth:`backward` needs."""
        x, syn, mem, weight, bias, threshold, graded, lengths, record = call
        x_at, syn_at, mem_at = x.data_ptr(), syn.data_ptr(), mem.data_ptr()
        if not (x_at and syn_at and mem_at and weight.data_ptr()):
            check_memory(call)
        packed = packed_weight(weight, self._last_packed())
        if packed is not self._last_packed():
            self._last_packed = ref(packed)
        percent, lengths_at, order = 100, 0, None
        if lengths is not None:
            lengths_at, order = lengths.data_ptr(), longest_first(lengths)
        if self.counts_zeros:
            percent = _C.density(self.cell, (x_at, self.x5), lengths_at)
        a_pass = self._forward_passes.get((percent, packed.most_inputs))
        if a_pass is None:
            a_pass = self._pass((percent, packed.most_inputs), False, False, False)
        forms = packed.forms(a_pass)
        spk, new_syn, new_mem = self.empty_results(call)
        saved = self._empty_saved(x) if training else None
        if not self.reads_as_is:
            bias, threshold, graded = (
                None if t is None else numbers(t, self.dtype) for t in call[4:7]
            )
        bias_at = 0 if bias is None else bias.data_ptr()
        threshold_at = 0 if threshold is None else threshold.data_ptr()
        graded_at = 0 if graded is None else graded.data_ptr()
        if (
            (bias is not None and not bias_at)
            or (threshold is not None and not threshold_at)
            or (graded is not None and not graded_at)
        ):
            check_memory(call)
        workspace = pool.workspace(a_pass.workspace)
        addresses = (
            (x_at, self.x5), (syn_at, self.syn5), (mem_at, self.mem5), *forms.addresses,
            threshold_at, self.threshold_stride, graded_at, self.levels_address, record,
            *self.saved.addresses(saved),
            lengths_at, address(order), workspace.data_ptr(), bias_at, None, None,
            (spk.data_ptr(), self.spk5) if self.has_spk else None,
            (new_syn.data_ptr(), self.state5), (new_mem.data_ptr(), self.state5),
        )  # fmt: skip
        a_pass.run(addresses)
        pool.let_go(workspace)
        if lengths is not None and not record:
            keep_empty(call, (new_syn, new_mem), (syn, mem))
        return Result(spk, new_syn, new_mem, saved, a_pass.name, a_pass.decided, packed)

    def backward(
        self,
        call: Call,
        saved: Tensor,
        grads: Sequence[Tensor | None],
        wanted: Sequence[bool],
        decided: Sequence[int],
        packed: PackedWeight | None,
    ) -> Gradients:
        """Run the backward kernels on what :meth:`forward` was given and saved."""
        call, saved, views = self.as_saved(call, saved)
        lengths = call.lengths
        order = None if lengths is None else longest_first(lengths)
        a_pass = self._pass((decided[0], decided[1]), True, wanted[0], wanted[3])
        if packed is None:  # in torch.compile's graph, which keeps only tensors
            packed = packed_weight(self.saved_weight(call))
        forms = packed.forms(a_pass)
        threshold_at, _threshold = address_of_numbers(call.threshold, self.dtype)
        graded_at, _graded = address_of_numbers(call.graded, self.dtype)
        noise = stochastic_noise(self, grads[0])
        workspace = pool.workspace(a_pass.workspace)
        out = empty_gradients(call.x, self.gradient_memory, wanted)
        addresses = (
            *views, *forms.addresses,
            threshold_at, self.threshold_stride, graded_at, self.levels_address, call.record,
            *self.saved.addresses(saved), address(lengths), address(order),
            workspace.data_ptr(), *self.gradient_addresses(grads, noise, out), 0, 0,
        )  # fmt: skip
        a_pass.run(addresses)
        pool.let_go(workspace)
        if lengths is not None:
            into = (None, None) if call.record else grads[1:]
            keep_empty(call, (out.syn, out.mem), into)
        return shaped_as(call.threshold, out)


def longest_first(lengths: Tensor) -> Tensor:
    """The samples in the order of their numbers of steps, the longest first."""
    return lengths.argsort(descending=True, stable=True)


class Backend:
    """The CPU backend; see :class:`snnlstm.native.function.Backend`."""

    half_types = False

    def name(self) -> str:
        """Name of the kernels, such as ``"cpu-avx2"``; that of a call's result says more."""
        return f"cpu-{isa}"

    def settings(self, algorithm: str) -> tuple[Any, ...]:
        """The process's settings that a plan depends on."""
        return self, algorithm, 1 if ONE_THREAD else torch.get_num_threads(), isa

    def plan(self, call: Call, spec: CellSpec, operands: Any, settings: tuple[Any, ...]) -> Plan:
        """The plan of calls like this one."""
        return Plan(self, call, spec, operands, settings)

    def reason_against(self, s: Sizes) -> str | None:
        """Why these kernels cannot run a call; None if they can.

        Under autocast they compute in float32, and half types come as that (function.run).
        """
        return None if s.dtype in DTYPES else f"there are no CPU kernels for {s.dtype}"

    def saved_shapes(self, s: Sizes) -> Shapes:
        """Shapes and dtypes of what a forward pass saves."""
        padded = _C.cpu_padded_channels(DTYPES.index(s.dtype), s.c)
        images = (s.time, s.n, s.ho * s.wo)
        return (
            ((*images, 4 * padded), s.dtype),
            ((*images, padded), s.dtype),
            *s.decisions(padded),
        )

    def leaky(self, fields: tuple[Any, ...], backward: bool, device: torch.device) -> None:
        """Run a pass of a Leaky, whose arguments are `fields` (csrc/args.h)."""
        (_C.leaky_backward if backward else _C.leaky_forward)(fields)
