"""Trains with either library's cell, and shows both in a table, and in plots over time."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks import machine
from benchmarks.demo import training
from benchmarks.demo.seeds import WINDOW
from benchmarks.demo.training import CANVAS, DIGIT, STEPS
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


def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.demo",
        description="Train a two-layer spiking ConvLSTM to read handwritten digits that move "
        "before an event camera: once with snnTorch's cell and once with ours, from the same "
        "weights, on the same digits in the same order, with the same number of threads.",
    )
    training.add_common(p)
    out = "directory for demo.png and demo.json (default: %(default)s)"
    p.add_argument("--out", type=Path, default=Path("out") / "demo", metavar="DIR", help=out)
    args = training.parse(p, arguments)
    name = f"{machine.device_name(args.device)}, threads: {args.threads}"
    print(
        f"Digits of {DIGIT}x{DIGIT} pixels move over {CANVAS}x{CANVAS} "
        f"pixels and are seen as ON and OFF events, {STEPS} frames each.\n"
        f"A two-layer spiking ConvLSTM learns to read them on {name}.\n",
        flush=True,
    )
    if not args.quick:
        print(
            "Both trainings together take one to two minutes on an idle core. "
            "make demo ARGS=--quick takes half of that, and learns less.\n",
            flush=True,
        )
    if args.device == "cpu" and torch.cuda.is_available():
        print("There is a GPU here: --device cuda runs the demo on it.", flush=True)
    reference, ours = (
        training.run(argparse.Namespace(**vars(args), network=network)) for network in LIBRARIES
    )
    args.out.mkdir(parents=True, exist_ok=True)
    epochs = f"{ours['epochs']} epochs, seed {args.seed}"
    caption = f"Two-layer spiking ConvLSTM, {epochs}; {name}, torch {torch.__version__}"
    plot(reference, ours, args.out / "demo.png", caption)
    results = {"caption": caption, "snntorch": reference, "snnlstm": ours}
    (args.out / "demo.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{table(reference, ours)}\n\nwrote demo.png and demo.json to {args.out}")


if __name__ == "__main__":
    main()
