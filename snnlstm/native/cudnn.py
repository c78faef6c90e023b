"""The convolutions that cuDNN computes on CUDA instead of the kernels.

cuDNN convolves cat[x, mem] step by step, as snnTorch does; the kernels do the rest. Results and
saved memory have the kernels' layouts. So does the gradient of the gate sums:

    d_gates   (T, N, Ho * Wo, 4 Cp)
    mems      (T, N, Ho * Wo, Cp), mem before each step

Cp is C, padded to whole vectors. For torch these are channels-last images of 4 Cp and Cp channels.
The host does not know the lengths of samples, so padded samples are convolved, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from ..calls.call import Call, Outputs
from ..calls.lengths import length_mask
from .plan import BackwardInputs, Gradients, Plan
from .tensors import pointer, strided


class Geometry(NamedTuple):
    """What torch convolves: the kernel without its `outer` taps, which only meet padding."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int]
    outer: tuple[int, int]

    def inner(self, weight: Tensor) -> Tensor:
        """The weight of the kernel."""
        if self.outer == (0, 0):
            return weight
        for axis, outer, size in zip((2, 3), self.outer, self.kernel, strict=True):
            weight = weight.narrow(axis, outer, size)
        return weight.contiguous()

    def whole(self, grad: Tensor) -> Tensor:
        """The gradient of the whole weight."""
        h, w = self.outer
        return grad if (h, w) == (0, 0) else F.pad(grad, (w, w, h, h))


class Convolutions(NamedTuple):
    """How torch convolves in the passes of a plan."""

    geometry: Geometry
    work: torch.dtype
    """The dtype of the numbers that are multiplied."""
    sums_dtype: torch.dtype
    """The dtype of the gate sums and of their gradient, d_gates."""
    d_gates_shape: tuple[int, ...]


def convolutions(plan: Plan, core: Any) -> Convolutions:
    """How torch convolves in a pass of the `core`."""
    (_, sums_dtype), (syn, _), *_ = plan.saved.parts
    d_gates_shape = plan.time, *syn[1:3], 4 * syn[3]
    return Convolutions(
        Geometry(*core.geometry), plan.operands or plan.dtype, sums_dtype, d_gates_shape
    )


def _steps(tensor: Tensor, sequence: bool) -> Tensor:
    """The tensor of a sequence or of a step call, with a time axis."""
    return tensor if sequence else tensor.unsqueeze(0)


def images_of(pixels: Tensor, mem: Tensor) -> Tensor:
    """(..., Ho * Wo, channels) as (..., channels, Ho, Wo), without a copy."""
    return pixels.unflatten(-2, mem.shape[-2:]).movedim(-1, -3)


def _part(how: Convolutions, weight: Tensor, d_gates: Tensor) -> Tensor:
    """Weight (4C, ...) with zeros for the padding between gates, which d_gates has."""
    weight = how.geometry.inner(weight.detach().to(how.work)).contiguous()
    padding = (d_gates.shape[-1] - weight.shape[0]) // 4
    if padding == 0:
        return weight
    pad = (0, 0) * (weight.dim() - 1) + (0, padding)
    return F.pad(weight.unflatten(0, (4, -1)), pad).flatten(0, 1)


def _step_of(call: Call, t: int) -> Call:
    """The call with the lengths, if any, that remain from step t on.

    The kernels skip padded samples. They write the states of every step, which the next one reads.
    """
    if call.lengths is None:
        return call
    return call._replace(lengths=call.lengths - t, record=True)


def forward(
    plan: Plan,
    how: Convolutions,
    core: Any,
    stream: int,
    call: Call,
    levels: int,
    outs: Outputs,
    saved: Tensor | None,
) -> None:
    """cuDNN convolves, and the kernels of `core` do the rest of each step.

    x is convolved with mem, or apart if it has a stride.
    """
    syn, mem, bias, geometry = call.syn, call.mem, pointer(call.bias), how.geometry
    all_spk, all_syn, all_mem = outs
    spks, last = _steps(all_spk, call.sequence), plan.time - 1
    weight = geometry.inner(call.weight.detach().to(how.work))
    x_weight, mem_weight = weight.split([plan.cin, plan.c], 1)
    for t, x in enumerate(_steps(call.x, call.sequence)):
        spk: Tensor | None = spks[t]
        images = x.to(how.work), mem.to(how.work)
        with torch.autocast(x.device.type, enabled=False):  # how.work decides
            if geometry.stride == (1, 1):
                sums = _convolve(how, torch.cat(images, 1), weight, (1, 1))
            else:
                sums = _convolve(how, images[0], x_weight, geometry.stride)
                sums += _convolve(how, images[1], mem_weight, (1, 1))
        # Without record the states are updated in place, each neuron by one thread.
        out_syn = all_syn[t] if call.record else all_syn
        out_mem = all_mem[t] if call.record else all_mem
        h_alone = not plan.spec.spiking and not call.record and call.lengths is None
        if t < last and h_alone:
            spk, out_mem = None, spks[t]  # spk is mem, and the next step reads it there
        views, step = (None, *strided(syn, mem)), _step_of(call, t)  # step owns its lengths
        fields = plan.call_fields(views, step, saved, t)
        results = strided(sums.to(how.sums_dtype), spk, out_syn, out_mem)
        core.run(stream, (0, 0, 0, 0, levels, 0, *fields, bias, *results))
        syn, mem = out_syn, out_mem


def backward(
    plan: Plan,
    how: Convolutions,
    inputs: BackwardInputs,
    out: Gradients,
    run_kernels: Callable[[tuple], None],
) -> Gradients:
    """The wanted gradients. cuDNN computes those of x, weight and bias after the steps.

    `run_kernels` runs the kernels of one step.
    """
    call, x, wanted = inputs.call, inputs.call.x, inputs.wanted
    out = out._replace(weight=None, bias=None)  # cuDNN allocates these
    d_gates = x.new_empty(how.d_gates_shape, dtype=how.sums_dtype)
    mems = _empty_mems(call, d_gates) if wanted[3] else None
    if call.lengths is not None:
        d_gates.zero_()
        x = torch.where(length_mask(call.lengths, plan.time), x, 0)
    _steps_backward(plan, how, run_kernels, inputs, out, d_gates, mems)
    if out.x is not None:
        _data_gradient(how, call, d_gates, out.x)
    mem = None if mems is None else images_of(mems, call.mem)
    weight, bias = _weight_gradient(plan, how, _steps(x, call.sequence), mem, d_gates, wanted[3:5])
    return out._replace(weight=weight, bias=bias)


def _steps_backward(
    plan: Plan,
    how: Convolutions,
    run_kernels: Callable[[tuple], None],
    inputs: BackwardInputs,
    out: Gradients,
    d_gates: Tensor,
    mems: Tensor | None,
) -> None:
    """The kernels do the neurons of each step, last step first; cuDNN the gradient of mem.

    `out` receives the gradients of syn, mem and threshold that it has memory for. `d_gates` and
    `mems`, if given, receive what the module's docstring says.
    """
    call, _, saved, grads = inputs[:4]
    syn, mem, record = call.syn, call.mem, call.record
    saved_syn = plan.saved.part(saved, 1)
    grad_spk, into_syn, into_mem = grads
    recorded_syn, recorded_mem = (into_syn, into_mem) if record else (None, None)
    if record:
        into_syn = into_mem = None
    grad_spk = None if grad_spk is None else _steps(grad_spk, call.sequence)
    c, last = mem.shape[1], plan.time - 1
    mem_weight = _part(how, call.weight[:, -c:], d_gates)
    d_syn = syn.new_empty(plan.state) if out.syn is None else out.syn
    d_threshold = None if out.threshold is None else call.x.new_empty((last + 1, c))
    live = None if call.lengths is None else length_mask(call.lengths, last + 1)
    if live is not None:  # the gradients of padded samples stay as they were given
        into_syn = d_syn.zero_() if into_syn is None else d_syn.copy_(into_syn)
    for t in range(last, -1, -1):
        into_syn = _sum(into_syn, recorded_syn, t)
        into_mem = _sum(into_mem, recorded_mem, t)
        syn_before = syn if t == 0 else images_of(saved_syn[t - 1], mem)[:, :c]
        spk_grad = None if grad_spk is None else grad_spk[t]
        step_threshold = None if d_threshold is None else d_threshold[t]
        views, step_grads = (None, *strided(syn_before), None), (spk_grad, into_syn, into_mem)
        step = BackwardInputs(_step_of(call, t), views, saved, step_grads)
        results = Gradients(None, d_syn, None, None, None, step_threshold)
        mem_after = 0 if mems is None or t == last else mems[t + 1].data_ptr()
        addresses = d_gates[t].data_ptr(), mem_after
        run_kernels(plan.backward_fields(step, results, addresses, t))
        into_syn, before, into_mem = d_syn, into_mem, None
        if t > 0 or out.mem is not None:
            images = images_of(d_gates[t], mem).to(how.work)
            options = 1, how.geometry.padding, how.geometry.dilation
            into_mem = conv2d_input(mem.shape, mem_weight, images, *options).to(mem.dtype)
        if live is not None and into_mem is not None:
            into_mem = torch.where(live[t], into_mem, 0 if before is None else before)
    if out.mem is not None and into_mem is not None:
        out.mem.copy_(into_mem)
    if out.threshold is not None and d_threshold is not None:
        torch.sum(d_threshold, 0, out=out.threshold)


def _empty_mems(call: Call, d_gates: Tensor) -> Tensor:
    """Memory for mem before each step; that before the first is filled in."""
    *shape, gates = d_gates.shape
    new = call.mem.new_empty if call.lengths is None else call.mem.new_zeros
    mems = new((*shape, gates // 4), dtype=d_gates.dtype)
    images_of(mems[0], call.mem)[:, : call.mem.shape[1]].copy_(call.mem)
    return mems


def _data_gradient(how: Convolutions, call: Call, d_gates: Tensor, out: Tensor) -> None:
    """The gradient of x at all steps, from that of the gate sums."""
    geometry, x = how.geometry, _steps(call.x, call.sequence)
    x_weight = _part(how, call.weight[:, : x.shape[2]], d_gates)
    grads = images_of(d_gates.flatten(0, 1), call.mem)
    shape = (len(grads), *x.shape[2:])
    options = geometry.stride, geometry.padding, geometry.dilation
    out.copy_(conv2d_input(shape, x_weight, grads.to(how.work), *options).view_as(out))


def _weight_gradient(
    plan: Plan,
    how: Convolutions,
    x: Tensor,
    mem: Tensor | None,
    d_gates: Tensor,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight and bias over all steps, as `wanted`.

    x is (T, N, Cin, H, W), and `mem`, (T, N, C or more, Ho, Wo), is that before each step, which
    only the weight's gradient needs.
    """
    geometry, gates, c, dtype = how.geometry, d_gates.shape[-1], plan.c, plan.dtype
    d_weight = d_bias = None
    if wanted[0]:
        assert mem is not None
        grads = images_of(d_gates, mem).flatten(0, 1).to(how.work)
        halves = []
        for images, stride in (x, geometry.stride), (mem, (1, 1)):
            images = images.flatten(0, 1).to(how.work)
            shape = gates, images.shape[1], *geometry.kernel
            halves.append(
                conv2d_weight(images, shape, grads, stride, geometry.padding, geometry.dilation)
            )
        both = geometry.whole(torch.cat([halves[0], halves[1][:, :c]], 1))
        d_weight = both.unflatten(0, (4, -1))[:, :c].flatten(0, 1).to(dtype)
    if wanted[1]:
        sums = d_gates.sum((0, 1, 2), dtype=torch.promote_types(torch.float32, dtype))
        d_bias = sums.unflatten(0, (4, -1))[:, :c].flatten().to(dtype)
    return d_weight, d_bias


def _sum(carried: Tensor | None, recorded: Tensor | None, step: int) -> Tensor | None:
    """The gradient of a recorded state, from later steps and from the caller."""
    if recorded is None:
        return carried
    return recorded[step] if carried is None else carried + recorded[step]


def _convolve(how: Convolutions, images: Tensor, weight: Tensor, stride: tuple[int, int]) -> Tensor:
    """Gate sums without the bias, which the kernels add."""
    geometry = how.geometry
    return F.conv2d(images, weight, None, stride, geometry.padding, geometry.dilation)
