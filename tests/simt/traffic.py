"""What a step of a layer costs on a GPU, counted in the emulation: `python traffic.py`.

Beside each number stands the fewest possible: each byte of the arguments read once and of the
results written once; sectors that hold just the bytes asked for; shared memory without bank
conflicts; tensor core instructions without waste.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]

import counters  # noqa: E402
from backend import Core, simt_core  # noqa: E402
from cases import Case, wanting_gradients  # noqa: E402
from modes import FORWARD as MODES  # noqa: E402
from modes import Mode  # noqa: E402

from snnlstm.call import CellOptions  # noqa: E402

STEP = CellOptions((3, 3))
# Channels and images of the benchmark suite's layers, with as many images as the emulation bears.
LAYERS = {
    "mnist": Case(STEP, torch.float32, 1, 4, 1, 8, 28, 28, density=0.1),
    "mid": Case(STEP, torch.float32, 1, 1, 32, 64, 32, 32, density=0.1),
    "big": Case(STEP, torch.float32, 1, 1, 64, 128, 32, 32, density=0.1),
}


@dataclass(frozen=True)
class Cost:
    """Ratios to the fewest possible, of all kernels of one call together."""

    bytes: float
    sectors: float
    banks: float
    mma: float

    def __str__(self) -> str:
        return (
            f"bytes {self.bytes:5.2f}   sectors {self.sectors:5.2f}   "
            f"banks {self.banks:5.2f}   mma {self.mma:5.2f}"
        )


def fewest_bytes(case: Case, mode: Mode) -> int:
    """Of one inference step: x, the states and the weight in; spikes and states out."""
    size = mode.dtype.itemsize
    operand = mode.operands.itemsize if mode.operands else size
    n, c, h, w = case.state_shape
    kh, kw = case.options.kernel_size
    states = n * c * h * w
    weight = 4 * c * (case.in_channels + c) * kh * kw * operand
    return (n * case.in_channels * case.height * case.width + 5 * states + 4 * c) * size + weight


def fewest_mma(case: Case, mode: Mode) -> int:
    """m16n8k16, or k8 for tf32 (three of them for 3xTF32), over pixels, gates and taps."""
    n, c, h, w = case.state_shape
    kh, kw = case.options.kernel_size
    tf32 = mode.dtype.itemsize == 4 and mode.operands is None
    steps = math.ceil(kh * kw * (case.in_channels + c) / (8 if tf32 else 16))
    times = 3 if tf32 and mode.precision == "ieee" else 1
    return math.ceil(n * h * w / 16) * math.ceil(4 * c / 8) * steps * times


def measure(core: Core, case: Case, mode: Mode) -> dict[str, counters.Counters]:
    """Counters of one inference step, by kernel, without those that pack the weight."""
    case = mode.of(case)
    inputs = case.inputs()
    core.reset()
    core.checks(races=False, counters=True)
    with mode.running(core), torch.no_grad():
        mode.run(*inputs, case.options)
    seen = core.counters()
    return {name: c for name, c in seen.items() if "pack" not in name}


def measure_training(core: Core, case: Case, mode: Mode) -> dict[str, counters.Counters]:
    """Counters of one step with its backward pass, by kernel."""
    case = mode.of(case)
    inputs = wanting_gradients(case.inputs())
    core.reset()
    core.checks(races=False, counters=True)
    with mode.running(core):
        torch.stack([o.float().sum() for o in mode.run(*inputs, case.options)]).sum().backward()
    return core.counters()


def cost(seen: dict[str, counters.Counters], case: Case, mode: Mode) -> Cost:
    total = counters.total(seen)
    moved = total["bytes_read"] + total["bytes_written"]
    return Cost(
        moved / fewest_bytes(case, mode),
        counters.sectors(total),
        counters.bank_conflicts(total),
        counters.mma(total) / fewest_mma(case, mode),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", nargs="*", default=list(LAYERS), choices=LAYERS)
    parser.add_argument(
        "--modes", nargs="*", choices=MODES, default=["float32", "tf32", "bfloat16 states"]
    )
    parser.add_argument("--lines", type=int, default=0, help="the most wasteful lines, this many")
    parser.add_argument("--training", action="store_true", help="with the backward pass")
    args = parser.parse_args()
    core = simt_core("faults")  # the build that the tests use
    for layer in args.layers:
        for mode in args.modes:
            case = LAYERS[layer]
            n, c, h, w = case.state_shape
            print(f"\n{layer}: N={n} {case.in_channels}->{c} {h}x{w}, {mode}")
            seen = (measure_training if args.training else measure)(core, case, MODES[mode])
            print(counters.table(seen))
            if not args.training:
                print(f"over the fewest: {cost(seen, case, MODES[mode])}")
            for s in core.spots()[: args.lines]:
                print(f"  {s.cost:>8} for {s.fewest:<8} {s.space}  {s.kernel}: {s.place}")


if __name__ == "__main__":
    main()
