"""Batch norm in evaluation as part of the convolution before it, whose weight it scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..calls.spec import DTYPES
from ..compat.torch_private import size_hint
from . import rules
from .effects import RecordedGraph


def find_folded(recorded: RecordedGraph) -> dict[Node, Node]:
    """The batch norms that become part of a convolution, each with the node of the convolution.

    A weight that is scaled is scaled alike wherever it is used, so the steps of a convolution stay
    equal. No gradient may be recorded: it would go through the scaled weight of each call.
    """
    norms = {
        conv: _norm_behind(recorded, conv)
        for conv in recorded.nodes
        if rules.name_of(conv) == "conv2d" and conv.args[1:]
    }
    scales: dict[Any, set[Any]] = {}
    for conv, norm in norms.items():
        scales.setdefault(conv.args[1], set()).add(norm and scale_of(norm))
    return {norm: conv for conv, norm in norms.items() if norm and len(scales[conv.args[1]]) == 1}


def scale_of(norm: Node) -> tuple[Any, ...]:
    """The statistics, weight, bias and eps of a batch norm, as :func:`scaled` takes them."""
    named = rules.named_arguments(norm)
    return tuple(named[name] for name in ("running_mean", "running_var", "weight", "bias", "eps"))


def scaled(
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution with a batch norm of these statistics and parameters."""
    scale = torch.rsqrt(var + eps)
    scale = scale if gamma is None else scale * gamma
    shift = -mean * scale if bias is None else (bias - mean) * scale
    return weight * scale.reshape(-1, 1, 1, 1), shift if beta is None else shift + beta


def _norm_behind(recorded: RecordedGraph, conv: Node) -> Node | None:
    """The batch norm that can be part of a convolution; None if there is none."""
    norm = next(iter(conv.users), conv)
    named = rules.named_arguments(norm) if rules.name_of(norm) == "batch_norm" else {}
    if not named or named["training"] or named["input"] is not conv or len(conv.users) > 1:
        return None
    if len(conv.args) < 3 or conv.kwargs or not (recorded.is_pure(conv) and recorded.is_pure(norm)):
        return None
    given = [arg for arg in (*conv.args[1:3], *scale_of(norm)[:-1]) if arg is not None]
    # The scaled weight is computed once, before the loop.
    if any(
        getattr(a, "op", "") != "placeholder" or recorded.memory[a] & recorded.written
        for a in given
    ):
        return None
    results = rules.value_of(conv), rules.value_of(norm)
    values = *results, *map(rules.value_of, given)
    one, other = ([size_hint(stride) for stride in result.stride()] for result in results)
    alike = (
        one == other and results[0].dim() == 4
        and results[0].dtype in DTYPES[:2]
        and all(v.dtype is results[0].dtype and v.device.type == "cpu" for v in values)
    )  # fmt: skip
    return norm if alike and not any(result.requires_grad for result in results) else None
