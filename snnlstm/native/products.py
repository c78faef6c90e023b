"""Products of an x of mostly zeros: which calls torch's own function runs, and why."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..calls.call import autocast_dtype
from ..compat.torch_private import any_autocast
from .function import torch_must_run
from .tensors import is_readable

Ran = int | str
"""What ran a call: the percentage of nonzeros in x if the kernels did, else why torch's function."""

SMALL = "the layer and its batch are too small to gain"
SHAPES = "torch's function checks the shapes"
AUTOCAST = "autocast is on"
RECORDED = 'something records or transforms the call, or set_algorithm("reference") is on'
TENSORS = "x, weight and bias must be plain float32 tensors of the CPU without gaps"


def reason_against(x: Any, weight: Any, bias: Any) -> str | None:
    """Why torch's function must run a product of these, whatever their sizes and zeros."""
    if torch_must_run():
        return RECORDED
    if any_autocast() and autocast_dtype("cpu") is not None:
        return AUTOCAST
    for tensor in (weight, x) if bias is None else (weight, x, bias):
        if not is_readable(tensor) or tensor.dtype is not torch.float32:
            return TENSORS
    if not weight.is_contiguous() or (bias is not None and not bias.is_contiguous()):
        return TENSORS
    return None


def too_dense(density: float) -> str:
    """Why torch's function runs a product whose x has so many nonzeros."""
    return f"{100 * density:.0f} % of x is not zero"


def flat(tensor: Tensor) -> Tensor:
    """View or copy (..., K) as (rows, K)."""
    return tensor.reshape(-1, tensor.shape[-1])
