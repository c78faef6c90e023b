"""Writes the graph of a loop anew, with one call for each run."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from ..compat.torch_private import size_hint
from . import rows
from .fold import scale_of, scaled
from .steps import Loop, Run

Place = tuple[Run, int, int]
"""The run, the item of its results, and the step, of which a node is the result."""


class Writer:
    """Writes the new graph of a loop.

    Parameters
    ----------
    loop : Loop
    operators : mapping
        Makes, for each call of an operator, what takes the operator's place.
    last : set of Node
        The convolutions that run channels-last.
    """

    def __init__(
        self, loop: Loop, operators: Mapping[Any, Callable[[], Any]], last: Set[Node]
    ) -> None:
        self.graph = Graph()
        self._loop, self._operators, self._last = loop, operators, last
        self._norms = {conv: norm for norm, conv in loop.folded.items()}
        self._at = loop.nodes[0]  # what is being written
        self._copies: dict[Node, Node] = {}
        self._results: dict[tuple[Run, int], Node] = {}
        self._unbound: dict[tuple[Run, int], Node] = {}
        self._sequences: dict[Any, Node] = {}
        self._weights: dict[Any, list[Any]] = {}  # with biases, as convolutions take them
        self._removable: list[Node] = []  # what nothing loses if nobody uses it, by age
        self._stacks: set[Node] = set()  # what has become the sequence that it was stacked from
        self._moved: set[Node] = set()  # nodes whose strides may differ from the recorded ones
        self._recorded: dict[tuple[Node, bool], Node] = {}
        self._starts: dict[int, Node] = {}  # the node of the new graph that begins a region

    def write(self) -> Graph:
        """Write the graph, without what nothing needs."""
        loop = self._loop
        for unit in loop.order():
            node = self._at = loop.nodes[unit]
            if node in loop.runs:
                self._write_run(loop.runs[node][0])
            elif loop.same[node] is not node or self._place(node):
                continue  # it is written where it is needed
            elif node.op == "output":
                self.graph.output(map_arg(node.args[0], partial(self._as_recorded, alone=True)))
            else:
                self._copies[node] = self._stacked(node) or self._copy(node)
        for node in reversed(self._removable):
            if not node.users:
                self.graph.erase_node(node)
        return self.graph

    # ---- what rows write ------------------------------------------------------------------------

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Write a call of a function, or of the method of this name."""
        kind = "call_method" if isinstance(target, str) else "call_function"
        node = self.graph.create_node(kind, self._made(target), args, kwargs)
        self._removable.append(node)
        return node

    def _made(self, target: Any) -> Any:
        """What a call of the new graph has in the place of an operator or function."""
        make = self._operators.get(target)
        return target if make is None else make()

    def copied(self, value: Any) -> Any:
        """An argument of the old graph, with the nodes of the new one."""
        return map_arg(value, self._single)

    def arguments(self, call: Node) -> list[Any]:
        """The arguments of a call behind the first one.

        The weight of a convolution decides its layout, and has the scale of a batch norm behind it.
        """
        args, last, norm = (
            self.copied(list(call.args[1:])),
            call in self._last,
            self._norms.get(call),
        )
        if not last and norm is None:
            return args
        key = self._loop.region(self._at), last, *args[:2]
        if key not in self._weights:
            weight = args[:2]
            if norm is not None:
                both = self.call(scaled, *weight, *self.copied(scale_of(norm)))
                weight = [self.call(rows.ITEM, both, item) for item in range(2)]
            if last:
                weight[0] = self.call("clone", weight[0], memory_format=torch.channels_last)
            self._weights[key] = weight
        return self._weights[key] + args[2:]

    def is_one(self, nodes: Sequence[Node]) -> bool:
        """Whether the nodes of all steps are one."""
        return len({self._loop.same[node] for node in nodes}) == 1

    def readers(self, node: Node) -> int:
        """How many nodes read a node of the old graph, or one that is the same."""
        return len(self._loop.users[self._loop.same[node]])

    def sequence(self, nodes: Sequence[Node]) -> Node:
        """The tensors of all steps as one, (T, ...)."""
        nodes = [self._loop.same[node] for node in nodes]
        key = self._loop.region(self._at), *nodes
        if key in self._sequences:
            return self._sequences[key]
        sequence = self._joined(nodes)
        if not any(self._loop.memory[node] & self._loop.written for node in nodes):
            self._sequences[key] = sequence  # else another call may see other numbers
        return sequence

    # ---- sequences ------------------------------------------------------------------------------

    def _joined(self, nodes: Sequence[Node]) -> Node:
        if self.is_one(nodes):
            one, same = self._single(nodes[0]), [-1] * rows.dim_of(nodes[0])
            return self.call("expand", self.call("unsqueeze", one, 0), len(nodes), *same)
        places = [self._place(node) or self._piece(node) for node in nodes]
        # Consecutive steps of one origin have one key.
        keys = [place and (*place[:2], place[2] - t) for t, place in enumerate(places)]
        counts, spans = Counter(keys), []
        keys = [key if counts[key] > 1 else None for key in keys]
        for key, span in groupby(zip(keys, places, nodes, strict=True), itemgetter(0)):
            members = list(span)
            if key is None:
                steps = [self._single(node) for _, _, node in members]
                spans.append(self.call(torch.stack, steps))
            else:
                spans.append(self._span(members[0][1], len(members)))
        return spans[0] if len(spans) == 1 else self.call(torch.cat, spans)

    def _piece(self, node: Node) -> tuple[Node, int, int] | None:
        """What :meth:`Loop.piece` returns, where the settings are those in which it was taken."""
        piece = self._loop.piece(node)
        alike = self._loop.region(node) == self._loop.region(self._at)
        return piece if piece and (alike or not rows.requires_grad(piece[0])) else None

    def _span(self, first: Any, count: int) -> Node:
        """As many steps of a sequence, from the place of the first one."""
        origin, dim, start = first
        if isinstance(origin, Node):
            whole, size = self._single(origin), rows.value_of(origin).shape[dim]
        else:
            whole, dim, size = self._results[origin, dim], 0, len(origin.calls)
        if count != size:
            whole = self.call("narrow", whole, dim, start, count)
        return self.call("movedim", whole, dim, 0) if dim else whole

    def _stacked(self, node: Node) -> Node | None:
        """Write a stack of what was taken apart; None if the node is none."""
        if node.target is not torch.stack or not node.args or not self._loop.is_pure(node):
            return None
        nodes: Any = node.args[0]
        taken = any(self._place(n) or self._loop.piece(n) for n in nodes)
        if not taken or rows.requires_grad(node) != any(map(rows.requires_grad, nodes)):
            return None
        dim = (*node.args[1:], *node.kwargs.values(), 0)[0]
        out = self.sequence(nodes)
        self._stacks.add(node)
        return self.call("movedim", out, 0, dim) if dim else out

    # ---- runs and single nodes ------------------------------------------------------------------

    def _write_run(self, run: Run) -> None:
        result = run.row.together(self, run)
        if not self._loop.is_pure(run.calls[0]):
            self._removable.remove(result)  # it also writes
        if not run.row.states:
            self._results[run, 0] = result
            return
        for item in (0, *(item for _, item in run.row.states)):
            self._results[run, item] = self.call(rows.ITEM, result, item)

    def _copy(self, node: Node) -> Node:
        loop, argument = self._loop, self._single
        row, pure = rows.row_of(node), loop.is_pure(node)
        if any(map(self._is_moved, node.all_input_nodes)):
            known = row is not None or node.target in (rows.ITEM, torch.stack)
            if known and loop.may_join(node):
                self._moved.add(node)
            elif list(loop.effects[node].writes) != list(node.args[:1]):
                argument = self._as_recorded  # the function may depend on strides
        changed = node in self._last or node in self._norms
        others = self.arguments(node) if changed else []
        new = self.graph.node_copy(node, argument)
        if changed:
            new.args = new.args[0], *others
        if node in self._last:
            self._moved.add(node)
        new.target = self._made(node.target)
        if "in_place" in node.meta and not self._place(node.args[0]):
            new.target = operator.iadd if self.readers(node.args[0]) == 1 else new.target
        region = loop.region(node)
        if node.op == "placeholder" or (region and region not in self._starts):
            self._starts[region] = new
        if pure:
            self._removable.append(new)
            if row is rows.RESHAPE and node in self._moved:
                new.target = "reshape"  # a view of a step may be none of all steps
        return new

    def _place(self, node: Node) -> Place | None:
        node, item = self._loop.same[node], 0
        if node.target is rows.ITEM and self._loop.same[node.args[0]].target in rows.STATEFUL:
            node, item = self._loop.same[node.args[0]], node.args[1]
        place = self._loop.runs.get(node)
        return place and (place[0], item, place[1])

    def _single(self, node: Node) -> Node:
        """A node of the old graph in the new one; a step of a run is taken out of its result."""
        node = self._loop.same[node]
        if node in self._copies:
            return self._copies[node]
        run, item, step = self._place(node)  # type: ignore[misc]
        whole = self._results[run, item]
        if item and not run.record:  # the state after the last step
            return whole
        # In the settings of the run: the steps are views, and gradients go through them.
        if (run, item) not in self._unbound:
            with self.graph.inserting_after(whole):
                self._unbound[run, item] = self.call("unbind", whole)
        unbound = self._unbound[run, item]
        with self.graph.inserting_after(unbound):
            self._copies[node] = self.call(rows.ITEM, unbound, step)
        return self._copies[node]

    # ---- strides and memory as they were recorded -----------------------------------------------

    def _is_moved(self, node: Node) -> bool:
        """Whether the strides of a node may differ from the recorded ones."""
        node = self._loop.same[node]
        return node in self._moved or node in self._stacks or self._place(node) is not None

    def _is_lent(self, node: Node) -> bool:
        """Whether a node lies in one memory with others that were recorded elsewhere."""
        place = self._place(node)
        in_sequence = place is not None and (place[1] == 0 or place[0].record)
        return (
            in_sequence or node in self._stacks or bool(self._loop.memory[node] & self._loop.merged)
        )

    def _as_recorded(self, node: Node, alone: bool = False) -> Node:
        """A node with the strides of the old graph; a view is a view of the same tensor.

        With `alone`, as a result of the graph, it also shares its memory only with what was
        recorded to share it: the caller may write to it, and snnTorch detaches it in place.
        """
        first = self._loop.same[node]
        if not alone or rows.value_of(node) is rows.value_of(first):
            node = first
        if (node, alone) not in self._recorded:
            source = self._source(node)
            self._recorded[node, alone] = (
                self._laid_out(node, alone) if source is None else self._viewed(node, source, alone)
            )
        return self._recorded[node, alone]

    def _source(self, node: Node) -> Node | None:
        """The argument of which a node is a view, or to which it writes; None if it is none."""
        memory = self._loop.memory
        for arg in node.all_input_nodes:
            if memory[arg] & memory[node]:
                is_item = isinstance(rows.value_of(arg), tuple | list)
                return None if is_item and self._source(arg) is None else arg
        return None

    def _viewed(self, node: Node, source: Node, alone: bool) -> Node:
        """A view, or what was written to, as one of its source as it was recorded."""
        base = self._as_recorded(source, alone)
        if (
            node is self._loop.same[node]
            and base is self._single(source)
            and not self._is_moved(node)
        ):
            return self._single(node)
        copies = {arg: base if arg is source else self._single(arg) for arg in node.all_input_nodes}
        with self._beside(node, copies.values()):
            return self.graph.node_copy(node, copies.__getitem__)

    def _laid_out(self, node: Node, alone: bool) -> Node:
        out, copied = self._single(node), alone and self._is_lent(node)
        if not copied and not self._is_moved(node):
            return out
        value, place = rows.value_of(node), self._place(node)
        by_stride = sorted(range(value.dim()), key=lambda dim: -size_hint(value.stride(dim)))
        shown = [dim for dim in by_stride if size_hint(value.shape[dim]) != 1]
        order = list(range(value.dim())) if shown == sorted(shown) else by_stride
        with self._beside(node, [out]):
            if order != sorted(order):
                out = self.call("permute", out, order)
            if copied:
                out = self.call("clone", out, memory_format=torch.contiguous_format)
            else:
                out = self.call("contiguous", out)
            if order != sorted(order):
                out = self.call("permute", out, [order.index(dim) for dim in sorted(order)])
            if place and not value.requires_grad and any(map(rows.requires_grad, place[0].calls)):
                out = self.call("detach", out)  # other steps have a gradient
        return out

    def _beside(self, node: Node, arguments: Iterable[Node]) -> Any:
        """Where a node that needs these ones is written, in the settings of another one."""
        start = self._starts.get(self._loop.region(node))
        return self.graph.inserting_before(max([*arguments, *([start] if start else [])]).next)
