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
"""What ran a call: the percentage of nonzeros in x if the kernels did, else why torch's did."""


class ByTiles(int):
    """The percentage of nonzeros in an x that Winograd's tiles convolved, zeros and all."""

    algorithm = "Winograd"


SMALL = "the layer and its batch are too small to gain"
SHAPES = "torch's function checks the shapes"
WIDE = "x has more than 65,535 columns"
INTERCEPTED = 'something records or transforms the call, or set_algorithm("reference") is on'
AUTOCAST = "autocast is on"
MISSED = "x has more nonzeros than a look at some of it had seen"
GEOMETRY = "the kernels take odd kernels above 1x1, padding below them, dilation 1 and one group"
FEW = "x has fewer than 4 channels"
NO_LISTS = "the layer and its batch are too small for lists; the kernels compute gradients"
X = "x must be a plain float32 tensor of the CPU without gaps"
WEIGHT = "weight and bias must be plain float32 tensors of the CPU without gaps"


def reason_against(x: Any) -> str | None:
    """Why torch's function must run a product with x, whatever its sizes and zeros."""
    if torch_must_run():
        return INTERCEPTED
    if any_autocast() and autocast_dtype("cpu") is not None:
        return AUTOCAST
    return None if is_readable(x) and x.dtype is torch.float32 else X


def reason_against_weight(weight: Any, bias: Any) -> str | None:
    """The same, because of weight or bias."""
    for tensor in (weight,) if bias is None else (weight, bias):
        if not (is_readable(tensor) and tensor.dtype is torch.float32 and _has_no_gaps(tensor)):
            return WEIGHT
    return None


def _has_no_gaps(tensor: Tensor) -> bool:
    last = torch.channels_last
    return tensor.is_contiguous() or (
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=last)
    )


_DENSE = tuple(f"{percent} % of x is not zero" for percent in range(101))


def too_dense(density: float) -> str:
    """Why torch's function runs a product whose x has this share of nonzeros."""
    return _DENSE[round(100 * density)]


def flat(tensor: Tensor) -> Tensor:
    """View or copy (..., K) as (rows, K)."""
    return tensor.reshape(-1, tensor.shape[-1])
