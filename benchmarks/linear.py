"""Measures linear layers that use the zeros of x beside torch's.

    python -m benchmarks.linear [SHARE ...]

Prints the time of our layer over that of torch's, forward / training, for an x with these shares of
nonzeros (default: 0.5 and 1, with which torch's function runs in both). The numbers are medians of
the ratios of neighbouring measurements, in processor time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import snnlstm

SIZES = (64, 64), (128, 128), (512, 512), (784, 1000)  # inputs and outputs
ROWS = 32, 128, 3200
SHORTEST, SECONDS = 2e-3, 1.2  # of a measurement, and of a ratio


def forward(layer: nn.Linear, x: Tensor, _: Tensor) -> None:
    """Runs a layer without gradients."""
    with torch.no_grad():
        layer(x)


def training(layer: nn.Linear, x: Tensor, grad: Tensor) -> None:
    """Runs a layer and its backward pass."""
    layer.weight.grad = layer.bias.grad = x.grad = None
    layer(x).backward(grad)


def _seconds(run: Callable[..., None], calls: int, *arguments: object) -> float:
    begin = time.process_time()
    for _ in range(calls):
        run(*arguments)
    return time.process_time() - begin


def ratio(run: Callable[..., None], rows: int, inputs: int, outputs: int, share: float) -> float:
    """Returns the time of our layer over that of torch's."""
    torch.manual_seed(0)
    x = torch.rand(rows, inputs).lt(share).float().requires_grad_()
    grad = torch.randn(rows, outputs)
    net = nn.ModuleList([nn.Linear(inputs, outputs), snnlstm.Leaky(0.9)])
    snnlstm.accelerate(net)
    ours, theirs = net[0], nn.Linear(inputs, outputs)
    theirs.weight, theirs.bias = ours.weight, ours.bias
    _seconds(run, 10, ours, x, grad)
    once = _seconds(run, 10, theirs, x, grad) / 10
    calls = max(1, round(SHORTEST / once))
    ratios = []
    for _ in range(max(5, round(SECONDS / (4 * calls * once)))):
        a, b, c, d = (_seconds(run, calls, one, x, grad) for one in (ours, theirs, theirs, ours))
        ratios += [a / b, d / c]
    return statistics.median(ratios)


def main(arguments: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shares", nargs="*", type=float, default=[0.5, 1.0], metavar="SHARE")
    shares = parser.parse_args(arguments).shares
    torch.set_num_threads(1)
    print(f"| layer | rows | {' | '.join(f'{100 * share:.0f} %' for share in shares)} |")
    print(f"|---|---|{'---|' * len(shares)}")
    for inputs, outputs in SIZES:
        for rows in ROWS:
            found = [
                " / ".join(
                    f"{ratio(run, rows, inputs, outputs, share):.3f}" for run in (forward, training)
                )
                for share in shares
            ]
            print(f"| {inputs}x{outputs} | {rows} | {' | '.join(found)} |", flush=True)


if __name__ == "__main__":
    main()
