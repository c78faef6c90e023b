"""Builds the emulated kernels with tests/emulator/Makefile."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pybind11

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = Path(os.environ.get("SNNLSTM_EMULATOR_CACHE", ROOT / "build" / "emulator"))


def run(command: list[Any], errors: bool = False, **options: Any) -> str:
    """Returns what a program prints, with its errors if they are wanted, and raises if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stderr + done.stdout if errors else done.stdout


def build(name: str) -> Path:
    """Brings a library, "core" or "own", up to date, and returns its path."""
    includes = f"-I{sysconfig.get_path('include')} -I{pybind11.get_include()}"
    command = ["make", "-sf", "tests/emulator/Makefile", f"-j{os.cpu_count()}", name]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # parallel test workers want the same objects
        command += [f"CACHE={CACHE}", f"INCLUDES={includes}"]
        return Path(run(command, cwd=ROOT, env=environment).split()[-1])
