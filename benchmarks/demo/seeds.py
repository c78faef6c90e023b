"""Trains the demo's network from several seeds with either library's cell, for docs/numerics.md.

    python -m benchmarks.demo.seeds --seeds 5

Each training adds a row to benchmarks/results/accuracy.csv: the test accuracy, and the training
loss as means of WINDOW batches. A training that has a row is not repeated.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.demo import training

ROWS = Path(__file__).resolve().parents[1] / "results" / "accuracy.csv"
LIBRARIES = ("snntorch", "snnlstm")
WINDOW = 30
"""A point of a smooth loss curve is the mean of this many batches."""


def trained(library: str, seed: int) -> dict[str, Any]:
    """Trains by the demo's own settings on one thread, and returns a row."""
    p = argparse.ArgumentParser()
    training.add_common(p)
    args = p.parse_args(["--seed", str(seed)])
    result = training.run(argparse.Namespace(**vars(args), network=library))
    means = pd.Series(result["losses"]).groupby(lambda batch: WINDOW * (batch // WINDOW + 1)).mean()
    row = {"library": library, "seed": seed, "epochs": args.epochs, "accuracy": result["accuracy"]}
    return row | means.round(4).to_dict()


def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.demo.seeds", description=__doc__)
    p.add_argument("--seeds", type=training.positive, default=5, help="default: %(default)s")
    p.add_argument("--rows", type=Path, default=ROWS, metavar="FILE", help="default: %(default)s")
    args = p.parse_args(arguments)
    for seed, library in itertools.product(range(args.seeds), LIBRARIES):
        rows = pd.read_csv(args.rows) if args.rows.exists() else pd.DataFrame()
        if len(rows) and ((rows.library == library) & (rows.seed == seed)).any():
            continue
        row = trained(library, seed)
        # The first row's columns are the header, since all rows have the same.
        pd.DataFrame([row]).to_csv(args.rows, mode="a", header=not len(rows), index=False)
    print(pd.read_csv(args.rows).groupby("library").accuracy.describe())


if __name__ == "__main__":
    main()
