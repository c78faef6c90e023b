"""The build decides rightly whether and how the CUDA backend is built, and says why."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shared.helpers import shell_program

ROOT = Path(__file__).resolve().parents[2]
PLAN = ROOT / "csrc" / "cmake" / "cuda_plan.cmake"
CMAKE = shutil.which("cmake")
pytestmark = pytest.mark.skipif(not (PLAN.exists() and CMAKE), reason="no source tree or no CMake")
OFF = "it is switched off by SNNLSTM_CUDA or by a wheel named +cpu"
ALL = "75;80;86;89;90;100;120"


@pytest.fixture
def add(tmp_path):
    """Adds a program to a machine which has neither CUDA nor a GPU, and returns its path."""

    def add(name: str, prints: str) -> str:
        return shell_program(tmp_path / name, f"echo '{prints}'")

    return add


@pytest.fixture
def plan(tmp_path):
    """Returns nvcc or "", the compute capabilities, and the reason."""
    script = tmp_path / "plan.cmake"
    script.write_text(
        f"set(Python_EXECUTABLE {sys.executable})\n"
        + PLAN.read_text().replace("/usr/local/cuda/", f"{tmp_path}/default/")
        + 'message("${NVCC}|${NVCC_ARCHS}|${CUDA_WHY}")\n'
    )

    def plan(**environment: str) -> tuple[str, str, str]:
        environment |= {"PATH": f"{tmp_path}/path", "PYTHONPATH": f"{tmp_path}/site"}
        command = [CMAKE, "-P", script]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        text = " ".join(done.stderr.split())
        return ("error", "", text) if done.returncode else tuple(text.split("|"))

    return plan


@pytest.fixture
def in_python(tmp_path):
    """Returns what tools/local_version.py and the tests' own tools find on the same machine."""
    program = f"""
from tests.emulator import gpu_tools
from tools import local_version

local_version.TOOLKIT = "{tmp_path}/default"
(found,) = {{gpu_tools.find("nvcc"), next(iter(local_version.nvcc() or ()), None)}}
print(found or "")
"""

    def in_python(**environment: str) -> str:
        environment |= {"PATH": f"{tmp_path}/path", "PYTHONPATH": f"{tmp_path}/site"}
        command = [sys.executable, "-c", program]
        return subprocess.check_output(command, cwd=ROOT, env=environment, text=True).strip()

    return in_python


def test_the_first_compiler_counts(add, plan, in_python, tmp_path):
    """Of CUDACXX, CUDA_HOME, PATH, the pip package and the default place."""
    environment = {"SNNLSTM_CUDA": "on"}
    assert plan()[2] == "no CUDA compiler found"
    for place, variable in (
        ("default/bin", ""), ("site/nvidia/cu13/bin", ""), ("path", ""), ("home/bin", "CUDA_HOME"),
        ("named", "CUDACXX"),
    ):  # fmt: skip
        nvcc = add(f"{place}/nvcc", "release 13.0, V13.0.88")
        environment[variable or "UNUSED"] = nvcc.removesuffix("/bin/nvcc")
        assert plan(**environment) == (nvcc, ALL, nvcc)
        assert in_python(**environment) == nvcc
    nvcc = str(tmp_path / "site/nvidia/cu13/bin/nvcc")
    assert plan(**environment | {"SNNLSTM_CUDA": "pip"}) == (nvcc, ALL, nvcc)
    assert plan(**environment | {"SNNLSTM_CUDA": "off"}) == ("", "", OFF)
    failed = "building them failed; SNNLSTM_CUDA=on shows why"
    assert plan(**environment | {"SNNLSTM_CUDA": "failed"})[::2] == ("", failed)


def test_a_compiler_that_does_not_serve_is_passed_over(add, plan, in_python, tmp_path):
    """Ubuntu 22.04 has nvcc 11.5 on PATH; images without a compiler set CUDA_HOME all the same."""
    add("path/nvidia-smi", "8.9")
    old = add("path/nvcc", "release 11.5, V11.5.119")
    too_old = f"{old} is of CUDA 11.5, and the kernels need 11.8 or newer"
    for environment in ({}, {"CUDACXX": old}, {"CUDA_HOME": str(tmp_path / "nothing")}):
        assert plan(**environment)[::2] == ("", f"no CUDA compiler found; {too_old}")
        assert in_python(**environment) == ""
    assert too_old in plan(SNNLSTM_CUDA="on")[2]
    broken = add("home/bin/nvcc", "cannot execute cicc")
    assert f"{broken} --version says: cannot execute cicc" in plan(CUDA_HOME=f"{tmp_path}/home")[2]
    newer = add("default/bin/nvcc", "release 11.8, V11.8.89")
    assert plan(CUDA_HOME=f"{tmp_path}/home")[:2] == (newer, "89")
    assert in_python(CUDA_HOME=f"{tmp_path}/home") == newer
    add("path/nvcc", "release 12.9, V12.9.41")  # a wheel's name may ask for another CUDA
    assert plan(SNNLSTM_LOCAL_VERSION="cu11")[0] == newer
    program = f"from tools import local_version; local_version.TOOLKIT = '{tmp_path}/default'; "
    program += "print(*(local_version.nvcc(major)[1] for major in (None, 12, 11)))"
    environment = {"PATH": f"{tmp_path}/path"}
    done = subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, env=environment)
    assert done.split() == [b"12", b"12", b"11"]


@pytest.mark.parametrize(
    ("gpus", "cuda", "archs", "tag", "planned", "why"),
    [
        ("", "", "", "", "", "no GPU of 7.5 or newer; SNNLSTM_CUDA=on builds it for all"),
        ("9.0\n12.0\n9.0\n7.0", "", "", "", "90;120", "nvcc"),
        ("9.0", "on", "", "cu13", ALL, "nvcc"),
        ("", "", "80;86", "", "80;86", "nvcc"),
        ("8.9", "on", "native", "", "89", "nvcc"),
        ("", "", "native", "", "error", "nvidia-smi shows no GPU"),
        ("", "maybe", "", "", "error", "'maybe'; accepted: on, off, pip"),
        ("", "pip", "", "", "error", "SNNLSTM_CUDA=pip, but no CUDA compiler found"),
        ("", "on", "", "cu12", "error", "is of CUDA 13.0, but the wheel's name is cu12"),
        ("", "on", "", "cpu", "error", "SNNLSTM_CUDA=on, but it is switched off"),
    ],
)
def test_a_build_is_for_the_gpus_that_are_asked_for(
    add, plan, gpus, cuda, archs, tag, planned, why
):
    add("path/nvcc", "release 13.0")
    add("path/nvidia-smi", gpus)
    wishes = {"SNNLSTM_CUDA": cuda, "SNNLSTM_CUDA_ARCHS": archs, "SNNLSTM_LOCAL_VERSION": tag}
    nvcc, actual, reason = plan(**wishes)
    assert planned == (nvcc if nvcc == "error" else actual if nvcc else "")
    assert why in reason
