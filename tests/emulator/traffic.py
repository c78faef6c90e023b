"""Counts what a step of a layer costs on a GPU: `python -m tests.emulator.traffic`.

Costs are compared with the least possible: each byte of the arguments is read once, each byte of
the results written once; sectors have just the bytes that are asked for; shared memory has no bank
conflicts; tensor core instructions multiply no padding.
"""

from __future__ import annotations

import argparse
import math

import torch

from tests.emulator.backend import Core, emulated_core
from tests.emulator.library import Counts
from tests.emulator.modes import FORWARD as MODES
from tests.emulator.modes import Mode
from tests.shared.cases import Case, Options, wanting_gradients

STEP = Options((3, 3))
# The benchmark suite's layers, with as many samples as the emulation can run.
LAYERS = {
    "mnist": Case(STEP, torch.float32, 1, 4, 1, 8, 28, 28, density=0.1),
    "mid": Case(STEP, torch.float32, 1, 1, 32, 64, 32, 32, density=0.1),
    "big": Case(STEP, torch.float32, 1, 1, 64, 128, 32, 32, density=0.1),
}


def fewest_bytes(case: Case, mode: Mode) -> int:
    """Bytes of an inference step: it reads x, states and weight, and writes spikes and states."""
    size = mode.dtype.itemsize
    operand = mode.operands.itemsize if mode.operands else size
    n, c, h, w = case.state_shape
    kh, kw = case.options.kernel_size
    states = n * c * h * w
    weight = 4 * c * (case.in_channels + c) * kh * kw * operand
    return (n * case.in_channels * case.height * case.width + 5 * states + 4 * c) * size + weight


def fewest_mma(case: Case, mode: Mode) -> int:
    """Instructions m16n8k16, or for tf32 m16n8k8, for all pixels, gates and taps. 3xTF32 takes
    three for each."""
    n, c, h, w = case.state_shape
    kh, kw = case.options.kernel_size
    tf32 = mode.dtype.itemsize == 4 and mode.operands is None
    steps = math.ceil(kh * kw * (case.in_channels + c) / (8 if tf32 else 16))
    times = 3 if tf32 and mode.precision == "ieee" else 1
    return math.ceil(n * h * w / 16) * math.ceil(4 * c / 8) * steps * times


def measure(core: Core, case: Case, mode: Mode, training: bool = False) -> dict[str, Counts]:
    """Counters of one step by kernel, without the kernels that pack the weight. training: the step
    has a backward pass."""
    case = mode.of(case)
    inputs = case.inputs()
    core.reset()
    core.checks(races=False, counters=True)
    with mode.running(core), torch.set_grad_enabled(training):
        out = mode.run(*wanting_gradients(inputs), case.options)
        if training:
            torch.stack([o.float().sum() for o in out]).sum().backward()
    return {name: c for name, c in core.counters().items() if "pack" not in name}


def total(seen: dict[str, Counts]) -> Counts:
    """The sum over all kernels."""
    joint = Counts()
    for counts in seen.values():
        joint.update(counts)
    return joint


def cost(seen: dict[str, Counts], case: Case, mode: Mode) -> dict[str, float]:
    """The costs of all kernels of one step together, over the least possible."""
    all_of_it = total(seen)
    moved = all_of_it["bytes_read"] + all_of_it["bytes_written"]
    return {
        "bytes": moved / fewest_bytes(case, mode),
        "sectors": all_of_it.sectors,
        "banks": all_of_it.banks,
        "mma": all_of_it.mma / fewest_mma(case, mode),
    }


def table(seen: dict[str, Counts]) -> str:
    """A text with one line for each kernel."""
    head = (
        f"{'kernel':<28}{'launches':>9}{'blocks':>8}{'KiB read':>10}{'KiB written':>12}"
        f"{'L2 KiB':>9}{'sectors':>9}{'banks':>7}{'mma':>9}"
    )
    lines = [head, "-" * len(head)]
    for name, c in seen.items():
        fetched = (c["global_read_sectors"] + c["global_write_sectors"]) * 32
        lines.append(
            f"{name:<28}{c['launches']:>9}{c['blocks']:>8}{c['bytes_read'] / 1024:>10.1f}"
            f"{c['bytes_written'] / 1024:>12.1f}{fetched / 1024:>9.1f}{c.sectors:>9.2f}"
            f"{c.banks:>7.2f}{c.mma:>9}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", nargs="*", default=list(LAYERS), choices=LAYERS)
    parser.add_argument(
        "--modes", nargs="*", choices=MODES, default=["float32", "tf32", "bfloat16 states"]
    )
    parser.add_argument("--training", action="store_true", help="with the backward pass")
    args = parser.parse_args()
    core = emulated_core()
    for layer in args.layers:
        for mode in args.modes:
            case = LAYERS[layer]
            n, c, h, w = case.state_shape
            print(f"\n{layer}: N={n} {case.in_channels}->{c} {h}x{w}, {mode}")
            seen = measure(core, case, MODES[mode], args.training)
            print(table(seen))
            if not args.training:
                found = cost(seen, case, MODES[mode]).items()
                print("over the fewest:", *(f"  {what} {ratio:5.2f}" for what, ratio in found))


if __name__ == "__main__":
    main()
