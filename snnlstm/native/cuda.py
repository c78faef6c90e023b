"""The CUDA backend: passes; twin of :mod:`snnlstm.native.cpu`.

Everything is enqueued on the current stream of the tensors' device and nothing waits for it, so
that a CUDA graph can capture it. All memory comes from torch's caching allocator.

Weights are packed anew in every call, in one small kernel: their values cannot be compared
without waiting for the GPU, and neither version counters nor addresses show every change. In
training the kernel also packs for the backward pass, and autograd saves that copy. As a loop would
save one per step, the backward pass packs a large weight again instead. So which weight it reads,
after a change that autograd cannot see, depends on sizes, and is not promised.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor

from ..calls.call import Call, Outputs
from ..compat.torch_private import current_stream, fp32_precision
from . import cudnn
from .plan import (
    BackwardInputs,
    CommonBackend,
    Fields,
    Gradients,
    Plan,
    Settings,
    Shapes,
    Sizes,
    make_cell,
)
from .tensors import check_memory, contiguous_as, empty_bytes, pointer, real, restored

logger = logging.getLogger("snnlstm")

# The order is that of csrc/cuda/pass.h; "direct" means "fused".
_ALGORITHMS = ("auto", "fused", "cudnn")
_CUDNN = _ALGORITHMS.index("cudnn")
_EXACT, _TF32 = 0, 1
_OPERANDS = {torch.float16: 3, torch.bfloat16: 4}

KEPT_WEIGHT = 256 << 10
"""The most bytes of a packed weight that training saves for the backward pass.

It saves none that is larger than what it saves besides.
"""

_ROUNDS = 3  # timed runs of an algorithm, after one untimed run; the shortest counts


def _tf32_is_allowed() -> bool:
    """Whether torch's setting for its own convolutions allows TF32, as it does by default."""
    if fp32_precision is None:
        return torch.backends.cudnn.allow_tf32
    return fp32_precision("cuda", "conv") == "tf32"


class Runner:
    """One pass of a plan, by one of the core's passes: `algorithm` is fused or cudnn."""

    def __init__(self, passes: Passes, core: Any) -> None:
        self.backend, self.plan, self._levels = passes.backend, passes.plan, passes.levels
        self.core, self.algorithm, self.name = core, core.algorithm, core.name
        device = self.backend.device(self.plan.device)
        self._convolutions = cudnn.convolutions(self.plan, core, device)

    def _levels_on(self, x: Tensor, stream: int) -> Tensor | None:
        """The quantiser's levels on the device; each call copies them from the host."""
        if self._levels is None:
            return None
        levels = x.new_empty(self._levels.numel(), dtype=real(x.dtype))
        self.core.store_levels(self._levels.data_ptr(), levels.data_ptr(), stream)
        return levels

    def _memory(
        self, weight: Tensor, stream: int, other: Runner | None = None, kept: Tensor | None = None
    ) -> tuple[int, int, Tensor]:
        """Addresses of the packed weight and of a workspace, and the memory that holds both.

        `kept`, if given, receives the weight as the `other` pass reads it.
        """
        weight = contiguous_as(weight, self.plan.dtype)
        workspace = -self.core.packed_bytes // 256 * -256
        memory = empty_bytes(workspace + self.core.workspace, weight.device)
        packed = memory.data_ptr()
        also = () if other is None else (other.core, pointer(kept))
        self.core.pack(weight.data_ptr(), packed, stream, *also)
        return packed, packed + workspace, memory

    def forward(
        self,
        call: Call,
        outs: Outputs,
        saved: Tensor | None,
        fields: Fields,
        other: Runner | None,
        kept: Tensor | None,
    ) -> None:
        """Run a forward pass; `kept` receives the weight as the `other` pass reads it."""
        stream = self.backend.stream(self.plan.device)
        levels = self._levels_on(call.x, stream)
        if self.algorithm == _CUDNN:
            check_memory(call)
            run_kernels = partial(self.core.run, stream)
            how, levels_at = self._convolutions, pointer(levels)
            return cudnn.forward(self.plan, how, run_kernels, call, levels_at, outs, saved)
        packed, workspace, _held = self._memory(call.weight, stream, other, kept)
        self.core.run(stream, (workspace, packed, 0, 0, pointer(levels), 0, *fields))
        return None

    def backward(self, inputs: BackwardInputs, out: Gradients, fields: Fields) -> Gradients:
        """Run a backward pass, on the weight that the forward pass has packed, if it was saved."""
        call, stream = inputs.call, self.backend.stream(self.plan.device)
        shape = self.plan.gradient_memory[3][0]
        weight = restored(call.weight, shape, self.plan.dtype, self.plan.device)
        levels = self._levels_on(call.x, stream)
        if self.algorithm == _CUDNN:
            memory = empty_bytes(self.core.workspace, self.plan.device)

            def run_kernels(fields: Fields) -> None:
                self.core.run(stream, (pointer(memory), 0, 0, 0, pointer(levels), 0, *fields))

            inputs = inputs._replace(call=call._replace(weight=weight))
            return cudnn.backward(self.plan, self._convolutions, inputs, out, run_kernels)
        if call.lengths is not None and out.x is not None:
            out.x.zero_()
        if inputs.packed is None:
            packed, workspace, _held = self._memory(weight, stream)
        else:
            block = self.plan.restored_block(inputs.packed, self.core.packed_bytes)
            _held = empty_bytes(self.core.workspace, self.plan.device)
            packed, workspace = block.data_ptr(), _held.data_ptr()
        self.core.run(stream, (workspace, packed, 0, 0, pointer(levels), 0, *fields))
        return out


class Passes:
    """The passes of a plan; the core's rules choose, or a measurement does.

    Nothing depends on values, and each algorithm can read what another one has saved:

    - "fused": the kernels do everything, in one launch per step
    - "cudnn": torch convolves, and the kernels do the rest of a step

    See :func:`snnlstm.set_algorithm`.
    """

    def __init__(self, plan: Plan, settings: Settings) -> None:
        self.backend: Backend = plan.backend  # type: ignore[assignment]
        self.plan, self.settings = plan, settings
        torch_measures = settings.algorithm == "auto" and settings.benchmark
        self._measures = settings.algorithm == "measure" or torch_measures
        levels = None if plan.spec.quant is None else plan.spec.quant.levels
        self.levels = None if levels is None else levels.to("cpu", torch.float64).contiguous()
        self._chosen: dict[bool, Runner] = {}
        # The fastest passes, at most 65, by direction and by the gradients that are wanted.
        self._measured: dict[tuple[bool, ...], Runner] = {}
        self._chosen_for(False)

    def _named(self) -> str:
        """The name of what runs, as in a path; a measured pass is named once it is known.

        An unmeasured backward pass is named, too, if it leaves other convolutions to torch.
        """
        # Autograd's thread may add to self._measured meanwhile.
        by_direction = {key[0]: one.name for key, one in self._measured.copy().items()}
        names = [by_direction[backward] for backward in (False, True) if backward in by_direction]
        if names:
            return f"{self.backend.name()}-measured-{'+'.join(names)}"
        forward, backward = self._chosen[False], self._chosen.get(True)
        names = [forward.name]
        if backward is not None and backward.algorithm != forward.algorithm:
            names += [backward.name] if _CUDNN in (forward.algorithm, backward.algorithm) else []
        return f"{self.backend.name()}-{'+'.join(names)}"

    def reason_against(self, training: bool) -> str | None:
        """Why no call of the plan can run; None if they can."""
        reason = self._chosen_for(False).core.reason_against
        if training and not reason:
            reason = self._chosen_for(True).core.reason_against
        return reason or None

    def _fastest(
        self, run_pass: Callable[[Runner], object], backward: bool, *wanted: bool
    ) -> Runner:
        """The pass to run, measured if that is wanted and not yet known.

        `wanted` has what else its time depends on.
        """
        if not self._measures and backward in self._chosen:
            return self._chosen[backward]
        key = backward, *wanted
        fastest = self._measured.get(key)
        if fastest is None and self._measures and self.backend.may_measure():
            other = self._chosen[False].core
            cores = self.backend.candidates(self.plan, self.settings.tf32, backward, other)
            passes = [Runner(self, core) for core in cores]
            seconds = [self.backend.seconds(partial(run_pass, one)) for one in passes]
            # setdefault keeps the first of two threads' measurements.
            fastest = self._measured.setdefault(key, passes[seconds.index(min(seconds))])
            self.name = self._named()
        return self._chosen_for(backward) if fastest is None else fastest

    def _chosen_for(self, backward: bool) -> Runner:
        """The pass of a direction that is not measured; the backward pass is made when needed.

        All backward candidates share one packed layout, so the forward pass may pack before the
        fastest is known.
        """
        if backward not in self._chosen:
            tf32, algorithm = self.settings.tf32, self.settings.algorithm
            other = self._chosen[False].core if backward else None
            core = self.backend.core_pass(self.plan, tf32, algorithm, backward, other)
            self._chosen[backward] = Runner(self, core)
            self.name = self._named()
        return self._chosen[backward]

    def forward(
        self, call: Call, outs: Outputs, saved: Tensor | None, fields: Fields, packs: bool
    ) -> tuple[Any, ...]:
        """Run a forward pass; in training it may pack the weight for the backward pass, too."""
        with self.backend.on_device(self.plan.device):
            other = kept = None
            if saved is not None and packs:
                backward = self._chosen_for(True)
                size = backward.core.packed_bytes
                if 0 < size <= min(KEPT_WEIGHT, saved.numel()):
                    other, kept = backward, empty_bytes(size, call.x.device)
            if call.lengths is not None:
                outs[0].zero_()  # the host does not know the lengths
            run_pass = methodcaller("forward", call, outs, saved, fields, other, kept)
            fastest = self._fastest(run_pass, False)
            run_pass(fastest)
        if fastest.algorithm == _CUDNN:  # it packs nothing
            kept = None
        return self.name, (), kept

    def backward(self, inputs: BackwardInputs, out: Gradients, fields: Fields) -> Gradients:
        """Run the backward pass of the wanted gradients."""
        run_pass = methodcaller("backward", inputs, out, fields)
        with self.backend.on_device(self.plan.device):
            return run_pass(self._fastest(run_pass, True, *inputs.wanted))


class Backend(CommonBackend):
    """The CUDA backend over `core`, a module like snnlstm._C."""

    half_types, passes = True, Passes

    def __init__(self, core: Any) -> None:
        self.core = core
        self._devices: dict[torch.device, Any] = {}

    def name(self) -> str:
        """Name of the kernels; a call's name also says what they multiply with."""
        return "cuda"

    def on_device(self, device: torch.device) -> AbstractContextManager:
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

    def core_pass(
        self, s: Sizes, tf32: bool, algorithm: str, backward: bool, other: Any = None, **blocks: Any
    ) -> Any:
        """The core's pass; a step may have only the `blocks`, if any are given.

        It need not plan the forward steps that an `other` pass of the same sizes has planned.
        """
        algorithm = "fused" if algorithm == "direct" else algorithm
        number = _ALGORITHMS.index(algorithm) if algorithm in _ALGORITHMS else 0
        return self.core.CudaPass(
            *self._facts(s, tf32), number, backward, lengths=s.has_lengths, other=other, **blocks
        )

    def candidates(self, s: Sizes, tf32: bool, backward: bool, other: Any = None) -> list[Any]:
        """The core's passes to time; if two are equally fast, the first one counts.

        They need not plan the forward steps of an `other` pass of the same sizes again.
        """
        return self.core.CudaPass.candidates(
            *self._facts(s, tf32), backward, lengths=s.has_lengths, other=other
        )

    def settings(self, algorithm: str) -> Settings:
        benchmark = torch.backends.cudnn.benchmark
        return Settings(algorithm, tf32=_tf32_is_allowed(), benchmark=benchmark)

    def saved_shapes(self, s: Sizes) -> Shapes:
        padded = self.core.cuda_padded_channels(s.c)
        pixels = s.ho * s.wo
        return (
            ((s.time, s.n, pixels, 4 * padded), s.operands or s.dtype),
            ((s.time - 1, s.n, pixels, padded), s.dtype),
            s.argmax(s.c),
        )

    def leaky(self, fields: Fields, backward: bool, device: torch.device) -> None:
        core = self.core
        with self.on_device(device):
            run = core.cuda_leaky_backward if backward else core.cuda_leaky_forward
            run(self.device(device), self.stream(device), fields)
