"""What the demo shows at the end: a table and a plot."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.plots import STYLE, pyplot
from benchmarks.tables import format_table

WINDOW = 30
"""Batches that a point of the smooth loss curve is the mean of."""

TITLES = {"snntorch": "snnTorch", "snnlstm": "snnlstm"}


@dataclass
class Result:
    """One trained network: its losses, batch by batch, and what its process said at the end."""

    network: str
    losses: list[float] = field(default_factory=list)
    start: dict[str, Any] = field(default_factory=dict)
    end: dict[str, Any] = field(default_factory=dict)


def smooth(losses: list[float], window: int = WINDOW) -> list[float]:
    """Running mean over up to `window` values, as long as `losses`."""
    total, means = 0.0, []
    for index, value in enumerate(losses):
        total += value - (losses[index - window] if index >= window else 0.0)
        means.append(total / min(index + 1, window))
    return means


def largest_difference(one: list[float], other: list[float]) -> float:
    """Largest distance between two curves of the same length."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def same_start(one: Result, other: Result) -> list[str]:
    """What was not the same for both, though it has to be; empty where all is well."""
    wrong = []
    if one.start["weights"] != other.start["weights"]:
        wrong.append("the initial weights differ")
    if one.end["order"] != other.end["order"]:
        wrong.append("the digits came in another order")
    return wrong


def table(reference: Result, ours: Result) -> str:
    """Accuracy, time and memory side by side, and how far the curves are apart."""

    def ratio(key: str) -> str:
        return f"{reference.end[key] / ours.end[key]:.2f}x" if ours.end[key] else ""

    def line(title: str, key: str, form: str, compare: bool = False) -> list[str]:
        values = [form.format(result.end[key]) for result in (reference, ours)]
        return [title, *values, ratio(key) if compare else ""]

    last = [f"{smooth(result.losses)[-1]:.3f}" for result in (reference, ours)]
    lines = [
        line("test accuracy", "accuracy", "{:.1%}"),
        ["training loss at the end", *last, ""],
        line("seconds of training", "seconds", "{:.1f}", compare=True),
        line("ms per batch, median", "batch_ms", "{:.1f}", compare=True),
        line("peak memory, MiB", "peak_mib", "{:.0f}"),
        line("  of it for training", "training_mib", "{:.0f}", compare=True),
    ]
    text = [format_table(["", TITLES["snntorch"], TITLES["snnlstm"], "ratio"], lines)]
    apart = largest_difference(smooth(reference.losses), smooth(ours.losses))
    single = largest_difference(reference.losses, ours.losses)
    middle = statistics.median(
        abs(a - b) for a, b in zip(reference.losses, ours.losses, strict=True)
    )
    text.append(
        f"\nLoss curves (means of {WINDOW} batches) are at most {apart:.3f} apart; single batches "
        f"{middle:.4f} in the median and {single:.3f} at most."
    )
    wrong = same_start(reference, ours)
    if wrong:
        text.append(f"NOT COMPARABLE: {'; '.join(wrong)}.")
    else:
        weights = reference.start["weights"][:12]
        text.append(
            f"Both started from the same {reference.start['parameters']} weights (SHA-256 "
            f"{weights}...) and saw the same digits in the same order."
        )
    text.append(f"{ours.end['path']}")
    return "\n".join(text)


def plot(reference: Result, ours: Result, path: Path, caption: str) -> None:
    """Both loss curves in one panel; accuracy, time and memory as bars beside it."""
    plt = pyplot()
    figure, panels = plt.subplots(
        1, 4, figsize=(12, 4.2), width_ratios=(5, 1.2, 1.2, 1.2), layout="constrained"
    )
    curves = panels[0]
    colours = {"snntorch": "#E69F00", "snnlstm": STYLE["snnlstm"][0]}
    for result, style in ((reference, {"linewidth": 5}), (ours, {"linewidth": 1.4})):
        colour = colours[result.network]
        batches = range(1, len(result.losses) + 1)
        curves.plot(batches, result.losses, color=colour, alpha=0.18, linewidth=0.8)
        label = f"{TITLES[result.network]} (mean of {WINDOW} batches)"
        curves.plot(batches, smooth(result.losses), color=colour, label=label, **style)
    apart = largest_difference(smooth(reference.losses), smooth(ours.losses))
    curves.set_title(f"Training loss; the curves are at most {apart:.3f} apart", fontsize=10)
    curves.set_xlabel("batch")
    curves.set_ylabel("cross-entropy")
    curves.set_ylim(bottom=0)
    curves.legend(fontsize=9)
    bars = (
        ("accuracy", "test accuracy", 100, "{:.1f} %"),
        ("seconds", "training time", 1, "{:.0f} s"),
        ("training_mib", "memory for training", 1, "{:.0f} MiB"),
    )
    for panel, (key, title, factor, form) in itertools.zip_longest(panels[1:], bars):
        names = [TITLES[result.network] for result in (reference, ours)]
        values = [factor * result.end[key] for result in (reference, ours)]
        drawn = panel.bar(names, values, color=[colours[r.network] for r in (reference, ours)])
        panel.bar_label(drawn, [form.format(value) for value in values], fontsize=8, padding=2)
        panel.set_title(title, fontsize=10)
        panel.set_yticks([])
        panel.spines["left"].set_visible(False)
        panel.tick_params(axis="x", labelsize=9, length=0)
    figure.suptitle(caption, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
