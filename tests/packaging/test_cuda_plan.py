"""The build decides rightly whether and how the CUDA backend is built, and says why."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shared.helpers import long, shell_program
from tools import local_version

ROOT = Path(__file__).resolve().parents[2]
OFF = "it is switched off by SNNLSTM_CUDA or by a wheel named +cpu"
ALL = "75 80 86 89 90 100 120 80+ptx"


@pytest.fixture
def add(tmp_path):
    """Adds a program to a machine which has neither CUDA nor a GPU, and returns its path.

    It prints a text; a compiler knows these GPUs, too.
    """

    def add(name: str, prints: str, known: str = "75 80 86 89 90 100 120") -> str:
        archs = "".join(f"compute_{arch}\n" for arch in known.split())
        listed = f"case $1 in --list-gpu-arch) printf '{archs}';; *) echo '{prints}';; esac"
        return shell_program(tmp_path / name, listed)

    return add


@pytest.fixture
def plan(tmp_path):
    """Returns nvcc or "", the compute capabilities, and the reason."""
    program = f"""
from tools import local_version
local_version.TOOLKIT = "{tmp_path}/default"
print(*local_version.plan(), sep="|")
"""

    def plan(**environment: str) -> tuple[str, str, str]:
        environment |= {"PATH": f"{tmp_path}/path", "PYTHONPATH": f"{tmp_path}/site"}
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            return "error", "", " ".join(done.stderr.split())
        nvcc, _, *rest = done.stdout.strip("\n").split("|")
        return nvcc, *rest

    return plan


def test_the_first_compiler_that_is_found_is_used(add, plan, tmp_path):
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
    nvcc = str(tmp_path / "site/nvidia/cu13/bin/nvcc")
    assert plan(**environment | {"SNNLSTM_CUDA": "pip"}) == (nvcc, ALL, nvcc)
    assert plan(**environment | {"SNNLSTM_CUDA": "off"}) == ("", "", OFF)
    failed = "building them failed; SNNLSTM_CUDA=on shows why"
    assert plan(**environment | {"SNNLSTM_CUDA": "failed"}) == ("", "", failed)


def test_a_compiler_that_does_not_serve_is_passed_over(add, plan, tmp_path):
    """Ubuntu 22.04 has nvcc 11.5 on PATH; images without a compiler set CUDA_HOME all the same."""
    add("path/nvidia-smi", "8.9")
    old = add("path/nvcc", "release 11.5, V11.5.119")
    too_old = f"{old} is of CUDA 11.5, and the kernels need 11.8 or newer"
    for environment in ({}, {"CUDACXX": old}, {"CUDA_HOME": str(tmp_path / "nothing")}):
        assert plan(**environment) == ("", "", f"no CUDA compiler found; {too_old}")
    assert too_old in plan(SNNLSTM_CUDA="on")[2]
    broken = add("home/bin/nvcc", "cannot execute cicc")
    assert f"{broken} --version says: cannot execute cicc" in plan(CUDA_HOME=f"{tmp_path}/home")[2]
    newer = add("default/bin/nvcc", "release 11.8, V11.8.89")
    assert plan(CUDA_HOME=f"{tmp_path}/home")[:2] == (newer, "89 80+ptx")
    add("path/nvcc", "release 12.9, V12.9.41")  # a wheel's name may ask for another CUDA
    assert plan(SNNLSTM_LOCAL_VERSION="cu11")[0] == newer


@pytest.mark.parametrize(
    ("asked", "known", "flags", "words"),
    [
        ((75, 86, 90), "75 80 86 90", ("75 sm_75", "80 sm_86,sm_90,compute_80"), "75 86 90 80+ptx"),
        ((90, 100), "80 90", ("80 sm_90,compute_80",), "90 80+ptx"),
        ((75,), "75 80", ("75 sm_75,compute_75",), "75 75+ptx"),
        ((75, 120), "75 90", ("75 sm_75", "80 compute_80"), "75 80+ptx"),  # newer than nvcc
        ((120,), "75 90", ("80 compute_80",), "80+ptx"),
    ],
)  # fmt: skip
def test_gpus_that_the_compiler_does_not_know_get_ptx(add, asked, known, flags, words):
    nvcc = add("nvcc", "", known)
    code = [f"-gencode=arch=compute_{{}},code=[{flag[3:]}]".format(flag[:2]) for flag in flags]
    assert local_version.machine_code(nvcc, asked) == (code, words)
    assert local_version.machine_code(nvcc, (70,)) == ([], known.replace(" ", ", "))


@pytest.mark.parametrize(
    ("gpus", "cuda", "archs", "tag", "planned", "why"),
    [
        ("", "", "", "", "", "no GPU of 7.5 or newer; SNNLSTM_CUDA=on builds it for all"),
        ("9.0\n12.0\n9.0\n7.0", "", "", "", "90 120 80+ptx", "nvcc"),
        ("9.0", "on", "", "cu13", ALL, "nvcc"),
        ("", "", "80;86", "", "80 86 80+ptx", "nvcc"),
        ("8.9", "on", "native", "", "89 80+ptx", "nvcc"),
        ("", "", "native", "", "error", "CUDA_ARCHS=native, but nvidia-smi shows no GPU"),
        ("", "", "70", "", "error", "nvcc knows none of the GPUs 70 (it knows 75, 80, 86,"),
        ("", "maybe", "", "", "error", "'maybe'; accepted: on, off, pip"),
        ("", "", "8.6", "", "error", "SNNLSTM_CUDA_ARCHS is '8.6'; accepted: such as 80;90"),
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


def test_a_compiler_that_lists_no_gpu_fails_only_a_build_that_asks_for_it(add, plan):
    add("path/nvidia-smi", "8.9")
    nvcc = add("path/nvcc", "release 13.0", "")
    assert plan() == ("", "", f"{nvcc} knows none of the GPUs 89 (it knows none)")
    assert plan(SNNLSTM_CUDA="on")[0] == "error"


@long
@pytest.mark.parametrize("wish", ["off", "on"])
def test_cmake_follows_the_plan(wish, tmp_path):
    pybind11 = pytest.importorskip("pybind11")
    if not shutil.which("cmake") or (wish == "on" and not local_version.nvcc()):
        pytest.skip("there is no CMake or no nvcc")
    command = ["cmake", "-S", ROOT / "csrc", "-B", tmp_path, f"-DSNNLSTM_CUDA={wish}"]
    command += ["-DSNNLSTM_CUDA_ARCHS=75;90", f"-DPython_EXECUTABLE={sys.executable}"]
    command += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    status = "built with nvcc .* for sm_75 90 80.ptx " if wish == "on" else f"not built: {OFF}"
    assert re.search(f"snnlstm CUDA kernels: {status.replace('+', '.')}", said)
    commands = (tmp_path / "compile_commands.json").read_text()
    assert ("compute_80,code=[sm_90,compute_80]" in commands) == (wish == "on")
