"""What scikit-build-core asks before a build: the version, and packages that the build needs.

Programs that look for a GPU's driver and compiler ask here, too. csrc/cmake/cuda_plan.cmake has the
same rules for the compiler, because a build has nothing but CMake's language.
"""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

OLDEST_NVCC = 11, 8
TOOLKIT = "/usr/local/cuda"  # where NVIDIA's installers put it
# The CUDA of torch and of nvcc for drivers from a number on. PyPI has both for CUDA 13 alone. The
# indexes of torch have torch for the others: cu128 up to 2.11, and cu126 up to 2.14.
DRIVERS = {580: 13.0, 570: 12.8, 525: 12.6}
QUERY = ("nvidia-smi", "--format=csv,noheader")
PYPI_NVCC = ("nvidia-cuda-nvcc==13.*", "nvidia-cuda-runtime==13.*", "nvidia-cuda-cccl==13.*")


def dynamic_metadata(settings: dict, project: dict) -> dict[str, str]:
    """Returns the version: that of snnlstm, with +SNNLSTM_LOCAL_VERSION if it is set."""
    version = runpy.run_path("snnlstm/version.py")["__version__"]
    local = os.environ.get("SNNLSTM_LOCAL_VERSION")
    return {"version": f"{version}+{local}" if local else version}


def get_requires_for_dynamic_metadata(settings: dict) -> list[str]:
    """Asks for PyPI's compiler if SNNLSTM_CUDA=pip, or if nothing is set and it alone serves a GPU.

    An installation must not fail because an index has no compiler, so pip tries that index first.
    """
    if os.environ.get("SNNLSTM_CUDA", "").lower() == "pip":
        return list(PYPI_NVCC)
    set_by_user = "SNNLSTM_CUDA", "SNNLSTM_LOCAL_VERSION", "CUDACXX"
    if any(map(os.environ.get, set_by_user)) or os.environ.get("SNNLSTM_CORE", "").lower() == "off":
        return []
    if sys.platform != "linux" or cuda() < 13 or nvcc():
        return []
    if can_be_fetched(PYPI_NVCC):
        return list(PYPI_NVCC)
    print("The CUDA kernels are not built, because pip finds no package of their compiler.")
    return []


def can_be_fetched(packages: tuple[str, ...]) -> bool:
    """Tells whether the pip of this Python finds all packages; it installs nothing."""
    # In an isolated build PYTHONPATH hides the site-packages in which pip lies.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps"]
    tried = subprocess.run([*pip, *packages], env=environment, capture_output=True, check=False)
    return tried.returncode == 0


def cuda() -> float:
    """Returns the CUDA for this machine's driver, or 0 if nvidia-smi finds no GPU or an old one."""
    major = re.match(r"\d+", printed([*QUERY, "--query-gpu=driver_version"]))
    return next(
        (version for oldest, version in DRIVERS.items() if major and int(major[0]) >= oldest), 0.0
    )


def torch_for(cuda: float) -> list[str]:
    """Returns pip's arguments for a torch of this CUDA; 0 means any torch."""
    index = ["--index-url", f"https://download.pytorch.org/whl/cu{10 * cuda:.0f}"]
    return ["torch", *index * (0 < cuda < 13)]


def places() -> list[Path]:
    """Returns the folders in which a build looks for CUDA's programs, in this order."""
    homes = os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")
    package = importlib.util.find_spec("nvidia")
    sites = package.submodule_search_locations if package else None
    return [
        *(Path(home, "bin") for home in homes if home),
        *map(Path, os.environ.get("PATH", "").split(os.pathsep)),
        *(place for site in sites or () for place in Path(site).glob("cu*/bin")),
        Path(TOOLKIT, "bin"),
    ]


def compilers() -> Iterator[tuple[str, tuple[int, int]]]:
    """Yields each CUDA compiler, with its CUDA version, in the order in which a build looks."""
    named = os.environ.get("CUDACXX")
    candidates = [shutil.which(named)] if named else [str(place / "nvcc") for place in places()]
    for candidate in candidates:
        release = re.search(r"release (\d+)\.(\d+)", printed([candidate or "", "--version"]))
        if candidate and release:
            yield candidate, (int(release[1]), int(release[2]))


def nvcc(major: int | None = None) -> tuple[str, int] | None:
    """Returns the CUDA compiler that a build takes, and its CUDA major version, or None.

    major: the only one that serves, if it is given.
    """
    for path, release in compilers():
        if release >= OLDEST_NVCC and major in (None, release[0]):
            return path, release[0]
    return None


def serving(cuda: float) -> tuple[str | None, str]:
    """Returns the compiler for this machine's GPUs and driver, and why others do not serve.

    cuda: as `cuda` returns it. A compiler that does not know a GPU makes PTX for it. That is taken
    where PyPI's compiler does not serve the driver.
    """
    found = re.findall(r"(?m)^\d+\.\d$", printed([*QUERY, "--query-gpu=compute_cap"]))
    gpus, only_ptx, reasons = [gpu for gpu in found if float(gpu) >= 7.5], None, []
    for path, release in compilers():
        why = f"{path} is of CUDA {release[0]}.{release[1]}, and "
        known = printed([path, "--list-gpu-arch"]).split()
        unknown = [gpu for gpu in gpus if f"compute_{gpu.replace('.', '')}" not in known]
        if release < OLDEST_NVCC:
            why += f"the kernels need {OLDEST_NVCC[0]}.{OLDEST_NVCC[1]} or newer"
        elif release[0] > cuda:
            why += f"the driver runs {cuda}"
        elif unknown:
            why += f"does not know GPUs of {', '.join(unknown)}"
            only_ptx = only_ptx or path
        else:
            return path, ""
        reasons.append(why)
    return only_ptx if cuda < 13 else None, "; ".join(reasons)


def printed(command: list[str]) -> str:
    """Returns what a command prints, or "" if it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


if __name__ == "__main__":  # the Makefile asks: prints the compiler, of a CUDA if it is given
    print(*(nvcc(*map(int, sys.argv[1:])) or ())[:1])
