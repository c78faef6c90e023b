"""Calls of the CPU kernels: sizes, packed weights, workspaces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch  # before the core, which uses the OpenMP runtime that torch has loaded
from torch import Tensor

from . import _C, blocks, glue
from .glue import DTYPES, Gradients, Result, Saved, address, view
from .options import CellOptions
from .packing import Packed, look_up, pack

__all__ = ["ALGORITHMS", "backward", "empty_saved", "evaluate", "forward", "name", "refusal"]

ALGORITHMS = ("auto", "direct", "winograd")  # the numbers of csrc/cpu/api.h

# What the environment variable and the cost model know by number.
_X_WAYS = ("", "-sparse", "")

_cell = lru_cache(maxsize=1024)(glue.make_cell)


def name() -> str:
    """Name of the kernels, such as ``"cpu-avx2"``."""
    return f"cpu-{_C.isa_name()}"


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot run a call; None if they can."""
    if torch.is_autocast_enabled("cpu"):
        return "autocast on the CPU"
    if dtype not in (torch.float32, torch.float64):
        return f"there are no CPU kernels for {dtype}"
    return None


@lru_cache(maxsize=1024)
def _choose(
    cell: Any, algorithm: str, percent: int, most_inputs: int, backward: bool, isa: str
) -> Any:
    number = ALGORITHMS.index(algorithm) if algorithm in ALGORITHMS else 0
    return _C.cpu_choose(cell, number, percent / 100, most_inputs, backward)


@lru_cache(maxsize=1024)
def _workspace_bytes(cell: Any, threads: int, isa: str, backward: bool) -> int:
    size = _C.cpu_backward_workspace if backward else _C.cpu_forward_workspace
    return size(cell, threads)


def _density(x: Tensor) -> float:
    """Roughly which part of x is not zero, from at most some ten thousand of its values."""
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return _C.density(x.data_ptr(), DTYPES[x.dtype], x.numel())
    return int(torch.count_nonzero(x)) / max(x.numel(), 1)


def _describe(
    x: Tensor, mem: Tensor, weight: Packed, options: CellOptions, algorithm: str, *, backward: bool
) -> tuple[Any, int]:
    """Cell with its convolution algorithms, and the number of threads."""
    time = x.shape[0] if options.sequence else 1
    cell = _cell(_C, options, x.dtype, time, tuple(x.shape[-4:]), mem.shape[1])
    percent = round(100 * _density(x)) if x.shape[-3] > 2 else 100
    chosen = _choose(cell, algorithm, percent, weight.most_inputs, backward, _C.isa_name())
    return chosen, torch.get_num_threads()


def _prefer_huge_pages(tensors: Iterable[Tensor | None]) -> None:
    """Where tensors that nobody has written to yet are large, let huge pages back them."""
    for tensor in tensors:
        if tensor is not None and tensor.nbytes >= blocks.SMALLEST:
            _C.prefer_huge_pages(tensor.data_ptr(), tensor.nbytes)


def _levels(options: CellOptions, dtype: torch.dtype) -> Tensor | None:
    return None if options.quant is None else options.quant.levels.to(dtype).contiguous()


def empty_saved(
    x: Tensor, mem: Tensor, options: CellOptions, new: Callable[..., Tensor] | None = None
) -> Saved:
    """What :func:`forward` keeps in training, uninitialised; also for tensors without memory.

    `new` makes the tensors: ``x.new_empty``, if None.
    """
    new = new or x.new_empty
    n, c, ho, wo = mem.shape
    steps = x.shape[0] if options.sequence else 1
    padded = _C.cpu_padded_channels(DTYPES[x.dtype], c)
    return Saved(
        new((steps, n, ho * wo, 4 * padded), dtype=x.dtype),
        new((steps, n, ho * wo, padded), dtype=x.dtype),
        new((steps, n) if options.inhibition else (0,), dtype=torch.int64),
    )


def forward(
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
    entry = look_up(weight)
    cell, threads = _describe(x, mem, entry, options, algorithm, backward=False)
    packed = pack(entry, cell, threads, backward=False)
    bias = None if bias is None else bias.detach().contiguous()
    thresholds, threshold_stride = glue.threshold_numbers(threshold, x.dtype)
    levels = _levels(options, x.dtype)
    spk, new_syn, new_mem = glue.empty_outputs(x, mem, options)
    _prefer_huge_pages((spk, new_syn, new_mem))
    saved = empty_saved(x, mem, options, blocks.empty) if training else None
    workspace = blocks.workspace(_workspace_bytes(cell, threads, _C.isa_name(), backward=False))
    _C.cpu_forward(
        cell,
        threads,
        options.record,
        view(x),
        view(syn),
        view(mem),
        [address(form) for form in packed],
        address(bias),
        thresholds.data_ptr(),
        threshold_stride,
        float(graded),
        address(levels),
        view(spk),
        view(new_syn),
        view(new_mem),
        address(saved and saved.gates),
        address(saved and saved.syn),
        saved.winner.data_ptr() if saved and options.inhibition else 0,
        workspace.data_ptr(),
    )
    tile = "x".join(str(side) for side in dict.fromkeys(cell.tile))
    way = f"winograd{tile}" if any(cell.tile) else "direct"
    glue.last.name = f"{name()}-{way}{_X_WAYS[cell.x_way]}"
    return Result(spk, new_syn, new_mem, saved)


def backward(
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
    entry = look_up(weight)
    cell, threads = _describe(x, mem, entry, options, algorithm, backward=True)
    packed = pack(entry, cell, threads, backward=True, grad_x=wanted[0])
    thresholds, threshold_stride = glue.threshold_numbers(threshold, x.dtype)
    levels = _levels(options, x.dtype)
    grads = glue.empty_gradients(x, syn, mem, weight, wanted)
    _prefer_huge_pages(grads)
    workspace = blocks.workspace(_workspace_bytes(cell, threads, _C.isa_name(), backward=True))
    noise = glue.stochastic_noise(x, options, grad_spk)
    _C.cpu_backward(
        cell,
        threads,
        options.record,
        view(x),
        view(syn),
        view(mem),
        [address(form) for form in packed],
        thresholds.data_ptr(),
        threshold_stride,
        float(graded),
        address(levels),
        saved.gates.data_ptr(),
        saved.syn.data_ptr(),
        saved.winner.data_ptr() if options.inhibition else 0,
        view(noise),
        view(grad_spk),
        view(grad_syn),
        view(grad_mem),
        view(grads.x),
        view(grads.syn),
        view(grads.mem),
        address(grads.weight),
        address(grads.bias),
        address(grads.threshold),
        workspace.data_ptr(),
    )
    return glue.with_threshold_of(grads, threshold)


def evaluate(function: str, x: Tensor) -> Tensor:
    """``exp``, ``sigmoid`` or ``tanh`` of x as the kernels compute it; float32 or float64."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _C.cpu_evaluate(function, DTYPES[x.dtype], x.data_ptr(), out.data_ptr(), x.numel())
    return out
