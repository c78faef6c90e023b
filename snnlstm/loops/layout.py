"""Which convolutions of a loop on the CPU run channels-last, and which of them neurons alone read.

torch's convolutions follow the layout of their weight, so the weight alone decides. What follows a
convolution keeps its layout: pools, Leaky, cells, batch norm, elementwise functions and flatten.
Everything else gets the strides that were recorded.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from ..compat.torch_private import size_hint
from . import rules
from .steps import Loop

SAMPLES, CHANNELS, FEW_SAMPLES = 8, 4, 4
"""The least samples, or channels, for which a channels-last convolution pays.

Without gradients the channels must come with a few samples, and kernels be 3x3 or smaller. Time of
a training pass of 3x3 and 5x5 convolutions with a channels-last weight, relative to a contiguous
one: 0.78 to 1.06; 2.3 for one sample of 2 channels, and 1.9 for a 1x1 convolution. If x is
channels-last already, 0.5 to 1.05. Without gradients: 3x3 0.6 to 1; 2 for one sample of 2 channels,
1.6 for 1x1, and 0.9 to 1.05 for 5x5 (benchmarks/NOTES.md).
"""


def channels_last(loop: Loop) -> dict[Node, bool]:
    """The convolutions that run channels-last, each with all equal ones and all of its run.

    Each comes with whether its weight must become so, because x is not.
    """
    leading: set[Node] = set()  # nodes that reach a pool or a Leaky, if by nodes that keep a layout
    for node in reversed(loop.nodes):
        if (
            _is_pool(node)
            or node.target is rules.LEAKY_OPERATOR
            or (node in leading and _keeps(node))
        ):
            leading.update(loop.same[arg] for arg in node.all_input_nodes)
    found: set[Node] = set()  # nodes whose results are channels-last
    converted: dict[Node, bool] = {}
    for node in loop.nodes:
        if loop.same[node] is not node:
            continue
        behind = any(loop.same[arg] in found for arg in node.all_input_nodes)
        if rules.name_of(node) == "conv2d":
            if _can(loop, node) and (
                (follows := loop.same[node.args[0]] in found) or (node in leading and _pays(node))
            ):
                calls = loop.runs[node][0].calls if node in loop.runs else [node]
                found.update(calls)
                converted.update(dict.fromkeys(calls, not follows))
        elif behind and (_keeps(node) or _is_pool(node)):
            found.add(node)
    return converted


def for_neurons(loop: Loop) -> set[Node]:
    """The convolutions of which a Leaky alone reads the results, if behind sums and batch norms.

    These may be rounded otherwise at equal pixels. A max_pool2d would give the gradient of such
    pixels to another one than the first, so nothing but a neuron may read mem, either.
    """
    alone: set[Node] = set()
    for node in reversed(loop.nodes):
        users = loop.users[loop.same[node]]
        if users and all(
            _keeps_mem(loop, user) if user.target is rules.LEAKY_OPERATOR
            else user in alone and rules.name_of(user) in ("add", "iadd", "batch_norm")
            for user in users
        ):  # fmt: skip
            alone.add(node)
    convolutions = [node for node in loop.nodes if rules.name_of(node) == "conv2d"]
    runs = (loop.runs[node][0].calls if node in loop.runs else [node] for node in convolutions)
    return {call for calls in runs if alone.issuperset(calls) for call in calls}


def _keeps_mem(loop: Loop, leaky: Node) -> bool:
    """Whether only neurons, or who calls the loop, read the mem that a Leaky returns."""
    mems = [item for item in loop.users[loop.same[leaky]] if item.args[1:] != (0,)]
    readers = [user for mem in mems for user in loop.users[loop.same[mem]]]
    return all(user.op == "output" or user.target in rules.STATEFUL for user in readers)


def _is_pool(node: Node) -> bool:
    return rules.name_of(node) in ("max_pool2d", "avg_pool2d")


def _keeps(node: Node) -> bool:
    """Whether a node's result has the layout of its argument."""
    if node.target in rules.STATEFUL or node.target is rules.ITEM:
        return True
    rule = rules.rule_of(node)
    return rule is rules.ELEMENTWISE or (rule is not None and rules.name_of(node) == "batch_norm")


def _can(loop: Loop, node: Node) -> bool:
    """Whether the layout of a convolution can be chosen."""
    x, weight = (rules.value_of(arg) for arg in (*node.args, None, None)[:2])
    if x is None or weight is None or not loop.is_pure(node):
        return False
    written = loop.memory[node.args[1]] & loop.written
    is_image = x.dim() == 4 and x.device.type == "cpu" and x.dtype == torch.float32
    return is_image and not written and weight.is_contiguous()


def _pays(node: Node) -> bool:
    """Whether a convolution of a contiguous x is faster channels-last."""
    x, weight = (rules.value_of(arg) for arg in node.args[:2])
    sides, samples = weight.shape[2:], size_hint(x.shape[0])
    if rules.requires_grad(node):
        return max(sides) > 1 and (x.shape[1] >= CHANNELS or samples >= SAMPLES)
    several = samples >= SAMPLES or (x.shape[1] >= CHANNELS and samples >= FEW_SAMPLES)
    return 1 < max(sides) <= 3 and several
