"""What the nodes of a recorded graph do beside computing their results."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ..compat.torch_private import memory_of, operators_named
from . import rules


class Effects(NamedTuple):
    """What a node does beside computing its result.

    Attributes
    ----------
    writes : sequence of Node
        Arguments to whose memory it writes.
    draws : bool
        Whether it draws random numbers.
    unknown : bool
        Whether nothing is known about it.
    """

    writes: Sequence[Node] = ()
    draws: bool = False
    unknown: bool = False


_NONE = Effects()
# Methods of tensors and functions without an operator of their name, and without an effect.
_PURE = {
    "float", "double", "half", "bfloat16", "int", "long", "bool", "cross_entropy", "normalize",
    "interpolate", "_are_functorch_transforms_active",
}  # fmt: skip
_WRITE_BUFFERS = {"batch_norm", "instance_norm"}  # without saying so
_DRAW = {"fractional_max_pool2d", "fractional_max_pool3d"}  # likewise


def effects_of(node: Node) -> Effects:
    """What a node does; a function that is not known writes to all of its arguments, and draws."""
    number = isinstance(rules.value_of(node), int | float | torch.SymInt | torch.SymFloat)
    if number or node.op not in ("call_function", "call_method") or node.target in rules.STATEFUL:
        return _NONE
    # A slice of an nn.ModuleList makes a module, of which torch takes note.
    if rules.dropped(node) is not None or node.target is torch._C._log_api_usage_once:
        return _NONE
    name, tensors = rules.name_of(node), [arg for arg in node.all_input_nodes if memory(arg)]
    everything = Effects(tensors, True, True)
    if node.target is rules.APPLY:
        is_pure = all(_only_computes(rules.body_of(arg)) for arg in node.args[:2])
        return _NONE if is_pure else everything
    if rules.is_operator(node):  # in place, operator.iadd(a, b) is named after Tensor.__iadd__
        in_place = name in ("setitem", "delitem") or (
            name[0] == "i" and hasattr(operator, f"__{name[1:]}__")
        )
        return Effects(tensors[:1] if in_place else ())
    named = rules.named_arguments(node)
    # An embedding with a max_norm writes to its weight.
    if not rules.is_of_torch(node) or "out" in node.kwargs or named.get("max_norm") is not None:
        return everything
    if named.get("inplace"):
        return Effects(tensors[:1], bool(named.get("training")))
    if name in _WRITE_BUFFERS:
        if not named.get("training", named.get("use_input_stats", True)):
            return _NONE
        statistics = [named.get(key) for key in ("running_mean", "running_var")]
        return Effects([arg for arg in (statistics if named else tensors[1:]) if arg is not None])
    if name in _PURE:
        return _NONE
    known = operators_named(name)
    if known is None or name in _DRAW:
        return everything
    writes = [arg for at, arg in enumerate(node.args) if at in known.writes and arg in tensors]
    if len(writes) < len(known.writes):  # it is a list of tensors, or was given by name
        writes = tensors
    return Effects(writes, known.draws and bool(named.get("training", True)))


def _only_computes(body: GraphModule) -> bool:
    """Whether a body of an autograd Function draws nothing, and writes to its own memory alone."""
    found, outer = memory_in(body.graph), set(rules.own_settings(body.graph))
    given = {storage for node in found if node.op == "placeholder" for storage in found[node]}
    effects = [effects_of(node) for node in found.keys() - outer]
    writes = {storage for effect in effects for arg in effect.writes for storage in found[arg]}
    return not (writes & given or any(effect.draws or effect.unknown for effect in effects))


def memory(node: Node) -> set[int]:
    """The memory of a node's result: a number for each storage."""
    memories: set[int] = set()
    pending = [node.meta.get("example_value")]
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor):
            memories.add(memory_of(value))
        elif isinstance(value, tuple | list):
            pending += value
    return memories


def memory_in(graph: Graph) -> dict[Node, set[int]]:
    """The memory of each node's result; torch records a dropout that does nothing as a copy."""
    found: dict[Node, set[int]] = {}
    copied: dict[int, set[int]] = {}
    for node in graph.nodes:
        argument = rules.dropped(node)
        if argument is not None:
            copied.update(dict.fromkeys(memory(node), found[argument]))
        found[node] = {storage for one in memory(node) for storage in copied.get(one, {one})}
    return found


def separate_sums(nodes: Sequence[Node]) -> None:
    """Let ``out += x`` be a sum in new memory, so that what made `out` can become one call.

    Nothing else reads `out`, the result of a convolution or a batch norm, whose gradient does not
    need it. :class:`~snnlstm.loops.rewrite.Writer` adds in place again where both stay in steps.
    """
    found: set[Node] = set()
    for node in nodes:
        if not memory(node):
            found.clear()  # the grad mode may change here
        elif rules.name_of(node) in ("conv2d", "batch_norm") and rules.is_of_torch(node):
            found.add(node)
        elif node.target is operator.iadd and node.args[0] in found:
            (made, _), (out, x) = node.args, map(rules.value_of, node.args)
            if len(made.users) == 1 and isinstance(x, Tensor) and x.dtype is out.dtype:
                node.target, node.meta["in_place"] = operator.add, True
                value = out.detach().clone()  # the sum keeps the memory, of which others have views
                made.meta["example_value"] = value.requires_grad_(out.requires_grad)


class RecordedGraph:
    """The nodes of a graph, and what each does.

    Parameters
    ----------
    graph : torch.fx.Graph
        Recorded by torch.compile, with an ``example_value`` for each node.

    Attributes
    ----------
    effects : dict of Node to Effects
    memory : dict of Node to set of int
        A number for each storage of a node's result.
    written : set of int
        Memory to which some node writes.
    """

    def __init__(self, graph: Graph) -> None:
        self.nodes = list(graph.nodes)
        separate_sums(self.nodes)
        self.effects = {node: effects_of(node) for node in self.nodes}
        self.memory = memory_in(graph)
        self.written = {
            storage
            for effects in self.effects.values()
            for written in effects.writes
            for storage in self.memory[written]
        }

    def is_pure(self, node: Node) -> bool:
        """Whether a node only computes its result, to which nothing ever writes."""
        if node.op not in ("call_function", "call_method") or any(self.effects[node]):
            return False
        return self.memory[node].isdisjoint(self.written)
