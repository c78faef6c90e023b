"""`python -m snnlstm` reports what is there, and never fails where something is missing."""

from __future__ import annotations

import os
import platform
import re
import runpy
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch

import snnlstm
from snnlstm import __main__ as report
from tests.shared.fresh import fresh
from tests.shared.helpers import python


@pytest.mark.parametrize(
    ("absent", "problem"),
    [
        ("", ""),
        ("snntorch numpy", ""),
        ("snnlstm._C", "so that every call takes the reference path, which is slower: "),
        ("snnlstm._C numpy snntorch torch", "pip install torch"),
    ],
)
def test_the_table_tells_what_is_there_and_what_is_missing(monkeypatch, absent, problem):
    report.module_of.cache_clear()
    for module in absent.split():
        monkeypatch.setitem(sys.modules, module, None)  # an import raises ModuleNotFoundError
    facts = report.collect()
    report.module_of.cache_clear()
    table = report.table(facts)
    for fact in (snnlstm.__version__, sys.executable, platform.platform()):
        assert fact in table
    assert table.count("missing: ModuleNotFoundError") >= len(absent.split())
    assert absent or "missing: " not in table
    assert ("Nothing is wrong." in table) == (not problem) == ("problem: " not in table)
    assert problem in table.splitlines()[-1]
    for fact in ("in use", "OpenMP", "native core", "numpy", "snntorch"):
        assert facts[fact] in table
    step = re.search(r"(?m)^one step on cpu +(.+) agrees with plain PyTorch to \de-\d+$", table)
    assert bool(step) == (not problem)
    assert not step or step[1].startswith("cpu-")


@pytest.mark.parametrize(
    ("part", "fault"),
    [
        ("called", lambda own: lambda *a: (spk := own(*a)) + (1 - 2 * spk).detach()),  # spikes
        ("_gates", lambda own: lambda *a: own(*a) * 1.01),
        ("_gates", lambda own: lambda *a: own(*a) * torch.nan),
    ],
)
def test_a_step_that_differs_from_plain_pytorch_is_a_problem(part, fault, monkeypatch):
    monkeypatch.setattr(snnlstm.reference, part, fault(getattr(snnlstm.reference, part)))
    last = report.table(report.collect()).splitlines()[-1]
    assert re.match("problem: one step on cpu failed .*: cpu-.+ differs from plain PyTorch", last)


def test_a_step_on_the_reference_path_is_no_problem_and_says_so():
    with snnlstm.algorithm("reference"):
        table = report.table(report.collect())
    assert re.search(r"(?m)^one step on cpu +reference \(set_algorithm or ", table)
    assert "Nothing is wrong." in table


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("--all", 2)])
def test_its_only_argument_is_help(argument, status, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["", argument])
    with pytest.raises(SystemExit) as left:
        runpy.run_module("snnlstm", run_name="__main__")
    assert left.value.code == status
    said = "".join(capsys.readouterr())
    assert "usage: python -m snnlstm [-h]" in said
    assert "torch" not in said


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["-m", "snnlstm"], 0, "problem: torch cannot be imported"),
        (["-c", "import snnlstm"], 1, "ModuleNotFoundError: No module named 'torch'"),
    ],
)
def test_a_broken_torch_is_an_error_for_every_other_program(tmp_path, arguments, status, says):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")")
    paths = os.pathsep.join([str(tmp_path), str(Path(snnlstm.__file__).parents[1])])
    done = python(*arguments, cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths})
    assert done.returncode == status
    assert says in done.stdout + done.stderr


def test_a_checkout_without_a_core_names_both_ways_out(tmp_path):
    """Python takes the sources of the folder before the package that is installed."""
    package, core = Path(snnlstm.__file__).parent, shutil.ignore_patterns("_C*.so", "_C*.pyd")
    shutil.copytree(package, tmp_path / "snnlstm", ignore=core)
    (tmp_path / "csrc").mkdir()
    code = """
import runpy, sys
import snntorch, torch, snnlstm
net = torch.nn.Sequential(snntorch.SConv2dLSTM(2, 3, 3, init_hidden=True))
print(snnlstm.accelerate(net))
net(torch.ones(1, 2, 5, 5))
sys.argv[1:] = ["--help"]
runpy.run_module("benchmarks", run_name="__main__")
"""
    compiled = 'python -m benchmarks: backend "snnlstm" needs the compiled core'
    for program, module, mentions in (code, False, 2), ("snnlstm", True, 1):
        done = fresh(program, [tmp_path], module)
        said = done.stdout + done.stderr
        assert f"the checkout {tmp_path.resolve()}" in said
        assert said.count("run Python in another folder") == mentions
        assert said.count("`pip install -e .`") == mentions
        assert (compiled in said) == (not module)
        assert "Traceback" not in said


def test_a_core_that_does_not_load_is_not_called_missing(tmp_path):
    package, core = Path(snnlstm.__file__).parent, shutil.ignore_patterns("_C*")
    shutil.copytree(package, tmp_path / "snnlstm", ignore=core)
    (tmp_path / "snnlstm" / "_C.py").write_text("raise ImportError('GLIBC_2.99 not found')")
    code = """
import torch, snnlstm
cell = snnlstm.SConv2dLSTM(2, 3, 3, threshold=0.1)
cell(torch.ones(1, 2, 5, 5))
print(cell.path)
"""
    done = fresh(code, [tmp_path])
    assert done.stdout == "reference (the compiled core does not load: GLIBC_2.99 not found)\n"
    assert "reference path, which is slower: the compiled core does not load" in done.stderr


def test_a_package_that_does_not_import_says_why(tmp_path):
    """An import of the package itself would only say that it lacks a name."""
    shutil.copytree(Path(snnlstm.__file__).parent, tmp_path / "snnlstm")
    with (tmp_path / "snnlstm" / "native" / "operators.py").open("a") as module:
        module.write("_C.a_function_that_is_not_built\n")
    done = python("-m", "snnlstm", cwd=tmp_path)
    *_, problem = done.stdout.splitlines()
    assert problem.startswith("problem: one step on cpu failed (missing: ")
    assert "has no attribute 'a_function_that_is_not_built'" in problem, problem


def test_gpus_are_shown_with_the_code_for_them(monkeypatch):
    build = {"cuda": "built", "cuda_version": "13.0.88", "cuda_archs": "86 80+ptx"}
    capabilities = [(8, 9), (12, 0), (7, 5)]
    monkeypatch.setattr(snnlstm._C, "build_info", lambda: build)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", "card {}".format)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    codes = ("machine code of 86", "PTX of 80", "no code")
    assert report.gpus() == [
        f"card {k} {capabilities[k]}: {code}, built for 86 80+ptx" for k, code in enumerate(codes)
    ]


def test_a_broken_driver_is_part_of_the_report(monkeypatch):
    def is_available() -> bool:
        warnings.warn("the driver is too old", stacklevel=1)
        raise RuntimeError("broken")

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    report.module_of.cache_clear()
    table = report.table(report.collect())
    assert "problem: torch cannot use the GPU (missing: RuntimeError: broken)" in table
    assert "the driver is too old" in table
