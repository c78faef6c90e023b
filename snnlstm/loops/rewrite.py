"""Writes the graph of a loop anew, with one call for each run.

Strides may change on the way. A result of the graph, and an argument of a function that may see
strides, gets the strides that were recorded.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from ..compat.torch_private import size_hint
from . import rules
from .fold import scale_of, scaled
from .steps import Loop, Run

Place = tuple[Run | Node, int, int]
"""A run, the item of its results, and a step; or a sequence, its dimension of time, and a step."""

_LIKE = {"new_zeros", "new_ones", "new_empty"}  # they read the dtype and device of a tensor alone


class Writer:
    """Writes the new graph of a loop.

    Parameters
    ----------
    loop : Loop
    operators : mapping
        Makes, for each call of an operator, what takes the operator's place.
    channels_last : mapping
        The convolutions that run channels-last, and whether their weights must become so.
    for_neurons : set of Node
        The convolutions of which neurons alone read the results.
    """

    def __init__(
        self,
        loop: Loop,
        operators: Mapping[Any, Callable[[], Any]],
        channels_last: Mapping[Node, bool],
        for_neurons: Set[Node],
    ) -> None:
        self.graph = Graph()
        self._loop, self._operators, self._channels_last = loop, operators, channels_last
        self._for_neurons = for_neurons
        self._norms = {conv: norm for norm, conv in loop.folded.items()}
        results = loop.nodes[-1].all_input_nodes
        self._returned = {storage for node in results for storage in loop.memory[node]}
        self._at = loop.nodes[0]  # what is being written
        self._copies: dict[Node, Node] = {}
        self._results: dict[tuple[Run, int], Node] = {}
        self._unbound: dict[tuple[Run, int], Node] = {}
        self._sequences: dict[Any, Node] = {}
        self._weights: dict[Any, list[Any]] = {}  # with biases, as convolutions take them
        self._removable: list[Node] = []  # what nothing loses if nobody uses it, by age
        # What :meth:`_as_recorded` reads, and what it has written.
        self._moved: set[Node] = set()  # nodes whose strides may differ from the recorded ones
        self._lent: set[Node] = set()  # stacks in whose memory something else may lie
        self._unshared: set[Node] = set()  # new nodes: sequences that a stack may be without a copy
        self._recorded: dict[Node, Node] = {}
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
                self.graph.output(map_arg(node.args[0], self._as_recorded))
            else:
                self._copies[node] = self._stacked(node) or self._copy(node)
        for node in reversed(self._removable):
            if not node.users:
                self.graph.erase_node(node)
        return self.graph

    # ---- what rules write ------------------------------------------------------------------------

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
        args, norm = self.copied(list(call.args[1:])), self._norms.get(call)
        converted = self._channels_last.get(call, False)
        if not converted and norm is None:
            return args
        key = self._loop.region(self._at), converted, *args[:2]
        if key not in self._weights:
            weight = args[:2]
            if norm is not None:
                both = self.call(scaled, *weight, *self.copied(scale_of(norm)))
                weight = [self.call(rules.ITEM, both, item) for item in range(2)]
            if converted:
                weight[0] = self.call("clone", weight[0], memory_format=torch.channels_last)
            self._weights[key] = weight
        return self._weights[key] + args[2:]

    def options(self, call: Node) -> dict[str, Any]:
        """The arguments of a call by name; of a convolution, who reads it."""
        is_ours = call in self._for_neurons and self._made(call.target) is not call.target
        return self.copied(dict(call.kwargs)) | ({"for_neurons": True} if is_ours else {})

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
        if self.is_one(nodes):
            one, same = self._single(nodes[0]), [-1] * rules.dim_of(nodes[0])
            out = self.call("expand", self.call("unsqueeze", one, 0), len(nodes), *same)
        else:
            parts = [self._taken(part) for part in self._parts(nodes)]
            if None in parts:
                out = self.call(torch.stack, [*map(self._single, nodes)])
            else:
                out = parts[0] if len(parts) == 1 else self.call(torch.cat, parts)
        if not any(self._loop.memory[node] & self._loop.written for node in nodes):
            self._sequences[key] = out  # else another call may see other numbers
        return out

    # ---- sequences ------------------------------------------------------------------------------

    def _parts(self, nodes: Sequence[Node]) -> list[list[Node]]:
        """The nodes, cut where the next one is not the next step of the same sequence."""
        parts: list[list[Node]] = []
        last: Any = None
        for node in nodes:
            place = self._place(node) or self._piece(node)
            if place is None or last is None or place != (*last[:2], last[2] + 1):
                parts.append([])
            parts[-1].append(node)
            last = place
        return parts if all(len(part) > 1 for part in parts) else [list(nodes)]

    def _taken(self, nodes: Sequence[Node]) -> Node | None:
        """The part of a sequence whose steps are these nodes, in this order; None without one."""
        places = [self._place(node) or self._piece(node) for node in nodes]
        first = places[0]
        if first is None or places != [(*first[:2], first[2] + t) for t in range(len(nodes))]:
            return None
        (origin, dim, start), whole = first, self._whole(first)
        if isinstance(origin, Node):
            size = rules.value_of(origin).shape[dim]
        else:
            dim, size = 0, len(origin.calls)
        if len(nodes) != size:
            whole = self.call("narrow", whole, dim, start, len(nodes))
        return self.call("movedim", whole, dim, 0) if dim else whole

    def _whole(self, place: Place) -> Node:
        """The sequence to which a step belongs."""
        origin, at, _ = place
        return self._single(origin) if isinstance(origin, Node) else self._results[origin, at]

    def _piece(self, node: Node) -> Place | None:
        """What :meth:`Loop.piece` returns, where the settings are those in which it was taken."""
        piece = self._loop.piece(node)
        alike = self._loop.region(node) == self._loop.region(self._at)
        return piece if piece and (alike or not rules.requires_grad(piece[0])) else None

    def _stacked(self, node: Node) -> Node | None:
        """Write a stack as the sequence that was taken apart; None if the node is none."""
        if node.target is not torch.stack or not node.args or not self._loop.is_pure(node):
            return None
        nodes: Any = node.args[0]
        if rules.requires_grad(node) != any(map(rules.requires_grad, nodes)):
            return None
        out = self._taken([self._loop.same[one] for one in nodes])
        if out is None:
            return None
        dim = (*node.args[1:], *node.kwargs.values(), 0)[0]
        self._moved.add(node)
        if dim or out not in self._unshared:
            self._lent.add(node)
        self._unshared.discard(out)  # a second stack would share its memory with this one
        return self.call("movedim", out, 0, dim) if dim else out

    # ---- runs and single nodes ------------------------------------------------------------------

    def _write_run(self, run: Run) -> None:
        result = run.rule.together(self, run)
        if not self._loop.is_pure(run.calls[0]):
            self._removable.remove(result)  # it also writes
        if not run.rule.states:
            self._results[run, 0] = result
            return
        for item in (0, *(item for _, item in run.rule.states)):
            out = self._results[run, item] = self.call(rules.ITEM, result, item)
            if not any(map(rules.requires_grad, run.calls)):  # else a backward pass reads it
                self._unshared.add(out)

    def _copy(self, node: Node) -> Node:
        loop, argument = self._loop, self._single
        rule = rules.rule_of(node)
        if node.target in _LIKE:
            argument = self._like
        elif any(map(self._is_moved, node.all_input_nodes)):
            keeps_order = rule is not None or node.target in (rules.ITEM, torch.stack)
            if keeps_order and loop.may_join(node):
                self._moved.add(node)
            elif list(loop.effects[node].writes) != list(node.args[:1]):
                argument = self._as_recorded  # the function may see strides
        new = self.graph.node_copy(node, argument)
        new.target = self._made(node.target)
        if node in self._for_neurons:
            new.kwargs = self.options(node)
        if node in self._channels_last or node in self._norms:
            with self.graph.inserting_before(new):
                new.args = new.args[0], *self.arguments(node)
        if node in self._channels_last:
            self._moved.add(node)
        if "in_place" in node.meta and not self._place(node.args[0]):
            new.target = operator.iadd if self.readers(node.args[0]) == 1 else new.target
        region = loop.region(node)
        if node.op == "placeholder" or (region and region not in self._starts):
            self._starts[region] = new
        if loop.is_pure(node):
            self._removable.append(new)
            if rule is rules.RESHAPE and node in self._moved:
                new.target = "reshape"  # a view of a step may be none of all steps
        return new

    def _like(self, node: Node) -> Node:
        """What has the dtype and device of a node: of a step, the sequence to which it belongs."""
        place = self._place(node) or self._loop.piece(self._loop.same[node])
        return self._whole(place) if place else self._single(node)

    def _place(self, node: Node) -> Place | None:
        node, item = self._loop.same[node], 0
        if node.target is rules.ITEM and self._loop.same[node.args[0]].target in rules.STATEFUL:
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
            self._copies[node] = self.call(rules.ITEM, unbound, step)
        return self._copies[node]

    # ---- strides and memory as they were recorded -----------------------------------------------

    def _as_recorded(self, node: Node) -> Node:
        """A node with the strides that were recorded.

        A result of the graph also shares its memory only with what was recorded to share it: the
        caller may write to it, and snnTorch detaches it in place.

        ===============  ==========================================================================
        node             what is written
        ===============  ==========================================================================
        a view           the same call of its source, which is written as this table says; a node
                         that writes to its argument counts as a view of it (:meth:`_viewed`)
        a step of a run  that part of the sequence; for a result of the graph a copy, because other
                         steps lie in the same memory (:meth:`_is_lent`)
        a stack          the sequence itself, if :meth:`_stacked` found one; for a result a copy, if
                         something else may lie in the sequence's memory (`_lent`)
        an equal node    the first of the equal ones; for a result a copy
        ===============  ==========================================================================

        What is neither a view nor a copy becomes contiguous in the recorded order of dimensions, if
        its strides may differ (:meth:`_is_moved`).
        """
        first, is_returned = self._loop.same[node], self._loop.memory[node] & self._returned
        if not is_returned or rules.value_of(node) is rules.value_of(first):
            node = first
        if node not in self._recorded:
            source = self._source(node)
            if source is not None:
                self._recorded[node] = self._viewed(node, source)
            else:
                own = bool(is_returned) and self._is_lent(node)
                self._recorded[node] = self._laid_out(node, own)
        return self._recorded[node]

    def _is_lent(self, node: Node) -> bool:
        """Whether a node lies in one memory with others that were recorded elsewhere."""
        place, is_equal = self._place(node), self._loop.same[node] is not node
        in_sequence = place is not None and (place[1] == 0 or place[0].record)
        return in_sequence or is_equal or node in self._lent

    def _is_moved(self, node: Node) -> bool:
        """Whether the strides of a node may differ from the recorded ones."""
        node = self._loop.same[node]
        return node in self._moved or self._place(node) is not None

    def _source(self, node: Node) -> Node | None:
        """The argument of which a node is a view, or to which it writes; None if it is none."""
        memory = self._loop.memory
        for arg in node.all_input_nodes:
            if memory[arg] & memory[node]:
                takes_item = isinstance(rules.value_of(arg), tuple | list)
                # An item of (spk, mem) is a new tensor; one of x.unbind() is a view of x.
                is_new = takes_item and self._source(arg) is None
                return None if is_new else arg
        return None

    def _viewed(self, node: Node, source: Node) -> Node:
        """A view of its source as recorded, or the source itself, to which the node writes."""
        args = {arg: self._single(arg) for arg in node.all_input_nodes}
        given = args[source]
        args[source] = self._as_recorded(source)
        is_first = node is self._loop.same[node]
        if is_first and args[source] is given and not self._is_moved(node):
            return self._single(node)
        with self._beside(node, args.values()):
            return self.graph.node_copy(node, args.__getitem__)

    def _laid_out(self, node: Node, own: bool) -> Node:
        """A tensor that is no view with the recorded strides; `own`, in memory of its own."""
        value, place, out = rules.value_of(node), self._place(node), self._single(node)
        if not own and not self._is_moved(node):
            return out
        dims = [dim for dim in range(value.dim()) if size_hint(value.shape[dim]) != 1]
        by_stride = sorted(dims, key=lambda dim: -size_hint(value.stride(dim)))
        with self._beside(node, [out]):
            if by_stride != dims:
                out = self.call("movedim", out, by_stride, dims)
            if own:
                out = self.call("clone", out, memory_format=torch.contiguous_format)
            else:
                out = self.call("contiguous", out)
            if by_stride != dims:
                out = self.call("movedim", out, dims, by_stride)
            if place and not value.requires_grad and any(map(rules.requires_grad, place[0].calls)):
                out = self.call("detach", out)  # other steps have a gradient
        return out

    def _beside(self, node: Node, arguments: Iterable[Node]) -> Any:
        """Where a node that needs these ones is written, in the settings of another one."""
        start = self._starts.get(self._loop.region(node))
        return self.graph.inserting_before(max([*arguments, *([start] if start else [])]).next)
