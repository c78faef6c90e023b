"""`--compare A B`: what changed between two runs, and what is noise.

A median alone says nothing of how sure it is. A row counts as changed only if the bands between
the 20th and the 80th percentile of both runs do not touch, and the medians lie more than a few
per cent apart; everything else is called noise. Where a run has too few rounds for percentiles,
nothing is claimed.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from benchmarks.providers import BASELINE
from benchmarks.report import format_table
from benchmarks.rows import Row

SMALLEST_CHANGE = 0.03
"""Below this, two medians are not told apart: clocks and page placement differ by that much."""

FEWEST_ROUNDS = 5


@dataclass(frozen=True)
class Change:
    """One row in both runs. change: relative, negative is faster. spread: of both, relative."""

    before: Row
    after: Row
    change: float
    spread: float
    verdict: str


def compare_rows(before: list[Row], after: list[Row]) -> list[Change]:
    """Changes of the rows that are timed in both runs, in the order of the second."""
    earlier = {row.key: row for row in before if row.p50_ms is not None}
    pairs = [(earlier[row.key], row) for row in after if row.p50_ms and row.key in earlier]
    return [_compare(*pair) for pair in pairs]


def _compare(before: Row, after: Row) -> Change:
    (low, median, high), (new_low, new_median, new_high) = _band(before), _band(after)
    change = new_median / median - 1
    spread = max((high - low) / median, (new_high - new_low) / new_median)
    if min(before.rounds, after.rounds) < FEWEST_ROUNDS:
        verdict = "too few rounds"
    elif abs(change) <= SMALLEST_CHANGE:
        verdict = "noise"
    elif new_high < low:
        verdict = "faster"
    elif new_low > high:
        verdict = "slower"
    else:
        verdict = "noise"
    return Change(before, after, change, spread, verdict)


def _band(row: Row) -> tuple[float, float, float]:
    if row.p20_ms is None or row.p50_ms is None or row.p80_ms is None:
        raise ValueError(f"the row {row.key} holds no times")
    return row.p20_ms, row.p50_ms, row.p80_ms


def report(before: list[Row], after: list[Row]) -> str:
    """The comparison as text: what differs between the runs themselves, a table, a summary."""
    changes = compare_rows(before, after)
    if not changes:
        return "The two runs have no timed row in common."
    lines = [*_provenance(before, after), ""]
    cells = [
        [
            change.after.case,
            change.after.mode,
            change.after.provider,
            f"{change.before.p50_ms:.4g}",
            f"{change.after.p50_ms:.4g}",
            f"{change.change:+.1%}",
            f"±{change.spread / 2:.1%}",
            _ratio(change.before.speedup),
            _ratio(change.after.speedup),
            _memory(change),
            change.verdict,
        ]
        for change in changes
    ]
    header = ["case", "mode", "provider", "A ms", "B ms", "change", "spread", "A x", "B x"]
    lines.append(format_table([*header, "memory", "verdict"], cells, left=3))
    drift = [change.change for change in changes if change.after.provider == BASELINE]
    if drift:
        lines.append(
            f"\nThe baseline itself ({BASELINE}, the same code in both runs) changed by "
            f"{statistics.median(drift):+.1%} in the median: take that off before believing a row; "
            "A x and B x (speed-up over it) have it taken off."
        )
    counts = dict.fromkeys(("faster", "slower", "noise", "too few rounds"), 0)
    for change in changes:
        counts[change.verdict] += 1
    lines.append(
        "ms: median per time step. " + ", ".join(f"{n} {verdict}" for verdict, n in counts.items())
    )
    only = len(before) + len(after) - 2 * len(changes)
    if only:
        lines.append(f"{only} rows are in one run only, or were not timed.")
    return "\n".join(lines)


def _ratio(speedup: float | None) -> str:
    return "" if speedup is None else f"{speedup:.2f}x"


def _memory(change: Change) -> str:
    before, after = change.before.live_mib, change.after.live_mib
    return "" if not before or after is None else f"{after / before - 1:+.0%}"


def _provenance(before: list[Row], after: list[Row]) -> list[str]:
    lines = []
    for label, row in (("A", before[0]), ("B", after[0])):
        lines.append(
            f"{label}: snnlstm {row.version} at {row.commit}, {row.date}, {row.device}, "
            f"{row.threads} threads, torch {row.torch}"
        )
    for field in ("device", "threads", "torch", "snntorch", "python"):
        one, other = getattr(before[0], field), getattr(after[0], field)
        if one != other:
            lines.append(f"Not the same {field}: {one} and {other}. Changes may come from that.")
    return lines
