"""Measures the time of a step call in Python and torch, with kernels that do nothing.

    python -m benchmarks.host [--compile]

Prints microseconds a step of a loop of step calls, without gradients and with a backward pass. The
rows are the CPU backend, the CUDA backend (of tests/emulator, so that no GPU is needed), and the
same where cuDNN convolves (and takes no time). The numbers are medians over alternating rounds.
With --compile it prints the processor time for which torch.compile traces a call instead.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

import snnlstm
from benchmarks import devices
from benchmarks.cases import loop
from snnlstm import _C
from snnlstm.calls import entries
from snnlstm.native import cudnn

ROUNDS = 10  # of 20 measurements of each row
X = torch.rand(16, 1, 2, 15, 17)
STATE = torch.zeros(1, 12, 15, 17)
SUMS = torch.zeros(1, 48, 15, 17)


# These stand for what torch convolves by, and compute nothing.
CONVOLUTIONS = {
    "F": SimpleNamespace(conv2d=lambda *_: SUMS, pad=F.pad),
    "conv2d_input": lambda shape, *_: X.new_empty(shape),
    "conv2d_weight": lambda _, shape, *__: X.new_empty(shape),
}


@contextlib.contextmanager
def stubbed(device: str, algorithm: str) -> Iterator[None]:
    """Within the block, cells on the CPU run the backend of a device whose kernels do nothing."""
    passes, kernels = _C.CpuPass, ["run"]
    if device != "cpu":
        passes = devices.emulator().module.CudaPass
        kernels += ["pack", "store_levels"]
    with (
        devices.running(device),
        mock.patch.dict(entries.table, clear=True),
        mock.patch.multiple(passes, **dict.fromkeys(kernels, lambda *_: None)),
        mock.patch.multiple(cudnn, **CONVOLUTIONS),
        snnlstm.algorithm(algorithm),
    ):
        yield


def _measure(step: Callable) -> tuple[float, float]:
    """Returns microseconds a step, without gradients and with a backward pass."""
    begin = time.perf_counter()
    with torch.no_grad():
        loop(step, X, STATE, STATE)
    middle = time.perf_counter()
    loop(step, X, STATE, STATE)[2].backward(torch.ones_like(STATE))
    each = 1e6 / len(X)
    return (middle - begin) * each, (time.perf_counter() - middle) * each


def _traced(layers: nn.Sequential, time_steps: int) -> float:
    """Returns the processor's seconds for which dynamo compiles a loop of calls."""

    def loop_of_calls(x: torch.Tensor) -> list[torch.Tensor]:
        layers[-1].reset_mem()
        return [layers(x_t) for x_t in x]

    torch._dynamo.reset()
    compiled = torch.compile(loop_of_calls, backend="eager", fullgraph=True)
    x = torch.rand(time_steps, 1, 2, 8, 8)
    begin = time.process_time()
    compiled(x)
    return time.process_time() - begin


def print_tracing() -> None:
    """Prints how long dynamo traces a call, from loops of 5 and of 25 calls."""
    print("Milliseconds of the processor for which torch.compile traces a call")
    for name, layers in {
        "SConv2dLSTM": [snnlstm.SConv2dLSTM(2, 3, 3, threshold=0.1, init_hidden=True)],
        "Linear and Leaky": [nn.Linear(8, 8), snnlstm.Leaky(0.9, init_hidden=True)],
    }.items():
        net = nn.Sequential(*layers)
        _traced(net, 2)
        short, whole = (min(_traced(net, steps) for _ in range(3)) for steps in (5, 25))
        print(f"  {name:34} {(whole - short) / 20 * 1e3:6.1f}")


def main(arguments: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", action="store_true", help="time torch.compile's traces")
    if parser.parse_args(arguments).compile:
        print_tracing()
        return
    ways = ("cpu", "auto"), ("emulator-a100", "auto"), ("emulator-a100", "cudnn")
    cells = {way: snnlstm.SConv2dLSTM(2, 12, 3, threshold=0.1) for way in ways}
    times: dict[tuple[str, str], list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(ROUNDS):
        for way, cell in cells.items():
            with stubbed(*way):
                _measure(cell)
                times[way] += [_measure(cell) for _ in range(20)]
    print("Microseconds a step call on the host (without gradients; forward and backward)")
    for way, found in times.items():
        one, both = map(statistics.median, zip(*found, strict=True))
        print(f"  {', '.join(way):34} {one:6.1f} {both:8.1f}")


if __name__ == "__main__":
    main()
