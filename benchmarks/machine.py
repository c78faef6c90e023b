"""Describes the machine of a run, the load beside it, and the peak that it reaches."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path

import snntorch
import torch
from torch.utils.benchmark import Timer

import snnlstm
from benchmarks import devices
from benchmarks.providers import Setting

ROOT = Path(__file__).resolve().parent.parent


def describe(device: str) -> dict[str, str]:
    """Returns the fields of a row that say where it comes from, such as version and device."""
    return {
        "version": snnlstm.__version__,
        "commit": git_commit(),
        "device": device_name(device),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "snntorch": snntorch.__version__,
        "python": platform.python_version(),
    }


def git_commit() -> str:
    """Returns the short commit of this checkout, with "+" if files were changed, or "unknown"."""
    describe = "git describe --always --abbrev=10 --dirty=+ --exclude='*'"
    done = subprocess.run(describe, shell=True, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def device_name(device: str) -> str:
    """Returns the GPU's name, or the CPU's with its widest vector unit."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    if device != "cpu":
        return f"{devices.name(device)} on {device_name('cpu')}"
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores)"


def others() -> float:
    """Returns the seconds that processors were busy for other programs; 0 if nothing tells it."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    # proc(5): user, nice, system, idle, iowait, irq, softirq, steal, in ticks
    ticks = [int(word) for word in stat.read_text().split("\n", 1)[0].split()[1:9]]
    busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
    return busy - sum(os.times()[:4])  # with ended children


def peak(setting: Setting) -> float:
    """Measures the largest rate of a square matrix product, in GFLOP/s of the setting's dtype.

    Convolutions are compared with the measured product, and not with a number of a data sheet.
    """
    setting.apply_precision()
    on = {"device": setting.torch_device, "dtype": setting.torch_dtype}
    side = 8192 if setting.device == "cuda" else 1536
    if setting.device != "cuda" and setting.torch_dtype.itemsize < 4:
        side = 384  # many CPUs have no unit for half types, and need seconds for larger products
    tensors = {name: torch.randn(side, side, **on) for name in "abc"}
    product = Timer("torch.mm(a, b, out=c)", globals=tensors, num_threads=torch.get_num_threads())
    seconds = 1.0 if setting.device == "cpu" else 0.2
    return 2 * side**3 / min(product.blocked_autorange(min_run_time=seconds).times) / 1e9
