"""Counts what the machine code of a kernel does between two tensor core instructions (HMMA).

A loop is the code between a branch backwards and its target. In an innermost loop with HMMA a warp
issues one way over and over: the one with the most HMMA, and of those the shortest. Other ways, on
which elements are fetched one by one, are taken rarely or by few threads.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import networkx as nx  # torch wants it, too

ENDS = ("BRA", "EXIT", "RET", "BRX")  # only a branch reaches what comes behind
# Divisions (by way of a reciprocal), calls and local memory.
SLOW = ("I2F", "F2I", "MUFU.RCP", "CALL", "LDL", "STL")


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str  # with its modifiers
    predicated: bool
    target: int | None  # address that a branch goes to

    @property
    def is_hmma(self) -> bool:
        return self.name.startswith("HMMA")

    @property
    def ends(self) -> bool:
        """Whether only a branch reaches the next instruction."""
        return not self.predicated and self.name.split(".")[0] in ENDS


@dataclass
class Loop:
    """An innermost loop with HMMA."""

    code: list[Instruction]  # on all ways
    issued: int  # on the way that is issued over and over
    hmma: int  # on that way

    @property
    def per_hmma(self) -> float:
        return self.issued / self.hmma

    def slow(self) -> list[str]:
        """Instructions that no way of such a loop may have."""
        return sorted({i.name for i in self.code if i.name.startswith(SLOW)})


def parse(code: list[tuple[int, str, str, str]]) -> list[Instruction]:
    """The instructions of one kernel, from gpu_tools.disassemble()."""
    instructions = []
    for address, predicate, name, operands in code:
        target = re.search(r"0x([0-9a-f]+)\s*$", operands) if name[:3] == "BRA" else None
        # BRA.DIV branches only if the lanes of a warp have gone different ways.
        predicated = bool(predicate or re.match(r"!?U?P\d", operands) or name == "BRA.DIV")
        to = int(target[1], 16) if target else None
        instructions.append(Instruction(address, name, predicated, to))
    return instructions


def blocks_of(code: list[Instruction]) -> tuple[list[list[Instruction]], nx.DiGraph]:
    """The blocks, whose instructions run one after the other, and which block follows which."""
    starts = {code[0].address} | {i.target for i in code if i.target is not None}
    blocks: list[list[Instruction]] = []
    for i, before in zip(code, [None, *code], strict=False):
        if i.address in starts or (before and (before.target is not None or before.ends)):
            blocks.append([])
        blocks[-1].append(i)
    number, graph = {b[0].address: k for k, b in enumerate(blocks)}, nx.DiGraph()
    graph.add_nodes_from(range(len(blocks)))
    for k, (*_, last) in enumerate(blocks):
        if last.target in number:
            graph.add_edge(k, number[last.target])
        if not last.ends and k + 1 < len(blocks):
            graph.add_edge(k, k + 1)
    return blocks, graph


def loops(disassembled: list[tuple[int, str, str, str]]) -> list[Loop]:
    """The innermost loops with HMMA of one kernel, from gpu_tools.disassemble()."""
    blocks, graph = blocks_of(parse(disassembled))
    graph = graph.subgraph({0} | nx.descendants(graph, 0))
    tree = nx.DiGraph((above, n) for n, above in nx.immediate_dominators(graph, 0).items() if n)
    back = [(n, h) for n, h in graph.edges if n == h or (n in tree and h in nx.ancestors(tree, n))]
    bodies: dict[int, set[int]] = {}
    for n, header in back:
        within = graph.subgraph(set(graph) - {header})
        body = {n} | nx.ancestors(within, n) if n != header else set()
        bodies.setdefault(header, {header}).update(body)
    hmma = {n for n in graph if any(i.is_hmma for i in blocks[n])}
    hot = {header: body for header, body in bodies.items() if body & hmma}
    hot_loops = []
    for header, body in sorted(hot.items()):
        if any(other < body for other in hot.values()):
            continue
        # The way from the header once around with the most HMMA, and of those the fewest
        # instructions. It passes inner loops once.
        once = nx.DiGraph(e for e in graph.subgraph(body).edges if e not in back)
        once.add_edges_from((n, "end") for n, h in back if h == header)
        for n, _, edge in once.edges(data=True):
            edge["cost"] = sum(1 - 10**6 * i.is_hmma for i in blocks[n])
        *way, _ = nx.bellman_ford_path(once, header, "end", weight="cost")
        issued = [i for n in way for i in blocks[n]]
        code = [i for n in sorted(body) for i in blocks[n]]
        hot_loops.append(Loop(code, len(issued), sum(i.is_hmma for i in issued)))
    return hot_loops
