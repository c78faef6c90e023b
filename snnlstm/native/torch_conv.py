"""What torch's convolution (cuDNN) does of the cell on CUDA.

"pointwise": torch convolves, and the kernels do what is of the neurons alone, step by step.
"hybrid": the kernels go through the steps, and torch forms the gradients of x, weight and bias over
all steps at once. Results, what is saved, and the gradient of the gate sums are laid out as those
of the kernels:

    d_gates   (T, N, Ho * Wo, 4 Cp)
    mems      (T, N, Ho * Wo, Cp), mem before each step

Cp is C, padded to whole vectors. To torch these are channels-last images of 4 Cp and Cp channels,
which are made contiguous where cuDNN is faster then (`plan.contiguous`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from ..call import Call
from ..lengths import active
from ..options import CellOptions
from . import tensors
from .tensors import Gradients, Pass, Result, Saved, address, view

if TYPE_CHECKING:
    from .cuda import Plan

__all__ = ["data_gradient", "empty_mems", "forward", "steps_backward", "weight_gradient"]


def _steps(tensor: Tensor, options: CellOptions) -> Tensor:
    """The tensor of a step call or a sequence, with a time axis."""
    return tensor if options.sequence else tensor.unsqueeze(0)


def images_of(pixels: Tensor, mem: Tensor) -> Tensor:
    """(..., Ho * Wo, channels) as (..., channels, Ho, Wo), without a copy."""
    return pixels.unflatten(-2, mem.shape[-2:]).movedim(-1, -3)


def _ordered(plan: Plan, images: Tensor) -> Tensor:
    """The images in the order that torch convolves fastest."""
    return images.contiguous() if plan.contiguous else images


def _padded(weight: Tensor, gates: int) -> Tensor:
    """Weight (4C, ...) with zeros for the padding between gates, (gates, ...)."""
    padding = (gates - weight.shape[0]) // 4
    if padding == 0:
        return weight
    pad = (0, 0) * (weight.dim() - 1) + (0, padding)
    return F.pad(weight.unflatten(0, (4, -1)), pad).flatten(0, 1)


def forward(plan: Plan, core: Any, call: Call, parameters: dict[str, int], result: Result) -> None:
    """Torch convolves, the kernels do the rest of each step by `core`, a plan of one step."""
    options, stream = call.options, plan.stream
    saved: Any = result.saved or None
    syn, mem = call.syn, call.mem
    weight = call.weight.detach().to(plan.work)
    spks, last = _steps(result.spk, options), plan.signature.time - 1
    for t, x in enumerate(_steps(call.x, options)):
        spk: Tensor | None = spks[t]
        sums = _convolve(x.to(plan.work), mem.to(plan.work), weight, options)
        # Without record the states are updated in place, each neuron by one thread.
        out_syn = result.syn[t] if options.record else result.syn
        out_mem = result.mem[t] if options.record else result.mem
        plain = not options.spiking and not options.record and call.lengths is None
        if t < last and plain:
            spk, out_mem = None, spks[t]  # which are one, and the next step reads it there
        at_step, _held = _at_step(call, parameters, t)
        core.forward(
            stream,
            gate_sums=view(sums),
            syn0=view(syn),
            mem0=view(mem),
            spk=view(spk),
            syn=view(out_syn),
            mem=view(out_mem),
            saved_gates=address(saved and saved.gates[t]),
            saved_syn=saved.syn[t].data_ptr() if saved and t < last else 0,
            **_decisions(saved, t),
            **at_step,
        )
        syn, mem = out_syn, out_mem


def _decisions(saved: Saved | None, step: int) -> dict[str, int]:
    """Addresses of a step's winners and places, where there are any."""
    if saved is None:
        return {}
    kinds = {"winner": saved.winner, "places": saved.places}
    return {name: kind[step].data_ptr() for name, kind in kinds.items() if kind.numel()}


def _at_step(
    call: Call, parameters: dict[str, int], t: int
) -> tuple[dict[str, int], Tensor | None]:
    """The parameters of a call of one step, and what holds the lengths from there on.

    The kernels leave finished samples out. Torch convolves those too, since the host does not know
    them.
    """
    if call.lengths is None:
        return parameters, None
    left = call.lengths - t
    # The states are carried on: those of every step are wanted.
    return parameters | {"lengths": left.data_ptr(), "record": True}, left


def steps_backward(
    plan: Plan, core: Any, given: Pass, out: Gradients, d_gates: Tensor, mems: Tensor | None
) -> None:
    """The kernels do a step's neurons, last step first; torch forms the gradient of mem.

    `out` gets the gradients of syn, mem and threshold that it has memory for, `d_gates` and
    `mems`, if given, what the module's docstring says.
    """
    call, parameters, saved, grads, noise = given
    options, stream = call.options, plan.stream
    syn, mem = call.syn, call.mem
    grad_spk, into_syn, into_mem = grads
    recorded_syn, recorded_mem = (into_syn, into_mem) if options.record else (None, None)
    if options.record:
        into_syn = into_mem = None
    noise, grad_spk = (None if t is None else _steps(t, options) for t in (noise, grad_spk))
    c, last = mem.shape[1], plan.signature.time - 1
    of_mem = _padded(call.weight.detach()[:, -c:].to(plan.work), d_gates.shape[-1])
    d_syn = torch.empty_like(syn) if out.syn is None else out.syn
    of_threshold = None if out.threshold is None else call.x.new_empty((last + 1, c))
    own = None if call.lengths is None else active(call.lengths, last + 1)
    if own is not None:  # where finished samples keep what they were given
        into_syn = d_syn.zero_() if into_syn is None else d_syn.copy_(into_syn)
    workspace = tensors.empty_bytes(core.workspace, syn.device)
    for t in range(last, -1, -1):
        into_syn = _sum(into_syn, recorded_syn, t)
        into_mem = _sum(into_mem, recorded_mem, t)
        at_step, _held = _at_step(call, parameters, t)
        core.backward(
            stream,
            syn0=view(syn if t == 0 else images_of(saved.syn[t - 1], mem)[:, :c]),
            saved_gates=saved.gates[t].data_ptr(),
            **_decisions(saved, t),
            noise=view(None if noise is None else noise[t]),
            grad_spk=view(None if grad_spk is None else grad_spk[t]),
            grad_syn=view(into_syn),
            grad_mem=view(into_mem),
            grad_syn0=view(d_syn),
            grad_threshold=address(None if of_threshold is None else of_threshold[t]),
            d_gates=d_gates[t].data_ptr(),
            mem_after=0 if mems is None or t == last else mems[t + 1].data_ptr(),
            workspace=workspace.data_ptr(),
            **at_step,
        )
        into_syn, kept, into_mem = d_syn, into_mem, None
        if t > 0 or out.mem is not None:
            of_sums = _ordered(plan, images_of(d_gates[t], mem))
            into_mem = conv2d_input(
                mem.shape, of_mem, of_sums, 1, options.padding, options.dilation
            ).to(mem.dtype)
        if own is not None and into_mem is not None:
            into_mem = torch.where(own[t], into_mem, 0 if kept is None else kept)
    if out.mem is not None and into_mem is not None:
        out.mem.copy_(into_mem)
    if out.threshold is not None and of_threshold is not None:
        torch.sum(of_threshold, 0, out=out.threshold)


def empty_mems(plan: Plan, call: Call, d_gates: Tensor) -> Tensor:
    """Memory for mem before each step, which holds that before the first."""
    *shape, gates = d_gates.shape
    new = call.mem.new_empty if call.lengths is None else call.mem.new_zeros
    mems = new((*shape, gates // 4), dtype=plan.work)
    images_of(mems[0], call.mem)[:, : call.mem.shape[1]].copy_(call.mem)
    return mems


def data_gradient(plan: Plan, call: Call, d_gates: Tensor, out: Tensor) -> None:
    """The gradient of x at all steps, from that of the gate sums."""
    options, x = call.options, _steps(call.x, call.options)
    of_x = _padded(call.weight.detach()[:, : x.shape[2]].to(plan.work), d_gates.shape[-1])
    geometry = (options.stride, options.padding, options.dilation)
    grads = _ordered(plan, images_of(d_gates.flatten(0, 1), call.mem))
    out.copy_(conv2d_input(x.flatten(0, 1).shape, of_x, grads, *geometry).view_as(out))


def weight_gradient(
    plan: Plan, x: Tensor, mem: Tensor | None, d_gates: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight and bias over steps, as `wanted`.

    x is (T, N, Cin, H, W), and `mem`, (T, N, C or more, Ho, Wo), is that before each step, which
    only the weight's gradient needs.
    """
    signature, options, gates = plan.signature, plan.signature.options, d_gates.shape[-1]
    c, kernel, dtype = signature.c, options.kernel_size, signature.dtype
    rest = (options.padding, options.dilation)
    d_weight = d_bias = None
    if wanted[0]:
        assert mem is not None
        grads = _ordered(plan, images_of(d_gates, mem).flatten(0, 1))
        halves = []
        for images, stride in (x, options.stride), (mem, (1, 1)):
            images = _ordered(plan, images.flatten(0, 1).to(plan.work))
            shape = gates, images.shape[1], *kernel
            halves.append(conv2d_weight(images, shape, grads, stride, *rest))
        both = torch.cat([halves[0], halves[1][:, :c]], 1)
        d_weight = both.unflatten(0, (4, -1))[:, :c].flatten(0, 1).to(dtype)
    if wanted[1]:
        sums = d_gates.sum((0, 1, 2), dtype=plan.real)
        d_bias = sums.unflatten(0, (4, -1))[:, :c].flatten().to(dtype)
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
