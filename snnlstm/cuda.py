"""Calls of the CUDA kernels: targets, packed weights, workspaces, and torch's convolution.

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
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from . import glue, pointwise
from .glue import Gradients, Result, Saved, address, view
from .options import CellOptions
from .pointwise import Call

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


@lru_cache(maxsize=64)
def _levels(quant: Any) -> Tensor:
    """The quantiser's levels on the host, from where each call brings them to the device."""
    return quant.levels.to("cpu", torch.float64).contiguous()


class Kernels:
    """The kernels of `core`, a module like snnlstm._C with the CUDA half."""

    def __init__(self, core: Any) -> None:
        self._core = core
        self._devices: dict[torch.device, Any] = {}
        self._targets: dict[tuple[torch.device, int], Any] = {}
        self._cell = lru_cache(maxsize=1024)(partial(glue.make_cell, core))
        self._packed_bytes = lru_cache(maxsize=1024)(core.cuda_packed_bytes)
        self._workspace_bytes = lru_cache(maxsize=1024)(core.cuda_workspace)
        self._choose = lru_cache(maxsize=1024)(core.cuda_choose)

    def name(self) -> str:
        """Name of the kernels; what they multiply with is known in a call."""
        return "cuda"

    # ---- where a call runs ----------------------------------------------------------------

    def _guard(self, device: torch.device) -> AbstractContextManager:
        return torch.cuda.device(device)

    def _stream(self, device: torch.device) -> int:
        return torch.cuda.current_stream(device).cuda_stream

    def _device_target(self, device: torch.device) -> Any:
        """What the core knows of a device."""
        found = self._devices.get(device)
        if found is None:
            with self._guard(device):
                found = self._devices[device] = self._core.cuda_target()
        return found

    def refusal(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why these kernels cannot run a call; None if they can."""
        return None

    def _target(self, device: torch.device, dtype: torch.dtype, options: CellOptions) -> Any:
        """The device, and in which numbers its convolutions multiply."""
        there = self._device_target(device)
        matrix = _EXACT
        if options.operands is not None:
            matrix = _OPERANDS[options.operands]
        elif dtype == torch.float32:
            allowed = _tf32_is_allowed()
            matrix = _TF32 if allowed else self._core.cuda_full_precision(there)
        found = self._targets.get((device, matrix))
        if found is None:
            found = self._targets[device, matrix] = there.wanting(matrix, _AUTOMATIC)
        return found

    def _begin(self, x: Tensor, mem: Tensor, options: CellOptions) -> Call:
        time = x.shape[0] if options.sequence else 1
        cell = self._cell(options, x.dtype, time, tuple(x.shape[-4:]), mem.shape[1])
        target = self._target(x.device, x.dtype, options)
        return Call(cell, target, self._stream(x.device))

    def _convolves(self, call: Call, algorithm: str) -> bool:
        """Whether torch does."""
        if algorithm == "direct":
            return False
        return algorithm == "pointwise" or self._choose(call.cell, call.target) == _POINTWISE

    # ---- memory ---------------------------------------------------------------------------

    def empty_saved(self, x: Tensor, mem: Tensor, options: CellOptions) -> Saved:
        """What :meth:`forward` keeps in training, uninitialised; also for fake tensors."""
        n, c, ho, wo = mem.shape
        steps = x.shape[0] if options.sequence else 1
        padded = self._core.cuda_padded_channels(c)
        return Saved(
            x.new_empty((steps, n, ho * wo, 4 * padded), dtype=options.operands or x.dtype),
            x.new_empty((steps - 1, n, ho * wo, padded)),
            x.new_empty((steps, n) if options.inhibition else (0,), dtype=torch.int64),
        )

    def _pack(self, call: Call, weight: Tensor, backward: bool) -> Tensor:
        weight = weight.detach().contiguous()
        packed = glue.empty_bytes(
            self._packed_bytes(call.cell, call.target, backward), weight.device
        )
        self._core.cuda_pack_weight(*call, weight.data_ptr(), backward, packed.data_ptr())
        return packed

    def _neuron_parameters(
        self, call: Call, x: Tensor, threshold: Tensor, graded: Tensor, options: CellOptions
    ) -> tuple[dict[str, int], list[Tensor | None]]:
        """Arguments of every kernel, and the tensors whose addresses these are."""
        real = glue.compute_type(x.dtype)
        thresholds, stride = glue.threshold_numbers(threshold, x.dtype)
        factor = graded.detach().to(real)
        levels = None
        if options.quant is not None:
            values = _levels(options.quant)
            levels = x.new_empty(values.numel(), dtype=real)
            self._core.cuda_store_levels(*call, values.data_ptr(), levels.data_ptr())
        arguments = {
            "threshold": thresholds.data_ptr(),
            "threshold_stride": stride,
            "graded": factor.data_ptr(),
            "levels": address(levels),
        }
        return arguments, [thresholds, factor, levels]

    # ---- forward --------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        syn: Tensor,
        mem: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        threshold: Tensor,
        graded: Tensor,
        options: CellOptions,
        training: bool,
        algorithm: str,
    ) -> Result:
        """See :func:`snnlstm.native.forward`."""
        with self._guard(x.device):
            call = self._begin(x, mem, options)
            outputs = glue.empty_outputs(x, mem, options)
            saved = self.empty_saved(x, mem, options) if training else None
            result = Result(*outputs, saved)
            bias = None if bias is None else bias.detach().contiguous()
            parameters, alive = self._neuron_parameters(call, x, threshold, graded, options)
            parameters["bias"] = address(bias)
            if self._convolves(call, algorithm):
                step = self._one_step(x, mem, options, call)
                pointwise.forward(
                    self._core, step, x, syn, mem, weight, parameters, options, result
                )
                glue.last.name = f"{self.name()}-pointwise"
                return result
            packed = self._pack(call, weight, backward=False)
            size = self._workspace_bytes(call.cell, call.target, False)
            workspace = glue.empty_bytes(size, x.device)
            self._core.cuda_forward(
                *call,
                record=options.record,
                x=view(x),
                syn0=view(syn),
                mem0=view(mem),
                weight=packed.data_ptr(),
                spk=view(result.spk),
                syn=view(result.syn),
                mem=view(result.mem),
                saved_gates=address(saved and saved.gates),
                saved_syn=address(saved and saved.syn),
                winner=saved.winner.data_ptr() if saved and options.inhibition else 0,
                workspace=workspace.data_ptr(),
                **parameters,
            )
            del alive  # the kernels are on the stream: what takes their memory comes after them
            kind = self._core.cuda_algorithm_name(call.cell, call.target)
            glue.last.name = f"{self.name()}-{kind}"
        return result

    def _one_step(self, x: Tensor, mem: Tensor, options: CellOptions, call: Call) -> Call:
        step = replace(options, sequence=False, record=False)
        cell = self._cell(step, x.dtype, 1, tuple(x.shape[-4:]), mem.shape[1])
        return call._replace(cell=cell)

    # ---- backward -------------------------------------------------------------------------

    def backward(
        self,
        x: Tensor,
        syn: Tensor,
        mem: Tensor,
        weight: Tensor,
        threshold: Tensor,
        graded: Tensor,
        options: CellOptions,
        saved: Saved,
        grad_spk: Tensor | None,
        grad_syn: Tensor | None,
        grad_mem: Tensor | None,
        wanted: Sequence[bool],
        algorithm: str,
    ) -> Gradients:
        """See :func:`snnlstm.native.backward`."""
        with self._guard(x.device):
            call = self._begin(x, mem, options)
            parameters, alive = self._neuron_parameters(call, x, threshold, graded, options)
            noise = glue.stochastic_noise(x, options, grad_spk)
            if self._convolves(call, algorithm):
                grads = pointwise.backward(
                    self._core,
                    self._one_step(x, mem, options, call),
                    (x, syn, mem, weight),
                    (noise, grad_spk, grad_syn, grad_mem),
                    parameters,
                    options,
                    saved,
                    wanted,
                )
                return glue.with_threshold_of(grads, threshold)
            grads = glue.empty_gradients(x, syn, mem, weight, wanted)
            packed = self._pack(call, weight, backward=True)
            size = self._workspace_bytes(call.cell, call.target, True)
            workspace = glue.empty_bytes(size, x.device)
            self._core.cuda_backward(
                *call,
                record=options.record,
                x=view(x),
                syn0=view(syn),
                mem0=view(mem),
                weight=packed.data_ptr(),
                saved_gates=saved.gates.data_ptr(),
                saved_syn=saved.syn.data_ptr(),
                winner=saved.winner.data_ptr() if options.inhibition else 0,
                noise=view(noise),
                grad_spk=view(grad_spk),
                grad_syn=view(grad_syn),
                grad_mem=view(grad_mem),
                grad_x=view(grads.x),
                grad_syn0=view(grads.syn),
                grad_mem0=view(grads.mem),
                grad_weight=address(grads.weight),
                grad_bias=address(grads.bias),
                grad_threshold=address(grads.threshold),
                workspace=workspace.data_ptr(),
                **parameters,
            )
            del alive
        return glue.with_threshold_of(grads, threshold)
