"""The half of the core for a call's device, and the plan of the call.

The halves, :mod:`snnlstm.native.cpu` and :mod:`snnlstm.native.cuda`, are twins. Their ``Kernels``
make a ``Plan`` of all that does not depend on values; the plan's ``choose`` looks at values and
returns a ``Choice``, which runs the call and its backward pass.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch

from .. import _C
from ..call import Call
from . import cpu, cuda, cuda_check, tensors
from .tensors import Result, Saved

__all__ = ["DEVICES", "HALVES", "LAYOUT", "choose", "empty_result", "name", "reason_against"]

# The halves of the core, by device type.
HALVES: dict[str, Any] = {"cpu": cpu.Kernels()}
_NO_CUDA = cuda_check.without_kernels(_C.build_info())
if _NO_CUDA is None:
    HALVES["cuda"] = cuda.Kernels(_C)
DEVICES = frozenset(HALVES)

_MOST = 64  # plans are kept of a signature; one more, and all are forgotten


def layout() -> int:
    """A number that changes with the shapes of what a forward pass keeps.

    They differ between instruction sets, and may between versions. torch.compile writes graphs
    that hold them to a cache on disk, which outlives both.
    """
    counts = [_C.cpu_padded_channels(dtype, c) for dtype in (0, 1) for c in range(1, 129)]
    if "cuda" in HALVES:
        counts += map(_C.cuda_padded_channels, range(1, 129))
    return zlib.crc32(repr(counts).encode())


LAYOUT = layout()  # computed here, because dynamo cannot trace a call into the core


def name(device: str) -> str:
    """Name of the kernels for a device type; the name of a call's choice says more.

    On the CPU, ``direct`` or ``winogradM`` (tiles of M x M outputs) is the recurrent convolution
    and ``sparse`` says that the input's zeros were skipped. On CUDA, ``fma`` and ``mma-TYPE``
    say what multiplied (plain cores, or tensor cores with operands of a type), ``pointwise``
    that torch convolved.
    """
    return HALVES[device].name()


def reason_against_device(device: torch.device) -> str | None:
    """Why no kernels can run on a CUDA device; None if they can."""
    if _NO_CUDA or torch.compiler.is_compiling():  # dynamo cannot ask; the call itself will say it
        return _NO_CUDA
    index = torch.cuda.current_device() if device.index is None else device.index
    return cuda_check.trouble(index)


def reason_against(call: Call) -> str | None:
    """Why the kernels of the call's device cannot run it; None if they can, or if it is traced."""
    signature = call.signature  # None while torch.compile traces: the operator will say it
    return None if signature is None else HALVES[signature.device_type].reason_against(signature)


def choose(call: Call, algorithm: str) -> Any:
    """The kernels that run a call: its plan, looked up or made, and what its values decide."""
    signature = call.signature
    half = HALVES[signature.device_type]
    settings = half.settings(signature)
    key = half, call.x.stride(), call.syn.stride(), call.mem.stride(), algorithm, settings
    plan = signature.notes.get(key)
    if plan is None:
        if len(signature.notes) >= _MOST:
            signature.notes.clear()
        plan = signature.notes[key] = half.plan(call, algorithm, settings)
    return plan.choose(call)


def empty_result(call: Call, training: bool) -> Result:
    """What a forward pass returns, uninitialised; also for tensors without memory."""
    signature, x = call.signature, call.x
    spk, state = (tensors.empty_like_images(x, shape) for shape in tensors.output_shapes(signature))
    shapes = HALVES[signature.device_type].saved_shapes(signature) if training else ()
    saved = [x.new_empty(shape, dtype=dtype) for shape, dtype in shapes]
    return Result(spk, state, torch.empty_like(state), Saved(*saved) if training else None)
