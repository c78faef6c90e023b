"""Says which rows changed between two runs, and which differ by noise.

    python -m benchmarks.compare A [B]

A and B are files of rows, their directories, or texts with the block that `make gpu` prints. With A
alone the rows are shown. `python -m benchmarks --compare A B` does the same as the first form.

A row counts as changed only if the bands between the 20th and the 80th percentile of both runs do
not touch, and the medians lie more than SMALLEST_CHANGE apart. Other differences are called noise.
A row with too few rounds for percentiles gets no verdict.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.providers import BASELINE
from benchmarks.report import format_table, number, ratio
from benchmarks.rows import Row, read_rows

SMALLEST_CHANGE = 0.03
"""Clocks and the placement of pages make medians of equal programs differ by up to this share."""

FEWEST_ROUNDS = 5


@dataclass(frozen=True)
class Change:
    """A change has a row of both runs, the relative change of its median, and the wider band.

    A negative change is faster. spread: the width of the wider band, relative to its median.
    """

    before: Row
    after: Row
    change: float
    spread: float
    verdict: str


def compare_rows(before: list[Row], after: list[Row]) -> list[Change]:
    """Compares the rows that are timed in both runs, in the order of the second run."""
    earlier = {row.key: row for row in before if row.p50_ms is not None}
    return [_compare(earlier[row.key], row) for row in after if row.p50_ms and row.key in earlier]


def _compare(before: Row, after: Row) -> Change:
    bands = [(row.p20_ms, row.p50_ms, row.p80_ms) for row in (before, after)]
    (low, median, high), (new_low, new_median, new_high) = bands
    change = new_median / median - 1
    spread = max((high - low) / median, (new_high - new_low) / new_median)
    verdict = "noise"
    if min(before.rounds, after.rounds) < FEWEST_ROUNDS:
        verdict = "too few rounds"
    elif abs(change) > SMALLEST_CHANGE and new_high < low:
        verdict = "faster"
    elif abs(change) > SMALLEST_CHANGE and new_low > high:
        verdict = "slower"
    return Change(before, after, change, spread, verdict)


def report(before: list[Row], after: list[Row]) -> str:
    """Returns the comparison as text: the origins of both runs, a table and a summary."""
    changes = compare_rows(before, after)
    if not changes:
        return "The two runs have no timed row in common."
    lines = [*_provenance(before[0], after[0]), ""]
    cells = []
    for change in changes:
        one, other = change.before, change.after
        memory = other.live_mib / one.live_mib - 1 if one.live_mib and other.live_mib else None
        cells.append(
            [
                *(other.case, other.mode, other.provider),
                *(f"{row.p50_ms:.4g}" for row in (one, other)),
                f"{change.change:+.1%}",
                f"±{change.spread / 2:.1%}",
                *("" if row.speedup is None else f"{row.speedup:.2f}x" for row in (one, other)),
                "" if memory is None else f"{memory:+.0%}",
                change.verdict,
            ]
        )
    header = ["case", "mode", "provider", "A ms", "B ms", "change", "spread", "A x", "B x"]
    lines.append(format_table([*header, "memory", "verdict"], cells, left=3))
    drift = [change.change for change in changes if change.after.provider == BASELINE]
    if drift:
        lines.append(
            f"\nThe baseline itself ({BASELINE}, the same code in both runs) changed by "
            f"{statistics.median(drift):+.1%} in the median: take that off before believing a row; "
            "A x and B x (speed-up over it) have it taken off."
        )
    verdicts = [change.verdict for change in changes]
    kinds = ("faster", "slower", "noise", "too few rounds")
    counts = ", ".join(f"{verdicts.count(kind)} {kind}" for kind in kinds)
    lines.append(f"ms: median per time step. {counts}")
    only = len(before) + len(after) - 2 * len(changes)
    if only:
        lines.append(f"{only} rows are in one run only, or were not timed.")
    return "\n".join(lines)


def _provenance(before: Row, after: Row) -> list[str]:
    lines = [
        f"{label}: snnlstm {row.version} at {row.commit}, {row.date}, {row.device}, "
        f"{row.threads} threads, torch {row.torch}"
        for label, row in (("A", before), ("B", after))
    ]
    for field in ("device", "threads", "torch", "snntorch", "python"):
        one, other = getattr(before, field), getattr(after, field)
        if one != other:
            lines.append(f"Not the same {field}: {one} and {other}. Changes may come from that.")
    return lines


def show(rows: list[Row]) -> str:
    """Returns one run as text: the origin and a table of all timed rows."""
    timed = [row for row in rows if row.p50_ms is not None]
    if not timed:
        return "The run has no timed row."
    row = timed[0]
    origin = f"snnlstm {row.version} at {row.commit}, {row.date}, {row.device}, torch {row.torch}"
    header = ["case", "mode", "dtype", "provider", "ms", "speed-up", "rounds", "path"]
    cells = [
        [
            *(row.case, row.mode, row.dtype, row.provider, number(row.p50_ms)),
            *(ratio(row.speedup), str(row.rounds), row.path.split(" ")[0]),
        ]
        for row in timed
    ]
    return f"{origin}\n\n{format_table(header, cells, left=4)}\nms: median per time step"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="one or two runs")
    options = parser.parse_args(arguments)
    if len(options.runs) > 2:
        parser.error(f"expected one or two runs, got {len(options.runs)}")
    try:
        runs = [read_rows(path) for path in options.runs]
    except ValueError as error:
        parser.error(str(error))
    print(report(*runs) if len(runs) == 2 else show(runs[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
