"""Trains with either library's cell, and shows both in a table, and in plots over time."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from benchmarks import what_brings
from benchmarks.demo import training
from benchmarks.demo.training import CANVAS, DIGIT, STEPS


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
    try:
        from benchmarks import machine
        from benchmarks.demo import compare
    except ModuleNotFoundError as error:
        sys.exit(what_brings(f'{p.prog} needs {error.name}, which the extra "bench" brings'))
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
        training.run(argparse.Namespace(**vars(args), network=network))
        for network in compare.LIBRARIES
    )
    args.out.mkdir(parents=True, exist_ok=True)
    epochs = f"{ours['epochs']} epochs, seed {args.seed}"
    caption = f"Two-layer spiking ConvLSTM, {epochs}; {name}, torch {torch.__version__}"
    compare.plot(reference, ours, args.out / "demo.png", caption)
    results = {"caption": caption, "snntorch": reference, "snnlstm": ours}
    (args.out / "demo.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{compare.table(reference, ours)}\n\nwrote demo.png and demo.json to {args.out}")


if __name__ == "__main__":
    main()
