"""The CUDA backend: passes; twin of :mod:`snnlstm.native.cpu`.

Everything is enqueued on the current stream of the tensors' device and nothing waits for it, so
that a CUDA graph can capture it. All memory comes from torch's caching allocator.

Weights are packed anew in every pass, in one small kernel: their values cannot be compared without
waiting for the GPU, and neither version counters nor addresses show every change.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..calls.call import Call, Outputs
from ..calls.entries import Settings
from ..compat.torch_private import current_stream, fp32_precision
from . import cudnn
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
from .tensors import check_memory, compute_dtype, contiguous_as, pointer, restored

# The order is that of csrc/cuda/pass.h; other names mean "auto".
_ALGORITHMS = ("auto", "fused", "cudnn")
_CUDNN = _ALGORITHMS.index("cudnn")
_EXACT, _TF32 = 0, 1
_OPERANDS = {torch.float16: 2, torch.bfloat16: 3}


class Passes:
    """The passes of a plan, by the core's kernels ("fused") or around torch's convolutions.

    Nothing depends on values, and each algorithm can read what the other one has saved. See
    :func:`snnlstm.set_algorithm`.
    """

    def __init__(self, plan: Plan, settings: Settings) -> None:
        self.backend: Backend = plan.backend  # type: ignore[assignment]
        self.plan, self.settings = plan, settings
        levels = None if plan.spec.quant is None else plan.spec.quant.levels
        self._levels = None if levels is None else levels.to("cpu", torch.float64).contiguous()
        self._cores: dict[bool, Any] = {}
        core = self._core(False)
        self.name = f"{self.backend.name()}-{core.name}"
        self._convolutions = cudnn.convolutions(plan, core)

    def _core(self, backward: bool) -> Any:
        """The core's pass of a direction; the backward pass is made when it is needed."""
        if backward not in self._cores:
            tf32, algorithm = self.settings.tf32, self.settings.algorithm
            self._cores[backward] = self.backend.core_pass(self.plan, tf32, algorithm, backward)
        return self._cores[backward]

    def reason_against(self, backward: bool) -> str | None:
        """Why no call of the plan can run; None if they can."""
        reason = self._core(False).reason_against
        if backward and not reason:
            reason = self._core(True).reason_against
        return reason or None

    def _levels_on(self, core: Any, x: Tensor, stream: int) -> Tensor | None:
        """The quantiser's levels on the device; each call copies them from the host."""
        if self._levels is None:
            return None
        levels = x.new_empty(self._levels.numel(), dtype=compute_dtype(x.dtype))
        core.store_levels(self._levels.data_ptr(), levels.data_ptr(), stream)
        return levels

    def _memory(
        self, core: Any, weight: Tensor, stream: int
    ) -> tuple[int, int, tuple[Tensor, Tensor]]:
        """Addresses of a workspace and of the packed weight, and what the pass has to hold.

        That is their memory, and the weight's, which may be a copy that the packing still reads.
        """
        weight = contiguous_as(weight, self.plan.dtype)
        workspace = -core.packed_bytes // 256 * -256
        memory = weight.new_empty(workspace + core.workspace, dtype=torch.uint8)
        packed = memory.data_ptr()
        core.pack(weight.data_ptr(), packed, stream)
        return packed + workspace, packed, (memory, weight)

    def forward(
        self, call: Call, outs: Outputs, saved: Tensor | None, fields: Fields
    ) -> tuple[Any, ...]:
        """Run a forward pass."""
        core, stream = self._core(False), self.backend.stream(self.plan.device)
        with self.backend.on_device(self.plan.device):
            if call.lengths is not None:
                outs[0].zero_()  # the host does not know the lengths
            levels = self._levels_on(core, call.x, stream)
            if core.algorithm == _CUDNN:
                check_memory(call)
                how, at = self._convolutions, pointer(levels)
                cudnn.forward(self.plan, how, core, stream, call, at, outs, saved)
            else:
                *memory, _held = self._memory(core, call.weight, stream)
                core.run(stream, (*memory, 0, 0, pointer(levels), 0, *fields))
        return self.name, (), None

    def backward(self, inputs: BackwardInputs, out: Gradients, fields: Fields) -> Gradients:
        """Run the backward pass of the wanted gradients."""
        core, stream = self._core(True), self.backend.stream(self.plan.device)
        with self.backend.on_device(self.plan.device):
            call = inputs.call
            shape = self.plan.gradient_memory[3][0]
            weight = restored(call.weight, shape, self.plan.dtype, self.plan.device)
            levels = self._levels_on(core, call.x, stream)
            if core.algorithm == _CUDNN:
                memory = weight.new_empty(core.workspace, dtype=torch.uint8)

                def run_kernels(fields: Fields) -> None:
                    core.run(stream, (pointer(memory), 0, 0, 0, pointer(levels), 0, *fields))

                inputs = inputs._replace(call=call._replace(weight=weight))
                return cudnn.backward(self.plan, self._convolutions, inputs, out, run_kernels)
            if call.lengths is not None and out.x is not None:
                out.x.zero_()
            *addresses, _held = self._memory(core, weight, stream)
            core.run(stream, (*addresses, 0, 0, pointer(levels), 0, *fields))
            return out


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

    def device(self, device: torch.device) -> Any:
        """What the core knows about a device."""
        if device not in self._devices:
            self._devices[device] = self.core.cuda_device(device.index)
        return self._devices[device]

    def core_pass(self, s: Sizes, tf32: bool, algorithm: str, backward: bool) -> Any:
        """The core's pass."""
        matrix = _TF32 if tf32 and s.dtype == torch.float32 else _EXACT
        if s.operands is not None:
            matrix = _OPERANDS[s.operands]
        number = _ALGORITHMS.index(algorithm) if algorithm in _ALGORITHMS else 0
        cell, device = make_cell(self.core, s), self.device(s.device)
        return self.core.CudaPass(cell, device, matrix, number, backward, lengths=s.has_lengths)

    @property
    def tf32(self) -> bool:
        """Whether torch's setting for its own convolutions allows TF32, as it does by default."""
        if fp32_precision is None:
            return torch.backends.cudnn.allow_tf32
        return fp32_precision("cuda", "conv") == "tf32"

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
