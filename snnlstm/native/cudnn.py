"""The cell with torch's convolution (cuDNN) and the CUDA kernels behind it, step by step.

The kernels do what is of the neurons alone: gates, states, spikes, and the gradients of these.
Results, and what is saved for the backward pass, are those of the fused kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from ..call import Call, CellOptions
from . import tensors
from .tensors import Gradients, Result, Saved, address, view

if TYPE_CHECKING:
    from .cuda import Plan

__all__ = ["backward", "forward", "weight_gradient"]


def _steps(tensor: Tensor, options: CellOptions) -> Tensor:
    """With a time axis."""
    return tensor if options.sequence else tensor.unsqueeze(0)


def _from_pixels(pixels: Tensor, mem: Tensor) -> Tensor:
    """(..., Ho * Wo, Cp) as (..., C, Ho, Wo), without a copy."""
    _, c, ho, wo = mem.shape
    return pixels.unflatten(-2, (ho, wo))[..., :c].movedim(-1, -3)


def _begin(plan: Plan) -> tuple[Any, Any, int]:
    """What each call of the core starts with: it is of one step."""
    return plan.step, plan.target, plan.kernels.stream(plan.signature.device)


def forward(plan: Plan, call: Call, parameters: dict[str, int], result: Result) -> None:
    """Torch convolves, the kernels do the rest of each step."""
    options, saved, begin = call.options, result.saved, _begin(plan)
    syn, mem = call.syn, call.mem
    weight = call.weight.detach().to(plan.work)
    spks, last = _steps(result.spk, options), plan.signature.time - 1
    for t, x in enumerate(_steps(call.x, options)):
        sums = _convolve(x.to(plan.work), mem.to(plan.work), weight, options)
        # Without record the states are updated in place, each neuron by one thread.
        out_syn = result.syn[t] if options.record else result.syn
        out_mem = result.mem[t] if options.record else result.mem
        plan.core.cuda_pointwise_forward(
            *begin,
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
    plan: Plan,
    call: Call,
    parameters: dict[str, int],
    saved: Saved,
    output_grads: tuple[Tensor | None, ...],
    wanted: Sequence[bool],
    left: Tensor | None,
) -> Gradients:
    """The kernels do a step's neurons, last step first; torch all that is a convolution.

    `left`: of a step call, (N, 4C, Ho, Wo), gets the gradient of the gate sums.
    """
    core, options, work, begin = plan.core, call.options, plan.work, _begin(plan)
    x, syn, mem, weight = call.x, call.syn, call.mem, call.weight
    *of_spikes, grad_syn, grad_mem = output_grads
    noise, grad_spk = (None if t is None else _steps(t, options) for t in of_spikes)
    n, c, ho, wo = mem.shape
    xs = _steps(x, options)
    of_x, of_mem = weight.detach().to(work).split([x.shape[-3], c], 1)
    if left is None:
        d_sums = tensors.empty_like_images(x, (xs.shape[0], n, 4 * c, ho, wo), work)
    else:
        d_sums = left.unsqueeze(0)
    # mem before each step, as the weight's gradient wants it
    pixels = x.new_empty((*saved.gates.shape[:3], saved.gates.shape[3] // 4), dtype=work)
    mems = _from_pixels(pixels, mem)
    mems[0].copy_(mem)
    d_syn = torch.empty_like(syn)
    of_threshold = x.new_empty((xs.shape[0], c)) if wanted[5] else None
    size = core.cuda_pointwise_workspace(*begin[:2])
    workspace = tensors.empty_bytes(size, x.device)
    into_syn, into_mem = (None, None) if options.record else (grad_syn, grad_mem)
    for t in reversed(range(xs.shape[0])):
        if options.record:
            into_syn = _sum(into_syn, grad_syn, t)
            into_mem = _sum(into_mem, grad_mem, t)
        before = syn if t == 0 else _from_pixels(saved.syn[t - 1], mem)
        core.cuda_pointwise_backward(
            *begin,
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
    d_x = None
    if wanted[0]:
        geometry = (options.stride, options.padding, options.dilation)
        d_x = conv2d_input(xs.flatten(0, 1).shape, of_x, d_sums.flatten(0, 1), *geometry)
        d_x = d_x.to(x.dtype).view_as(x)
    d_weight, d_bias = weight_gradient(plan, xs, mems, d_sums.flatten(0, 1), wanted[3:5])
    d_threshold = None if of_threshold is None else of_threshold.sum(0)
    d_mem = into_mem if wanted[2] else None
    return Gradients(d_x, d_syn if wanted[1] else None, d_mem, d_weight, d_bias, d_threshold)


def weight_gradient(
    plan: Plan,
    x: Tensor,
    mem: Tensor,
    d_sums: Tensor,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight and bias over steps.

    Parameters
    ----------
    plan : Plan
    x, mem : Tensor
        (T, N, Cin, H, W) and (T, N, C, Ho, Wo), mem before each step.
    d_sums : Tensor
        (T N, 4C, Ho, Wo), gradient of the gate sums.
    wanted : two of bool
    """
    options, dtype = plan.signature.options, plan.signature.dtype
    kernel, rest = options.kernel_size, (options.padding, options.dilation)
    d_weight = d_bias = None
    if wanted[0]:
        xs, mems = x.flatten(0, 1).to(plan.work), mem.flatten(0, 1).to(plan.work)
        kernel = options.kernel_size
        halves = (
            conv2d_weight(
                xs, (d_sums.shape[1], xs.shape[1], *kernel), d_sums, options.stride, *rest
            ),
            conv2d_weight(mems, (d_sums.shape[1], mems.shape[1], *kernel), d_sums, 1, *rest),
        )
        d_weight = torch.cat(list(halves), 1).to(dtype)
    if wanted[1]:
        d_bias = d_sums.sum((0, 2, 3), dtype=plan.real).to(dtype)
    return d_weight, d_bias


def _sum(carried: Tensor | None, recorded: Tensor | None, step: int) -> Tensor | None:
    """What reaches a recorded state: from later steps, and from the caller."""
    if recorded is None:
        return carried
    return recorded[step] if carried is None else carried + recorded[step]


def _convolve(x: Tensor, mem: Tensor, weight: Tensor, options: CellOptions) -> Tensor:
    """The gate sums, without the bias, which the kernels add."""
    if options.stride == (1, 1):
        both = torch.cat([x, mem], 1)
        return F.conv2d(both, weight, None, 1, options.padding, options.dilation)
    of_x, of_mem = weight.split([x.shape[1], mem.shape[1]], 1)
    sums = F.conv2d(x, of_x, None, options.stride, options.padding, options.dilation)
    return sums.add_(F.conv2d(mem, of_mem, None, 1, options.padding, options.dilation))
