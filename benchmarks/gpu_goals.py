"""Says which of the project's goals on a GPU a run has met."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.rows import Row

LAUNCH_BOUND = 1.5
"""Launches bind a layer if a CUDA graph makes snnTorch's loop at least this many times as fast."""


class Goal(NamedTuple):
    """A goal is that our time in one case is `wanted` times shorter than that of `against`."""

    where: str
    against: str
    wanted: float
    found: float

    @property
    def met(self) -> bool:
        return self.found >= self.wanted

    def __str__(self) -> str:
        verdict = "met" if self.met else "missed"
        return f"{self.where}: {self.found:.2f}x {self.against}, goal {self.wanted:g}x: {verdict}"


def goals(rows: Iterable[Row]) -> list[Goal]:
    """Returns the goals of all measured cases, in inference and in training."""
    times: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.p50_ms and row.mode != "backward":
            times.setdefault(f"{row.case} {row.mode} {row.dtype}", {})[row.provider] = row.p50_ms
    found = []
    for where, of in times.items():
        if "snnlstm" not in of:
            continue
        by_call = of["snnlstm"]
        best = min(by_call, of.get("snnlstm-cudagraph", by_call))
        if of.get("snntorch", 0) >= LAUNCH_BOUND * of.get("snntorch-cudagraph", float("inf")):
            wanted = [("snntorch", 5, by_call), ("snntorch-cudagraph", 2, best)]
        else:
            wanted = [("snntorch-compile-graph", 1.5, best)]
        others = {name: time for name, time in of.items() if not name.startswith("snnlstm")}
        if others:
            wanted.append((min(others, key=others.__getitem__), 1, best))
        found += [
            Goal(where, against, times_faster, of[against] / ours)
            for against, times_faster, ours in wanted
            if against in of
        ]
    return found


def verdict(rows: Iterable[Row]) -> str:
    """Returns how many goals were met and a line for each goal, or nothing without goals."""
    found = goals(rows)
    if not found:
        return ""
    met = sum(goal.met for goal in found)
    return "\n".join([f"{met} of {len(found)} goals for GPUs met:", *map(str, found)])
