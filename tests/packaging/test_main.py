"""`python -m snnlstm` reports what is there, and never fails where something is missing."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from helpers import HANG

import snnlstm
from snnlstm import __main__ as report
from snnlstm.native import cuda_check

# This sitecustomize module makes imports of the modules in BLOCK fail.
BLOCKER = """
import os, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name in os.environ.get("BLOCK", "").split():
            raise ModuleNotFoundError(f"blocked: {name}", name=name)
sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture
def run(tmp_path):
    """Returns a function that runs `python -m` with arguments, and says how that ended."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    paths = os.pathsep.join([str(tmp_path), str(Path(snnlstm.__file__).parents[1])])

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", *arguments], cwd=tmp_path, capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": paths} | environment, timeout=HANG,
        )  # fmt: skip

    return run


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({}, None),
        ({"SNNLSTM_ISA": "baseline"}, None),
        ({"SNNLSTM_ISA": "pentium"}, "no instruction set could be chosen (missing: ValueError: "),
        ({"BLOCK": "snntorch numpy"}, None),
        ({"BLOCK": "snnlstm._C"}, "so that every call runs in plain torch, and slower: "),
        ({"BLOCK": "snnlstm._C numpy snntorch torch"}, "pip install torch"),
    ],
    ids=lambda value: " ".join(value.values()) if isinstance(value, dict) else "",
)
def test_the_table_tells_what_is_there_and_what_is_missing(run, environment, problem):
    done = run("snnlstm", **environment)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    table = done.stdout
    folder = Path(snnlstm.__file__).parent
    for fact in (snnlstm.__version__, str(folder), sys.executable, platform.platform()):
        assert fact in table
    for module in environment.get("BLOCK", "").split():
        assert f"blocked: {module}" in table
    assert ("Nothing is wrong." in table) == (problem is None) == ("problem: " not in table)
    assert problem is None or problem in table.splitlines()[-1]
    if not environment:
        facts = report.collect()
        assert facts["torch"] == torch.__version__
        assert facts["in use"] in facts["instruction sets"]
        assert "cpu" in facts["used on"]
        for fact in ("in use", "OpenMP", "native core", "numpy", "snntorch"):
            assert facts[fact] in table
        assert facts["build"]["cuda"] in table
    if environment.get("SNNLSTM_ISA") == "baseline":
        assert re.search("^in use +baseline$", table, re.MULTILINE)
        assert re.search("^forced +baseline$", table, re.MULTILINE)


def test_a_broken_import_is_an_error_for_every_other_program(run, tmp_path):
    """Python's name for a program is "-m" while it imports the packages around it."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("import snnlstm")
    (tmp_path / "package" / "snnlstm.py").write_text("print('it ran')")
    done = run("package.snnlstm", BLOCK="torch")
    assert done.returncode == 1
    assert "ModuleNotFoundError: blocked: torch" in done.stderr


@pytest.mark.parametrize(
    ("capability", "driver", "archs", "said"),
    [
        ((8, 9), 13000, "86 80+ptx", "A GPU (8, 9): machine code of 86"),
        ((12, 0), 13000, "86 80+ptx", "A GPU (12, 0): PTX of 80"),
        ((7, 5), 13000, "80", "A GPU (7, 5): no code"),
        ((8, 9), 13000, "86 80+ptx", "driver's CUDA      13.0"),
        ((7, 5), 13000, "80", "path: A GPU (compute capability 7.5) is not among the GPUs"),
        ((8, 0), 12040, "80", "path: the NVIDIA driver is too old: it runs CUDA 12.4"),
        ((8, 0), 13000, "", "path: this build of snnlstm has no CUDA kernels"),
        (None, 13000, "80", "problem: torch cannot use the GPU (missing: RuntimeError: broken)"),
        (None, 13000, "80", "notes              the driver is too old"),
    ],
)
def test_gpus_drivers_and_builds(monkeypatch, capability, driver, archs, said):
    def is_available() -> bool:
        if capability is None:
            warnings.warn("the driver is too old", stacklevel=1)
            raise RuntimeError("broken")
        return True

    build = {"cuda": "built", "cuda_version": "13.0.88", "cuda_archs": archs}
    monkeypatch.setattr(snnlstm._C, "build_info", lambda: build)
    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
    cuda_check.trouble.cache_clear()
    facts = report.collect()
    cuda_check.trouble.cache_clear()
    assert said in report.table(facts)
    fits = archs == "86 80+ptx"
    assert len(facts["problems"]) == (not fits)


def test_a_core_of_another_version(monkeypatch):
    """A core that lacks a function is a problem, not a crash."""
    monkeypatch.setitem(sys.modules, "snnlstm._C", types.SimpleNamespace(__file__="old.so"))
    report.module_of.cache_clear()
    facts = report.collect()
    report.module_of.cache_clear()
    assert "isa_name" in facts["problems"][0]
    assert "old.so" in report.table(facts)
