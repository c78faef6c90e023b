"""Trains with either library's cell, and shows both in a table and in a plot."""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import machine
from benchmarks.demo import training
from benchmarks.demo.digits import Motion
from benchmarks.plots import STYLE, pyplot
from benchmarks.report import format_table

WINDOW = 30
"""A point of the smooth loss curve is the mean of this many batches."""

TITLES = {"snntorch": "snnTorch", "snnlstm": "snnlstm"}
COLOURS = {"snntorch": "#E69F00", "snnlstm": STYLE["snnlstm"][0]}


@dataclass
class Result:
    """Holds the losses of a trained network, and its process's first and last message."""

    network: str
    losses: list[float] = field(default_factory=list)
    start: dict[str, Any] = field(default_factory=dict)
    end: dict[str, Any] = field(default_factory=dict)


def train(network: str, args: argparse.Namespace) -> Result:
    """Trains in a fresh process and shows the progress; raises RuntimeError if that fails."""
    result, title = Result(network), f"{TITLES[network]:<8}"
    spawn = multiprocessing.get_context("spawn")
    receive, send = spawn.Pipe(duplex=False)
    asked = argparse.Namespace(**vars(args), network=network)
    process = spawn.Process(target=training.tell, args=(send, asked), daemon=True)
    process.start()
    send.close()  # so that recv raises EOFError when the training's process has ended
    # With disable=None there is no bar without a terminal; a line is printed per epoch instead.
    with (
        tqdm(desc=title, unit="batch", disable=None, dynamic_ncols=True) as bar,
        contextlib.suppress(EOFError),
    ):
        while True:
            event = receive.recv()
            kind = event["event"]
            if kind == "start":
                result.start = event
                bar.reset(event["steps"])
            elif kind == "batch":
                result.losses.append(event["loss"])
                of = f"epoch {event['epoch'] + 1}/{result.start['epochs']}"
                recent = statistics.fmean(result.losses[-WINDOW:])
                bar.set_postfix_str(f"{of}, loss {recent:.3f}", refresh=False)
                bar.update()
            elif kind == "epoch" and bar.disable:
                said = f"loss {event['loss']:.3f}  {event['seconds']:.1f} s"
                print(f"{title}  {of}  {said}", flush=True)
            elif kind == "end":
                result.end = event
    process.join()
    if process.exitcode or not result.end:
        raise RuntimeError(f"training {network} failed, see above")
    return result


def smooth(losses: list[float], window: int = WINDOW) -> list[float]:
    """Returns the running mean over up to `window` values; it is as long as `losses`."""
    ends = range(1, len(losses) + 1)
    return [statistics.fmean(losses[max(0, end - window) : end]) for end in ends]


def differences(one: list[float], other: list[float]) -> list[float]:
    """Returns the distances between two curves of equal length, point by point."""
    return [abs(a - b) for a, b in zip(one, other, strict=True)]


def same_start(one: Result, other: Result) -> list[str]:
    """Returns a text for each of weights and order that is not equal for both trainings."""
    wrong = {
        "the initial weights differ": one.start["weights"] != other.start["weights"],
        "the digits came in another order": one.end["order"] != other.end["order"],
    }
    return [text for text, true in wrong.items() if true]


def table(reference: Result, ours: Result) -> str:
    """Returns accuracy, time and memory side by side, and the distance of the loss curves."""

    def line(title: str, key: str, form: str, compare: bool = False) -> list[str]:
        one, other = reference.end[key], ours.end[key]
        ratio = f"{one / other:.2f}x" if compare and other else ""
        return [title, form.format(one), form.format(other), ratio]

    last = [f"{smooth(result.losses)[-1]:.3f}" for result in (reference, ours)]
    lines = [
        line("test accuracy", "accuracy", "{:.1%}"),
        ["training loss at the end", *last, ""],
        line("seconds of training", "seconds", "{:.1f}", compare=True),
        line("ms per batch, median", "batch_ms", "{:.1f}", compare=True),
        line("peak memory, MiB", "peak_mib", "{:.0f}"),
        line("  of it for training", "training_mib", "{:.0f}", compare=True),
    ]
    apart = differences(smooth(reference.losses), smooth(ours.losses))
    single = differences(reference.losses, ours.losses)
    text = [
        format_table(["", *TITLES.values(), "ratio"], lines),
        f"\nLoss curves (means of {WINDOW} batches) are at most {max(apart):.3f} apart; single "
        f"batches {statistics.median(single):.4f} in the median and {max(single):.3f} at most.",
    ]
    if wrong := same_start(reference, ours):
        text.append(f"NOT COMPARABLE: {'; '.join(wrong)}.")
    else:
        text.append(
            f"Both started from the same {reference.start['parameters']} weights (SHA-256 "
            f"{reference.start['weights'][:12]}...) and saw the same digits in the same order."
        )
    return "\n".join([*text, ours.end["path"]])


def plot(reference: Result, ours: Result, path: Path, caption: str) -> None:
    """Draws both loss curves in one panel, and accuracy, time and memory as bars beside it."""
    plt = pyplot()
    figure, (curves, *panels) = plt.subplots(
        1, 4, figsize=(12, 4.2), width_ratios=(5, 1.2, 1.2, 1.2), layout="constrained"
    )
    for result, width in ((reference, 5), (ours, 1.4)):
        colour = COLOURS[result.network]
        batches = range(1, len(result.losses) + 1)
        curves.plot(batches, result.losses, color=colour, alpha=0.18, linewidth=0.8)
        label = f"{TITLES[result.network]} (mean of {WINDOW} batches)"
        curves.plot(batches, smooth(result.losses), color=colour, label=label, linewidth=width)
    apart = max(differences(smooth(reference.losses), smooth(ours.losses)))
    curves.set_title(f"Training loss; the curves are at most {apart:.3f} apart", fontsize=10)
    curves.set_xlabel("batch")
    curves.set_ylabel("cross-entropy")
    curves.set_ylim(bottom=0)
    curves.legend(fontsize=9)
    bars = (
        ("accuracy", "test accuracy", "{:.1%}"),
        ("seconds", "training time", "{:.0f} s"),
        ("training_mib", "memory for training", "{:.0f} MiB"),
    )
    for panel, (key, title, form) in zip(panels, bars, strict=True):
        values = [result.end[key] for result in (reference, ours)]
        drawn = panel.bar(list(TITLES.values()), values, color=list(COLOURS.values()))
        panel.bar_label(drawn, [form.format(value) for value in values], fontsize=8, padding=2)
        panel.set_title(title, fontsize=10)
        panel.set_yticks([])
        panel.spines["left"].set_visible(False)
        panel.tick_params(axis="x", labelsize=9, length=0)
    figure.suptitle(caption, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns 1 if a training failed or is not comparable, else 0."""
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
    name, workers = machine.device_name(args.device), f"{args.threads} threads"
    print(
        f"Digits of {Motion.digit}x{Motion.digit} pixels move over {Motion.canvas}x{Motion.canvas} "
        f"pixels and are seen as ON and OFF events, {Motion.steps} frames each.\n"
        f"A two-layer spiking ConvLSTM learns to read them on {name}, {workers}."
    )
    if args.device == "cpu" and torch.cuda.is_available():
        print("There is a GPU here: --device cuda runs the demo on it.")
    print(flush=True)
    begin = time.perf_counter()
    try:
        reference, ours = (train(network, args) for network in TITLES)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    picture, data = args.out / "demo.png", args.out / "demo.json"
    caption = (
        f"Two-layer spiking ConvLSTM on moving digits, {ours.start['epochs']} epochs, seed "
        f"{args.seed}; {name}, {workers}, torch {torch.__version__}"
    )
    plot(reference, ours, picture, caption)
    found = {result.network: vars(result) for result in (reference, ours)}
    data.write_text(json.dumps({"caption": caption, **found}, indent=1) + "\n")
    print(f"\n{table(reference, ours)}")
    print(f"\nwrote {picture} and {data}; took {time.perf_counter() - begin:.0f} s")
    return 1 if same_start(reference, ours) else 0
