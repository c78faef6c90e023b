"""What the project aims at on a GPU, and how much of it a run has met.

A layer is bound by launches where a CUDA graph makes snnTorch's loop at least 1.5 times as fast.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.rows import Row

LAUNCH_BOUND = 1.5
OURS = ("snnlstm", "snnlstm-cudagraph")
COMPILED_GRAPH = "snntorch-compile-graph"


@dataclass(frozen=True)
class Goal:
    """One aim in one case: our time is to be `wanted` times shorter than `against`'s."""

    dtype: str
    case: str
    mode: str
    against: str
    wanted: float
    found: float

    @property
    def met(self) -> bool:
        return self.found >= self.wanted

    def __str__(self) -> str:
        where = f"{self.case} {self.mode} {self.dtype}"
        verdict = "met" if self.met else "missed"
        return f"{where}: {self.found:.2f}x {self.against}, goal {self.wanted:g}x: {verdict}"


def goals(rows: Iterable[Row]) -> list[Goal]:
    """The goals of all cases in inference and training that rows were measured for."""
    times: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        if row.p50_ms and row.mode != "backward":
            times.setdefault((row.dtype, row.case, row.mode), {})[row.provider] = row.p50_ms
    found = []
    for where, of in times.items():
        by_call, best = of.get(OURS[0]), min((of[name] for name in OURS if name in of), default=0)
        if not by_call or not best:
            continue

        def goal(against: str, wanted: float, ours: float, where=where, of=of) -> None:
            if against in of:
                found.append(Goal(*where, against, wanted, of[against] / ours))

        if of.get("snntorch", 0) >= LAUNCH_BOUND * of.get("snntorch-cudagraph", float("inf")):
            goal("snntorch", 5, by_call)
            goal("snntorch-cudagraph", 2, best)
        else:
            goal(COMPILED_GRAPH, 1.5, best)
        others = {name: time for name, time in of.items() if not name.startswith("snnlstm")}
        if others:
            goal(min(others, key=others.__getitem__), 1, best)
    return found


def verdict(rows: Iterable[Row]) -> str:
    """How many goals were met, and each; empty where none can be told."""
    found = goals(rows)
    if not found:
        return ""
    met = sum(goal.met for goal in found)
    return "\n".join([f"{met} of {len(found)} goals for GPUs met:", *map(str, found)])
