"""Draws the speed-ups of releases, whose rows are committed to benchmarks/results/history.csv."""

from __future__ import annotations

import csv
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = Path(__file__).parent / "results" / "history.csv"
COLUMNS = {
    "version": "version", "device": "processor", "case": "network", "mode": "mode",
    "provider": "form", "speedup": "ratio",
}  # fmt: skip
"""The columns of a run's rows, and of the history."""


def read() -> list[dict[str, str]]:
    """Reads the rows; raises ValueError that names a row with a missing or a wrong field."""
    with FILE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows, 2):
        if list(row) != list(COLUMNS.values()) or not all(row.values()) or float(row["ratio"]) <= 0:
            raise ValueError(f"{FILE.name}:{number}: expected {', '.join(COLUMNS.values())}: {row}")
    return rows


def draw() -> Figure:
    """Draws each network's speed-ups, with a colour for each version and processor."""
    from matplotlib.figure import Figure

    rows = read()
    networks = list(dict.fromkeys(row["network"] for row in rows))
    runs = list(dict.fromkeys((row["version"], row["processor"]) for row in rows))
    figure = Figure(figsize=(3.7, 1.8 + 0.44 * len(networks)), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    for panel, mode in zip(panels, ("inference", "training"), strict=True):
        for (number, run), form in product(enumerate(runs), ("loop", "sequence")):
            asked = (*run, mode, form)
            points = [
                (float(row["ratio"]), networks.index(row["network"]))
                for row in rows
                if (row["version"], row["processor"], row["mode"], row["form"]) == asked
            ]
            style, label = ("full", ", ".join(run)) if form == "sequence" else ("none", None)
            panel.plot(
                *zip(*points, strict=True), "o", color=f"C{number}", fillstyle=style, label=label
            )
        panel.axvline(1, color="#808890", linewidth=1)
        panel.set(title=mode, yticks=range(len(networks)), yticklabels=networks)
        panel.xaxis.set(major_formatter="{x:g}x")
        panel.invert_yaxis()
    panels[1].set_xlabel("speed-up: ○ loop, ● sequence")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center")
    return figure
