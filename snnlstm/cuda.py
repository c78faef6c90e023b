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
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from . import glue
from .glue import Gradients, Result, Saved, address, view
from .options import CellOptions

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


def _compute_type(dtype: torch.dtype) -> torch.dtype:
    """The type in which the kernels compute with states of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@lru_cache(maxsize=64)
def _levels(quant: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    return quant.levels.to(device, dtype).contiguous()


def _bytes(count: int, device: torch.device) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device=device)


def _steps(tensor: Tensor, options: CellOptions) -> Tensor:
    """With a time axis."""
    return tensor if options.sequence else tensor.unsqueeze(0)


def _from_pixels(pixels: Tensor, mem: Tensor) -> Tensor:
    """(..., Ho * Wo, Cp) as (..., C, Ho, Wo), without a copy."""
    _, c, ho, wo = mem.shape
    return pixels.unflatten(-2, (ho, wo))[..., :c].movedim(-1, -3)


class _Call(NamedTuple):
    """What all calls of the core begin with."""

    cell: Any
    target: Any
    stream: int


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

    def _begin(self, x: Tensor, mem: Tensor, options: CellOptions) -> _Call:
        time = x.shape[0] if options.sequence else 1
        cell = self._cell(options, x.dtype, time, tuple(x.shape[-4:]), mem.shape[1])
        target = self._target(x.device, x.dtype, options)
        return _Call(cell, target, self._stream(x.device))

    def _convolves(self, call: _Call, algorithm: str) -> bool:
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

    def _pack(self, call: _Call, weight: Tensor, backward: bool) -> Tensor:
        weight = weight.detach().contiguous()
        packed = _bytes(self._packed_bytes(call.cell, call.target, backward), weight.device)
        self._core.cuda_pack_weight(*call, weight.data_ptr(), backward, packed.data_ptr())
        return packed

    def _neuron_parameters(
        self, x: Tensor, threshold: Tensor, graded: Tensor, options: CellOptions
    ) -> tuple[dict[str, int], list[Tensor | None]]:
        """Arguments of every kernel, and the tensors whose addresses these are."""
        real = _compute_type(x.dtype)
        thresholds, stride = glue.threshold_numbers(threshold, x.dtype)
        factor = graded.detach().to(real)
        levels = None if options.quant is None else _levels(options.quant, real, x.device)
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
            parameters, alive = self._neuron_parameters(x, threshold, graded, options)
            parameters["bias"] = address(bias)
            if self._convolves(call, algorithm):
                self._forward_by_steps(x, syn, mem, weight, parameters, options, call, result)
                glue.last.name = f"{self.name()}-pointwise"
                return result
            packed = self._pack(call, weight, backward=False)
            size = self._workspace_bytes(call.cell, call.target, False)
            workspace = _bytes(size, x.device)
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

    def _one_step(self, x: Tensor, mem: Tensor, options: CellOptions, call: _Call) -> _Call:
        step = replace(options, sequence=False, record=False)
        cell = self._cell(step, x.dtype, 1, tuple(x.shape[-4:]), mem.shape[1])
        return call._replace(cell=cell)

    def _forward_by_steps(
        self,
        x: Tensor,
        syn: Tensor,
        mem: Tensor,
        weight: Tensor,
        parameters: dict[str, int],
        options: CellOptions,
        call: _Call,
        result: Result,
    ) -> None:
        """Torch convolves, the kernels do the rest of each step."""
        work = options.operands or x.dtype
        step, saved = self._one_step(x, mem, options, call), result.saved
        weight = weight.detach().to(work)
        spks, last = _steps(result.spk, options), x.shape[0] - 1 if options.sequence else 0
        for t, x_t in enumerate(_steps(x, options)):
            sums = _convolve(x_t.to(work), mem.to(work), weight, options)
            # Without record the states are updated in place, each neuron by one thread.
            out_syn = result.syn[t] if options.record else result.syn
            out_mem = result.mem[t] if options.record else result.mem
            self._core.cuda_pointwise_forward(
                *step,
                view(sums),
                syn0=view(syn),
                mem0=view(mem),
                spk=view(spks[t]),
                syn=view(out_syn),
                mem=view(out_mem),
                saved_gates=address(saved and saved.gates[t]),
                saved_syn=saved.syn[t].data_ptr() if saved and t < last else 0,
                winner=saved.winner[t].data_ptr() if saved and options.inhibition else 0,
                **parameters,
            )
            syn, mem = out_syn, out_mem

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
            parameters, alive = self._neuron_parameters(x, threshold, graded, options)
            noise = glue.stochastic_noise(x, options, grad_spk)
            if self._convolves(call, algorithm):
                grads = self._backward_by_steps(
                    (x, syn, mem, weight),
                    (noise, grad_spk, grad_syn, grad_mem),
                    parameters,
                    options,
                    call,
                    saved,
                    wanted,
                )
                return glue.with_threshold_of(grads, threshold)
            grads = glue.empty_gradients(x, syn, mem, weight, wanted)
            packed = self._pack(call, weight, backward=True)
            size = self._workspace_bytes(call.cell, call.target, True)
            workspace = _bytes(size, x.device)
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

    def _backward_by_steps(
        self,
        inputs: tuple[Tensor, Tensor, Tensor, Tensor],
        output_grads: tuple[Tensor | None, ...],
        parameters: dict[str, int],
        options: CellOptions,
        call: _Call,
        saved: Saved,
        wanted: Sequence[bool],
    ) -> Gradients:
        """The kernels do a step's neurons, last step first; torch all that is a convolution."""
        x, syn, mem, weight = inputs
        *of_spikes, grad_syn, grad_mem = output_grads
        noise, grad_spk = (None if t is None else _steps(t, options) for t in of_spikes)
        work, (n, c, ho, wo) = options.operands or x.dtype, mem.shape
        step, xs = self._one_step(x, mem, options, call), _steps(x, options)
        of_x, of_mem = weight.detach().to(work).split([x.shape[-3], c], 1)
        d_sums = glue.empty_like_images(x, (xs.shape[0], n, 4 * c, ho, wo), work)
        # mem before each step, as the weight's gradient wants it
        pixels = x.new_empty((*saved.gates.shape[:3], saved.gates.shape[3] // 4), dtype=work)
        mems = _from_pixels(pixels, mem)
        mems[0].copy_(mem)
        d_syn = torch.empty_like(syn)
        of_threshold = x.new_empty((xs.shape[0], c)) if wanted[5] else None
        workspace = _bytes(self._core.cuda_pointwise_workspace(step.cell, step.target), x.device)
        into_syn, into_mem = (None, None) if options.record else (grad_syn, grad_mem)
        for t in reversed(range(xs.shape[0])):
            if options.record:
                into_syn = _sum(into_syn, grad_syn, t)
                into_mem = _sum(into_mem, grad_mem, t)
            before = syn if t == 0 else _from_pixels(saved.syn[t - 1], mem)
            self._core.cuda_pointwise_backward(
                *step,
                view(d_sums[t]),
                pixels[t + 1].data_ptr() if t + 1 < xs.shape[0] else 0,
                syn0=view(before),
                saved_gates=saved.gates[t].data_ptr(),
                winner=saved.winner[t].data_ptr() if options.inhibition else 0,
                noise=view(None if noise is None else noise[t]),
                grad_spk=view(None if grad_spk is None else grad_spk[t]),
                grad_syn=view(into_syn),
                grad_mem=view(into_mem),
                grad_syn0=view(d_syn),
                grad_threshold=address(None if of_threshold is None else of_threshold[t]),
                workspace=workspace.data_ptr(),
                **parameters,
            )
            into_syn, into_mem = d_syn, None
            if t > 0 or wanted[2]:
                into_mem = conv2d_input(
                    mem.shape, of_mem, d_sums[t], 1, options.padding, options.dilation
                ).to(x.dtype)
        flat, geometry = d_sums.flatten(0, 1), (options.stride, options.padding, options.dilation)
        d_x = d_weight = d_bias = d_threshold = None
        if wanted[0]:
            d_x = conv2d_input(xs.flatten(0, 1).shape, of_x, flat, *geometry)
            d_x = d_x.to(x.dtype).view_as(x)
        if wanted[3]:
            halves = (
                conv2d_weight(xs.flatten(0, 1).to(work), of_x.shape, flat, *geometry),
                conv2d_weight(mems.flatten(0, 1), of_mem.shape, flat, 1, *geometry[1:]),
            )
            d_weight = torch.cat(halves, 1).to(x.dtype)
        if wanted[4]:
            d_bias = flat.sum((0, 2, 3), dtype=_compute_type(x.dtype)).to(x.dtype)
        if of_threshold is not None:
            d_threshold = of_threshold.sum(0)
        d_mem = into_mem if wanted[2] else None
        return Gradients(d_x, d_syn if wanted[1] else None, d_mem, d_weight, d_bias, d_threshold)


def _convolve(x: Tensor, mem: Tensor, weight: Tensor, options: CellOptions) -> Tensor:
    """The gate sums, without the bias, which the kernels add."""
    if options.stride == (1, 1):
        both = torch.cat([x, mem], 1)
        return F.conv2d(both, weight, None, 1, options.padding, options.dilation)
    of_x, of_mem = weight.split([x.shape[1], mem.shape[1]], 1)
    sums = F.conv2d(x, of_x, None, options.stride, options.padding, options.dilation)
    return sums.add_(F.conv2d(mem, of_mem, None, 1, options.padding, options.dilation))


def _sum(carried: Tensor | None, recorded: Tensor | None, step: int) -> Tensor | None:
    """What reaches a recorded state: from later steps, and from the caller."""
    if recorded is None:
        return carried
    return recorded[step] if carried is None else carried + recorded[step]
