"""Measures linear layers and convolutions that use the zeros of x beside torch's.

    python -m benchmarks.products [--channels-last] [SHARE ...]

Prints the time of our layer over that of torch's, forward / training, for an x with these shares of
nonzeros (default: 0.12, 0.5 and 1). Above some 40 % torch's function runs forward passes in both.
The numbers are medians of the ratios of neighbouring measurements, in processor time. Each call of
training has a new weight, as behind an optimizer's step. `--channels-last` is for convolutions.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import snnlstm

LINEAR = (64, 64), (128, 128), (512, 512), (784, 1000)  # inputs and outputs
ROWS = 32, 128, 3200
# Images, channels of x and y, side, kernel, stride: ten steps of networks, and single ones.
CONVOLUTIONS = (
    (80, 32, 32, 64, 3, 1), (80, 64, 64, 32, 3, 1), (320, 12, 64, 12, 5, 1), (8, 64, 64, 32, 3, 1),
    (160, 32, 64, 16, 3, 1), (40, 128, 128, 16, 3, 1), (80, 64, 128, 32, 3, 1),
    (80, 64, 64, 15, 7, 1), (10, 64, 64, 32, 3, 1), (320, 16, 32, 14, 3, 1),
    (80, 32, 64, 32, 3, 2), (160, 2, 16, 32, 3, 1), (20, 512, 512, 4, 3, 1),
)  # fmt: skip
SHORTEST, SECONDS = 2e-3, 1.2  # of a measurement, and of a ratio


def forward(layer: nn.Module, x: Tensor, _: Tensor) -> None:
    """Runs a layer without gradients."""
    with torch.no_grad():
        layer(x)


def training(layer: nn.Module, x: Tensor, grad: Tensor) -> None:
    """Runs a layer with a new weight, and its backward pass."""
    layer.weight.data[0].neg_()
    layer.weight.grad = layer.bias.grad = x.grad = None
    layer(x).backward(grad)


def cases() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Returns torch's layers with the shapes of x, by the titles of rows."""
    linear = {
        f"{one}x{other}, {rows} rows": (nn.Linear(one, other), (rows, one))
        for (one, other), rows in itertools.product(LINEAR, ROWS)
    }
    return linear | {
        f"{n}, {one}->{other} {side}x{side}, {kernel}x{kernel}, stride {stride}": (
            nn.Conv2d(one, other, kernel, stride, kernel // 2),
            (n, one, side, side),
        )
        for n, one, other, side, kernel, stride in CONVOLUTIONS
    }


def _seconds(run: Callable[..., None], calls: int, *arguments: object) -> float:
    begin = time.process_time()
    for _ in range(calls):
        run(*arguments)
    return time.process_time() - begin


def ratio(run: Callable[..., None], theirs: nn.Module, x: Tensor) -> float:
    """Returns the time of our layer over that of torch's."""
    net = nn.ModuleList([copy.deepcopy(theirs), snnlstm.Leaky(0.9)])
    snnlstm.accelerate(net)
    ours = net[0]
    ours.weight, ours.bias = theirs.weight, theirs.bias
    grad = torch.randn_like(theirs(x))
    _seconds(run, 3, ours, x, grad)
    once = _seconds(run, 3, theirs, x, grad) / 3
    calls = max(1, round(SHORTEST / once))
    ratios = []
    for _ in range(max(5, round(SECONDS / (4 * calls * once)))):
        a, b, c, d = (_seconds(run, calls, one, x, grad) for one in (ours, theirs, theirs, ours))
        ratios += [a / b, d / c]
    return statistics.median(ratios)


def main(arguments: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shares", nargs="*", type=float, default=[0.12, 0.5, 1], metavar="SHARE")
    parser.add_argument("--channels-last", action="store_true")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"| layer | {' | '.join(f'{100 * share:.0f} %' for share in given.shares)} |")
    print(f"|---|{'---|' * len(given.shares)}")
    for title, (layer, shape) in cases().items():
        found = []
        for share in given.shares:
            x = torch.rand(shape).lt(share).float()
            if given.channels_last and x.dim() == 4:
                x = x.contiguous(memory_format=torch.channels_last)
                layer = layer.to(memory_format=torch.channels_last)
            x.requires_grad_()
            found.append(" / ".join(f"{ratio(run, layer, x):.3f}" for run in (forward, training)))
        print(f"| {title} | {' | '.join(found)} |", flush=True)


if __name__ == "__main__":
    main()
