"""Builds the emulated kernels with tests/emulator/Makefile."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sysconfig
from pathlib import Path

import pybind11

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = Path(os.environ.get("SNNLSTM_EMULATOR_CACHE", ROOT / "build" / "emulator"))


class BuildError(RuntimeError):
    """Has the compiler's output."""


def build(name: str) -> Path:
    """Brings a library, "core" or "own", up to date, and returns its path."""
    includes = f"-I{sysconfig.get_path('include')} -I{pybind11.get_include()}"
    command = ["make", "-sf", "tests/emulator/Makefile", f"-j{os.cpu_count()}", name]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # parallel test workers want the same objects
        done = subprocess.run(
            [*command, f"CACHE={CACHE}", f"INCLUDES={includes}"],
            cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return Path(done.stdout.split()[-1])
