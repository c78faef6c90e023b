"""The backends of this installation."""

from __future__ import annotations

import torch

from .. import _C
from . import cpu, cuda, cuda_check
from .plan import CommonBackend, Settings

BACKENDS: dict[str, CommonBackend] = {"cpu": cpu.Backend()}  # by device type
_NO_CUDA = cuda_check.without_kernels(_C.build_info())
if _NO_CUDA is None:
    BACKENDS["cuda"] = cuda.Backend(_C)
DEVICES = frozenset(BACKENDS)


def backend_of(device: str, algorithm: str) -> tuple[CommonBackend | None, Settings]:
    """The backend of a device type, or None, and the process's settings with this algorithm."""
    backend = BACKENDS.get(device)
    return backend, Settings(algorithm) if backend is None else backend.settings(algorithm)


def reason_against_device(device: torch.device, traced: bool) -> str | None:
    """Why no kernels can run on a device; None if they can, or if the call is traced."""
    if device.type == "cpu":
        return None
    if _NO_CUDA or traced:  # dynamo cannot ask the driver; the call itself raises
        return _NO_CUDA
    index = torch.cuda.current_device() if device.index is None else device.index
    return cuda_check.trouble(index)
