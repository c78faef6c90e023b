"""Lists what `make gpu` needs and this machine lacks, and installs what pip can install.

Only Python's own modules are imported, because nothing else may be there.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from tools import local_version

# The modules and programs that the steps need, as pip installs them.
NEEDED = {
    "pybind11": "pybind11>=2.13", "pytest": "pytest>=8", "hypothesis": "hypothesis>=6.100",
    "numpy": "numpy", "pandas": "pandas>=2", "snntorch": "snntorch==1.0.0", "tqdm": "tqdm",
    "cmake": "cmake>=3.24", "ninja": "ninja",
}  # fmt: skip
APT = "on Debian and Ubuntu sudo apt install"
TOOLKIT = """Either of these needs no root; then CUDA_HOME=$HOME/cuda make gpu
    sh cuda_{0}*_linux.run --silent --toolkit --toolkitpath=$HOME/cuda
        (the runfile is from https://developer.nvidia.com/cuda-toolkit-archive)
    conda create -p $HOME/cuda -c conda-forge cuda-toolkit cuda-version={0}"""


def lacking(rehearsal: bool = False, core: Path | None = None, fills: bool = False) -> list[str]:
    """Returns a line for each thing that is missing, with what installs it, unless `fill` does."""
    python, has, problems = sys.executable, importlib.util.find_spec, list[str]()
    packages = [package for name, package in NEEDED.items() if not (has(name) or find(name))]
    if packages and not fills:
        problems.append(f"missing: {python} -m pip install {shlex.join(packages)}")
    # nvcc compiles its host code with g++, whatever compiles the rest.
    hosts = [os.environ.get("CUDAHOSTCXX", "g++")]
    hosts = [os.environ.get("CXX", "c++"), "g++", "clang++"] if rehearsal else hosts
    if not (core or any(map(find, hosts))):
        problems.append(f"no C++ compiler {hosts[0]}: {APT} g++")
    if not (core or Path(sysconfig.get_path("include"), "Python.h").exists()):
        problems.append(f"no Python.h of {python}: {APT} python3-dev")
    if fills and not has("ensurepip"):
        problems.append(f"no module ensurepip of {python}: {APT} python3-venv")
    cuda = 0.0 if rehearsal else local_version.cuda()
    if not (has("torch") or fills):
        words = shlex.join(local_version.torch_for(cuda))
        problems.append(f"no torch: {python} -m pip install {words}, or make gpu PYTHON=...")
    if rehearsal:
        return problems
    if has("torch"):
        import torch

        if torch.cuda.is_available():
            cuda = cuda or float(torch.version.cuda)  # there may be no nvidia-smi
        elif not fills:
            built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
            problems.append(f"torch {torch.__version__} ({built}) of {python} sees no GPU")
    if not cuda:
        problems.append("no GPU with a driver from 525 on, says nvidia-smi; ")
        problems[-1] += 'ARGS="--rehearse" goes through the steps without one'
    elif not core:
        nvcc, why = local_version.serving(cuda)
        if nvcc is None and cuda < 13:
            text = "; ".join(filter(None, [why, "PyPI has none of CUDA 12"]))
            problems.append(f"no nvcc for this driver: {text}. {TOOLKIT.format(cuda)}")
        elif nvcc is None and not fills:
            pip = f"{python} -m pip install {shlex.join(local_version.PYPI_NVCC)}"
            problems.append(f"no nvcc: {pip}{f' ({why})' * bool(why)}")
    return problems


def fill(venv: Path, core: Path | None) -> str:
    """Installs what is missing into an environment, torch first, and returns the Python there.

    A new environment sees the torch of this Python, if that one serves.
    """
    python, cuda = str(venv / "bin" / "python"), local_version.cuda() or 99.0
    pip, nvcc = (python, "-m", "pip", "install"), core or local_version.serving(cuda)[0]
    # A torch without CUDA, or of one that is newer than the driver, is replaced.
    fits = f"import torch; assert 0 < float(torch.version.cuda or 0) < {int(cuda) + 1}"

    def run(*command: str) -> None:
        if subprocess.run(command, check=False).returncode:
            sys.exit(f"failed: {shlex.join(command)}")

    def serves(python: str) -> bool:
        command = [python, "-c", fits]
        return not subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode

    if not venv.exists():
        shared = ["--system-site-packages"] * serves(sys.executable)
        run(sys.executable, "-m", "venv", *shared, str(venv))
    if not serves(python):
        run(*pip, "--force-reinstall", *local_version.torch_for(cuda))
    run(*pip, *NEEDED.values(), "pytest-xdist", *(() if nvcc else local_version.PYPI_NVCC))
    return python


def building(
    core: Path | None, tree: Path, build: Path, gpus: Iterable[int], must: bool
) -> list[tuple[str, str]]:
    """Returns names and commands of what builds the core, and goes on where the last build stopped.

    It is built for these GPUs, with CUDA if it must be, or else if there is a compiler. Of the CPU
    kernels it has the baseline alone: that takes a tenth of the time of a release. A core that was
    built elsewhere is copied.
    """
    if core:
        return [("core", shlex.join(["cp", str(core), f"{tree}/snnlstm"]))]
    import pybind11

    archs = [gpu for gpu in sorted(gpus) if gpu >= 75]
    objects = build / "-".join([sys.implementation.cache_tag, *map(str, archs)])
    settings = {
        "Python_EXECUTABLE": sys.executable, "pybind11_DIR": pybind11.get_cmake_dir(),
        "SNNLSTM_INPLACE": "ON", "SNNLSTM_BASELINE_ALONE": "ON", "SNNLSTM_TESTING": "ON",
        "SNNLSTM_CUDA_ARCHS": ";".join(map(str, archs)),
        "CMAKE_CUDA_FLAGS": "-lineinfo",  # so that the sanitizers and profilers name lines
    }  # fmt: skip
    if must:
        settings["SNNLSTM_CUDA"] = "ON"
        nvcc, _ = local_version.serving(local_version.cuda() or 99)
        settings |= {"CMAKE_CUDA_COMPILER": nvcc} if nvcc else {}
    words = ["cmake", "-S", f"{tree}/csrc", "-B", str(objects), "-G", "Ninja"]
    words += [f"-D{name}={value}" for name, value in settings.items()]
    return [
        ("configure", shlex.join(words)),
        ("build", shlex.join(["cmake", "--build", str(objects)])),
    ]


def find(program: str) -> str | None:
    """Finds a program on PATH, beside this Python, or among CUDA's."""
    path = [os.environ.get("PATH", ""), Path(sys.executable).parent, *local_version.places()]
    return shutil.which(program, path=os.pathsep.join(map(str, path)))
