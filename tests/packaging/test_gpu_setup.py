"""`make gpu` lists and installs what a machine lacks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shared.helpers import shell_program
from tools import gpu_setup, local_version

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """Makes this a machine with a driver alone, and returns a function that sets its number."""
    monkeypatch.setattr(gpu_setup, "find", lambda program: None)
    monkeypatch.setattr(local_version, "TOOLKIT", "/nowhere")
    monkeypatch.setattr(gpu_setup.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu_setup.sysconfig, "get_path", lambda name: "/nowhere")
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "CUDAHOSTCXX"):
        monkeypatch.delenv(name, raising=False)

    return lambda name, prints: shell_program(tmp_path / name, f"echo '{prints}'")


@pytest.mark.parametrize(
    ("driver", "torch_index", "compiler"),
    [("580.65.06", "torch,", "nvidia-cuda-nvcc==13.*"), ("575.51", "cu128", "--toolkitpath"),
     ("535.1", "cu126", "cuda-version=12.6"), ("470.2", "torch,", "")],
)  # fmt: skip
def test_everything_that_is_missing_is_listed_with_what_installs_it(
    driver, torch_index, compiler, bare
):
    """`make gpu` installs Python's packages; nothing of what it cannot install may be left out."""
    bare("nvidia-smi", f"{driver}\n{driver}")
    text = "\n".join(gpu_setup.lacking())
    for part in ("missing: ", "pandas>=2", torch_index, "C++ compiler g++", "Python.h", compiler):
        assert part in text
    text = "\n".join(gpu_setup.lacking(fills=True))
    for part in ("C++ compiler g++", "Python.h", "ensurepip"):
        assert part in text
    assert "pip install" not in text
    assert ("--toolkitpath" in text) == (torch_index != "torch,")
    assert ("no GPU" in text) == (driver == "470.2")
    for part in ("C++ compiler", "Python.h", "nvcc"):
        assert part not in "\n".join(gpu_setup.lacking(core=ROOT))
    bare("nvcc", "release 13.0, V13.0.88")
    assert ("nvcc is of CUDA 13" in "\n".join(gpu_setup.lacking())) == (
        compiler[:2] in ("--", "cu")
    )


@pytest.fixture
def python(tmp_path):
    """Makes a Python that logs its arguments, whose torch serves or not, and that makes others."""

    def python(torch_serves: bool):
        script = f"""
            echo "$@" >> {tmp_path}/log
            case "$*" in
              "-m venv "*) mkdir -p $3/bin && cp $0 $3/bin/python ;;
              "-c "*torch*) exit {int(not torch_serves)} ;;
            esac"""
        return shell_program(tmp_path / f"python-{torch_serves}", script)

    return python


@pytest.mark.parametrize("torch_serves", [False, True])
@pytest.mark.parametrize(
    ("driver", "index"), [("580.65", ""), ("570.1", "/cu128"), ("525.6", "/cu126")]
)
def test_an_environment_gets_torch_for_the_driver_before_what_needs_torch(
    driver, index, torch_serves, bare, python, monkeypatch, tmp_path
):
    monkeypatch.setattr(sys, "executable", python(torch_serves))
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}:/usr/bin:/bin")
    monkeypatch.setattr(local_version, "nvcc", lambda: ("nvcc", 12) if index else None)
    bare("nvidia-smi", driver)
    assert gpu_setup.fill(tmp_path / "venv", None) == str(tmp_path / "venv" / "bin" / "python")
    made, asked, *pip = (tmp_path / "log").read_text().splitlines()
    assert made == f"-m venv {tmp_path / 'venv'}"
    assert asked.endswith(f" < {14 if not index else 13}")
    torch_first = "-m pip install --force-reinstall torch"
    torch_first += f" --index-url https://download.pytorch.org/whl{index}" if index else ""
    assert pip[:-1] == ([] if torch_serves else [torch_first])
    assert "snntorch==1.0.0" in pip[-1]
    assert ("nvidia-cuda-nvcc==13.*" in pip[-1]) == (not index)


@pytest.mark.parametrize("torch_serves", [False, True])
def test_make_gpu_makes_an_environment_where_no_torch_sees_a_gpu(torch_serves, python, tmp_path):
    words = [f"PYTHON={python(torch_serves)}", f"VENV={tmp_path}/venv", "ARGS=--quick"]
    subprocess.run(["make", "gpu", *words], cwd=ROOT, check=True)
    _, asked, ran = (tmp_path / "log").read_text().splitlines()
    assert "torch.cuda.is_available()" in asked
    venv = "" if torch_serves else f"--venv {tmp_path}/venv "
    assert ran == f"-m benchmarks.gpu {venv}--quick"
