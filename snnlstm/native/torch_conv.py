"""What torch's convolution does of the cell: cuDNN on CUDA, oneDNN on the CPU.

"pointwise": torch convolves, and the kernels do what is of the neurons alone, step by step.
"hybrid", on CUDA: the kernels go through the steps, and torch forms the gradients of x, weight and
bias over all steps at once. Results and what is saved are laid out as those of the kernels. So is
the gradient of the gate sums:

    d_gates   (T, N, Ho * Wo, 4 Cp)
    mems      (T, N, Ho * Wo, Cp), mem before each step

Cp is C, padded to whole vectors. To torch these are channels-last images of 4 Cp and Cp channels,
which are made contiguous where torch is faster then (`plan.contiguous`). Torch multiplies numbers
of the type `plan.work`, or `plan.of_weight` for the gradient of the weight. The gate sums and
d_gates are of the type `plan.of_sums`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from ..call import Call
from ..lengths import active
from ..options import CellOptions
from . import tensors
from .tensors import Gradients, Pass, Result, Saved, address, view

__all__ = ["backward", "forward", "rates_on_cpu", "steps_backward"]

# A tensors.CommonPlan with the attributes `contiguous` and `of_weight`.
Plan = Any


def _steps(tensor: Tensor, options: CellOptions) -> Tensor:
    """The tensor of a step call or a sequence, with a time axis."""
    return tensor if options.sequence else tensor.unsqueeze(0)


def images_of(pixels: Tensor, mem: Tensor) -> Tensor:
    """(..., Ho * Wo, channels) as (..., channels, Ho, Wo), without a copy."""
    return pixels.unflatten(-2, mem.shape[-2:]).movedim(-1, -3)


def _ordered(plan: Plan, images: Tensor, dtype: torch.dtype) -> Tensor:
    """The images in a type, and in the order that torch convolves fastest."""
    images = images.to(dtype)
    return images.contiguous() if plan.contiguous else images


def _part(plan: Plan, weight: Tensor, d_gates: Tensor) -> Tensor:
    """Weight (4C, ...) with zeros for the padding between gates, as d_gates have it."""
    weight = weight.detach().to(plan.work).contiguous()
    padding = (d_gates.shape[-1] - weight.shape[0]) // 4
    if padding == 0:
        return weight
    pad = (0, 0) * (weight.dim() - 1) + (0, padding)
    return F.pad(weight.unflatten(0, (4, -1)), pad).flatten(0, 1)


def _own(call: Call, time: int) -> Tensor | None:
    """Whether a step is one of the sample's own, (T, N), and None for all.

    Torch leaves out the others, but not on CUDA, whose host does not know the lengths.
    """
    if call.lengths is None or call.lengths.device.type != "cpu":
        return None
    return active(call.lengths, time).flatten(1)


def _of(images: Tensor, own: Tensor | None) -> Tensor:
    return images if own is None else images[own]


def _among(images: Tensor, own: Tensor | None) -> Tensor:
    """Put images among zeros in the place of those that :func:`_of` left out."""
    if own is None:
        return images
    every = images.new_zeros((len(own), *images.shape[1:]))
    every[own] = images
    return every


def forward(
    plan: Plan,
    run: Callable[..., None],
    call: Call,
    parameters: dict[str, int],
    result: Result,
) -> None:
    """Torch convolves, the kernels do the rest of each step by `run`, of one step."""
    options = call.options
    saved: Any = result.saved or None
    syn, mem = call.syn, call.mem
    weight = call.weight.detach().to(plan.work)
    spks, last = _steps(result.spk, options), plan.signature.time - 1
    all_own = _own(call, last + 1)
    for t, x in enumerate(_steps(call.x, options)):
        spk: Tensor | None = spks[t]
        own = None if all_own is None else all_own[t]
        with torch.autocast(x.device.type, enabled=False):  # the call's own counts: plan.work
            of_x, of_mem = (_of(half, own).to(plan.work) for half in (x, mem))
            sums = _convolve(plan, of_x, of_mem, weight).to(plan.of_sums)
        sums = _among(sums, own)
        # Without record the states are updated in place, each neuron by one thread.
        out_syn = result.syn[t] if options.record else result.syn
        out_mem = result.mem[t] if options.record else result.mem
        plain = not options.spiking and not options.record and call.lengths is None
        if t < last and plain:
            spk, out_mem = None, spks[t]  # which are one, and the next step reads it there
        at_step, _held = _at_step(call, parameters, t)
        run(
            gate_sums=view(sums),
            syn0=view(syn),
            mem0=view(mem),
            spk=view(spk),
            syn=view(out_syn),
            mem=view(out_mem),
            **_saved_at(saved, t),
            **at_step,
        )
        syn, mem = out_syn, out_mem


def _saved_at(saved: Saved | None, step: int) -> dict[str, int]:
    """Addresses of what is saved of a step, where there is any."""
    if saved is None:
        return {}
    kinds = {"saved_gates": saved.gates, "saved_syn": saved.syn}
    kinds |= {"winner": saved.winner, "places": saved.places}
    return {name: kind[step].data_ptr() for name, kind in kinds.items() if len(kind) > step}


def _at_step(
    call: Call, parameters: dict[str, int], t: int
) -> tuple[dict[str, int], Tensor | None]:
    """The parameters of a call of one step, and what holds the lengths from there on.

    The kernels leave finished samples out.
    """
    if call.lengths is None:
        return parameters, None
    left = call.lengths - t
    # The states are carried on: those of every step are wanted.
    return parameters | {"lengths": left.data_ptr(), "record": True}, left


def backward(
    plan: Plan,
    given: Pass,
    wanted: Sequence[bool],
    run_steps: Callable[[Gradients, Tensor, Tensor | None], None],
) -> Gradients:
    """The gradients that are wanted. Torch forms those of x, weight and bias behind the steps.

    `run_steps` gets the gradients of syn, mem and threshold to fill in, d_gates, and mems or None,
    of which the first step's is there.
    """
    call, signature, x = given.call, plan.signature, given.call.x
    out = tensors.empty_gradients(x, signature, (*wanted[:3], False, False, wanted[5]))
    d_gates = plan.empty_d_gates(x)
    mems = _empty_mems(call, d_gates) if wanted[3] else None
    own = _own(call, signature.time)
    own = None if own is None else own.flatten()
    if call.lengths is not None:
        d_gates.zero_()
        if own is None:  # torch forms the gradients of all samples
            x = torch.where(active(call.lengths, signature.time), x, 0)
    run_steps(out, d_gates, mems)
    if out.x is not None:
        _data_gradient(plan, call, d_gates, own, out.x)
    mem = None if mems is None else images_of(mems, call.mem)
    x = _steps(x, call.options)
    weight, bias = _weight_gradient(plan, x, mem, d_gates, own, wanted[3:5])
    return out._replace(weight=weight, bias=bias)


def steps_backward(
    plan: Plan,
    run: Callable[..., None],
    given: Pass,
    out: Gradients,
    d_gates: Tensor,
    mems: Tensor | None,
) -> None:
    """The kernels do a step's neurons by `run`, last step first; torch forms the gradient of mem.

    `out` gets the gradients of syn, mem and threshold that it has memory for, `d_gates` and
    `mems`, if given, what the module's docstring says.
    """
    call, parameters, saved, grads, noise = given
    options, syn, mem = call.options, call.syn, call.mem
    grad_spk, into_syn, into_mem = grads
    recorded_syn, recorded_mem = (into_syn, into_mem) if options.record else (None, None)
    if options.record:
        into_syn = into_mem = None
    noise, grad_spk = (None if t is None else _steps(t, options) for t in (noise, grad_spk))
    c, last = mem.shape[1], plan.signature.time - 1
    of_mem = _part(plan, call.weight[:, -c:], d_gates)
    d_syn = torch.empty_like(syn) if out.syn is None else out.syn
    of_threshold = None if out.threshold is None else call.x.new_empty((last + 1, c))
    own = None if call.lengths is None else active(call.lengths, last + 1)
    all_own = _own(call, last + 1)
    if own is not None:  # where finished samples keep what they were given
        into_syn = d_syn.zero_() if into_syn is None else d_syn.copy_(into_syn)
    for t in range(last, -1, -1):
        into_syn = _sum(into_syn, recorded_syn, t)
        into_mem = _sum(into_mem, recorded_mem, t)
        at_step, _held = _at_step(call, parameters, t)
        run(
            syn0=view(syn if t == 0 else images_of(saved.syn[t - 1], mem)[:, :c]),
            **_saved_at(saved, t),
            noise=view(None if noise is None else noise[t]),
            grad_spk=view(None if grad_spk is None else grad_spk[t]),
            grad_syn=view(into_syn),
            grad_mem=view(into_mem),
            grad_syn0=view(d_syn),
            grad_threshold=address(None if of_threshold is None else of_threshold[t]),
            d_gates=d_gates[t].data_ptr(),
            mem_after=0 if mems is None or t == last else mems[t + 1].data_ptr(),
            **at_step,
        )
        into_syn, kept, into_mem = d_syn, into_mem, None
        if t > 0 or out.mem is not None:
            some = None if all_own is None else all_own[t]
            of_sums = _ordered(plan, _of(images_of(d_gates[t], mem), some), plan.work)
            shape = len(of_sums), *mem.shape[1:]
            into_mem = conv2d_input(shape, of_mem, of_sums, 1, options.padding, options.dilation)
            into_mem = _among(into_mem, some).to(mem.dtype)
        if own is not None and into_mem is not None:
            into_mem = torch.where(own[t], into_mem, 0 if kept is None else kept)
    if out.mem is not None and into_mem is not None:
        out.mem.copy_(into_mem)
    if out.threshold is not None and of_threshold is not None:
        torch.sum(of_threshold, 0, out=out.threshold)


def _empty_mems(call: Call, d_gates: Tensor) -> Tensor:
    """Memory for mem before each step, which holds that before the first."""
    *shape, gates = d_gates.shape
    new = call.mem.new_empty if call.lengths is None else call.mem.new_zeros
    mems = new((*shape, gates // 4), dtype=d_gates.dtype)
    images_of(mems[0], call.mem)[:, : call.mem.shape[1]].copy_(call.mem)
    return mems


def _data_gradient(
    plan: Plan, call: Call, d_gates: Tensor, own: Tensor | None, out: Tensor
) -> None:
    """The gradient of x at all steps, from that of the gate sums of `own` images."""
    options, x = call.options, _steps(call.x, call.options)
    of_x = _part(plan, call.weight[:, : x.shape[2]], d_gates)
    geometry = (options.stride, options.padding, options.dilation)
    grads = _of(images_of(d_gates.flatten(0, 1), call.mem), own)
    shape = len(grads), *x.shape[2:]
    found = conv2d_input(shape, of_x, _ordered(plan, grads, plan.work), *geometry)
    out.copy_(_among(found, own).view_as(out))


def _weight_gradient(
    plan: Plan,
    x: Tensor,
    mem: Tensor | None,
    d_gates: Tensor,
    own: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight and bias over the `own` images of all steps, as `wanted`.

    x is (T, N, Cin, H, W), and `mem`, (T, N, C or more, Ho, Wo), is that before each step, which
    only the weight's gradient needs.
    """
    signature, options, gates = plan.signature, plan.signature.options, d_gates.shape[-1]
    c, kernel, dtype = signature.c, options.kernel_size, signature.dtype
    rest = (options.padding, options.dilation)
    d_weight = d_bias = None
    if wanted[0]:
        assert mem is not None
        grads = _ordered(plan, _of(images_of(d_gates, mem).flatten(0, 1), own), plan.of_weight)
        halves = []
        for images, stride in (x, options.stride), (mem, (1, 1)):
            images = _ordered(plan, _of(images.flatten(0, 1), own), plan.of_weight)
            shape = gates, images.shape[1], *kernel
            halves.append(conv2d_weight(images, shape, grads, stride, *rest))
        both = torch.cat([halves[0], halves[1][:, :c]], 1)
        d_weight = both.unflatten(0, (4, -1))[:, :c].flatten(0, 1).to(dtype)
    if wanted[1]:
        sums = d_gates.sum((0, 1, 2), dtype=torch.promote_types(torch.float32, dtype))
        d_bias = sums.unflatten(0, (4, -1))[:, :c].flatten().to(dtype)
    return d_weight, d_bias


def _sum(carried: Tensor | None, recorded: Tensor | None, step: int) -> Tensor | None:
    """What reaches a recorded state: from later steps, and from the caller."""
    if recorded is None:
        return carried
    return recorded[step] if carried is None else carried + recorded[step]


def _convolve(plan: Plan, x: Tensor, mem: Tensor, weight: Tensor) -> Tensor:
    """The gate sums, without the bias, which the kernels add."""
    options, on_cpu = plan.signature.options, x.device.type == "cpu"

    def convolve(images: Tensor, weight: Tensor, stride: tuple[int, int]) -> Tensor:
        if on_cpu:  # where equal numbers in any layout have equal sums
            images, weight = images.contiguous(), weight.contiguous()
        return F.conv2d(images, weight, None, stride, options.padding, options.dilation)

    if options.stride == (1, 1):
        return convolve(torch.cat([x, mem], 1), weight, (1, 1))
    of_x, of_mem = weight.split([x.shape[1], mem.shape[1]], 1)
    return convolve(x, of_x, options.stride).add_(convolve(mem, of_mem, (1, 1)))


# What asks for instructions for products of bfloat16, and how many times as many torch's
# convolution forms with them as of float32. Younger versions of torch have these functions.
_PRODUCTS = (("_is_amx_tile_supported", 6.0), ("_is_avx512_bf16_supported", 2.1))


@lru_cache
def _bfloat16_rate() -> float:
    if not torch.backends.mkldnn.is_available():
        return 0
    return next((rate for name, rate in _PRODUCTS if getattr(torch.cpu, name, bool)()), 0)


def rates_on_cpu(
    wanted: torch.dtype, own: torch.dtype, isa: str
) -> tuple[torch.dtype, torch.dtype, tuple[float, float]]:
    """The types in which torch convolves and forms the weight's gradient, and how fast.

    The rates of the forward and the backward pass are 1 for float32, and 0 for what is very slow.
    The types are what the user asked for where the processor has instructions for that, and else
    the states' own. oneDNN is fast with AMX alone where it forms the gradient of the weight in
    bfloat16; else it takes up to 8 times as long as in float32.
    """
    rate = _bfloat16_rate() if wanted == torch.bfloat16 and isa == "avx512" else 0
    if rate > 3:
        return wanted, wanted, (rate, rate)
    if rate:
        return wanted, own, (rate, 2 / (1 + 1 / rate))
    rate = float(own == torch.float32 and torch.backends.mkldnn.is_available())
    return own, own, (rate, rate)
