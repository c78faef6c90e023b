"""Measures the time of a step call in Python and torch, with kernels that do nothing.

    python -m benchmarks.host

Prints microseconds a step of a loop of step calls, without gradients and with a backward pass. The
rows are the CPU backend, the CUDA backend (on CPU tensors, so that no GPU is needed), and the same
where cuDNN convolves (and takes no time). The numbers are medians over alternating rounds.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

import snnlstm
from benchmarks.cases import loop
from snnlstm import _C, entry
from snnlstm.native import cuda, function, torch_conv

ROUNDS = 10  # of 20 measurements of each row
X = torch.rand(16, 1, 2, 15, 17)
STATE = torch.zeros(1, 12, 15, 17)
SUMS = torch.zeros(1, 48, 15, 17)


def _nothing(*_: Any) -> None:
    pass


class _StubbedPlan:
    """Stands for a plan of the core on CUDA; its kernels do nothing."""

    name, reason_against = "stub", ""
    packed_bytes = workspace = 1
    geometry = (3, 3), (1, 1), (1, 1), (1, 1), (0, 0)
    forward = backward = pack = store_levels = _nothing

    def __init__(self, *arguments: Any, lengths: bool) -> None:
        *_, self.algorithm, _ = arguments


# This stands for the core with its CUDA backend.
_STUBBED_CUDA = SimpleNamespace(
    Cell=_C.Cell,
    CudaPlan=_StubbedPlan,
    cuda_device=lambda _: SimpleNamespace(compute_capability=80),
    cuda_full_precision=lambda _: 0,
    cuda_padded_channels=lambda channels: -(-channels // 8) * 8,
)


_CUDA = cuda.Backend(_STUBBED_CUDA)
_CUDA.guard, _CUDA.stream = lambda _: contextlib.nullcontext(), lambda _: 0  # for CPU tensors
# These stand for what torch convolves by, and compute nothing.
CONVOLUTIONS = {
    "F": SimpleNamespace(conv2d=lambda *_: SUMS, pad=F.pad),
    "conv2d_input": lambda shape, *_: X.new_empty(shape),
    "conv2d_weight": lambda _, shape, *__: X.new_empty(shape),
}


@contextlib.contextmanager
def stubbed(backend: str, algorithm: str) -> Iterator[None]:
    """Within the block, cells on the CPU run a backend whose kernels do nothing."""
    on_cpu = mock.patch.multiple(_C.CpuPlan, forward=_nothing, backward=_nothing)
    on_cuda = mock.patch.dict(function.BACKENDS, {"cpu": _CUDA})
    with (
        mock.patch.dict(entry._entries, clear=True),
        mock.patch.dict(function._plans, clear=True),
        on_cpu if backend == "cpu" else on_cuda,
        mock.patch.multiple(torch_conv, **CONVOLUTIONS),
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


def main() -> None:
    """Prints the table."""
    ways = ("cpu", "auto"), ("cuda", "auto"), ("cuda", "cudnn")
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
