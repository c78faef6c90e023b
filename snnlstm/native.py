"""Calls of the compiled core, on whatever device the tensors are. Nothing else calls its kernels.

The halves of the core, :mod:`snnlstm.cpu` and :mod:`snnlstm.cuda`, are twins: ``forward``,
``backward``, ``empty_saved``, ``name`` and ``refusal`` mean the same in both.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _C, cpu, cuda, cuda_check, glue
from .glue import Gradients, Result, Saved, empty_gradients
from .options import CellOptions

__all__ = [
    "DEVICES",
    "LAYOUT",
    "Gradients",
    "Result",
    "Saved",
    "backward",
    "empty_gradients",
    "empty_result",
    "forward",
    "last_name",
    "name",
    "refusal",
    "trouble",
]

TRACEABLE = True  # torch.compile keeps the kernels in its graph: ops.py

# By device type.
HALVES: dict[str, Any] = {"cpu": cpu}
_NO_CUDA = cuda_check.without_kernels(_C.build_info())
if _NO_CUDA is None:
    HALVES["cuda"] = cuda.Kernels(_C)
DEVICES = frozenset(HALVES)


def layout() -> int:
    """A number that changes with the shapes of what a forward pass keeps.

    They differ between instruction sets, and may between versions. torch.compile writes graphs
    that hold them to a cache on disk, which outlives both.
    """
    counts = [_C.cpu_padded_channels(dtype, c) for dtype in (0, 1) for c in range(1, 129)]
    if "cuda" in HALVES:
        counts += map(_C.cuda_padded_channels, range(1, 129))
    return zlib.crc32(repr(counts).encode())


LAYOUT = layout()  # made once: dynamo cannot trace a call into the core


def name(device: str) -> str:
    """Name of the kernels for a device type; :func:`last_name` says more."""
    return HALVES[device].name()


def last_name() -> str:
    """What this thread's last forward pass ran, such as ``"cpu-avx2-winograd4-sparse"``.

    On the CPU, ``direct`` or ``winogradM`` (tiles of M x M outputs) is the recurrent convolution
    and ``sparse`` says that the input's zeros were skipped. On CUDA, ``fma`` and ``mma-TYPE``
    say what multiplied (plain cores, or tensor cores with operands of a type), ``pointwise``
    that torch convolved.
    """
    return glue.last.name


def trouble(device: torch.device) -> str | None:
    """Why the kernels cannot run anything on a device; None if they can."""
    if device.type != "cuda":
        return None
    if _NO_CUDA or torch.compiler.is_compiling():  # dynamo cannot ask; the call itself will say it
        return _NO_CUDA
    return cuda_check.trouble(torch.cuda.current_device() if device.index is None else device.index)


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run a call with these states; None if they can."""
    return HALVES[device.type].refusal(device, dtype)


def empty_result(x: Tensor, mem: Tensor, options: CellOptions, training: bool) -> Result:
    """What :func:`forward` returns, uninitialised; also for tensors without memory."""
    outputs = glue.empty_outputs(x, mem, options)
    saved = HALVES[x.device.type].empty_saved(x, mem, options) if training else None
    return Result(*outputs, saved)


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
    algorithm: str = "auto",
) -> Result:
    """Run the forward kernels.

    Parameters
    ----------
    x, syn, mem, weight, bias, threshold, graded, options
        As :func:`snnlstm.reference.run` takes them; threshold is one number or one a channel.
    training : bool
        Whether to keep what :func:`backward` needs.
    algorithm : str
        One of ``snnlstm.path.ALGORITHMS``.
    """
    half = HALVES[x.device.type]
    return half.forward(x, syn, mem, weight, bias, threshold, graded, options, training, algorithm)


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
        One of ``snnlstm.path.ALGORITHMS``.
    """
    half = HALVES[x.device.type]
    grads = (grad_spk, grad_syn, grad_mem)
    return half.backward(
        x, syn, mem, weight, threshold, graded, options, saved, *grads, wanted, algorithm
    )
