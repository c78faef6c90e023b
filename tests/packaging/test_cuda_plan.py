"""The build decides rightly whether and how the CUDA backend is built, and says why."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

PLAN = Path(__file__).resolve().parents[2] / "csrc" / "cmake" / "cuda_plan.cmake"
CMAKE = shutil.which("cmake")
pytestmark = [
    pytest.mark.skipif(not PLAN.exists(), reason="not in a source tree"),
    pytest.mark.skipif(CMAKE is None, reason="no CMake on PATH"),
]
ALL = "75;80;86;89;90;100;120"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Returns a function that puts programs into a machine which has neither CUDA nor a GPU."""
    for name in ("SNNLSTM_CUDA", "SNNLSTM_CUDA_ARCHS", "SNNLSTM_LOCAL_VERSION"):
        monkeypatch.delenv(name, raising=False)
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))

    def add(name: str, prints: str, status: int = 0) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\necho '{prints}'\nexit {status}\n")
        path.chmod(0o755)
        return str(path)

    return add


@pytest.fixture
def plan(machine, tmp_path):
    """Returns a function that gives nvcc, the compute capabilities, and the reason or the error."""
    script = tmp_path / "plan.cmake"
    script.write_text(
        f'set(DEFAULT_CUDA {tmp_path}/default)\nset(Python_SITELIB {tmp_path}/site)\n'
        f'include({PLAN})\nmessage("${{NVCC}}|${{NVCC_ARCHS}}|${{CUDA_WHY}}")\n'
    )  # fmt: skip

    def plan(**environment: str) -> tuple[str, str, str]:
        done = subprocess.run(
            [CMAKE, "-P", script], env=os.environ | environment, capture_output=True, text=True
        )
        text = " ".join(done.stderr.split())
        return ("error", "", text) if done.returncode else tuple(text.split("|"))

    return plan


def test_the_order_of_preference(machine, plan, tmp_path):
    """Of CUDACXX, CUDA_HOME, PATH, the pip package and the default place, the first counts."""
    places = ["default/bin", "site/nvidia/cu13/bin", "path", "home/bin", "named"]
    environment = {"SNNLSTM_CUDA": "on"}
    assert plan()[2] == "no CUDA compiler found"
    for place in places:
        nvcc = machine(f"{place}/nvcc", "release 13.0, V13.0.88")
        if place == "home/bin":
            environment["CUDA_HOME"] = str(tmp_path / "home")
        if place == "named":
            environment["CUDACXX"] = nvcc
        assert plan(**environment) == (nvcc, ALL, nvcc)
    nvcc = str(tmp_path / "site/nvidia/cu13/bin/nvcc")
    assert plan(**environment | {"SNNLSTM_CUDA": "pip"}) == (nvcc, ALL, nvcc)
    assert plan(**environment | {"SNNLSTM_CUDA": "off"}) == ("", "", "SNNLSTM_CUDA=off")


def test_a_compiler_that_does_not_serve_is_passed_over(machine, plan, tmp_path):
    """Ubuntu 22.04 has nvcc 11.5 on PATH; images without a compiler set CUDA_HOME all the same."""
    machine("path/nvidia-smi", "8.9")
    old = machine("path/nvcc", "release 11.5, V11.5.119")
    too_old = f"{old} is of CUDA 11.5, and the kernels need 11.8 or newer"
    for environment in ({}, {"CUDACXX": old}, {"CUDA_HOME": str(tmp_path / "nothing")}):
        assert plan(**environment) == ("", "", f"no CUDA compiler found; {too_old}")
    assert too_old in plan(SNNLSTM_CUDA="on")[2]
    broken = machine("home/bin/nvcc", "cannot execute cicc", status=1)
    assert (
        f"{broken} does not run (1): cannot execute cicc" in plan(CUDA_HOME=f"{tmp_path}/home")[2]
    )
    newer = machine("default/bin/nvcc", "release 11.8, V11.8.89")
    assert plan(CUDA_HOME=f"{tmp_path}/home")[0] == newer


@pytest.mark.parametrize(
    ("gpus", "environment", "archs", "why"),
    [
        ("", {}, "", "no GPU of 7.5 or newer here; SNNLSTM_CUDA=on builds it for all"),
        ("6.1", {}, "", "no GPU of 7.5 or newer here"),
        ("9.0\n12.0\n9.0\n7.0", {}, "90;120", "for the GPUs found here"),
        ("9.0", {"SNNLSTM_CUDA": "on"}, ALL, ""),
        ("", {"SNNLSTM_CUDA_ARCHS": "80;86"}, "80;86", ""),
        ("8.9", {"SNNLSTM_CUDA": "on", "SNNLSTM_CUDA_ARCHS": "native"}, "89", "found here"),
    ],
)
def test_a_build_is_for_these_gpus(machine, plan, gpus, environment, archs, why):
    nvcc = machine("path/nvcc", "release 13.0")
    if gpus:
        machine("path/nvidia-smi", gpus)
    found, planned, reason = plan(**environment)
    assert (found, planned) == (nvcc if archs else "", archs)
    assert why in reason


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SNNLSTM_CUDA": "maybe"}, "'maybe'; accepted: on, off, pip"),
        ({"SNNLSTM_CUDA": "pip"}, "SNNLSTM_CUDA=pip, but no CUDA compiler found"),
        ({"SNNLSTM_CUDA_ARCHS": "native"}, "native, but nvidia-smi shows no GPU"),
        ({"SNNLSTM_LOCAL_VERSION": "cu12", "SNNLSTM_CUDA": "on"}, "is to be named cu12"),
        ({"SNNLSTM_LOCAL_VERSION": "cpu", "SNNLSTM_CUDA": "on"}, "SNNLSTM_LOCAL_VERSION is cpu"),
    ],
)  # fmt: skip
def test_a_wish_that_cannot_be_met_is_an_error(machine, plan, environment, message):
    machine("path/nvcc", "release 13.0")
    status, _, said = plan(**environment)
    assert (status, message in said) == ("error", True), said
