"""What scikit-build-core asks before a build: the version, and packages that the build needs.

The rules for CUDA's compiler are here, too: `python tools/local_version.py` prints what a build
compiles, and programs that look for the compiler import this module.
"""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

OLDEST_NVCC = 11, 8  # the first with cudaLaunchKernelExC and __grid_constant__
ARCHS = 75, 80, 86, 89, 90, 100, 120
PTX = 75, 80
"""Translating C++ to PTX takes two thirds of nvcc's time. Therefore GPUs without cp.async share one
PTX, and those with it another. Each GPU still has its own machine code."""
TOOLKIT = "/usr/local/cuda"  # where NVIDIA's installers put it
DRIVER = 580  # the oldest for CUDA 13, the only one whose compiler PyPI has
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
    if sys.platform != "linux" or not runs_cuda_13() or nvcc():
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


def runs_cuda_13() -> bool:
    """Tells whether nvidia-smi finds a GPU whose driver runs code of PyPI's compiler."""
    major = re.match(r"\d+", printed([*QUERY, "--query-gpu=driver_version"]))
    return bool(major) and int(major[0]) >= DRIVER


def places(pip: bool = False) -> list[Path]:
    """Returns the folders in which a build looks for CUDA's programs, in this order.

    pip: only those of pip's nvidia-cuda-nvcc.
    """
    package = importlib.util.find_spec("nvidia")
    sites = package.submodule_search_locations if package else None
    packages = [place for site in sites or () for place in Path(site).glob("cu*/bin")]
    if pip:
        return packages
    homes = os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")
    path = os.environ.get("PATH", "").split(os.pathsep)
    return [*(Path(home, "bin") for home in homes if home), *map(Path, path), *packages,
            Path(TOOLKIT, "bin")]  # fmt: skip


class Compiler(NamedTuple):
    """A CUDA compiler, its CUDA, or (0, 0) if it does not tell, and what it says of its version."""

    path: str
    release: tuple[int, int]
    says: str

    @property
    def why(self) -> str:
        """Returns the beginning of a reason against it."""
        return f"{self.path} is of CUDA {self.release[0]}.{self.release[1]}"

    def against(self, tag: str = "") -> str:
        """Returns why a build does not take it, or "". tag: of a wheel, such as cu13."""
        if not any(self.release):
            text = re.sub(r'[^ -~]+|["\\]', " ", self.says)  # build_info.h quotes it
            return f"{self.path} --version says: {text.strip()}"
        if self.release < OLDEST_NVCC:
            return f"{self.why}, and the kernels need {'.'.join(map(str, OLDEST_NVCC))} or newer"
        if re.match(r"cu\d", tag) and tag != f"cu{self.release[0]}":
            return f"{self.why}, but the wheel's name is {tag}"
        return ""


def compilers(pip: bool = False) -> Iterator[Compiler]:
    """Yields each CUDA compiler in the order in which a build looks. pip: only those of pip."""
    named = os.environ.get("CUDACXX")  # only this one: another would be a surprise
    found = [str(place / "nvcc") for place in places(pip)]
    for path in [shutil.which(named)] if named and not pip else found:
        if path and os.path.exists(path):
            says = printed([path, "--version"], failed=True)
            release = re.search(r"release (\d+)\.(\d+)", says)
            yield Compiler(path, (int(release[1]), int(release[2])) if release else (0, 0), says)


def nvcc() -> str | None:
    """Returns the CUDA compiler that a build takes, or None."""
    return next((one.path for one in compilers() if not one.against()), None)


def gpus() -> list[int]:
    """Returns the compute capabilities of this machine's GPUs that a build serves: 89 for 8.9."""
    found = re.findall(r"(?m)^(\d+)\.(\d)$", printed([*QUERY, "--query-gpu=compute_cap"]))
    known = dict.fromkeys(int(major + minor) for major, minor in found)
    return [gpu for gpu in known if gpu >= ARCHS[0]]


def plan() -> tuple[str, list[str], str, str]:
    """Returns nvcc or "", its flags, the GPUs that they are for in words, and the reason for all.

    The variables of the environment that CONTRIBUTING.md lists decide. Exits with a message if they
    ask for what is not there.
    """
    names = "SNNLSTM_CUDA", "SNNLSTM_CUDA_ARCHS", "SNNLSTM_LOCAL_VERSION"
    asked, archs, tag = (os.environ.get(name, "") for name in names)
    wish, found, why = asked.lower(), None, "no CUDA compiler found"
    if wish not in ("on", "off", "pip", "failed", ""):  # tools/backend.py sets it to failed
        sys.exit(f"SNNLSTM_CUDA is '{asked}'; accepted: on, off, pip, or unset (automatic)")
    if not re.fullmatch(r"[\d;]*|native", archs):
        sys.exit(f"SNNLSTM_CUDA_ARCHS is '{archs}'; accepted: such as 80;90, or native")
    if wish == "off" or tag == "cpu":
        why = "it is switched off by SNNLSTM_CUDA or by a wheel named +cpu"
    elif wish == "failed":
        why = "building them failed; SNNLSTM_CUDA=on shows why"
    elif sys.platform != "linux":
        why = "it is built only on Linux"
    else:
        for one in compilers(wish == "pip"):
            if not (against := one.against(tag)):
                found, why = one.path, one.path
                break
            why += f"; {against}"
    numbers = list(map(int, re.findall(r"\d+", archs))) or list(ARCHS if wish and not archs else ())
    # All GPUs take minutes, so a plain `pip install .` builds only for those of this machine.
    if found and not numbers and not (numbers := gpus()):
        why = "nvidia-smi shows no GPU of 7.5 or newer; SNNLSTM_CUDA=on builds it for all, "
        found, why = None, f"{why}with {found}"
    if found:
        flags, served = machine_code(found, numbers)
        if flags:
            return found, flags, served, why
        why = f"{found} knows none of the GPUs {', '.join(map(str, numbers))} (it knows {served})"
    asks = wish in ("on", "pip") or bool(re.match(r"cu\d", tag))
    if asks or archs == "native" or (found and archs):
        wanted = f"SNNLSTM_CUDA_ARCHS={archs}" if archs and not wish else f"SNNLSTM_CUDA={wish}"
        sys.exit(
            f"{wanted}, but {why}.\nSet CUDACXX=/path/to/nvcc, or SNNLSTM_CUDA=pip to "
            "have pip fetch CUDA 13's compiler for the build (not with --no-build-isolation), or "
            "SNNLSTM_CUDA=off."
        )
    return "", [], "", why


def machine_code(nvcc: str, archs: Iterable[int]) -> tuple[list[str], str]:
    """Returns flags for machine code of those GPUs that nvcc knows, and for PTX; and what they are.

    If it knows none, and they are not newer, there are no flags, and the text has those it knows.
    The PTX of 8.0 is kept, because it serves most GPUs: the driver translates it for GPUs that are
    not listed.
    """
    text = printed([nvcc, "--list-gpu-arch"], failed=True)
    known = sorted(map(int, re.findall(r"compute_(\d+)", text)))
    served = [arch for arch in archs if arch in known and arch >= PTX[0]]
    code: dict[int, list[str]] = {ptx: [] for ptx in PTX}
    for arch in served:
        code[max(ptx for ptx in PTX if ptx <= arch)].append(f"sm_{arch}")
    newer = any(known and arch > known[-1] for arch in archs)
    ways = (80, code[80]), (80, newer), (75, code[75])
    kept = next((ptx for ptx, fits in ways if fits), None)
    if kept is None:
        return [], ", ".join(map(str, known)) or "none"
    code[kept].append(f"compute_{kept}")
    flags = [f"-gencode=arch=compute_{ptx},code=[{','.join(names)}]"
             for ptx, names in code.items() if names]  # fmt: skip
    return flags, " ".join([*map(str, served), f"{kept}+ptx"])


def printed(command: list[str], failed: bool = False) -> str:
    """Returns what a command prints, or "" if it fails. failed: with errors, even if it fails."""
    errors = subprocess.STDOUT if failed else subprocess.DEVNULL
    try:
        return subprocess.run(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, check=not failed
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


if __name__ == "__main__":  # CMake and the Makefile ask for the plan
    path, flags, archs, why = plan()
    print(path, ";".join(flags), archs, why, sep="\n")
