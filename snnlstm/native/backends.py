"""The backends of this installation."""

from __future__ import annotations

import torch

from .. import _C
from ..calls.entries import BACKENDS
from . import cpu, cuda, cuda_check

_NO_CUDA = cuda_check.without_kernels(_C.build_info())
BACKENDS["cpu"] = cpu.Backend()
if _NO_CUDA is None:
    BACKENDS["cuda"] = cuda.Backend(_C)
DEVICES = frozenset(BACKENDS)


def reason_against_device(device: torch.device, traced: bool) -> str | None:
    """Why no kernels can run on a device; None if they can, or if the call is traced."""
    if device.type == "cpu":
        return None
    if _NO_CUDA or traced:  # dynamo cannot ask the driver; the call itself raises
        return _NO_CUDA
    index = torch.cuda.current_device() if device.index is None else device.index
    return cuda_check.trouble(index)
