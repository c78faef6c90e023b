"""Says what `make gpu` lacks on this machine, all in one message, with the line that installs it.

This file imports Python's own modules alone, so that a machine with nothing gets the message, too.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

# The modules and programs that the steps need, as pip installs them. The core is built with CMake
# alone (gpu_build.py), which says by itself if it is too old.
NEEDED = {
    "pybind11": "pybind11>=2.13", "pytest": "pytest>=8", "hypothesis": "hypothesis>=6.100",
    "numpy": "numpy", "pandas": "pandas>=2", "snntorch": "snntorch==1.0.0", "tqdm": "tqdm",
}  # fmt: skip
PROGRAMS = {"cmake": "cmake>=3.24", "ninja": "ninja"}
NVCC = '"nvidia-cuda-nvcc==13.*" "nvidia-cuda-runtime==13.*" "nvidia-cuda-cccl==13.*"'
COMPILERS = ("c++", "g++", "clang++")  # in CMake's order


def lacking(rehearsal: bool = False) -> str | None:
    """Returns why the steps cannot run here, or None. A rehearsal needs neither GPU nor nvcc."""
    if not importlib.util.find_spec("torch"):
        return f"no torch: {sys.executable} has none; make gpu PYTHON=... takes another Python"
    if not rehearsal and (no_gpu := without_gpu()):
        return no_gpu
    missing = [pinned for name, pinned in NEEDED.items() if not importlib.util.find_spec(name)]
    missing += [pinned for name, pinned in PROGRAMS.items() if not find(name)]
    line = " ".join(f'"{pinned}"' if ">" in pinned else pinned for pinned in missing)
    others = []
    if not os.environ.get("CXX") and not any(map(find, COMPILERS)):
        others.append("a C++ compiler: apt-get install g++")
    if not find("timeout"):
        others.append("timeout: apt-get install coreutils")
    if not rehearsal:
        if nvcc() is None and (driver_version() or 13000) >= 13000:
            line = f"{line} {NVCC}".strip()
        elif trouble := nvcc_trouble():
            others.append(trouble)
    if not line and not others:
        return None
    text = "missing:"
    if line:
        text += f"\n  {sys.executable} -m pip install {line}"
    text += "".join(f"\n  {other}" for other in others)
    return text


def without_gpu() -> str | None:
    """Returns why torch sees no GPU, or None."""
    import torch

    if torch.cuda.is_available():
        return None
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return (
        f"no GPU: torch {torch.__version__} ({built}) of {sys.executable} sees none; "
        'ARGS="--rehearse" goes through the steps without one'
    )


def before(variable: str, folder: Path) -> str:
    """Returns the folders of an environment variable, with `folder` before them."""
    return os.pathsep.join(filter(None, (str(folder), os.environ.get(variable))))


def find(program: str) -> str | None:
    """Finds a program on PATH, beside this Python, or beside nvcc."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    folders = [f"{home}/bin" for home in [*homes, "/usr/local/cuda"] if home]
    path = [os.environ.get("PATH", ""), str(Path(sys.executable).parent), *folders]
    return shutil.which(program, path=os.pathsep.join(path))


def nvcc() -> str | None:
    """Finds nvcc where setup.py looks for it, PyPI's packages included."""
    packages = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin/nvcc"))
    return os.environ.get("CUDACXX") or find("nvcc") or next(map(str, packages), None)


def nvcc_trouble() -> str | None:
    """Returns why no nvcc here makes code that the driver runs, or None."""
    compiler, driver = nvcc(), driver_version()
    newest = f"{driver // 1000}.{driver % 1000 // 10}" if driver else "unknown"
    if compiler is None:
        return (
            f"nvcc of CUDA 12, since the driver runs CUDA {newest} and PyPI has nvcc from 13 on: "
            "apt-get install nvidia-cuda-toolkit, or NVIDIA's installer of CUDA 12"
        )
    release = re.search(r"release (\d+)\.(\d+)", subprocess_text(compiler, "--version"))
    if release and (int(release[1]), int(release[2])) < (11, 8):
        return (
            f"nvcc 11.8 or newer: {compiler} is of CUDA {release[1]}.{release[2]}; CUDACXX=... or "
            "CUDA_HOME=... names another nvcc"
        )
    if driver and release and int(release[1]) > driver // 1000:
        return (
            f"an older nvcc, or a newer driver: {compiler} is of CUDA {release[1]}, and the driver "
            f"runs CUDA {newest}; CUDACXX=... names another nvcc"
        )
    return None


def driver_version() -> int | None:
    """Returns the newest CUDA that the driver runs, as 1000 * major + 10 * minor, or None."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else version.value


def subprocess_text(*command: str) -> str:
    """Returns what a program prints, or an empty text if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def said(*command: str) -> str:
    """Returns the last line of what a program prints, or "unknown"."""
    return (subprocess_text(*command).splitlines() or ["unknown"])[-1]
