"""The CUDA backend: plans and calls. Twin of :mod:`snnlstm.native.cpu`.

Everything is enqueued on the current stream of the tensors' device and nothing waits for it, so
that a CUDA graph can capture it. All memory comes from torch's caching allocator.

Weights are packed anew in every call, in one small kernel: their values cannot be compared
without waiting for the GPU, and neither version counters nor addresses show every change. In
training the kernel also packs for the backward pass, and autograd saves that copy. As a loop would
save one per step, the backward pass packs a large weight again instead.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..calls.call import Call
from ..calls.spec import CellSpec
from ..compat.torch_private import current_stream, fp32_precision
from . import cudnn
from .cudnn import Geometry
from .plan import (
    BackwardInputs,
    CommonBackend,
    CommonPlan,
    Fields,
    Gradients,
    Outs,
    Result,
    Settings,
    Shapes,
    Sizes,
    empty_gradients,
    make_cell,
)
from .tensors import check_memory, contiguous_as, empty_bytes, pointer, real

logger = logging.getLogger("snnlstm")

# The order is that of csrc/cuda/plan.h; "direct" means "fused".
_ALGORITHMS = ("auto", "fused", "cudnn")
_CUDNN = _ALGORITHMS.index("cudnn")
_EXACT, _TF32 = 0, 1
_OPERANDS = {torch.float16: 3, torch.bfloat16: 4}

KEPT_WEIGHT = 256 << 10
"""Bytes of the largest packed weight that a call in training saves for its backward pass."""

_ROUNDS = 3  # timed runs of an algorithm, after one untimed run; the shortest counts


def _tf32_is_allowed() -> bool:
    """Whether torch's setting for its own convolutions allows TF32, as it does by default."""
    if fp32_precision is None:
        return torch.backends.cudnn.allow_tf32
    return fp32_precision("cuda", "conv") == "tf32"


class Plan(CommonPlan):
    """The plan of a call on CUDA, which has a plan of the core for each pass.

    Nothing depends on values, and each algorithm can read what another one has saved:

    - "fused": the kernels do everything, in one launch per step
    - "cudnn": torch convolves, and the kernels do the rest of a step

    The core's rules choose, or a measurement does: see :func:`snnlstm.set_algorithm`.
    """

    def __init__(
        self, backend: Backend, call: Call, spec: CellSpec, operands: Any, settings: Settings
    ) -> None:
        super().__init__(backend, call, spec, operands)
        algorithm, tf32, benchmark = settings.algorithm, settings.tf32, settings.benchmark
        self.backend, self._tf32, self._algorithm = backend, tf32, algorithm
        self._measures = algorithm == "measure" or (benchmark and algorithm == "auto")
        self._chosen = {False: backend.core_plan(self, tf32, algorithm, False)}
        # The fastest plans, at most 65, by pass and by the gradients that are wanted.
        self._measured: dict[tuple[bool, ...], Any] = {}
        self._name: str | None = None
        self.geometry = Geometry(*self._chosen[False].geometry)
        # cuDNN is said to have fast kernels of full float32 only for contiguous images.
        self.contiguous = (
            self.work == torch.float32 and backend.device(self.device).compute_capability < 80
        )
        self.real = real(self.dtype)
        # cuDNN convolves x of this many steps at once, in self.real. For half types that would be
        # slower without tensor cores for float32.
        sums = 4 * math.prod(self.state) * self.real.itemsize
        self.steps_at_once = min(self.time, max(cudnn.MOST_SUMS // max(sums, 1), 1))
        if self.work.itemsize == 2 and backend.device(self.device).compute_capability < 80:
            self.steps_at_once = 1
        # Each call copies the levels from the host to the device.
        levels = None if spec.quant is None else spec.quant.levels
        self.levels = None if levels is None else levels.to("cpu", torch.float64).contiguous()

    @property
    def name(self) -> str:
        """The name of what runs, as in a path; a measured pass is named once it is known.

        An unmeasured backward pass is named, too, if it leaves other convolutions to torch.
        """
        name = self._name = self._name or self._named()  # another thread may reset it
        return name

    def _named(self) -> str:
        # Autograd's thread may add to self._measured meanwhile.
        by_pass = {key[0]: core.name for key, core in self._measured.copy().items()}
        names = [by_pass[backward] for backward in (False, True) if backward in by_pass]
        if names:
            return f"{self.backend.name()}-measured-{'+'.join(names)}"
        forward, backward = self._chosen[False], self._chosen.get(True)
        names = [forward.name]
        if backward is not None and backward.algorithm != forward.algorithm:
            names += [backward.name] if _CUDNN in (forward.algorithm, backward.algorithm) else []
        return f"{self.backend.name()}-{'+'.join(names)}"

    def _fastest(self, run: Callable[[Any], object], backward: bool, *wanted: bool) -> Any:
        """The core's plan of a pass, measured if that is wanted and not yet known.

        `run` runs the pass with a plan; `wanted` has what else its time depends on.
        """
        if not self._measures and backward in self._chosen:
            return self._chosen[backward]
        self._name = None  # a new measurement may change the name
        key = backward, *wanted
        found = self._measured.get(key)
        if found is None and self._measures and self.backend.may_measure():
            cores = self.backend.candidates(self, self._tf32, backward)
            seconds = [self.backend.seconds(partial(run, core)) for core in cores]
            # setdefault keeps the first of two threads' measurements.
            found = self._measured.setdefault(key, cores[seconds.index(min(seconds))])
        return self._chosen_for(backward) if found is None else found

    def _chosen_for(self, backward: bool) -> Any:
        """The core's plan of a pass that is not measured; the backward plan is made when needed.

        Each candidate for the backward pass that packs a weight packs it as this plan does.
        """
        if backward not in self._chosen:
            self._name = None
            self._chosen[backward] = self.backend.core_plan(
                self, self._tf32, self._algorithm, backward
            )
        return self._chosen[backward]

    @property
    def stream(self) -> int:
        """The current stream of the call's device."""
        return self.backend.stream(self.device)

    def _levels(self, x: Tensor) -> Tensor | None:
        """The quantiser's levels on the device."""
        if self.levels is None:
            return None
        levels = x.new_empty(self.levels.numel(), dtype=self.real)
        values = self.levels.data_ptr()
        self._chosen[False].store_levels(values, levels.data_ptr(), self.stream)
        return levels

    def _memory(
        self, core: Any, weight: Tensor, stream: int, kept: Tensor | None = None
    ) -> tuple[int, int, Tensor]:
        """Addresses of the packed weight and of a workspace, and the memory that holds both.

        `kept`, if given, receives the weight as the backward pass reads it.
        """
        weight = contiguous_as(weight, self.dtype)
        workspace = -core.packed_bytes // 256 * -256
        memory = empty_bytes(workspace + core.workspace, weight.device)
        packed = memory.data_ptr()
        other = () if kept is None else (self._chosen_for(True), kept.data_ptr())
        core.pack(weight.data_ptr(), packed, stream, *other)
        return packed, packed + workspace, memory

    def _empty_kept(self, x: Tensor) -> Tensor | None:
        """Memory for the weight as the backward pass reads it, if a call in training saves it."""
        size = self._chosen_for(True).packed_bytes
        return empty_bytes(size, x.device) if 0 < size <= KEPT_WEIGHT else None

    def _forward(self, call: Call, outs: Outs, saved: Tensor | None, fields: Fields) -> Result:
        with self.backend.guard(self.device):
            kept = None if saved is None else self._empty_kept(call.x)
            if call.lengths is not None:
                outs[0].zero_()  # the host does not know the lengths
            levels = self._levels(call.x)

            def run(core: Any) -> None:
                stream, levels_at = self.stream, pointer(levels)
                if core.algorithm == _CUDNN:
                    check_memory(call)
                    kernels = partial(core.forward, stream)
                    cudnn.forward(self, kernels, call, levels_at, outs, saved)
                    return
                packed, workspace, _held = self._memory(core, call.weight, stream, kept)
                core.forward(stream, (workspace, packed, 0, 0, levels_at, 0, *fields))

            fastest = self._fastest(run, False)
            run(fastest)
        if fastest.algorithm == _CUDNN:  # it packs nothing
            kept = None
        return Result(*outs, saved, self.name, packed=kept)

    def _backward(
        self, given: BackwardInputs, selection: Sequence[int], packed: Tensor | None
    ) -> Gradients:
        weight = self.restored_weight(given.call)
        if weight is not given.call.weight:
            given = given._replace(call=given.call._replace(weight=weight))
        with self.backend.guard(self.device):
            levels = self._levels(given.call.x)

            def run(core: Any) -> Gradients:
                return self._backward_by(core, given, pointer(levels), packed)

            return run(self._fastest(run, True, *given.wanted))

    def _backward_by(
        self, core: Any, given: BackwardInputs, levels: int, kept: Tensor | None
    ) -> Gradients:
        """The gradients; `kept` is the packed weight, if the forward pass has saved it."""
        call, stream = given.call, self.stream
        if core.algorithm == _CUDNN:
            memory = empty_bytes(core.workspace, self.device)

            def run(fields: Fields) -> None:
                core.backward(stream, (pointer(memory), 0, 0, 0, levels, 0, *fields))

            return cudnn.backward(self, given, run)
        out = empty_gradients(call.x, self.gradient_memory, given.wanted)
        if call.lengths is not None and out.x is not None:
            out.x.zero_()
        if kept is None:
            packed, workspace, _held = self._memory(core, call.weight, stream)
        else:
            block = self.restored_block(kept, core.packed_bytes)
            _held = empty_bytes(core.workspace, self.device)
            packed, workspace = block.data_ptr(), _held.data_ptr()
        fields = self.backward_fields(given, out, (0, 0))
        core.backward(stream, (workspace, packed, 0, 0, levels, 0, *fields))
        return out


class Backend(CommonBackend):
    """The CUDA backend over `core`, a module like snnlstm._C."""

    half_types, plan = True, Plan

    def __init__(self, core: Any) -> None:
        self.core = core
        self._devices: dict[torch.device, Any] = {}

    def name(self) -> str:
        """Name of the kernels; a call's name also says what they multiply with."""
        return "cuda"

    def guard(self, device: torch.device) -> AbstractContextManager:
        """Make `device` the current one within a ``with`` block."""
        return torch.cuda.device(device)

    def stream(self, device: torch.device) -> int:
        """The current stream of `device`."""
        return current_stream(device.index)

    def may_measure(self) -> bool:
        """Whether kernels may be timed now; timing waits for the GPU, and its result varies."""
        return not (
            torch.cuda.is_current_stream_capturing() or torch.are_deterministic_algorithms_enabled()
        )

    def seconds(self, run: Callable[[], object]) -> float:
        """The GPU's shortest time for a run; infinity if its memory is too small."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times = []
        try:
            run()  # this run loads the kernels and allocates the memory
            for _ in range(_ROUNDS):
                start.record()
                run()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end) / 1e3)
        except torch.cuda.OutOfMemoryError:
            return math.inf
        except RuntimeError as error:  # a kernel or cuDNN refused; other candidates may run
            logger.warning("a candidate is not timed: %s", error)
            return math.inf
        return min(times)

    def device(self, device: torch.device) -> Any:
        """What the core knows about a device."""
        if device not in self._devices:
            self._devices[device] = self.core.cuda_device(device.index)
        return self._devices[device]

    def _facts(self, s: Sizes, tf32: bool) -> tuple[Any, Any, int]:
        """The core's cell and device, and the type of the numbers that convolutions multiply."""
        device, matrix = self.device(s.device), _EXACT
        if s.operands is not None:
            matrix = _OPERANDS[s.operands]
        elif s.dtype == torch.float32:
            matrix = _TF32 if tf32 else self.core.cuda_full_precision(device)
        return make_cell(self.core, s), device, matrix

    def core_plan(self, s: Sizes, tf32: bool, algorithm: str, backward: bool, **blocks: Any) -> Any:
        """The core's plan of a pass; a step may have only the `blocks`, if any are given."""
        algorithm = "fused" if algorithm == "direct" else algorithm
        number = _ALGORITHMS.index(algorithm) if algorithm in _ALGORITHMS else 0
        return self.core.CudaPlan(
            *self._facts(s, tf32), number, backward, lengths=s.has_lengths, **blocks
        )

    def candidates(self, s: Sizes, tf32: bool, backward: bool) -> list[Any]:
        """The core's plans of a pass to time; if two are equally fast, the first one counts."""
        return self.core.CudaPlan.candidates(*self._facts(s, tf32), backward, lengths=s.has_lengths)

    def reason_against(self, s: Sizes) -> str | None:
        """Why these kernels cannot run a call; None if they can."""
        plans = (
            self.core_plan(s, _tf32_is_allowed(), "fused", backward) for backward in (False, True)
        )
        return next((plan.reason_against for plan in plans if plan.reason_against), None)

    def settings(self, algorithm: str) -> Settings:
        benchmark = torch.backends.cudnn.benchmark
        return Settings(algorithm, tf32=_tf32_is_allowed(), benchmark=benchmark)

    def saved_shapes(self, s: Sizes) -> Shapes:
        padded = self.core.cuda_padded_channels(s.c)
        pixels = s.ho * s.wo
        return (
            ((s.time, s.n, pixels, 4 * padded), s.operands or s.dtype),
            ((s.time - 1, s.n, pixels, padded), s.dtype),
            *s.decisions(s.c),
        )

    def leaky(self, fields: Fields, backward: bool, device: torch.device) -> None:
        core = self.core
        with self.guard(device):
            run = core.cuda_leaky_backward if backward else core.cuda_leaky_forward
            run(self.device(device), self.stream(device), fields)
