"""Finds the calls of a recorded loop that can become one.

torch.compile unrolls a loop over steps: its graph has a call of each layer for each step. A group
has the calls of one layer; a run has consecutive calls of a group that become one call. Calls form
a run only if none of them needs a result of another, except for the states that a cell or Leaky
hands from step to step.

What a node needs is more than its arguments. Nodes that write to memory keep their order with all
that read or write it, random nodes of a layer keep theirs, and nothing moves across a node that
changes a setting, such as the grad mode.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from ..dispatch.reasons import Reason
from ..networks.layers import reason_by_size, steps_at_once, too_large
from . import rules
from .effects import RecordedGraph
from .fold import find_folded


@dataclass(eq=False)
class Run:
    """Calls that become one.

    Attributes
    ----------
    rule : Rule
    calls : list of Node
        In the order of their steps.
    record : bool
        Whether the call returns the states after each step; otherwise those after the last one.
    """

    rule: rules.Rule
    calls: list[Node]
    record: bool = False


class Loop(RecordedGraph):
    """The calls of a graph, and the runs that they form.

    Attributes
    ----------
    same : dict of Node to Node
        The first of all nodes that compute the same, for each node.
    folded : dict of Node to Node
        The convolution of which a batch norm becomes part, for each such batch norm.
    users : dict of Node to list of Node
        The nodes that take a node, or one that is the same, as an argument.
    runs : dict of Node to (Run, int)
        The run of a call, and the call's position in it.
    reasons : dict of Node to str
        Why a call does not continue the run of the call before.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self.same: dict[Node, Node] = {}
        self.users: dict[Node, list[Node]] = {node: [] for node in self.nodes}
        self.runs: dict[Node, tuple[Run, int]] = {}
        self.reasons: dict[Node, str] = {}
        self.folded = find_folded(self)
        self._number = {node: number for number, node in enumerate(self.nodes)}
        self._regions = self._needs_of_effects()
        self._find_equal()
        self._handed: dict[int, set[int]] = {}
        self._chains: dict[Node, Node] = {}  # the first call of a chain, by its last call
        groups = self._groups()
        limit = self._longest_run(groups)
        for rule, calls in groups:
            self._form_runs(rule, calls, limit)

    def may_join(self, node: Node) -> bool:
        """Whether nothing but its arguments keeps a node from a run.

        A batch norm in training may also write to its running statistics.
        """
        tracks = rules.rule_of(node) is rules.BATCH_NORMS
        return self.is_pure(node) or (tracks and self.memory[node].isdisjoint(self.written))

    def region(self, node: Node) -> int:
        """The number of the region in which a node lies; in each, the settings are the same."""
        return self._regions[self._number[node]]

    # ---- what each node needs -------------------------------------------------------------------

    def _needs_of_effects(self) -> list[int]:
        """Find the nodes that each node must follow beside its arguments; return the regions.

        Between nodes that change a setting lies a region, which has a number.
        """
        self._needs: dict[int, set[int]] = {}  # of each unit
        writer: dict[int, int] = {}
        readers: dict[int, list[int]] = {}
        drawn: dict[Any, int] = {}
        barrier, region, since, regions = -1, 0, [0], []
        for number, node in enumerate(self.nodes):
            needs, effects = self._needs.setdefault(number, set()), self.effects[node]
            writes = {storage for arg in effects.writes for storage in self.memory[arg]}
            touched = self._touched(node)
            for storage in touched & self.written:
                if storage in writer:
                    needs.add(writer[storage])
                if storage in writes:
                    needs.update(readers.pop(storage, ()))
                    writer[storage] = number
                else:
                    readers.setdefault(storage, []).append(number)
            if effects.unknown:
                needs.update(drawn.values())
                drawn = {None: number}
            elif effects.draws:
                layer = node.target, node.meta.get("stack_trace")
                needs.update(drawn[key] for key in (None, layer) if key in drawn)
                drawn[layer] = number
            changes_settings = effects.unknown and not touched
            if changes_settings or node.op == "output":
                needs.update(since)
                barrier, region, since = number, region + 1, []
            elif barrier >= 0 and node.op != "placeholder":
                needs.add(barrier)
            since.append(number)
            needs.discard(number)
            regions.append(region)
        return regions

    def _touched(self, node: Node) -> set[int]:
        """The memory of a node's result and arguments."""
        return self.memory[node].union(*(self.memory[arg] for arg in node.all_input_nodes))

    def _find_equal(self) -> None:
        """Find the nodes that compute the same from the same."""
        first: dict[Any, Node] = {}
        for number, node in enumerate(self.nodes):
            value, key = rules.value_of(node), node
            if node in self.folded:
                key = self.same[self.folded[node]]
            elif self._is_its_argument(node):
                key = self.same[node.all_input_nodes[0]]
            elif isinstance(value, torch.SymInt) and node.op != "placeholder":
                key = str(value)  # sizes are equal, however they were computed
            elif self.is_pure(node) and self._touched(node).isdisjoint(self.written):
                key = node.target, self._arguments(node), self._regions[number]
            self.same[node] = key if isinstance(key, Node) else first.setdefault(key, node)
            if self.same[node] is node:
                for arg in node.all_input_nodes:
                    self._needs[number].add(self._number[self.same[arg]])
                    self.users[self.same[arg]].append(node)

    def _is_its_argument(self, node: Node) -> bool:
        """Whether a node returns its argument: a detach does so where no gradient is recorded."""
        if not self.is_pure(node) or len(node.all_input_nodes) != 1:
            return False
        argument, value = rules.value_of(node.all_input_nodes[0]), rules.value_of(node)
        idle = rules.dropped(node) is not None
        detached = rules.name_of(node) == "detach" and not argument.requires_grad
        return idle or detached or (isinstance(value, Tensor) and value is argument)

    def _arguments(self, node: Node, start: int = 0) -> str:
        """A node's arguments as text, from the one at `start` on; equal ones are alike."""
        return repr(map_arg((node.args[start:], node.kwargs), self.same.get))

    # ---- the groups -----------------------------------------------------------------------------

    def _groups(self) -> list[tuple[rules.Rule, list[int]]]:
        """The calls of each layer that runs may have.

        Two calls of a function belong to one layer if their arguments do: each node has a color,
        which equals that of the same expression in other steps.
        """
        colors: dict[Node, int] = {}
        numbers: dict[Any, int] = {}
        groups: dict[Any, tuple[rules.Rule, list[int]]] = {}
        for number, node in enumerate(self.nodes):
            if self.same[node] is not node:
                colors[node] = colors[self.same[node]]
                continue
            rule = rules.rule_of(node) if self.may_join(node) else None
            key: Any = node
            if rule is not None and rule.states:
                key = self._options(rule, node)
            elif (piece := self.piece(node)) is not None:
                key = piece[:2]
            elif node.op in ("call_function", "call_method"):
                colored = map_arg((node.args, node.kwargs), lambda a: f"%{colors[self.same[a]]}")
                key = node.target, repr(colored), str(rules.shape_of(node))
            colors[node] = numbers.setdefault(key, len(numbers))
            if rule is not None:
                group = self._chain(number, rule) if rule.states else colors[node]
                _, calls = groups.setdefault(group, (rule, []))
                if calls and not self.is_pure(node):  # it hands on the running statistics
                    self._handed[number] = {calls[-1]}
                calls.append(number)
        return [(rule, calls) for rule, calls in groups.values() if len(calls) > 1]

    def _chain(self, number: int, rule: rules.Rule) -> Any:
        """The first call of a chain, in which each call starts from the last one's states."""
        node = self.nodes[number]
        states = {self.same[node.args[at]]: item for at, item in rule.states}
        are_items = all(s.target is rules.ITEM and s.args[1] == item for s, item in states.items())
        calls = {self.same[state.args[0]] for state in states} if are_items else set()
        previous = calls.pop() if len(calls) == 1 else node
        known = previous in self._chains
        if not known or self._options(rule, node) != self._options(rule, previous):
            self._chains[node] = node
            inputs = [*states][-1].all_input_nodes
            dtypes = {shape[1] for arg in inputs if (shape := rules.shape_of(arg))}
            if dtypes & {torch.float16, torch.bfloat16}:
                self.reasons[node] = Reason.ROUNDED
            return node
        self._handed[number] = {self._number[state] for state in states}
        self._chains[node] = self._chains.pop(previous)  # another call may not continue from it
        return self._chains[node]

    def _options(self, rule: rules.Rule, node: Node) -> Any:
        """What two calls of one layer with states have in common: options, weights and shapes."""
        options = map_arg([node.args[at] for at in rule.options], self.same.get)
        return node.target, repr(options), str(rules.shape_of(node.args[0]))

    def piece(self, node: Node) -> tuple[Node, int, int] | None:
        """The sequence, dimension and step of ``x[t]``, ``x[:, t]`` or an item of ``x.unbind()``.

        None if the node is none of these.
        """
        if node.target is not rules.ITEM or not self.is_pure(node):
            return None
        source, index = self.same[node.args[0]], node.args[1]
        if isinstance(source.meta.get("example_value"), tuple | list):
            if rules.name_of(source) != "unbind" or not isinstance(index, int):
                return None
            dim = (*source.args[1:], *source.kwargs.values(), 0)[0]
            return self.same[source.args[0]], dim, index
        before, last = (index[:-1], index[-1]) if isinstance(index, tuple) else ((), index)
        if type(last) is not int or last < 0 or any(part != slice(None) for part in before):
            return None
        return source, len(before), last

    # ---- the runs -------------------------------------------------------------------------------

    def _longest_run(self, groups: Sequence[tuple[rules.Rule, list[int]]]) -> int:
        """How many steps a run may have, so that no results of one are large.

        Where gradients are recorded, a loop keeps all steps, too.
        """
        nodes = [self.nodes[calls[0]] for _, calls in groups]
        if any(map(rules.requires_grad, nodes)):
            return len(self.nodes)
        several = [(rule, self.nodes[calls[0]]) for rule, calls in groups if len(calls) > 1]
        steps = [rules.bytes_of(node) for rule, node in several if not self._is_free(rule, node)]
        # A batch norm keeps one more sequence at once. Half as many steps take half the memory, and
        # no more time (benchmarks/NOTES.md).
        doubled = any(rule is rules.BATCH_NORMS for rule, _ in several)
        return steps_at_once(max(steps, default=0) << doubled)

    def _is_free(self, rule: rules.Rule, node: Node) -> bool:
        """Whether all steps at once take no memory, as views, or large ones run one by one."""
        by_size = rules.value_of(node.all_input_nodes[0]).device.type == "cpu"
        by_step = (
            by_size and node.target is not rules.CELL_OPERATOR and too_large(rules.bytes_of(node))
        )
        return by_step or rule in rules.VIEWS

    def _reason_against(self, rule: rules.Rule, calls: Sequence[Node], limit: int) -> str | None:
        """Why no calls of a group become one; None if they may, up to `limit` at once."""
        first, x = calls[0], calls[0].all_input_nodes[0]
        alone = rule.first_alone and not rule.states
        if alone and len({self._arguments(call, 1) for call in calls}) > 1:
            return Reason.WEIGHTS
        if rules.value_of(x).device.type != "cpu":
            return None
        if first.target is rules.CELL_OPERATOR:
            by_step = too_large(rules.bytes_of(x)) and not self._is_sequence(calls)
            return Reason.TO_STACK if by_step else None
        if rule in rules.VIEWS and self._is_sequence(calls):
            return None
        step = max(map(rules.bytes_of, (first, *first.all_input_nodes[:1])))
        return reason_by_size(step, min(limit, len(calls)), rule is rules.LINEAR, bool(rule.states))

    def _is_sequence(self, calls: Sequence[Node]) -> bool:
        """Whether the first arguments of calls lie in one memory."""
        origins = set()
        for call in calls:
            x = self.same[call.args[0]]
            owner = self.same[x.args[0]] if x.target is rules.ITEM else x
            piece = self.piece(x)
            origins.add(piece[:2] if piece else self.runs.get(owner, (x,))[0])
        return len(origins) == 1

    def _form_runs(self, rule: rules.Rule, calls: list[int], limit: int) -> None:
        """Let the calls of a group form runs of at most `limit` calls."""
        nodes = [self.nodes[number] for number in calls]
        reason = self._reason_against(rule, nodes, limit)
        if reason is not None:
            self.reasons.update(dict.fromkeys(nodes[1:], reason))
            return
        units = []
        for numbers in self._independent(calls, limit):
            # Equal calls are not one if something writes to what they read; no run has them alone,
            # but for batch norms, which write to that themselves.
            several = len({self._arguments(self.nodes[number]) for number in numbers}) > 1
            if several or (rule is rules.BATCH_NORMS and len(numbers) > 1):
                run = Run(rule, [self.nodes[number] for number in numbers])
                keeps_all = rule is rules.LEAKIES and rules.requires_grad(self.nodes[numbers[0]])
                run.record = bool(rule.states) and (keeps_all or self._needs_states(run.calls))
                self.runs.update((node, (run, at)) for at, node in enumerate(run.calls))
                units.append(numbers)
        self._contract(units)

    def _independent(self, calls: list[int], limit: int) -> list[list[int]]:
        """Cut the calls of a group where one needs the result of another, or a run gets too long.

        One pass over the units finds, for each, the last run that it depends on.
        """
        runs: list[list[int]] = []
        pieces = {number: at // limit for at, number in enumerate(calls)}
        depends_on: dict[int, int] = {}
        for unit in self.order():
            is_call, needed = unit in pieces, self._needs[unit]
            if is_call:
                needed = needed - self._handed.get(unit, set())
            latest = max(map(depends_on.__getitem__, needed), default=-1)
            if is_call:
                reason = self._reason_to_cut(runs, unit, latest, pieces)
                if reason is not None:
                    self.reasons[self.nodes[unit]] = reason
                if reason is not None or not runs:
                    runs.append([])
                runs[-1].append(unit)
                latest = len(runs) - 1
            depends_on[unit] = latest
        return [sorted(run) for run in runs]

    def _reason_to_cut(
        self, runs: Sequence[Sequence[int]], call: int, latest: int, pieces: Mapping[int, int]
    ) -> str | None:
        """Why a call may not continue the last one of the runs; None if it may, or there is none.

        `latest` is the last run that the call depends on. A run lies within one of the `pieces`,
        whose numbers the calls have.
        """
        if not runs:
            return None
        last = runs[-1][-1]
        if latest == len(runs) - 1:
            alike = self._regions[call] == self._regions[last]
            return Reason.FEEDBACK if alike else Reason.OTHER_SETTINGS
        return Reason.MEMORY if pieces[call] != pieces[last] else None

    def _needs_states(self, calls: Sequence[Node]) -> bool:
        """Whether a node beside the next step reads the states after one of these calls."""
        states = [item for call in calls[:-1] for item in self.users[call] if item.args[1] > 0]
        inside = set(calls)
        return any(user not in inside for state in states for user in self.users[state])

    def _contract(self, runs: Sequence[Sequence[int]]) -> None:
        """Make the calls of each run one unit, that of the first one, which needs what they do."""
        units = {call: run[0] for run in runs for call in run}
        for call, unit in units.items():
            if call != unit:
                self._needs[unit] |= self._needs.pop(call) - self._handed.get(call, set())
        for unit, needs in self._needs.items():
            self._needs[unit] = {units.get(needed, needed) for needed in needs} - {unit}

    def order(self) -> Iterator[int]:
        """The units in an order in which each follows all that it needs; early nodes come early."""
        missing = {unit: len(needs) for unit, needs in self._needs.items()}
        needed_by: dict[int, list[int]] = {unit: [] for unit in self._needs}
        for unit, needs in self._needs.items():
            for needed in needs:
                needed_by[needed].append(unit)
        ready = [unit for unit, count in missing.items() if not count]  # sorted, so it is a heap
        while ready:
            unit = heappop(ready)
            yield unit
            for user in needed_by[unit]:
                missing[user] -= 1
                if not missing[user]:
                    heappush(ready, user)
        assert not any(missing.values()), "runs need each other"
