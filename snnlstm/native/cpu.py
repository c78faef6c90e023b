"""The CPU backend: plans, and weights in the kernels' order. Twin of :mod:`snnlstm.native.cuda`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch  # before the core, which uses the OpenMP runtime that torch has loaded
from torch import Tensor

from .. import _C
from ..call import Call, Signature
from ..options import DTYPES
from . import memory, tensors
from .tensors import Gradients, Result, Saved, Shapes, address

__all__ = ["ALGORITHMS", "Backend", "Packed", "look_up", "set_isa"]

ALGORITHMS = ("auto", "direct", "winograd")  # the numbers of csrc/args.h

NO_THREADS = None if _C.openmp_library() else "no OpenMP runtime of torch's was found"
"""Why no CPU kernels can run, or None."""

isa = _C.isa_name()


def set_isa(name: str) -> None:
    """Use the kernels of an instruction set that ``_C.isa_names()`` lists, in the whole process."""
    global isa
    _C.set_isa(name)
    isa = name


# ---- packed weights ------------------------------------------------------------------------------

_WEIGHTS = ("weight", "weight_mem", "weight_x")  # the places of the forms, csrc/cpu/api.h: Form
_MOST = 16  # weights of one storage whose forms are kept, and plans whose addresses a weight knows


class Packed:
    """A weight in the forms that the kernels read, and the copy of it that they are made from.

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
        self._found: dict[Any, dict[str, int]] = {}  # addresses, by the pass of a plan

    def addresses(self, a_pass: _Pass) -> dict[str, int]:
        """Addresses of the forms that a pass reads, by the names of the core's arguments.

        Each form, told by its number and name, is made once for each of the weight's values.
        """
        found = self._found.get(a_pass)
        if found is not None:
            return found
        found = {}
        for number, name, size in a_pass.forms:
            key = number, name
            form = self.forms.get(key)
            if form is None:
                form = memory.empty((size,), torch.uint8)
                a_pass.core.pack(number, self.address, form.data_ptr())
                # Other threads may look, so the form is kept when it is whole; and the first stays,
                # because another thread may have taken its address meanwhile.
                form = self.forms.setdefault(key, form)
            found[_WEIGHTS[number % 3]] = form.data_ptr()
        if len(self._found) >= _MOST:
            self._found.clear()
        self._found[a_pass] = found
        return found


# The packed weights that live, by storage and by place: many weights may lie in one storage.
# Tensors do not serve as keys, because torch refuses to swap the contents of tensors that have weak
# references. There is no lock: the worst that two threads do to each other is to pack a weight
# twice, while a lock could be held across a fork or a signal.
_packed: WeakKeyDictionary[torch.UntypedStorage, dict[tuple[Any, ...], Packed]] = (
    WeakKeyDictionary()
)


def look_up(weight: Tensor, cell: Any, x: Any = None, lengths: int = 0) -> tuple[Packed, int]:
    """The packed form of a weight, and the density of x in hundredths; one call of the core.

    `cell` describes x, which is given as its address and five strides; without x the density is
    100. What lies behind the last step of a sample does not count. Neither addresses nor version
    counters tell whether the weight's values are those that were packed:
    ``weight.data.add_(...)`` changes neither of them. So the values are compared byte for byte,
    which takes one to three hundredths of a step, or more if a wide layer has small images.
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
        percent = _C.inspect(contiguous.data_ptr(), *own, cell, x, lengths)
        if percent >= 0:
            return packed, percent
    entries.pop(place, None)
    too_many = max(len(entries) - _MOST + 1, 0)
    for oldest in list(entries)[:too_many]:  # a copy, because other threads drop entries, too
        entries.pop(oldest, None)
    packed = entries[place] = Packed(contiguous)
    return packed, _C.inspect(0, 0, 0, cell, x, lengths)


# ---- plans ---------------------------------------------------------------------------------------


class _Pass:
    """One pass of a plan: the core's plan, the forms of the weight that it reads, its workspace."""

    def __init__(
        self, core: Any, isa: str, workspace: int, backward: bool = False, grad_x: bool = False
    ) -> None:
        self.core, self.workspace = core, workspace
        self.name = f"cpu-{isa}-{core.name}"
        # The number, the name and the bytes of each form.
        self.forms = [
            (number, f"{isa}:{name}", size) for number, name, size in core.forms(backward, grad_x)
        ]


class Plan(tensors.CommonPlan):
    """The plan of a call on the CPU; see :class:`snnlstm.native.backend.Plan`.

    The density of x and the gain of the weight decide the algorithms of a call. The number that
    says so is ``16 * percent + most_inputs``.
    """

    contiguous = True  # oneDNN's gradients of channels-last images can take ten times as long

    def __init__(
        self, backend: Backend, call: Call, algorithm: str, threads: int, isa: str
    ) -> None:
        super().__init__(backend, call)
        s, o = self.signature, self.signature.options
        self.algorithm = ALGORITHMS.index(algorithm) if algorithm in ALGORITHMS else 0
        self.threads, self.isa = threads, isa
        self.cell = tensors.make_cell(_C, s)
        largest = max(math.prod(shape) * dtype.itemsize for shape, dtype in self.saved_shapes)
        self.saves_blocks = largest >= memory.SMALLEST  # which are used again, by memory.py
        itemsize = s.dtype.itemsize
        self.largest_result = itemsize * max(math.prod(of[0]) for of in (self.spk, self.state))
        self.levels = None if o.quant is None else o.quant.levels.to(s.dtype).contiguous()
        self.levels_address = address(self.levels)
        # An x of few channels gains nothing from lists of nonzeros, so its zeros are not counted.
        self.counts_zeros = s.cin > 2
        self._cores: dict[int, Any] = {}
        self._passes: dict[Any, _Pass] = {}

    def _forward_pass(self, decided: int) -> _Pass:
        core = self._core(decided)
        made = _Pass(core, self.isa, core.forward_workspace)
        self._passes[decided] = made
        return made

    def _backward_pass(self, decided: int, grad_x: bool, grad_weight: bool) -> _Pass:
        key = decided, grad_x, grad_weight
        found = self._passes.get(key)
        if found is None:
            core = self._core(decided)
            workspace = core.backward_workspace(grad_weight)
            found = _Pass(core, self.isa, workspace, True, grad_x)
            self._passes[key] = found
        return found

    def _core(self, decided: int) -> Any:
        found = self._cores.get(decided)
        if found is None:
            percent, most_inputs = divmod(decided, 16)
            given = self.cell, self.algorithm, percent / 100, most_inputs, self.threads
            found = _C.CpuPlan(*given)
            self._cores[decided] = found
        return found

    def empty_results(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Memory for spk, syn and mem; large ones lie in blocks that are used again."""
        if not self.largest_result >= memory.MAPPED:
            return super().empty_results(x)
        made = (self._empty_result(x, *result) for result in (self.spk, self.state, self.state))
        return tuple(made)  # type: ignore[return-value]

    def _empty_result(self, x: Tensor, shape: Any, strides: Any) -> Tensor:
        if math.prod(shape) * x.itemsize >= memory.MAPPED:
            return memory.empty_strided(shape, strides, x.dtype)
        return x.new_empty_strided(shape, strides)

    def empty_saved(self, x: Tensor) -> Saved:
        """What the forward pass saves in training, uninitialised."""
        if self.saves_blocks:
            return Saved(*(memory.empty(shape, kind) for shape, kind in self.saved_shapes))
        return super().empty_saved(x)

    def _decide(self, call: Call) -> tuple[int, Packed]:
        """The number that says what runs, and the packed weight."""
        x = (call.x.data_ptr(), self.x5) if self.counts_zeros else None
        packed, percent = look_up(call.weight, self.cell, x, address(call.lengths))
        return 16 * percent + packed.most_inputs, packed

    def forward(self, call: Call, training: bool) -> Result:
        """Run the forward kernels; in training, save what :meth:`backward` needs."""
        x, dtype = call.x, call.x.dtype
        decided, packed = self._decide(call)
        a_pass = self._passes.get(decided) or self._forward_pass(decided)
        spk, new_syn, new_mem = self.empty_results(x)
        lengths, _held = tensors.by_length(call)
        saved = self.empty_saved(x) if training else None
        bias = None if call.bias is None else tensors.numbers(call.bias, dtype)
        threshold = tensors.numbers(call.threshold, dtype)
        graded = tensors.numbers(call.graded, dtype)
        at = x.data_ptr(), call.syn.data_ptr(), call.mem.data_ptr(), threshold.data_ptr()
        at_bias = address(bias)
        if not all(at) or (bias is not None and not at_bias):
            names = ("x", "syn", "mem", "bias", "threshold")
            raise ValueError(tensors.no_memory(**{name: getattr(call, name) for name in names}))
        workspace = memory.workspace(a_pass.workspace)
        parameters = {
            **lengths,
            "bias": at_bias,
            "threshold": at[3],
            "threshold_stride": self.threshold_stride,
            "graded": graded.data_ptr(),
            "levels": self.levels_address,
            "workspace": workspace.data_ptr(),
        }
        result = Result(spk, new_syn, new_mem, saved or (), a_pass.name, decided, packed)
        a_pass.core.forward(
            **packed.addresses(a_pass),
            **parameters,
            record=call.options.record,
            x=(at[0], self.x5),
            syn0=(at[1], self.syn5),
            mem0=(at[2], self.mem5),
            spk=(spk.data_ptr(), self.spk5) if self.has_spk else None,
            syn=(new_syn.data_ptr(), self.state5),
            mem=(new_mem.data_ptr(), self.state5),
            saved_gates=0 if saved is None else saved.gates.data_ptr(),
            saved_syn=0 if saved is None else saved.syn.data_ptr(),
            winner=0 if saved is None else saved.winner.data_ptr(),
            places=0 if saved is None else saved.places.data_ptr(),
        )
        if lengths and not call.options.record:
            tensors.keep_empty(call, (new_syn, new_mem), (call.syn, call.mem))
        return result

    def backward(
        self,
        call: Call,
        saved: Saved,
        grads: Sequence[Tensor | None],
        wanted: Sequence[bool],
        decided: int,
        packed: Packed | None,
    ) -> Gradients:
        """Run the backward kernels on what :meth:`forward` was given and saved."""
        x, dtype = call.x, call.x.dtype
        a_pass = self._backward_pass(decided, wanted[0], wanted[3])
        lengths, _held = tensors.by_length(call)
        threshold = tensors.numbers(call.threshold, dtype)
        graded = tensors.numbers(call.graded, dtype)
        noise = tensors.stochastic_noise(call.options, grads[0])
        workspace = memory.workspace(a_pass.workspace)
        parameters = {
            **lengths,
            "threshold": threshold.data_ptr(),
            "threshold_stride": self.threshold_stride,
            "graded": graded.data_ptr(),
            "levels": self.levels_address,
            "workspace": workspace.data_ptr(),
        }
        if packed is None:  # a second backward pass over the same graph, or a compiled one
            packed, _ = look_up(tensors.saved_weight(call), self.cell)
        out = tensors.empty_gradients(x, self.signature, wanted)
        a_pass.core.backward(
            **packed.addresses(a_pass),
            **tensors.backward_arguments(call, saved, grads, noise, out),
            **parameters,
        )
        if lengths:
            into = (None, None) if call.options.record else grads[1:]
            tensors.keep_empty(call, (out.syn, out.mem), into)
        return tensors.shaped_as(call.threshold, out)


class Backend:
    """The CPU backend; see :class:`snnlstm.native.backend.Backend`."""

    half_types = False

    def name(self) -> str:
        """Name of the kernels, such as ``"cpu-avx2"``; that of a call's result says more."""
        return f"cpu-{isa}"

    def reason_against(self, signature: Signature) -> str | None:
        """Why these kernels cannot run a call; None if they can.

        Under autocast they compute in float32, and half types come as that (function.run).
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
        """Shapes and dtypes of what a forward pass saves."""
        s = signature
        padded = _C.cpu_padded_channels(DTYPES.index(s.dtype), s.c)
        images = (s.time, s.n, s.ho * s.wo)
        return (
            ((*images, 4 * padded), s.dtype),
            ((*images, padded), s.dtype),
            *tensors.of_decisions(s, padded),
        )
