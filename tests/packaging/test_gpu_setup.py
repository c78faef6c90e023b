"""`make gpu` lists and installs what a machine lacks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu
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

    def add(name, prints, script=""):
        return shell_program(tmp_path / name, script or f"echo '{prints}'")

    return add


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


def machine(add, driver, gpus, release, known):
    """Makes a machine with these GPUs and an nvcc that knows some, and returns nvcc's path."""
    add("nvidia-smi", "", f'case "$*" in *driver*) echo {driver};; *) printf "{gpus}\\n";; esac')
    return add("nvcc", "", f'case $1 in --version) echo "release {release}, V";; '
                           f"*) printf 'compute_{known}\\n';; esac")  # fmt: skip


@pytest.mark.parametrize(
    ("driver", "gpus", "release", "known", "serves", "said"),
    [
        # Ubuntu 24.04's nvcc does not know the newest GPUs, and 22.04's is too old.
        ("580.1", "12.0", "12.0", "90", False, "CUDA 12.0, and does not know GPUs of 12.0"),
        ("580.1", "8.9", "12.0", "89", True, ""),
        ("580.1", "8.0\\n12.0", "12.0", "80", False, "does not know GPUs of 12.0"),
        ("580.1", "8.0\\n6.1", "12.0", "80", True, ""),  # which no build serves
        ("570.1", "12.0", "12.0", "90", True, ""),  # PTX: PyPI's compiler needs driver 580
        ("550.1", "8.0", "11.5", "80", False, "nvcc is of CUDA 11.5, and the kernels need 11.8"),
        ("550.1", "8.0", "13.0", "80", False, "nvcc is of CUDA 13.0, and the driver runs 12.6"),
        ("550.1", "8.0", "12.8", "80", True, ""),
    ],
)  # fmt: skip
def test_a_compiler_serves_if_it_knows_the_gpus_and_the_driver_knows_its_code(
    driver, gpus, release, known, serves, said, bare
):
    nvcc = machine(bare, driver, gpus, release, known)
    found, why = local_version.serving(local_version.cuda())
    assert found == (nvcc if serves else None)
    assert said in why
    listed = "\n".join(gpu_setup.lacking())
    assert said in listed
    assert ("no nvcc" in listed) == (not serves)
    filled = "\n".join(gpu_setup.lacking(fills=True))  # PyPI's is fetched from driver 580 on
    assert ("no nvcc" in filled) == (not serves and driver < "580")


def test_the_core_is_built_for_all_gpus_by_a_compiler_that_knows_them(bare, tmp_path):
    nvcc = machine(bare, "580.1", "7.5\\n8.9\\n6.1", "12.0", "75\\ncompute_89")
    (_, words), (_, make) = gpu_setup.building(None, ROOT, tmp_path, {89, 75, 61}, must=True)
    assert "'-DSNNLSTM_CUDA_ARCHS=75;89'" in words
    assert f"-DCMAKE_CUDA_COMPILER={nvcc}" in words
    assert "-75-89" in make
    (_, words), _ = gpu_setup.building(None, ROOT, tmp_path, {75}, must=False)
    assert "SNNLSTM_CUDA_ARCHS=75" in words
    assert "SNNLSTM_CUDA=ON" not in words
    copy = [("core", f"cp core.so {ROOT}/snnlstm")]
    assert gpu_setup.building(Path("core.so"), ROOT, tmp_path, {75}, must=True) == copy


def test_a_machine_whose_torch_serves_is_filled_as_one_without_torch(monkeypatch):
    """What pip installs is not asked for, and what it cannot install is listed."""
    asked = []

    def lacking(rehearsal, core, fills=False):
        asked.append(fills)
        return ["missing: pandas"] if not fills else missing

    monkeypatch.setattr(gpu, "lacking", lacking)
    monkeypatch.setattr(gpu, "fill", lambda venv, core: f"{venv}/bin/python")
    monkeypatch.setattr(os, "execv", lambda *command: sys.exit(str(command)))
    missing = []
    with pytest.raises(SystemExit, match=r"venv/bin/python.*--quick.*--venv="):
        gpu.main(["--quick", "--venv", "venv"])
    missing = ["no C++ compiler"]
    assert gpu.main(["--quick", "--venv", "venv"]) == 1
    assert asked == [False, True] * 2
    assert gpu.main(["--quick"]) == 1


@pytest.fixture
def python(tmp_path):
    """Makes a Python that logs its arguments, whose torch serves or not, and that makes others."""

    def python(torch_serves: bool):
        script = f"""
            echo "$@" >> {tmp_path}/log
            case "$*" in
              "-m venv "*) for venv in "$@"; do :; done
                mkdir -p $venv/bin && cp $0 $venv/bin/python ;;
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
    monkeypatch.setattr(local_version, "serving", lambda cuda: ("nvcc" if index else None, ""))
    bare("nvidia-smi", driver)
    assert gpu_setup.fill(tmp_path / "venv", None) == str(tmp_path / "venv" / "bin" / "python")
    asked, made, again, *pip = (tmp_path / "log").read_text().splitlines()
    shared = "--system-site-packages " if torch_serves else ""
    assert made == f"-m venv {shared}{tmp_path / 'venv'}"
    assert asked == again
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
    assert ran == f"-m benchmarks.gpu --venv {tmp_path}/venv --quick"
