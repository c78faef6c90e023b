"""Runs small cells through every kernel, forward and backward, and compares with float64.

    python -m benchmarks.gpu_smoke [--device cuda] [--algorithms NAME ...] [--few]

Each line is printed as it comes, and a deviation ends nothing: it sets the exit status. `make gpu`
runs each algorithm in a process of its own, because an error of a kernel ends all work of its
process on the GPU, and a few cells again under compute-sanitizer. The types are those that a GPU
has tensor cores for, besides float32 and float64.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import snnlstm
from benchmarks import devices
from benchmarks.providers import TOLERANCE
from snnlstm.reference import sconv2dlstm

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "max_pool, subtract": {"max_pool": 2, "reset_mechanism": "subtract"},
    "avg_pool, zero": {"avg_pool": 2, "reset_mechanism": "zero"},
    "stride, dilation": {"stride": 2, "dilation": 2},
    "inhibition": {"inhibition": True},
    "quantised": {"state_quant": snnlstm.quant.state_quant(6)},
    # A kernel of its own forms the spikes if a window is larger than a tile.
    "one window": {"avg_pool": "image"},
}
SIZES = (2, 3, 6, 21, 13, 18)
"""The sizes T, N, Cin, C, H, W are no multiples of a tile's. An even width has plain steps."""
EXACT = ("float64", "float32")
# Under compute-sanitizer, where the start alone takes half a minute.
FEW = ("plain", "max_pool, subtract")
ALGORITHMS = ("fused", "hybrid", "cudnn")
SMOOTH = ("plain", "stride, dilation", "one window")
"""No decision of these options depends on rounding; coarse precisions run these options alone."""
DECIDING = 0.02
"""This share of neurons may differ by more than the tolerance if a rounding error can change a
decision (a reset, a level)."""


def precisions(device: str) -> tuple[str, ...]:
    """Returns the types that a device computes in by itself."""
    if device == "cpu":
        return EXACT
    halves = ("float16",) if devices.capability(device) < 80 else ("tf32", "float16", "bfloat16")
    return (*EXACT, *halves)


def run(
    device: str,
    sizes: tuple[int, ...] = SIZES,
    algorithms: Sequence[str] = ALGORITHMS,
    names: Sequence[str] = tuple(OPTIONS),
) -> Iterator[tuple[str, bool]]:
    """Runs and compares every cell; yields a line for each, and whether it is right.

    It is not if the reference path ran, if an error was raised, or if the results differ.
    """
    for precision, algorithm in itertools.product(precisions(device), algorithms):
        for name in names if precision in EXACT else SMOOTH:
            options = {
                option: sizes[-2:] if value == "image" else value
                for option, value in OPTIONS[name].items()
            }
            what = f"{algorithm}, {precision}, {name}"
            try:
                cell, x = _layer(device, precision, options, sizes)
                with snnlstm.algorithm(algorithm):
                    spk, _, mem = cell(x)
                    of_mem, of_gradients = _apart(cell, x, spk, mem, options)
            except RuntimeError as error:
                yield f"{what}: {str(error).splitlines()[0]}", False
                continue
            allowed, path = TOLERANCE[precision], cell.path
            right = of_mem <= allowed[0] and of_gradients <= allowed[1]
            right = right and path.name.startswith(devices.backend(device))
            yield f"{what}: {path.name}, mem {of_mem:.1e}, gradients {of_gradients:.1e}", right


def _layer(
    device: str, precision: str, options: dict[str, Any], sizes: tuple[int, ...]
) -> tuple[snnlstm.SConv2dLSTM, Tensor]:
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    dtype = torch.float32 if precision == "tf32" else getattr(torch, precision)
    t, n, cin, c, h, w = sizes
    torch.manual_seed(0)
    cell = snnlstm.SConv2dLSTM(cin, c, (3, 5), threshold=0.05, **options)
    x = torch.rand(t, n, cin, h, w).gt(0.7)
    place = devices.torch_device(device)
    return cell.to(place, dtype), x.to(place, dtype).requires_grad_()


def _apart(
    cell: snnlstm.SConv2dLSTM, x: Tensor, spk: Tensor, mem: Tensor, options: dict[str, Any]
) -> tuple[float, float]:
    """Returns the distances of mem and of gradients from those of the reference path in float64."""
    inputs = [x, cell.conv.weight, cell.conv.bias]
    found = torch.autograd.grad(spk.double().sum() + mem.double().square().sum(), inputs)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    threshold = cell.threshold.double()
    of_exact = dict(zip(("x", "weight", "bias"), exact, strict=True))
    true_spk, _, true = sconv2dlstm(**of_exact, threshold=threshold, **options)
    expected = torch.autograd.grad(true_spk.sum() + true.square().sum(), exact)
    far = (mem.double() - true).detach().abs().flatten()
    deciding = {"reset_mechanism", "state_quant"} & set(options)
    share = 1 - DECIDING if deciding else 1.0
    of_mem = float(far.kthvalue(max(1, int(share * far.numel()))).values)
    pairs = zip(found, expected, strict=True)
    return of_mem, max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_smoke", description=__doc__)
    parser.add_argument("--device", choices=devices.DEVICES, default="cuda")
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=ALGORITHMS)
    parser.add_argument("--few", action="store_true", help="two options alone")
    parser.add_argument("--sizes", nargs=6, type=int, default=SIZES, metavar="SIZE")
    options = parser.parse_args(arguments)
    names, wrong = FEW if options.few else tuple(OPTIONS), 0
    with devices.running(options.device):
        for line, right in run(options.device, tuple(options.sizes), options.algorithms, names):
            print(line if right else f"WRONG  {line}", flush=True)
            wrong += not right
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
