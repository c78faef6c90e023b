"""The CUDA half of the core: plans and calls. Twin of :mod:`snnlstm.native.cpu`.

Everything is enqueued on the current stream of the tensors' device and nothing waits for it, so
that a CUDA graph can capture it. All memory comes from torch's caching allocator.

Two algorithms give the same results, up to rounding, and read what the other one saved:

- fused: the kernels do it all, the convolution included
- pointwise: torch (cuDNN) convolves, and the kernels do the rest of a step; for wide layers

Weights are packed anew in every call, in one small kernel: their values cannot be compared
without waiting for the GPU, and neither version counters nor addresses tell of every change.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..call import Call, Signature
from . import cudnn, tensors
from .tensors import Gradients, Result, Saved, Step, address, view

__all__ = ["Kernels"]

# The numbers of csrc/cuda/api.h.
_EXACT, _TF32 = 0, 1
_OPERANDS = {torch.float16: 3, torch.bfloat16: 4}
_AUTOMATIC, _POINTWISE = 0, 3


def _tf32_is_allowed() -> bool:
    """What torch's setting for its own convolutions says; it is on by default."""
    setting = getattr(torch.backends.cudnn, "conv", None)
    precision = getattr(setting, "fp32_precision", None)  # torch 2.9 and newer
    return torch.backends.cudnn.allow_tf32 if precision is None else precision == "tf32"


class Plan:
    """All that follows for a call from its signature, its strides and the process's settings.

    It is the :class:`Choice` of each of its calls, too: nothing depends on values.
    """

    def __init__(
        self, kernels: Kernels, signature: Signature, call: Call, algorithm: str, tf32: bool
    ) -> None:
        s, core = signature, kernels.core
        self.kernels, self.core, self.signature = kernels, core, signature
        self.cell = tensors.make_cell(core, s, s.time)
        self.target = kernels.target(s, tf32)
        self.step = self.cell if s.time == 1 else tensors.make_cell(core, s, 1)
        self.convolves = algorithm == "pointwise" or (
            algorithm != "direct" and core.cuda_choose(self.cell, self.target) == _POINTWISE
        )
        kind = "pointwise" if self.convolves else core.cuda_algorithm_name(self.cell, self.target)
        self.name = f"{kernels.name()}-{kind}"
        spk, state = tensors.output_shapes(s)
        self.spk = spk, tensors.image_strides(call.x, spk)
        self.state = state, tensors.image_strides(call.x, state)
        self.saved_shapes = kernels.saved_shapes(s)
        self.work = s.options.operands or s.dtype
        self.real = tensors.compute_type(s.dtype)
        quant = s.options.quant
        # On the host, from where each call brings them to the device.
        self.levels = None if quant is None else quant.levels.to("cpu", torch.float64).contiguous()
        o = s.options
        geometry = (o.kernel_size, o.stride, o.dilation)
        self.loop_key = (
            kernels, s.cin, s.c, s.h, s.w, s.n, s.dtype, s.device, geometry, self.work, tf32,
            self.convolves,
        )  # fmt: skip

    def choose(self, call: Call) -> Plan:
        """The kernels of a call."""
        return self

    def _begin(self) -> tuple[Any, Any, int]:
        """What every call of the core starts with."""
        return self.cell, self.target, self.kernels.stream(self.signature.device)

    def _parameters(self, call: Call) -> tuple[dict[str, int], list[Tensor | None]]:
        """Arguments of every kernel, and the tensors whose addresses these are."""
        threshold = tensors.numbers(call.threshold, call.x.dtype)
        graded = tensors.numbers(call.graded, self.real)
        levels = None
        if self.levels is not None:
            levels = call.x.new_empty(self.levels.numel(), dtype=self.real)
            values = self.levels.data_ptr()
            self.core.cuda_store_levels(*self._begin(), values, levels.data_ptr())
        arguments = {
            "threshold": threshold.data_ptr(),
            "threshold_stride": 0 if self.signature.thresholds == 1 else 1,
            "graded": graded.data_ptr(),
            "levels": address(levels),
        }
        return arguments, [threshold, graded, levels]

    def _pack(self, call: Call, backward: bool) -> Tensor:
        weight = tensors.numbers(call.weight, call.x.dtype)
        size = self.core.cuda_packed_bytes(self.cell, self.target, backward)
        packed = tensors.empty_bytes(size, weight.device)
        self.core.cuda_pack_weight(*self._begin(), weight.data_ptr(), backward, packed.data_ptr())
        return packed

    def empty_d_gates(self, call: Call, kept: Saved | None) -> Tensor:
        """Memory for the gate gradients of a step; that of the gates in `kept`, if given."""
        if self.convolves:
            n, c, ho, wo = call.mem.shape
            return tensors.empty_like_images(call.x, (n, 4 * c, ho, wo), self.work)
        if kept is not None:
            return kept.gates
        shape, dtype = self.saved_shapes[0]
        return call.x.new_empty(shape, dtype=dtype)

    def forward(self, call: Call, training: bool) -> Result:
        """Run the forward kernels; `training`: keep what :meth:`backward` needs."""
        x = call.x
        with self.kernels.guard(x.device):
            spk = x.new_empty_strided(*self.spk)
            syn, mem = x.new_empty_strided(*self.state), x.new_empty_strided(*self.state)
            saved = None
            if training:
                saved = Saved(
                    *(x.new_empty(shape, dtype=dtype) for shape, dtype in self.saved_shapes)
                )
            result = Result(spk, syn, mem, saved)
            parameters, alive = self._parameters(call)
            bias = None if call.bias is None else tensors.numbers(call.bias, x.dtype)
            parameters["bias"] = address(bias)
            if self.convolves:
                cudnn.forward(self, call, parameters, result)
                return result
            packed = self._pack(call, backward=False)
            size = self.core.cuda_workspace(self.cell, self.target, False)
            workspace = tensors.empty_bytes(size, x.device)
            self.core.cuda_forward(
                *self._begin(),
                record=call.options.record,
                x=view(x),
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
            del alive  # the kernels are on the stream: what takes their memory comes after them
        return result

    def backward(
        self,
        call: Call,
        saved: Saved,
        grads: Sequence[Tensor | None],
        wanted: Sequence[bool],
        d_gates: Tensor | None = None,
    ) -> Gradients:
        """Run the backward kernels; see the twin's."""
        x = call.x
        with self.kernels.guard(x.device):
            parameters, alive = self._parameters(call)
            noise = tensors.stochastic_noise(x, call.options, grads[0])
            if self.convolves:
                out = cudnn.backward(
                    self, call, parameters, saved, (noise, *grads), wanted,
                    d_gates,
                )  # fmt: skip
            else:
                out = tensors.empty_gradients(x, self.signature, wanted)
                packed = self._pack(call, backward=True)
                if d_gates is None:
                    size = self.core.cuda_workspace(self.cell, self.target, True)
                else:
                    size = self.core.cuda_data_workspace(self.cell, self.target)
                workspace = tensors.empty_bytes(size, x.device)
                self.core.cuda_backward(
                    *self._begin(),
                    **tensors.backward_arguments(call, saved, grads, noise, out, d_gates),
                    weight=packed.data_ptr(),
                    workspace=workspace.data_ptr(),
                    **parameters,
                )
            del alive
        if out.threshold is None:
            return out
        return out._replace(threshold=tensors.threshold_gradient(out.threshold, call.threshold))

    def weight_gradient(
        self, steps: Sequence[Step], wanted: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of weight and bias, as `wanted`, from what step calls of this plan left."""
        x = torch.stack([step.x for step in steps])
        mem = torch.stack([step.mem for step in steps])
        d_gates = torch.cat([step.d_gates for step in steps])
        with self.kernels.guard(x.device):
            if self.convolves:
                return cudnn.weight_gradient(self, x, mem, d_gates, wanted)
            cell = tensors.make_cell(self.core, self.signature, len(steps))
            want = (False, False, False, *wanted, False)
            *_, of_weight, of_bias, _ = tensors.empty_gradients(x, self.signature, want)
            size = self.core.cuda_weight_workspace(cell, self.target)
            workspace = tensors.empty_bytes(size, x.device)
            self.core.cuda_weight_gradient(
                cell,
                *self._begin()[1:],
                x=view(x),
                mem=view(mem),
                d_gates=d_gates.data_ptr(),
                grad_weight=address(of_weight),
                grad_bias=address(of_bias),
                workspace=workspace.data_ptr(),
            )
        return of_weight, of_bias


class Kernels:
    """The kernels of `core`, a module like snnlstm._C with the CUDA half."""

    half_types = True  # whether float16 and bfloat16 run as they are

    def __init__(self, core: Any) -> None:
        self.core = core
        self._devices: dict[torch.device, Any] = {}
        self._targets: dict[tuple[torch.device, int], Any] = {}

    def name(self) -> str:
        """Name of the kernels; what they multiply with is known in a call."""
        return "cuda"

    def guard(self, device: torch.device) -> AbstractContextManager:
        """Within the block, `device` is the current one."""
        return torch.cuda.device(device)

    def stream(self, device: torch.device) -> int:
        """The current stream of `device`."""
        return torch.cuda.current_stream(device).cuda_stream

    def _device_target(self, device: torch.device) -> Any:
        """What the core knows of a device."""
        found = self._devices.get(device)
        if found is None:
            with self.guard(device):
                found = self._devices[device] = self.core.cuda_target()
        return found

    def target(self, signature: Signature, tf32: bool) -> Any:
        """The device, and in which numbers its convolutions multiply."""
        s = signature
        there = self._device_target(s.device)
        matrix = _EXACT
        if s.options.operands is not None:
            matrix = _OPERANDS[s.options.operands]
        elif s.dtype == torch.float32:
            matrix = _TF32 if tf32 else self.core.cuda_full_precision(there)
        found = self._targets.get((s.device, matrix))
        if found is None:
            found = self._targets[s.device, matrix] = there.wanting(matrix, _AUTOMATIC)
        return found

    def reason_against(self, call: Call, autocast: bool) -> str | None:
        """Why these kernels cannot run a call; None if they can."""
        signature = call.signature
        if signature is None:  # torch.compile traces: the operator will say it
            return None
        tf32 = _tf32_is_allowed()
        key = self, tf32
        if key not in signature.notes:
            cell = tensors.make_cell(self.core, signature, signature.time)
            reason = self.core.cuda_reason_against(cell, self.target(signature, tf32))
            signature.notes[key] = reason or None
        return signature.notes[key]

    def settings(self, signature: Signature) -> tuple[Any, ...]:
        """The process's settings that a plan depends on."""
        return (_tf32_is_allowed(),)

    def plan(self, call: Call, algorithm: str, settings: tuple[Any, ...]) -> Plan:
        """The plan of calls like this one."""
        assert call.signature is not None
        return Plan(self, call.signature, call, algorithm, *settings)

    def saved_shapes(self, signature: Signature) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        """Shapes and dtypes of what a forward pass keeps."""
        s, options = signature, signature.options
        padded = self.core.cuda_padded_channels(s.c)
        pixels = s.ho * s.wo
        return (
            ((s.time, s.n, pixels, 4 * padded), options.operands or s.dtype),
            ((s.time - 1, s.n, pixels, padded), s.dtype),
            ((s.time, s.n) if options.inhibition else (0,), torch.int64),
        )
