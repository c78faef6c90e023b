"""Writes the graph of a loop anew, with one call for each run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from ..compat.torch_private import memory_of
from . import rows
from .steps import Loop, Run

Place = tuple[Run, int, int]
"""The run, the item of its results, and the step, of which a node is the result."""


class Writer:
    """Writes the new graph of a loop.

    Parameters
    ----------
    loop : Loop
    operators : mapping
        What takes the place of an operator.
    """

    def __init__(self, loop: Loop, operators: Mapping[Any, Callable[..., Any]]) -> None:
        self.graph = Graph()
        self._loop, self._operators = loop, operators
        self._at = loop.nodes[0]  # what is being written
        self._copies: dict[Node, Node] = {}
        self._results: dict[tuple[Run, int], Node] = {}
        self._unbound: dict[tuple[Run, int], Node] = {}
        self._sequences: dict[Any, Node] = {}
        self._returned: dict[Node, Node] = {}
        self._removable: list[Node] = []  # what nothing loses if nobody uses it, by age
        self._shared: set[int] = set()
        """Memory of the old graph whose place in the new one several results share."""

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
                self.graph.output(map_arg(node.args[0], self._as_output))
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
        node = self.graph.create_node(kind, self._operators.get(target, target), args, kwargs)
        self._removable.append(node)
        return node

    def copied(self, value: Any) -> Any:
        """An argument of the old graph, with the nodes of the new one."""
        return map_arg(value, self._single)

    def is_one(self, nodes: Sequence[Node]) -> bool:
        """Whether the nodes of all steps are one."""
        return len({self._loop.same[node] for node in nodes}) == 1

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
        if dim:
            return self.call("contiguous", self.call("movedim", out, 0, dim))
        self._shared |= self._loop.memory[node]
        return out

    # ---- runs and single nodes ------------------------------------------------------------------

    def _write_run(self, run: Run) -> None:
        result, loop = run.row.together(self, run), self._loop
        if not run.row.states:
            self._results[run, 0] = result
            self._shared.update(*(loop.memory[call] for call in run.calls))
            return
        for item in (0, *(item for _, item in run.row.states)):
            self._results[run, item] = self.call(rows.ITEM, result, item)
            if item == 0 or run.record:
                parts = [rows.value_of(call)[item] for call in run.calls]
                self._shared.update(map(memory_of, parts))

    def _copy(self, node: Node) -> Node:
        new = self.graph.node_copy(node, self._single)
        new.target = self._operators.get(node.target, node.target)
        if self._loop.is_pure(node):
            self._removable.append(new)
            if rows.row_of(node) is rows.RESHAPE:  # a view of a step may be none of all steps
                new.target = "reshape"
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

    def _as_output(self, node: Node) -> Node:
        """A result of the graph, which shares its memory with no other one.

        The caller may write to each of them, and snnTorch detaches states in place.
        """
        out, place = self._single(node), self._place(node)
        if node in self._returned or node.op == "placeholder":
            return self._returned.get(node, out)
        alone = place is not None and place[1] > 0 and not place[0].record
        memory, twice = self._loop.memory[node], out in self._returned.values()
        if (not alone and memory & self._shared) or (twice and memory):
            out = self.call("clone", out)
        elif out.op == "placeholder" and rows.name_of(node) == "detach":  # no input itself
            out = self.call("detach", out)
        self._returned[node] = out
        return out
