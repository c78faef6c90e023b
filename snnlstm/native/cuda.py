"""The CUDA half of the core: plans and calls. Twin of :mod:`snnlstm.native.cpu`.

Everything is enqueued on the current stream of the tensors' device and nothing waits for it, so
that a CUDA graph can capture it. All memory comes from torch's caching allocator.

Weights are packed anew in every call, in one small kernel: their values cannot be compared
without waiting for the GPU, and neither version counters nor addresses tell of every change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..call import Call, Signature
from . import cudnn, tensors
from .tensors import Gradients, Pass, Result, Saved, Shapes, address, view
from .ways import Way, Ways

__all__ = ["Kernels"]

# The numbers of csrc/cuda/api.h.
_EXACT, _TF32 = 0, 1
_OPERANDS = {torch.float16: 3, torch.bfloat16: 4}

_ROUNDS = 3  # a measured way is timed so often, after one run that is not; the shortest counts


# What torch.backends.cudnn.conv.fp32_precision asks for, ten times as fast; torch 2.9 and newer.
_fp32_precision: Any = getattr(torch._C, "_get_fp32_precision_getter", None)


def _tf32_is_allowed() -> bool:
    """What torch's setting for its own convolutions says; it is on by default."""
    if _fp32_precision is None:
        return torch.backends.cudnn.allow_tf32
    return _fp32_precision("cuda", "conv") == "tf32"


class Plan(tensors.Plan):
    """The plan of a call on CUDA, and its choice, too: nothing depends on values."""

    def __init__(
        self, kernels: Kernels, call: Call, algorithm: str, tf32: bool, benchmark: bool
    ) -> None:
        measures = algorithm == "measure" or (benchmark and algorithm == "auto")
        super().__init__(kernels, call)
        s, core = self.signature, kernels.core
        self.kernels, self.core = kernels, core
        self.cell = tensors.make_cell(core, s, s.time)
        self.target = kernels.target(s, tf32)
        self.step = self.cell if s.time == 1 else tensors.make_cell(core, s, 1)
        strides = call.x.stride(), call.syn.stride(), call.mem.stride()
        self.ways = Ways(kernels, s, self.cell, strides, algorithm, tf32, measures)
        # Sizes in bytes, by the core's function that tells them and its arguments.
        self._bytes = lru_cache(None)(lambda function, *rest: getattr(core, function)(*rest))
        self.work = s.options.operands or s.dtype
        self.real = torch.float64 if s.dtype == torch.float64 else torch.float32
        quant = s.options.quant
        # The levels stay on the host, from where each call brings them to the device.
        self.levels = None if quant is None else quant.levels.to("cpu", torch.float64).contiguous()

    @property
    def name(self) -> str:
        """Name of what runs, as in a path."""
        return self.ways.name

    def _begin(self, target: Any) -> tuple[Any, Any, int]:
        """The first arguments of every call of the core."""
        return self.cell, target, self.kernels.stream(self.signature.device)

    def begin_step(self) -> tuple[Any, Any, int]:
        """The first arguments of the calls for one step, behind torch's convolution."""
        return self.step, self.target, self.kernels.stream(self.signature.device)

    def _parameters(self, call: Call) -> tuple[dict[str, int], list[Tensor | None]]:
        """Arguments of every kernel, and the tensors whose addresses these are."""
        threshold = tensors.numbers(call.threshold, call.x.dtype)
        graded = tensors.numbers(call.graded, self.real)
        levels = None
        if self.levels is not None:
            levels = call.x.new_empty(self.levels.numel(), dtype=self.real)
            values = self.levels.data_ptr()
            self.core.cuda_store_levels(*self._begin(self.target), values, levels.data_ptr())
        arguments = {
            "threshold": threshold.data_ptr(),
            "threshold_stride": self.threshold_stride,
            "graded": graded.data_ptr(),
            "levels": address(levels),
        }
        return arguments, [threshold, graded, levels]

    def _pack(self, call: Call, target: Any, backward: bool) -> Tensor:
        given = tensors.saved_weight(call) if backward else call.weight
        weight = tensors.numbers(given, call.x.dtype)
        size = self._bytes("cuda_packed_bytes", self.cell, target, backward)
        packed = tensors.empty_bytes(size, weight.device)
        self.core.cuda_pack_weight(
            *self._begin(target), weight.data_ptr(), backward, packed.data_ptr()
        )
        return packed

    def forward(self, call: Call, training: bool) -> Result:
        """Run the forward kernels; `training`: keep what :meth:`backward` needs."""
        x = call.x
        with self.kernels.guard(x.device):
            saved = self.empty_saved(x) if training else None
            result = Result(*self.empty_results(x), saved or ())
            parameters, alive = self._parameters(call)
            bias = None if call.bias is None else tensors.numbers(call.bias, x.dtype)
            parameters["bias"] = address(bias)

            def run(way: Way) -> None:
                self._forward(way, call, parameters, result)

            run(self.ways.choose("forward", run))
            del alive  # the kernels are on the stream: what takes their memory comes after them
        return result._replace(name=self.name)

    def _forward(self, way: Way, call: Call, parameters: dict[str, int], result: Result) -> None:
        if way.torch:
            cudnn.forward(self, call, parameters, result)
            return
        spk, syn, mem = result[:3]
        saved: Any = result.saved or None
        packed = self._pack(call, way.target, backward=False)
        size = self._bytes("cuda_workspace", self.cell, way.target, False)
        workspace = tensors.empty_bytes(size, call.x.device)
        self.core.cuda_forward(
            *self._begin(way.target),
            record=call.options.record,
            x=view(call.x),
            syn0=view(call.syn),
            mem0=view(call.mem),
            weight=packed.data_ptr(),
            spk=view(spk),
            syn=view(syn),
            mem=view(mem),
            saved_gates=0 if saved is None else saved.gates.data_ptr(),
            saved_syn=0 if saved is None else saved.syn.data_ptr(),
            winner=saved.winner.data_ptr() if saved and call.options.inhibition else 0,
            workspace=workspace.data_ptr(),
            **parameters,
        )

    def backward(
        self,
        call: Call,
        saved: Saved,
        grads: Sequence[Tensor | None],
        wanted: Sequence[bool],
        decided: int = 0,
        packed: Any = None,
    ) -> Gradients:
        """Run the backward kernels; see the twin's."""
        with self.kernels.guard(call.x.device):
            parameters, alive = self._parameters(call)
            noise = tensors.stochastic_noise(call.options, grads[0])
            given = Pass(call, parameters, saved, grads, noise)

            def run(way: Way) -> Gradients:
                return self._backward(way, given, wanted)

            out = run(self.ways.choose("backward", run, wanted))
            del alive
        return tensors.shaped_as(call.threshold, out)

    def _backward(self, way: Way, given: Pass, wanted: Sequence[bool]) -> Gradients:
        call, x = given.call, given.call.x
        if not way.torch:
            out = tensors.empty_gradients(x, self.signature, wanted)
            self._run_steps(way, given, out, None, None)
            return out
        out = tensors.empty_gradients(x, self.signature, (*wanted[:3], False, False, wanted[5]))
        d_gates = self.empty_gates(x)
        mems = cudnn.empty_mems(self, call, d_gates) if wanted[3] else None
        if way.torch == "all":
            cudnn.steps_backward(self, given, out, d_gates, mems)
        else:
            self._run_steps(way, given, out._replace(x=None), d_gates, mems)
        if out.x is not None:
            cudnn.data_gradient(self, call, d_gates, out.x)
        xs = x if call.options.sequence else x.unsqueeze(0)
        mem = None if mems is None else cudnn.images_of(mems, call.mem)
        weight, bias = cudnn.weight_gradient(self, xs, mem, d_gates, wanted[3:5])
        return out._replace(weight=weight, bias=bias)

    def _run_steps(
        self, way: Way, given: Pass, out: Gradients, d_gates: Tensor | None, mems: Tensor | None
    ) -> None:
        """The kernels, for the gradients that `out` has memory for.

        `mems`, if given, gets mem before each step but the first.
        """
        call, parameters, saved, grads, noise = given
        packed = self._pack(call, way.target, backward=True)
        if out.weight is not None or out.bias is not None or d_gates is None:
            size = self._bytes("cuda_workspace", self.cell, way.target, True)
        else:
            size = self._bytes("cuda_data_workspace", self.cell, way.target)
        workspace = tensors.empty_bytes(size, call.x.device)
        self.core.cuda_backward(
            *self._begin(way.target),
            **tensors.backward_arguments(call, saved, grads, noise, out),
            d_gates=address(d_gates),
            mem_after=0 if mems is None or len(mems) == 1 else mems[1].data_ptr(),
            weight=packed.data_ptr(),
            workspace=workspace.data_ptr(),
            **parameters,
        )


class Kernels:
    """The kernels of `core`, a module like snnlstm._C with the CUDA half."""

    half_types = True  # whether float16 and bfloat16 run as they are

    def __init__(self, core: Any) -> None:
        self.core = core
        self._devices: dict[torch.device, Any] = {}
        self._targets: dict[tuple[torch.device, int, int], Any] = {}

    def name(self) -> str:
        """Name of the kernels; what they multiply with is known in a call."""
        return "cuda"

    def guard(self, device: torch.device) -> AbstractContextManager:
        """Within the block, `device` is the current one."""
        return torch.cuda.device(device)

    def stream(self, device: torch.device) -> int:
        """The current stream of `device`."""
        return torch._C._cuda_getCurrentRawStream(device.index)

    def device_name(self, device: torch.device) -> str:
        """What measured choices hold for."""
        return torch.cuda.get_device_name(device)

    def may_measure(self) -> bool:
        """Whether kernels may be timed now, which waits for the GPU and depends on chance."""
        return not (
            torch.cuda.is_current_stream_capturing() or torch.are_deterministic_algorithms_enabled()
        )

    def seconds(self, run: Callable[[], object]) -> float:
        """How long the GPU takes for a run, at best; infinity where its memory is too small."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times = []
        try:
            run()  # kernels are loaded, and memory is allocated
            for _ in range(_ROUNDS):
                start.record()
                run()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end) / 1e3)
        except torch.cuda.OutOfMemoryError:
            return math.inf
        return min(times)

    def _device_target(self, device: torch.device) -> Any:
        """What the core knows of a device."""
        if device not in self._devices:
            with self.guard(device):
                self._devices[device] = self.core.cuda_target()
        return self._devices[device]

    def target(self, signature: Signature, tf32: bool, algorithm: int = 0) -> Any:
        """The device, in which numbers its convolutions multiply, and api.h's algorithm."""
        s = signature
        there = self._device_target(s.device)
        matrix = _EXACT
        if s.options.operands is not None:
            matrix = _OPERANDS[s.options.operands]
        elif s.dtype == torch.float32:
            matrix = _TF32 if tf32 else self.core.cuda_full_precision(there)
        key = s.device, matrix, algorithm
        if key not in self._targets:
            self._targets[key] = there.wanting(matrix, algorithm)
        return self._targets[key]

    def reason_against(self, signature: Signature) -> str | None:
        """Why these kernels cannot run a call; None if they can."""
        tf32 = _tf32_is_allowed()
        key = self, tf32
        if key not in signature.notes:
            cell = tensors.make_cell(self.core, signature, signature.time)
            reason = self.core.cuda_reason_against(cell, self.target(signature, tf32))
            signature.notes[key] = reason or None
        return signature.notes[key]

    def settings(self, signature: Signature) -> tuple[Any, ...]:
        """The process's settings that a plan depends on."""
        return _tf32_is_allowed(), torch.backends.cudnn.benchmark

    def plan(self, call: Call, algorithm: str, settings: tuple[Any, ...]) -> Plan:
        """The plan of calls like this one."""
        return Plan(self, call, algorithm, *settings)

    def saved_shapes(self, signature: Signature) -> Shapes:
        """Shapes and dtypes of what a forward pass keeps."""
        s, options = signature, signature.options
        padded = self.core.cuda_padded_channels(s.c)
        pixels = s.ho * s.wo
        return (
            ((s.time, s.n, pixels, 4 * padded), options.operands or s.dtype),
            ((s.time - 1, s.n, pixels, padded), s.dtype),
            ((s.time, s.n) if options.inhibition else (0,), torch.int64),
        )
