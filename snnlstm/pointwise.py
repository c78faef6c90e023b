"""The cell with torch's convolution (cuDNN) and the CUDA kernels behind it, step by step.

The kernels do what is of the neurons alone: gates, states, spikes, and the gradients of these.
Results, and what is saved for the backward pass, are those of the fused kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from . import glue
from .glue import Gradients, Result, Saved, address, view
from .options import CellOptions

__all__ = ["Call", "backward", "forward"]


class Call(NamedTuple):
    """What all calls of the core begin with."""

    cell: Any
    target: Any
    stream: int


def _steps(tensor: Tensor, options: CellOptions) -> Tensor:
    """With a time axis."""
    return tensor if options.sequence else tensor.unsqueeze(0)


def _from_pixels(pixels: Tensor, mem: Tensor) -> Tensor:
    """(..., Ho * Wo, Cp) as (..., C, Ho, Wo), without a copy."""
    _, c, ho, wo = mem.shape
    return pixels.unflatten(-2, (ho, wo))[..., :c].movedim(-1, -3)


def forward(
    core: Any,
    step: Call,
    x: Tensor,
    syn: Tensor,
    mem: Tensor,
    weight: Tensor,
    parameters: dict[str, int],
    options: CellOptions,
    result: Result,
) -> None:
    """Torch convolves, the kernels do the rest of each step."""
    work = options.operands or x.dtype
    saved = result.saved
    weight = weight.detach().to(work)
    spks, last = _steps(result.spk, options), x.shape[0] - 1 if options.sequence else 0
    for t, x_t in enumerate(_steps(x, options)):
        sums = _convolve(x_t.to(work), mem.to(work), weight, options)
        # Without record the states are updated in place, each neuron by one thread.
        out_syn = result.syn[t] if options.record else result.syn
        out_mem = result.mem[t] if options.record else result.mem
        core.cuda_pointwise_forward(
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


def backward(
    core: Any,
    step: Call,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    output_grads: tuple[Tensor | None, ...],
    parameters: dict[str, int],
    options: CellOptions,
    saved: Saved,
    wanted: Sequence[bool],
) -> Gradients:
    """The kernels do a step's neurons, last step first; torch all that is a convolution."""
    x, syn, mem, weight = inputs
    *of_spikes, grad_syn, grad_mem = output_grads
    noise, grad_spk = (None if t is None else _steps(t, options) for t in of_spikes)
    work, (n, c, ho, wo) = options.operands or x.dtype, mem.shape
    xs = _steps(x, options)
    of_x, of_mem = weight.detach().to(work).split([x.shape[-3], c], 1)
    d_sums = glue.empty_like_images(x, (xs.shape[0], n, 4 * c, ho, wo), work)
    # mem before each step, as the weight's gradient wants it
    pixels = x.new_empty((*saved.gates.shape[:3], saved.gates.shape[3] // 4), dtype=work)
    mems = _from_pixels(pixels, mem)
    mems[0].copy_(mem)
    d_syn = torch.empty_like(syn)
    of_threshold = x.new_empty((xs.shape[0], c)) if wanted[5] else None
    workspace = glue.empty_bytes(core.cuda_pointwise_workspace(step.cell, step.target), x.device)
    into_syn, into_mem = (None, None) if options.record else (grad_syn, grad_mem)
    for t in reversed(range(xs.shape[0])):
        if options.record:
            into_syn = _sum(into_syn, grad_syn, t)
            into_mem = _sum(into_mem, grad_mem, t)
        before = syn if t == 0 else _from_pixels(saved.syn[t - 1], mem)
        core.cuda_pointwise_backward(
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
        d_bias = flat.sum((0, 2, 3), dtype=glue.compute_type(x.dtype)).to(x.dtype)
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
