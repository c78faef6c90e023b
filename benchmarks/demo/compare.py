"""Shows a training with either library's cell side by side: a table, and plots over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.demo.seeds import WINDOW
from benchmarks.report import LIBRARIES, STYLE

LINES = {
    "accuracy": ("test accuracy", "{:.1%}"),
    "seconds": ("seconds of training,", "{:.1f}"),
    "batch_ms": ("ms per batch, median", "{:.1f}"),
}
Result = dict[str, Any]  # of training.run


def smooth(result: Result) -> pd.Series:
    """Returns the running mean of the losses over up to WINDOW batches."""
    return pd.Series(result["losses"]).rolling(WINDOW, min_periods=1).mean()


def furthest(reference: Result, ours: Result) -> float:
    """Returns the largest distance between the two smooth loss curves."""
    return float((smooth(reference) - smooth(ours)).abs().max())


def table(reference: Result, ours: Result) -> str:
    """Returns accuracy and time side by side, and the distance of the loss curves."""
    text = [f"{'':36}{'snnTorch':>10}{'snnlstm':>10}{'ratio':>8}"]
    for key, (title, form) in LINES.items():
        one, other = reference[key], ours[key]
        ratio = "" if key == "accuracy" else f"{one / other:.2f}x"
        title += f" {ours['clock']}" * (key == "seconds")
        text.append(f"{title:36}{form.format(one):>10}{form.format(other):>10}{ratio:>8}")
    apart = furthest(reference, ours)
    text += ["", f"Loss curves (means of {WINDOW} batches) are at most {apart:.3f} apart."]
    start = f"Both started from the same {ours['parameters']} weights and saw the same digits."
    return "\n".join([*text, start, "docs/numerics.md shows other seeds.", ours["path"]])


def plot(reference: Result, ours: Result, path: Path, caption: str) -> None:
    """Draws the test accuracy over seconds of training, and the loss over batches."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # which draws to files alone

    with rc_context(STYLE):
        figure = Figure(figsize=(9, 4), layout="constrained")
        times, curves = figure.subplots(1, 2)
        for result, width in ((reference, 4), (ours, 1.6)):
            name, losses = result["network"], pd.Series(result["losses"])
            colour = LIBRARIES[name]
            seconds, found = zip(*result["tests"], strict=True)
            label = f"{name}: {seconds[-1]:.0f} s"
            percent = [100 * share for share in found]
            times.plot(seconds, percent, color=colour, label=label, marker="o", markersize=4)
            batches = losses.index + 1
            curves.plot(batches, losses, color=colour, alpha=0.18, linewidth=0.8)
            label = f"{name} (mean of {WINDOW} batches)"
            curves.plot(batches, smooth(result), color=colour, label=label, linewidth=width)
        gain = reference["seconds"] / ours["seconds"]
        times.set_title(f"Accuracy over time: snnlstm trains {gain:.1f}x as fast", fontsize=10)
        x = f"seconds of training, {ours['clock']}"
        times.set(xlabel=x, ylabel="% of the test digits that are read correctly", ylim=(0, 100))
        apart = furthest(reference, ours)
        curves.set_title(f"Training loss: at most {apart:.3f} apart", fontsize=10)
        curves.set(xlabel="batch", ylabel="cross-entropy", ylim=0)
        for panel, corner in ((times, "lower right"), (curves, "upper right")):
            panel.legend(fontsize=9, framealpha=0, loc=corner)
        figure.suptitle(caption, fontsize=8)
        figure.savefig(path, dpi=150, transparent=True)
