"""The backends of this installation, and the table of plans."""

from __future__ import annotations

from typing import Any

import torch

from .. import _C
from ..calls.call import Call
from ..calls.keys import BoundedDict
from ..calls.spec import CellSpec
from . import cpu, cuda, cuda_check
from .plan import CommonBackend, Plan, Settings
from .tensors import has_numbers

BACKENDS: dict[str, CommonBackend] = {"cpu": cpu.Backend()}  # by device type
_NO_CUDA = cuda_check.without_kernels(_C.build_info())
if _NO_CUDA is None:
    BACKENDS["cuda"] = cuda.Backend(_C)
DEVICES = frozenset(BACKENDS)

_plans: BoundedDict[Any, Plan] = BoundedDict()


def reason_against_device(device: torch.device, traced: bool) -> str | None:
    """Why no kernels can run on a device; None if they can, or if the call is traced."""
    if device.type == "cpu":
        return None
    if _NO_CUDA or traced:  # dynamo cannot ask the driver; the call itself raises
        return _NO_CUDA
    index = torch.cuda.current_device() if device.index is None else device.index
    return cuda_check.trouble(index)


def operands_of(call: Call, autocast: torch.dtype | None) -> torch.dtype | None:
    """The convolution's type under autocast, if that is a half type."""
    narrows = call.x.dtype == torch.float32 and autocast != torch.float32
    return autocast if narrows else None


def plan_of(
    call: Call,
    spec: CellSpec,
    operands: torch.dtype | None,
    backend: CommonBackend,
    settings: Settings,
) -> Plan:
    """Look up or make the plan of a call on a backend; cells of equal options share it."""
    key = backend, settings, plan_key(call, spec, operands)
    plan = _plans.get(key)
    if plan is None:
        plan = _plans.keep(key, Plan(backend, call, spec, operands, settings))
    return plan


def plan_key(call: Call, spec: CellSpec, operands: torch.dtype | None) -> tuple[Any, ...]:
    """The key of the plan of a call on one backend under one setting.

    It omits what :func:`~snnlstm.calls.keys.key_of` omits, and what follows from the rest: the spec
    and the channels of x and mem give the weight's shape. It also omits gradients, because a plan
    has both passes.
    """
    x, syn, mem, threshold = call.x, call.syn, call.mem, call.threshold
    images = x.shape, x.stride(), x.dtype, x.device, syn.stride(), mem.shape, mem.stride()
    thresholds = None if threshold is None else threshold.numel()
    lacks_lengths = call.lengths is None
    return spec, operands, call.record, lacks_lengths, *images, thresholds, has_numbers(call)
