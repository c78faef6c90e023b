"""Names the devices that a program may run on: the CPU, a GPU, and an emulated GPU.

The device "emulator-t4" is an emulated T4 (tests/emulator): tensors lie on the CPU, and the kernels
run there. Nothing on it takes the time that it would take on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

# Compute capability, multiprocessors, and the most bytes of shared memory that a block may have: by
# NVIDIA's data sheets, and by the table "Technical Specifications per Compute Capability" of the
# CUDA C++ Programming Guide.
EMULATED = {
    "t4": (75, 40, 64 * 1024),
    "a100": (80, 108, 163 * 1024),
    "4090": (89, 128, 99 * 1024),
}
DEVICES = ("cpu", "cuda", *(f"emulator-{name}" for name in EMULATED))


def capabilities(device: str) -> list[int]:
    """Returns 10 * major + minor of the compute capability of each GPU, or of the emulated one."""
    if device != "cuda":
        return [EMULATED[device.removeprefix("emulator-")][0]]
    found = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
    return [10 * major + minor for major, minor in found]


def name(device: str) -> str:
    """Returns the name of a GPU, with its compute capability."""
    gpu = device.removeprefix("emulator-")
    kind = torch.cuda.get_device_name() if device == "cuda" else f"an emulated {gpu}"
    return f"{kind} (sm_{capabilities(device)[0]})"


def emulator() -> Any:
    """Returns the emulator; the first call builds it, in about a minute."""
    from tests.emulator.backend import emulated_core

    return emulated_core()


def precisions(device: str) -> tuple[str, ...]:
    """Returns the types that a device computes in by itself, of tensors or under autocast."""
    exact = ("float64", "float32")
    if device == "cpu":
        return exact
    newer = ("tf32", "bfloat16", "autocast") if capabilities(device)[0] >= 80 else ()
    return (*exact, "float16", "autocast16", *newer)


def captured(
    run: Callable[[], Any], setup: Callable[[], object] = lambda: None
) -> tuple[Callable[[], None], Any]:
    """Captures a run in a CUDA graph; returns what replays it, and what it returns.

    Each replay overwrites these results. `setup` goes before each run, and is not captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are loaded, and cuDNN chooses, before the capture
        for _ in range(3):
            setup()
            run()
    torch.cuda.current_stream().wait_stream(side)
    setup()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    return graph.replay, found


@contextlib.contextmanager
def running(device: str) -> Iterator[None]:
    """Within the block our kernels for `device` run on the tensors of a Setting."""
    if device in ("cpu", "cuda"):
        yield
        return
    core = emulator()
    core.settings.races = 0
    core.device(*EMULATED[device.removeprefix("emulator-")])
    try:
        with core.installed():
            yield
    finally:
        core.reset()
