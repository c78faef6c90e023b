"""Calls of the compiled core: addresses, sizes, workspaces. Nothing else calls its kernels.

The core takes raw memory and allocates none; everything it reads and writes is a torch tensor
that is kept alive here while it runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch  # before the core, which uses the OpenMP runtime that torch has loaded
from torch import Tensor

from . import _C, blocks
from .options import CellOptions
from .packing import Packed, look_up, pack

__all__ = ["DEVICES", "Gradients", "Result", "Saved", "backward", "evaluate", "forward", "name"]

DEVICES = frozenset({"cpu"})
TRACEABLE = True  # torch.compile keeps the kernels in its graph: ops.py

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_RESETS = {"subtract": 0, "zero": 1, "none": 2}
_POOLS = {"none": 0, "max": 1, "avg": 2}


ALGORITHMS = ("auto", "direct", "winograd")  # the numbers of csrc/cpu/api.h

# What the environment variable and the cost model know by number.
_X_WAYS = ("", "-sparse", "")


def name(device: str, options: CellOptions) -> str:
    """Name of the kernels for a device, such as ``"cpu-avx2"``; :func:`last_name` says more."""
    return f"{device}-{_C.isa_name()}"


class _Last(threading.local):
    name = ""


_last = _Last()


def last_name() -> str:
    """What this thread's last forward pass ran, such as ``"cpu-avx2-winograd4-sparse"``.

    ``direct`` or ``winogradM`` (tiles of M x M outputs) is the recurrent convolution, ``sparse``
    says that the input's zeros were skipped.
    """
    return _last.name


class Saved(NamedTuple):
    """What a forward pass keeps for its backward pass, beside its arguments.

    Attributes
    ----------
    gates : Tensor
        (T, N, Ho * Wo, 4 Cp), the activated gates of every step in the kernels' own order;
        Cp is C, padded to whole vectors.
    syn : Tensor
        (T, N, Ho * Wo, Cp), syn after every step.
    winner : Tensor
        (T, N) int64, the neuron that inhibition let through; (0,) without inhibition.
    """

    gates: Tensor
    syn: Tensor
    winner: Tensor


class Result(NamedTuple):
    """Outputs of :func:`forward`; `saved` is None in inference."""

    spk: Tensor
    syn: Tensor
    mem: Tensor
    saved: Saved | None


class Gradients(NamedTuple):
    """Gradients of the arguments of :func:`forward`; None where not wanted."""

    x: Tensor | None
    syn: Tensor | None
    mem: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    threshold: Tensor | None


@lru_cache(maxsize=1024)
def _cell(
    options: CellOptions,
    dtype: torch.dtype,
    time: int,
    shape: tuple[int, int, int, int],
    channels: int,
) -> Any:
    surrogate, quant = options.surrogate, options.quant
    n, cin, h, w = shape
    return _C.Cell(
        dtype=_DTYPES[dtype],
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


@lru_cache(maxsize=1024)
def _choose(cell: Any, algorithm: str, percent: int, tame: bool, isa: str) -> Any:
    return _C.cpu_choose(cell, ALGORITHMS.index(algorithm), percent / 100, tame)


@lru_cache(maxsize=1024)
def _workspace_bytes(cell: Any, threads: int, isa: str, backward: bool) -> int:
    size = _C.cpu_backward_workspace if backward else _C.cpu_forward_workspace
    return size(cell, threads)


def _density(x: Tensor) -> float:
    """Roughly which part of x is not zero, from at most some ten thousand of its values."""
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return _C.density(x.data_ptr(), _DTYPES[x.dtype], x.numel())
    return int(torch.count_nonzero(x)) / max(x.numel(), 1)


def _describe(
    x: Tensor, mem: Tensor, weight: Packed, options: CellOptions, algorithm: str
) -> tuple[Any, int]:
    """Cell with its convolution algorithms, and the number of threads."""
    time = x.shape[0] if options.sequence else 1
    cell = _cell(options, x.dtype, time, tuple(x.shape[-4:]), mem.shape[1])
    percent = round(100 * _density(x)) if x.shape[-3] > 2 else 100
    chosen = _choose(cell, algorithm, percent, weight.tame, _C.isa_name())
    return chosen, torch.get_num_threads()


def _view(tensor: Tensor | None) -> tuple[int, ...] | None:
    """Address and five strides; the time stride of a tensor without time is 0."""
    if tensor is None:
        return None
    strides = tensor.stride()
    return (tensor.data_ptr(), *((0,) * (5 - len(strides))), *strides)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def prefer_huge_pages(tensors: Iterable[Tensor | None]) -> None:
    """Where tensors that nobody has written to yet are large, let huge pages back them."""
    for tensor in tensors:
        if tensor is not None and tensor.nbytes >= blocks.SMALLEST:
            _C.prefer_huge_pages(tensor.data_ptr(), tensor.nbytes)


class _Workspace(threading.local):
    """One workspace a thread, kept between calls: it lies in caches that other blocks do not."""

    LARGEST_KEPT = 64 << 20  # bytes

    def __init__(self) -> None:
        self.kept = blocks.empty((0,), torch.uint8)

    def get(self, count: int) -> Tensor:
        if self.kept.numel() >= count:
            return self.kept
        workspace = blocks.empty((count,), torch.uint8)
        if count <= self.LARGEST_KEPT:
            self.kept = workspace
        return workspace


_workspace = _Workspace()


def _levels(options: CellOptions, dtype: torch.dtype) -> Tensor | None:
    return None if options.quant is None else options.quant.levels.to(dtype).contiguous()


def _threshold(threshold: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """Contiguous numbers and their stride along the channels: 0 for a single one."""
    flat = threshold.detach().to(dtype).reshape(-1).contiguous()
    return flat, 0 if flat.numel() == 1 else 1


def _empty(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An output of `shape` ending in (C, H, W), channels-last where the images of x are."""
    if x.stride(-3) != 1 or x.shape[-3] == 1 or x.is_contiguous():
        return x.new_empty(shape)
    *lead, c, h, w = shape
    strides = [1, w * c, c]
    size = c * h * w
    for count in reversed(lead):
        strides.insert(0, size)
        size *= count
    return torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device)


def empty_result(
    x: Tensor,
    mem: Tensor,
    options: CellOptions,
    training: bool,
    new: Callable[..., Tensor] | None = None,
) -> Result:
    """What :func:`forward` returns, uninitialised; also for tensors without memory.

    `new` makes what is saved: ``x.new_empty``, if None.
    """
    new = new or x.new_empty
    (n, c, ho, wo), (ph, pw) = mem.shape, options.pool_size
    time = (x.shape[0],) if options.sequence else ()
    state_time = time if options.record else ()
    saved = None
    if training:
        steps = time or (1,)
        padded = _C.cpu_padded_channels(_DTYPES[x.dtype], c)
        saved = Saved(
            new((*steps, n, ho * wo, 4 * padded), dtype=x.dtype),
            new((*steps, n, ho * wo, padded), dtype=x.dtype),
            new((*steps, n) if options.inhibition else (0,), dtype=torch.int64),
        )
    return Result(
        _empty(x, (*time, n, c, ho // ph, wo // pw)),
        _empty(x, (*state_time, n, c, ho, wo)),
        _empty(x, (*state_time, n, c, ho, wo)),
        saved,
    )


def forward(
    x: Tensor,
    syn: Tensor,
    mem: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    graded: float,
    options: CellOptions,
    training: bool,
    algorithm: str = "auto",
) -> Result:
    """Run the forward kernels.

    Parameters
    ----------
    x, syn, mem, weight, bias, threshold, options
        As :func:`snnlstm.reference.run` takes them; threshold is one number or one a channel.
    graded : float
        Multiplies spk.
    training : bool
        Whether to keep what :func:`backward` needs.
    algorithm : str
        One of ``ALGORITHMS``.
    """
    entry = look_up(weight)
    cell, threads = _describe(x, mem, entry, options, algorithm)
    packed = pack(entry, cell, backward=False)
    bias = None if bias is None else bias.detach().contiguous()
    thresholds, threshold_stride = _threshold(threshold, x.dtype)
    levels = _levels(options, x.dtype)
    spk, new_syn, new_mem, saved = empty_result(x, mem, options, training, blocks.empty)
    prefer_huge_pages((spk, new_syn, new_mem))
    workspace = _workspace.get(_workspace_bytes(cell, threads, _C.isa_name(), backward=False))
    _C.cpu_forward(
        cell,
        threads,
        options.record,
        _view(x),
        _view(syn),
        _view(mem),
        [_address(form) for form in packed],
        _address(bias),
        thresholds.data_ptr(),
        threshold_stride,
        graded,
        _address(levels),
        _view(spk),
        _view(new_syn),
        _view(new_mem),
        _address(saved and saved.gates),
        _address(saved and saved.syn),
        saved.winner.data_ptr() if saved and options.inhibition else 0,
        workspace.data_ptr(),
    )
    way = f"winograd{cell.tile}" if cell.tile else "direct"
    _last.name = f"{name('cpu', options)}-{way}{_X_WAYS[cell.x_way]}"
    return Result(spk, new_syn, new_mem, saved)


def empty_gradients(
    x: Tensor, syn: Tensor, mem: Tensor, weight: Tensor, wanted: Sequence[bool]
) -> Gradients:
    """The gradients that are wanted, uninitialised; the threshold's one a channel, (C,)."""
    c = mem.shape[1]
    shapes = (x.shape, syn.shape, mem.shape, weight.shape, (4 * c,), (c,))
    out = [x.new_empty(shape) if want else None for shape, want in zip(shapes, wanted, strict=True)]
    if wanted[0]:
        out[0] = _empty(x, tuple(x.shape))
    return Gradients(*out)


def backward(
    x: Tensor,
    syn: Tensor,
    mem: Tensor,
    weight: Tensor,
    threshold: Tensor,
    graded: float,
    options: CellOptions,
    saved: Saved,
    grad_spk: Tensor | None,
    grad_syn: Tensor | None,
    grad_mem: Tensor | None,
    wanted: Sequence[bool],
    algorithm: str = "auto",
) -> Gradients:
    """Run the backward kernels.

    Parameters
    ----------
    x, syn, mem, weight, threshold, graded, options
        What :func:`forward` was given.
    saved : Saved
        What it kept.
    grad_spk, grad_syn, grad_mem : Tensor or None
        Gradients of its outputs, in any memory layout; None for zeros.
    wanted : sequence of bool
        Which gradients are computed, in the order of :class:`Gradients`.
    algorithm : str
        One of ``ALGORITHMS``.
    """
    entry = look_up(weight)
    cell, threads = _describe(x, mem, entry, options, algorithm)
    packed = pack(entry, cell, backward=True, grad_x=wanted[0])
    thresholds, threshold_stride = _threshold(threshold, x.dtype)
    levels = _levels(options, x.dtype)
    grads = empty_gradients(x, syn, mem, weight, wanted)
    prefer_huge_pages(grads)
    workspace = _workspace.get(_workspace_bytes(cell, threads, _C.isa_name(), backward=True))
    noise = _noise(x, mem, options, grad_spk)
    _C.cpu_backward(
        cell,
        threads,
        options.record,
        _view(x),
        _view(syn),
        _view(mem),
        [_address(form) for form in packed],
        thresholds.data_ptr(),
        threshold_stride,
        graded,
        _address(levels),
        saved.gates.data_ptr(),
        saved.syn.data_ptr(),
        saved.winner.data_ptr() if options.inhibition else 0,
        _view(noise),
        _view(grad_spk),
        _view(grad_syn),
        _view(grad_mem),
        _view(grads.x),
        _view(grads.syn),
        _view(grads.mem),
        _address(grads.weight),
        _address(grads.bias),
        _address(grads.threshold),
        workspace.data_ptr(),
    )
    if grads.threshold is not None:
        total = grads.threshold.sum() if threshold.numel() == 1 else grads.threshold
        grads = grads._replace(threshold=total.reshape(threshold.shape).to(threshold.dtype))
    return grads


def _noise(x: Tensor, mem: Tensor, options: CellOptions, grad_spk: Tensor | None) -> Tensor | None:
    """Uniform numbers of the stochastic surrogate, (T, N, C, Hp, Wp), else None.

    Drawn one block a step, last step first: the order in which a loop over steps draws them.
    """
    if grad_spk is None or options.surrogate.name != "SSO":
        return None
    noise = _empty(x, tuple(grad_spk.shape))
    for step in reversed(noise.unbind()) if options.sequence else (noise,):
        step.uniform_()
    return noise


def evaluate(function: str, x: Tensor) -> Tensor:
    """``exp``, ``sigmoid`` or ``tanh`` of x as the CPU kernels compute it; float32 or float64."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _C.cpu_evaluate(function, _DTYPES[x.dtype], x.data_ptr(), out.data_ptr(), x.numel())
    return out
