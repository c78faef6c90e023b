"""What a batch of samples of different lengths costs: `python -m benchmarks.padded`.

The cost is that of the padded batch over that of a batch of full lengths. The share is the sum of
the lengths over N T, which the cost should come near to. Both run by turns, and medians count.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import snnlstm

STEPS, BATCH = 16, 16
LAYERS = {"1->8 28x28": (1, 8, 28), "2->16 16x16": (2, 16, 16), "16->32 32x32": (16, 32, 32)}


def seconds(run: Callable[[], object]) -> float:
    """Returns how long a run takes."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def main() -> None:
    """Prints a row for each layer, in inference and in training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    lengths = torch.arange(1, BATCH + 1)[torch.randperm(BATCH)] * STEPS // BATCH
    full = torch.full((BATCH,), STEPS)
    share = lengths.sum().item() / (BATCH * STEPS)
    print(f"{torch.get_num_threads()} threads, T={STEPS}, N={BATCH}, share {share:.3f}")
    for name, (cin, channels, side) in LAYERS.items():
        cell = snnlstm.SConv2dLSTM(cin, channels, 3, threshold=0.1)
        x = (torch.rand(STEPS, BATCH, cin, side, side) < 0.1).float()

        def train(of: torch.Tensor, cell: snnlstm.SConv2dLSTM = cell, x: torch.Tensor = x) -> None:
            cell.reset_mem()
            cell(x, lengths=of)[0].sum().backward()

        for mode, run in ("inference", torch.no_grad()(train_less(cell, x))), ("training", train):
            run(full), run(lengths)
            pairs = [(seconds(lambda: run(lengths)), seconds(lambda: run(full)))  # noqa: B023
                     for _ in range(rounds)]  # fmt: skip
            padded, whole = map(statistics.median, zip(*pairs, strict=True))
            print(f"{name:14} {mode:10} {whole * 1e3:8.2f} ms full, cost {padded / whole:.3f}, "
                  f"over the share {padded / whole / share:.3f}")  # fmt: skip


def train_less(cell: snnlstm.SConv2dLSTM, x: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """Returns a call of the cell alone."""

    def run(of: torch.Tensor) -> None:
        cell.reset_mem()
        cell(x, lengths=of)

    return run


if __name__ == "__main__":
    main()
