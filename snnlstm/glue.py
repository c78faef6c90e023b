"""What the callers of the CPU and of the CUDA kernels share: descriptions, addresses, results.

The core takes raw memory and allocates none; everything it reads and writes is a torch tensor
that its caller keeps alive while it runs.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .options import CellOptions

__all__ = ["Gradients", "Result", "Saved"]

# The numbers of csrc/args.h.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_RESETS = {"subtract": 0, "zero": 1, "none": 2}
_POOLS = {"none": 0, "max": 1, "avg": 2}


class _Last(threading.local):
    name = ""


last = _Last()  # the name of what this thread's last forward pass ran


class Saved(NamedTuple):
    """What a forward pass keeps for its backward pass, beside its arguments.

    Attributes
    ----------
    gates : Tensor
        (T, N, Ho * Wo, 4 Cp), the activated gates of every step in the kernels' own order;
        Cp is C, padded to whole vectors.
    syn : Tensor
        (T, N, Ho * Wo, Cp), syn after every step; CUDA: but the last one.
    winner : Tensor
        (T, N) int64, the neuron that inhibition let through; (0,) without inhibition.
    """

    gates: Tensor
    syn: Tensor
    winner: Tensor


class Result(NamedTuple):
    """Outputs of a forward pass; `saved` is None in inference."""

    spk: Tensor
    syn: Tensor
    mem: Tensor
    saved: Saved | None


class Gradients(NamedTuple):
    """Gradients of the arguments of a forward pass; None where not wanted."""

    x: Tensor | None
    syn: Tensor | None
    mem: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    threshold: Tensor | None


def make_cell(
    core: Any,
    options: CellOptions,
    dtype: torch.dtype,
    time: int,
    shape: tuple[int, int, int, int],
    channels: int,
) -> Any:
    """Describe a call to `core`, a module like snnlstm._C; shape: (N, Cin, H, W)."""
    surrogate, quant = options.surrogate, options.quant
    n, cin, h, w = shape
    return core.Cell(
        dtype=DTYPES[dtype],
        T=time,
        N=n,
        Cin=cin,
        C=channels,
        H=h,
        W=w,
        kernel=options.kernel_size,
        stride=options.stride,
        dilation=options.dilation,
        pool=_POOLS[options.pool],
        pool_size=options.pool_size,
        reset=_RESETS[options.reset],
        surrogate=surrogate.kind,
        p0=surrogate.p0,
        p1=surrogate.p1,
        inhibition=options.inhibition,
        num_levels=0 if quant is None else quant.levels.numel(),
    )


def view(tensor: Tensor | None) -> tuple[int, ...] | None:
    """Address and five strides; the time stride of a tensor without time is 0."""
    if tensor is None:
        return None
    strides = tensor.stride()
    return (tensor.data_ptr(), *((0,) * (5 - len(strides))), *strides)


def address(tensor: Tensor | None) -> int:
    """Where the tensor's numbers are; 0 where there is none."""
    return 0 if tensor is None else tensor.data_ptr()


def compute_type(dtype: torch.dtype) -> torch.dtype:
    """The type in which the CUDA kernels compute with states of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_bytes(count: int, device: torch.device | str = "cpu") -> Tensor:
    """Memory for the kernels alone, uninitialised."""
    return torch.empty(count, dtype=torch.uint8, device=device)


def threshold_numbers(threshold: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """Contiguous numbers and their stride along the channels: 0 for a single one."""
    flat = threshold.detach().to(dtype).reshape(-1).contiguous()
    return flat, 0 if flat.numel() == 1 else 1


def empty_like_images(
    x: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None
) -> Tensor:
    """An output of `shape` ending in (C, H, W), channels-last where the images of x are."""
    dtype = dtype or x.dtype
    if x.stride(-3) != 1 or x.shape[-3] == 1 or x.is_contiguous():
        return x.new_empty(shape, dtype=dtype)
    *lead, c, h, w = shape
    strides = [1, w * c, c]
    size = c * h * w
    for count in reversed(lead):
        strides.insert(0, size)
        size *= count
    return torch.empty_strided(shape, strides, dtype=dtype, device=x.device)


def empty_outputs(x: Tensor, mem: Tensor, options: CellOptions) -> tuple[Tensor, Tensor, Tensor]:
    """spk, syn and mem of a call, uninitialised."""
    (n, c, ho, wo), (ph, pw) = mem.shape, options.pool_size
    time = (x.shape[0],) if options.sequence else ()
    state_time = time if options.record else ()
    return (
        empty_like_images(x, (*time, n, c, ho // ph, wo // pw)),
        empty_like_images(x, (*state_time, n, c, ho, wo)),
        empty_like_images(x, (*state_time, n, c, ho, wo)),
    )


def empty_gradients(
    x: Tensor, syn: Tensor, mem: Tensor, weight: Tensor, wanted: Sequence[bool]
) -> Gradients:
    """The gradients that are wanted, uninitialised; the threshold's one a channel, (C,)."""
    c = mem.shape[1]
    shapes = (x.shape, syn.shape, mem.shape, weight.shape, (4 * c,), (c,))
    out = [x.new_empty(shape) if want else None for shape, want in zip(shapes, wanted, strict=True)]
    if wanted[0]:
        out[0] = empty_like_images(x, tuple(x.shape))
    return Gradients(*out)


def with_threshold_of(grads: Gradients, threshold: Tensor) -> Gradients:
    """The threshold's gradient, one number a channel, in the shape of the threshold."""
    if grads.threshold is None:
        return grads
    total = grads.threshold.sum() if threshold.numel() == 1 else grads.threshold
    return grads._replace(threshold=total.reshape(threshold.shape).to(threshold.dtype))


def stochastic_noise(x: Tensor, options: CellOptions, grad_spk: Tensor | None) -> Tensor | None:
    """Uniform numbers of the stochastic surrogate, (T, N, C, Hp, Wp), else None.

    Drawn one block a step, last step first: the order in which a loop over steps draws them.
    """
    if grad_spk is None or options.surrogate.name != "SSO":
        return None
    noise = empty_like_images(x, tuple(grad_spk.shape))
    for step in reversed(noise.unbind()) if options.sequence else (noise,):
        step.uniform_()
    return noise
