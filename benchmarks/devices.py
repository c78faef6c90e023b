"""Names the devices that a program may run on: the CPU, a GPU, and an emulated GPU.

The device "emulator-t4" is an emulated T4 (tests/emulator): tensors lie on the CPU, and the kernels
run there. Nothing on it takes the time that it would take on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from tools.local_version import QUERY, printed

# Compute capability, multiprocessors, and the most bytes of shared memory that a block may have: by
# NVIDIA's data sheets, and by the table "Technical Specifications per Compute Capability" of the
# CUDA C++ Programming Guide.
EMULATED = {
    "t4": (75, 40, 64 * 1024),
    "a100": (80, 108, 163 * 1024),
    "4090": (89, 128, 99 * 1024),
}
DEVICES = ("cpu", "cuda", *(f"emulator-{name}" for name in EMULATED))


def capability(device: str) -> int:
    """Returns 10 * major + minor of the compute capability of a GPU, emulated or not."""
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return 10 * major + minor
    return EMULATED[device.removeprefix("emulator-")][0]


def capabilities() -> set[int]:
    """Returns the compute capabilities of all GPUs of the machine."""
    found = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
    return {10 * major + minor for major, minor in found}


def name(device: str) -> str:
    """Returns the name of a GPU, with its compute capability."""
    gpu = device.removeprefix("emulator-")
    kind = torch.cuda.get_device_name() if device == "cuda" else f"an emulated {gpu}"
    return f"{kind} (sm_{capability(device)})"


def emulator() -> Any:
    """Returns the emulator; the first call builds it, in about a minute."""
    from tests.emulator.backend import emulated_core

    return emulated_core()


def lost(device: str) -> bool:
    """Returns whether an error has ended all work of this process on the GPU."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def add_rows(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments by which :func:`goes_on` runs the rest of the rows."""
    parser.add_argument("--rows", nargs=2, type=int, default=(0, sys.maxsize), help="first, end")
    parser.add_argument("--reruns", type=int, default=2, help="lost processes that end no rows")


def goes_on(module: str, given: Sequence[str] | None, row: int, options: Any) -> bool:
    """Returns whether this process can run another row, as no error has ended all work on the GPU.

    Otherwise the row runs again in a process whose launches wait, so that the error names the
    kernel, and the rows behind it run in another one, but not after too many such errors.
    """
    if not lost(options.device):
        return True
    end, left = options.rows[1], str(options.reruns - 1)
    if options.reruns <= 0 and row + 1 < end:
        print("NOT RUN: other rows, after too many errors that ended all work on the GPU")
    if options.reruns > 0:
        command = [sys.executable, "-m", module, *(sys.argv[1:] if given is None else given)]
        alone = [*command, "--rows", str(row), str(row + 1), "--reruns", "0"]
        subprocess.run(alone, env=os.environ | {"CUDA_LAUNCH_BLOCKING": "1"}, check=False)
        subprocess.run([*command, "--rows", str(row + 1), str(end), "--reruns", left], check=False)
    return False


def memory_of_first() -> int:
    """Returns the MiB that are in use on the first GPU, without making a context there."""
    number = getattr(torch.cuda.get_device_properties(0), "uuid", None)
    command = [*QUERY, "--query-gpu=memory.used", "-i", f"GPU-{number}"]
    found = re.match(r"\d+", printed(command) if number else "")
    return int(found[0]) if found else 0


def precisions(device: str) -> tuple[str, ...]:
    """Returns the types that a device computes in by itself, of tensors or under autocast."""
    exact = ("float64", "float32")
    if device == "cpu":
        return exact
    newer = ("tf32", "bfloat16", "autocast") if capability(device) >= 80 else ()
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
