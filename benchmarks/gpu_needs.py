"""Says what `make gpu` lacks on this machine, all in one message, with the line that installs it.

This file imports Python's own modules alone, so that a machine with nothing gets the message, too.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

# The modules and programs that the steps need, as pip installs them. The core is built with CMake
# alone, which says by itself if it is too old, or if it finds no compiler.
NEEDED = {
    "pybind11": "pybind11>=2.13", "pytest": "pytest>=8", "hypothesis": "hypothesis>=6.100",
    "numpy": "numpy", "pandas": "pandas>=2", "snntorch": "snntorch==1.0.0", "tqdm": "tqdm",
    "cmake": "cmake>=3.24", "ninja": "ninja",
}  # fmt: skip


def lacking(rehearsal: bool = False) -> str | None:
    """Returns why the steps cannot run here, or None. A rehearsal needs neither GPU nor nvcc."""
    if not importlib.util.find_spec("torch"):
        return f"no torch: {sys.executable} has none; make gpu PYTHON=... takes another Python"
    missing = [
        of for name, of in NEEDED.items() if not (importlib.util.find_spec(name) or find(name))
    ]
    if missing:
        return f"missing: {sys.executable} -m pip install " + " ".join(f'"{of}"' for of in missing)
    import torch

    if rehearsal or torch.cuda.is_available():
        return None
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return (
        f"no GPU: torch {torch.__version__} ({built}) of {sys.executable} sees none; "
        'ARGS="--rehearse" goes through the steps without one'
    )


def find(program: str) -> str | None:
    """Finds a program on PATH, beside this Python, or beside nvcc."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    folders = [f"{home}/bin" for home in [*homes, "/usr/local/cuda"] if home]
    path = [os.environ.get("PATH", ""), str(Path(sys.executable).parent), *folders]
    return shutil.which(program, path=os.pathsep.join(path))


def said(*command: str) -> str:
    """Returns the last line of what a program prints, or "unknown"."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (done.stdout.strip().splitlines() or ["unknown"])[-1]
