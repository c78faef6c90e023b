"""The backends, and the plan of a call.

A backend makes a :class:`Plan` of all that does not depend on the values of a call. The plan knows
sizes and algorithms, and runs both passes. :mod:`snnlstm.native.cpu` and
:mod:`snnlstm.native.cuda` are twins.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import _C
from ..call import Call, Signature
from . import cpu, cuda, cuda_check, tensors
from .tensors import Gradients, Result, Saved, Shapes

__all__ = ["BACKENDS", "DEVICES", "LAYOUT", "Backend", "Plan", "empty_result", "plan_of"]


class Plan(Protocol):
    """All that follows for a call from its signature, its strides and the process's settings.

    It serves all such calls, in any thread.
    """

    saved_shapes: Shapes

    def forward(self, call: Call, training: bool) -> Result:
        """Run the forward kernels; in training, save what :meth:`backward` needs."""

    def restored(self, saved: Sequence[Tensor]) -> Saved:
        """What the forward pass saved, in its dtypes and contiguous again."""

    def backward(
        self,
        call: Call,
        saved: Saved,
        grads: Sequence[Tensor | None],
        wanted: Sequence[bool],
        decided: int,
        packed: Any,
    ) -> Gradients:
        """Run the backward kernels on what :meth:`forward` was given and saved.

        `grads`, of spk, syn and mem, may have any memory layout, and None stands for zeros.
        `wanted` says which gradients are computed, in the order of :class:`Gradients`. `decided`
        and `packed` are the forward pass's result's; `packed` may be None.
        """


class Backend(Protocol):
    """The kernels of a device type."""

    half_types: bool
    """Whether float16 and bfloat16 run as they are."""

    def name(self) -> str:
        """Name of the kernels, as a path has it before a call has run."""

    def reason_against(self, signature: Signature) -> str | None:
        """Why these kernels cannot run a call; None if they can."""

    def settings(self, signature: Signature) -> tuple[Any, ...]:
        """The process's settings that a plan depends on."""

    def plan(self, call: Call, algorithm: str, settings: tuple[Any, ...]) -> Plan:
        """The plan of calls like this one."""

    def saved_shapes(self, signature: Signature) -> Shapes:
        """Shapes and dtypes of what a forward pass saves."""


BACKENDS: dict[str, Backend] = {"cpu": cpu.Backend()}  # by device type
_NO_CUDA = cuda_check.without_kernels(_C.build_info())
if _NO_CUDA is None:
    BACKENDS["cuda"] = cuda.Backend(_C)
DEVICES = frozenset(BACKENDS)

_MOST = 64  # plans are kept of a signature; one more, and all are forgotten


def layout() -> int:
    """A number that changes with the shapes of what a forward pass saves.

    They differ between instruction sets, and may between versions. torch.compile writes graphs
    that hold them to a cache on disk, which outlives both.
    """
    counts = [_C.cpu_padded_channels(dtype, c) for dtype in (0, 1) for c in range(1, 129)]
    if "cuda" in BACKENDS:
        counts += map(_C.cuda_padded_channels, range(1, 129))
    return zlib.crc32(repr((Saved._fields, counts)).encode())


LAYOUT = layout()  # computed here, because dynamo cannot trace a call into the core


def name(device: str) -> str:
    """Name of the kernels for a device type; the name of a call's choice says more.

    On the CPU, ``direct`` or ``winogradM`` (tiles of M x M outputs) is the recurrent convolution
    and ``sparse`` says that the input's zeros were skipped. On CUDA, ``fma`` and ``mma-TYPE``
    say what multiplied (plain cores, or tensor cores with operands of a type). On both,
    ``pointwise`` says that torch convolved.
    """
    return BACKENDS[device].name()


def reason_against_device(device: torch.device, traced: bool) -> str | None:
    """Why no kernels can run on a device; None if they can, or if the call is traced."""
    if device.type == "cpu":
        return None
    if _NO_CUDA or traced:  # dynamo cannot ask; the call itself will say it
        return _NO_CUDA
    index = torch.cuda.current_device() if device.index is None else device.index
    return cuda_check.trouble(index)


def reason_against(call: Call) -> str | None:
    """Why the kernels of the call's device cannot run it; None if they can."""
    return BACKENDS[call.signature.device_type].reason_against(call.signature)


def plan_of(call: Call, algorithm: str) -> Plan:
    """The plan of a call, looked up or made."""
    signature = call.signature
    backend = BACKENDS[signature.device_type]
    settings = backend.settings(signature)
    key = backend, call.x.stride(), call.syn.stride(), call.mem.stride(), algorithm, settings
    plan = signature.notes.get(key)
    if plan is None:
        if len(signature.notes) >= _MOST:
            signature.notes.clear()
        plan = signature.notes[key] = backend.plan(call, algorithm, settings)
    return plan


def empty_result(call: Call, training: bool) -> Result:
    """What a forward pass returns, uninitialised; also for tensors without memory."""
    signature, x = call.signature, call.x
    spk, state = (tensors.empty_like_images(x, shape) for shape in tensors.output_shapes(signature))
    shapes = BACKENDS[signature.device_type].saved_shapes(signature) if training else ()
    saved = [x.new_empty(shape, dtype=dtype) for shape, dtype in shapes]
    return Result(spk, state, torch.empty_like(state), saved)
