"""Describes the machine of a run, and measures the peaks that it reaches."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import devices
from benchmarks.providers.base import Setting
from benchmarks.timing import clock

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Peak:
    """Holds the highest rates of a matrix product and of a copy that were measured in a run."""

    gflops: float
    gbytes: float
    """The bytes that the copy reads plus those that it writes, in 1e9 a second."""


def describe(setting: Setting) -> dict[str, str]:
    """Returns the fields of a row that say where it comes from, such as version and device."""
    return {
        "version": package_version("snnlstm"),
        "commit": git_commit(),
        "device": device_name(setting.device),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "snntorch": package_version("snntorch"),
        "python": platform.python_version(),
    }


def package_version(name: str) -> str:
    """Returns the version of a package, or "missing"."""
    try:
        return str(__import__(name).__version__)
    except (ImportError, AttributeError):
        return "missing"


def git_commit() -> str:
    """Returns the short commit of this checkout, with "+" if files were changed, or "unknown"."""
    command = ["git", "describe", "--always", "--abbrev=10", "--dirty=+", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip() or "unknown"


def device_name(device: str) -> str:
    """Returns the GPU's name, or the CPU's with its widest vector unit."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    if device != "cpu":
        return f"{devices.name(device)} on {device_name('cpu')}"
    name = _proc("cpuinfo", "model name") or platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores)"


def available_bytes() -> int:
    """Returns how much memory of the host is available without swapping."""
    if found := _proc("meminfo", "MemAvailable"):
        return int(found.split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _proc(file: str, field: str) -> str:
    """Returns the first value of a field of a file in /proc, or an empty text."""
    path = Path("/proc") / file
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), "")


def busy_cores() -> float:
    """Returns the system's load over the last minute, in cores, or 0 if it is not known."""
    try:
        return os.getloadavg()[0]
    except OSError:
        return 0.0


@contextlib.contextmanager
def one_core_busy() -> Iterator[None]:
    """Within the block another process computes without end, pinned to a core if possible."""
    pin = ""
    if hasattr(os, "sched_setaffinity"):
        pin = f"import os; os.sched_setaffinity(0, {{{max(os.sched_getaffinity(0))}}})\n"
    process = subprocess.Popen([sys.executable, "-c", f"{pin}while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def measure_peak(setting: Setting, seconds: float = 1.0) -> Peak:
    """Measures the largest rates of a square matrix product and of a copy, in the setting's dtype.

    Each of the two takes `seconds`. Convolutions are compared with the measured matrix product, and
    not with a number of a data sheet.
    """
    setting.apply_precision()
    on = {"device": setting.torch_device, "dtype": setting.torch_dtype}
    side = 8192 if setting.device == "cuda" else 1536
    if setting.device != "cuda" and setting.torch_dtype.itemsize < 4:
        side = 384  # many CPUs have no unit for half types, and need seconds for larger products
    a, b = torch.randn(side, side, **on), torch.randn(side, side, **on)
    product = torch.empty_like(a)
    # No cache holds this many bytes, so that the copy passes through memory.
    size = 1 << 30 if setting.device == "cuda" else 1 << 28
    source = torch.ones(size // setting.torch_dtype.itemsize, **on)
    target = torch.zeros_like(source)

    def best(call: Callable[[], object]) -> float:
        call()
        found, stop = [clock(call, setting.device)], time.perf_counter() + seconds
        while time.perf_counter() < stop:
            found.append(clock(call, setting.device))
        return min(found)

    multiplying = best(lambda: torch.mm(a, b, out=product))
    return Peak(
        2 * side**3 / multiplying / 1e9, 2 * size / best(lambda: target.copy_(source)) / 1e9
    )
