"""Prints what would be chosen on a GPU, and the time that the model expects: nothing is measured.

    python -m benchmarks.estimate --gpu t4 [--layers mnist dvs] [--dtype float32 autocast16]

Our times are those by which the kernels are chosen (csrc/cuda/choice.h, with the constants of
plan.h and the cards of cards.h). snnTorch's are of the same model: its convolution at cuDNN's rate,
the traffic of its elementwise operations, and its launches, one by one or in a CUDA graph. All of
them are estimates, in microseconds a time step of a sequence; no GPU has been timed.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import dataclass
from typing import Any

from benchmarks import devices
from benchmarks.cases import CASES, Case

LAYERS = ("mnist", "dvs", "mid", "big", "dvs64", "wide64")
# By type: the states' dtype of csrc/args.h, and the matrix of csrc/cuda/plan.h; None is the core's
# own choice at full precision.
TYPES: dict[str, tuple[int, int | None]] = {
    "float32": (0, None), "tf32": (0, 1), "autocast16": (0, 3), "autocast": (0, 4),
    "float16": (2, 0), "bfloat16": (3, 0),
}  # fmt: skip
NEEDS_TENSOR_CORES = ("tf32", "autocast", "bfloat16")  # of compute capability 8.0
FACTS: dict[str, Any] = {
    "dtype": 0, "T": 1, "N": 1, "Cin": 1, "C": 8, "H": 8, "W": 8, "kernel": (3, 3),
    "stride": (1, 1), "dilation": (1, 1), "pool": 0, "pool_size": (1, 1), "reset": 2,
    "surrogate": 1, "p0": 2.0, "p1": 0.0, "inhibition": False, "num_levels": 0,
}  # fmt: skip
"""The fields of the core's Cell, which is a small layer."""

# Kernels that a step of snnTorch's cell launches, forward and in training, and the states that
# they move, counted in torch's profiler; seconds of a launch from Python, and within a graph.
LAUNCHES, STATES = {"forward": 21, "both": 49}, {"forward": 50, "both": 130}
EAGER, GRAPH = 5.5e-6, 2e-6
SAVED = 5  # states that a step of ours saves for the backward pass: the gates, and syn


@dataclass(frozen=True)
class Gpu:
    """A card of csrc/cuda/cards.h, with the module that plans for it."""

    core: Any
    card: dict[str, Any]
    model: tuple[tuple[str, float], ...] = ()

    @property
    def device(self) -> Any:
        """Returns the card as the core knows devices, with other constants if `model` has some."""
        card = self.card
        shared = 1024 * card["shared_kib"]
        of = card["capability"], card["multiprocessors"], shared
        return self.core.CudaDevice(*of, dict(self.model))

    def types(self) -> list[str]:
        """Returns the types that the card has instructions for."""
        return [t for t in TYPES if self.card["tf32"] or t not in NEEDS_TENSOR_CORES]


def facts_of(case: Case, dtype: int = 0) -> dict[str, Any]:
    """Returns the fields of the core's Cell for a layer of the suite."""
    pool, size = (1, case.max_pool) if case.max_pool else (2, case.avg_pool)
    pooling = {"pool": pool, "pool_size": (size, size)} if size else {}
    return FACTS | pooling | {
        "dtype": dtype, "T": case.steps, "N": case.batch, "Cin": case.cin, "C": case.cout,
        "H": case.height, "W": case.width, "kernel": case.kernel,
    }  # fmt: skip


def arguments(gpu: Gpu, case: Case, dtype: str) -> tuple[Any, Any, int]:
    """Returns cell, device and matrix of the core's plans."""
    states, matrix = TYPES[dtype]
    device = gpu.device
    if matrix is None:
        matrix = gpu.core.cuda_full_precision(device)
    return gpu.core.Cell(**facts_of(case, states)), device, matrix


def chosen(gpu: Gpu, case: Case, dtype: str, backward: bool) -> Any:
    """Returns the plan of a pass that the core chooses."""
    return gpu.core.CudaPlan(*arguments(gpu, case, dtype), 0, backward)


def candidates(gpu: Gpu, case: Case, dtype: str, backward: bool) -> list[Any]:
    """Returns every plan of a pass that may be chosen."""
    return gpu.core.CudaPlan.candidates(*arguments(gpu, case, dtype), backward)


def moving(gpu: Gpu, case: Case, dtype: str, states: float) -> float:
    """Returns the seconds in which the memory moves that many states of a time step."""
    neurons = case.batch * case.cout * case.height * case.width
    size = 2 if dtype in ("float16", "bfloat16") else 4
    part = (gpu.core.cuda_model() | dict(gpu.model))["memory_part"]
    return states * neurons * size / (1e9 * gpu.card["gigabytes"] * part)


def ours(gpu: Gpu, case: Case, dtype: str, mode: str) -> float:
    """Returns our seconds of a time step."""
    seconds = chosen(gpu, case, dtype, False).seconds / case.steps
    if mode == "forward":
        return seconds
    saving = moving(gpu, case, dtype, SAVED)
    return seconds + saving + chosen(gpu, case, dtype, True).seconds / case.steps


def snntorch(gpu: Gpu, case: Case, dtype: str, mode: str, launch: float) -> float:
    """Returns snnTorch's seconds of a time step, with launches that take `launch` each."""
    passes = (False, True) if mode == "both" else (False,)
    of = arguments(gpu, case, dtype)
    multiplying = sum(gpu.core.cuda_cudnn_seconds(*of, backward) for backward in passes)
    working = multiplying + moving(gpu, case, dtype, STATES[mode])
    return max(working, LAUNCHES[mode] * launch)


def table(gpu: Gpu, cases: list[Case], dtypes: list[str]) -> str:
    """Returns a line for each layer, type and mode."""
    cells = []
    for case in cases:
        for dtype in dtypes:
            for mode in ("forward", "both"):
                plan = chosen(gpu, case, dtype, mode == "both")
                times = [
                    ours(gpu, case, dtype, mode),
                    snntorch(gpu, case, dtype, mode, EAGER),
                    snntorch(gpu, case, dtype, mode, GRAPH),
                ]
                name = "training" if mode == "both" else mode
                ratio = f"{times[2] / times[0]:.1f}x"
                cells.append(
                    [case.name, dtype, name, plan.name, *(f"{1e6 * t:.0f}" for t in times), ratio]
                )
    header = ["layer", "type", "mode", "chosen", "ours", "snnTorch", "in a graph", "of the graph"]
    return "\n".join("  ".join(map(str, line)) for line in [header, *cells])


def ways(gpu: Gpu, cases: list[Case], dtypes: list[str]) -> str:
    """Returns a line for each layer, type and pass, with every plan that may be chosen."""
    lines = []
    for case, dtype, backward in itertools.product(cases, dtypes, (False, True)):
        plans = sorted(candidates(gpu, case, dtype, backward), key=lambda plan: plan.seconds)
        listed = ", ".join(f"{p.name} {1e6 * p.seconds / case.steps:.0f}" for p in plans)
        lines.append(f"{case.name} {dtype} {'backward' if backward else 'forward'}: {listed}")
    return "\n".join(lines)


def main(given: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.estimate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    core = devices.planner()
    cards = {card["name"]: card for card in core.cuda_cards()}
    parser.add_argument("--gpu", choices=cards, default="t4")
    parser.add_argument("--layers", nargs="+", choices=CASES, default=LAYERS, metavar="NAME")
    parser.add_argument("--dtype", nargs="+", choices=TYPES, help="default: all of the card's")
    parser.add_argument("--ways", action="store_true", help="list every way, the shortest first")
    options = parser.parse_args(given)
    gpu = Gpu(core, cards[options.gpu])
    dtypes = options.dtype or gpu.types()
    if unknown := set(dtypes) - set(gpu.types()):
        parser.error(f"--dtype: the {options.gpu} has no instructions for {', '.join(unknown)}")
    card = gpu.card
    print(
        f"{card['title']}: {card['multiprocessors']} multiprocessors, {card['gigahertz']} GHz, "
        f"{card['gigabytes']:.0f} GB/s ({card['source']})\n"
        "Estimates, us a time step: no GPU has been timed.\n"
    )
    cases = [CASES[name] for name in options.layers]
    print(ways(gpu, cases, dtypes) if options.ways else table(gpu, cases, dtypes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
