"""`python -m snnlstm` reports what is there, and never fails where something is missing."""

from __future__ import annotations

import json
import os
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
    """Returns a function that runs `python -m snnlstm` with blocked modules.

    The function returns what the program prints.
    """
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)

    def run(*arguments: str, block: str = "", **environment: str) -> str:
        paths = os.pathsep.join([str(tmp_path), str(Path(snnlstm.__file__).parents[1])])
        environment = os.environ | {"PYTHONPATH": paths, "BLOCK": block} | environment
        done = subprocess.run(
            [sys.executable, "-m", "snnlstm", *arguments],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=HANG,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout

    return run


def test_table_and_json_tell_the_same(run, capsys):
    facts = json.loads(run("--json"))
    assert report.main([]) == 0
    text = capsys.readouterr().out
    assert facts["version"] == snnlstm.__version__
    assert facts["torch"]["version"] == torch.__version__
    assert facts["native"]["isa"] in facts["native"]["isas"]
    assert "cpu" in list(facts["devices"])
    assert facts["problems"] == []
    for fact in (
        facts["version"], facts["path"], facts["python"], facts["platform"], facts["numpy"],
        facts["native"]["core"], facts["native"]["openmp"], facts["native"]["build"]["cuda"],
        ", ".join(facts["native"]["isas"]),
    ):  # fmt: skip
        assert fact in text
    assert "Nothing is wrong." in text
    lines = [line for line in text.splitlines() if line]
    column = lines[0].index(snnlstm.__version__)  # where all values start
    for line in lines[:-1]:
        assert line[column - 2 : column] == "  "
        assert line[column] != " "


def test_a_forced_instruction_set_shows(run):
    assert "baseline (forced by SNNLSTM_ISA=baseline)" in run(SNNLSTM_ISA="baseline")
    assert re.search("problem: .*pentium", run(SNNLSTM_ISA="pentium"))


@pytest.mark.parametrize("name", ["snnlstm._C", "numpy", "torch", "snntorch"])
def test_a_module_that_cannot_be_imported(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)  # makes the import fail
    facts = report.collect()
    needed = name != "snntorch"
    assert any(name in problem for problem in facts["problems"]) == needed
    assert bool(facts["problems"]) == needed
    assert f"import of {name} halted" in report.table(facts)


def test_everything_missing_at_once(run):
    text = run(block="snnlstm._C numpy snntorch torch")
    assert text.count("blocked: ") >= 4
    assert snnlstm.__version__ in text


def test_unknown_arguments_are_refused():
    with pytest.raises(SystemExit) as caught:
        report.main(["--xml"])
    assert caught.value.code == 2


def fake_torch(*capabilities: tuple[int, int], error: str = "", warning: str = "", driver=13000):
    """Makes a torch with GPUs of these compute capabilities, whose driver may fail or warn."""

    def is_available():
        if error:
            raise RuntimeError(error)
        if warning:
            warnings.warn(warning, stacklevel=1)
        return bool(capabilities)

    cuda = types.SimpleNamespace(
        is_available=is_available, device_count=lambda: len(capabilities),
        get_device_name=lambda i: f"GPU number {i}",
        get_device_capability=lambda i: capabilities[i],
    )  # fmt: skip
    return types.SimpleNamespace(
        __version__="9.9", version=types.SimpleNamespace(cuda="13.0"), cuda=cuda,
        get_num_threads=lambda: 3,
        _C=types.SimpleNamespace(_cuda_getDriverVersion=lambda: driver),
    )  # fmt: skip


def fake_core(archs: str):
    return types.SimpleNamespace(
        __file__="_C.so", isa_names=lambda: ["baseline"], isa_name=lambda: "baseline",
        openmp_library=lambda: "libgomp.so.1",
        build_info=lambda: {"cuda": "built", "cuda_version": "13.0.88", "cuda_archs": archs},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("torch_module", "archs", "problems"),
    [
        (fake_torch((8, 0)), "80 80+ptx", []),
        (fake_torch((8, 0), (7, 5)), "80 80+ptx", ["GPU number 1 (compute capability 7.5)"]),
        (fake_torch((8, 0), driver=12040), "80", ["driver is too old: it runs CUDA 12.4"]),
        (fake_torch((8, 0)), "", ["no CUDA kernels"]),
        (fake_torch(error="the driver is broken"), "80", ["the driver is broken"]),
    ],
    ids=["served", "no code", "old driver", "no CUDA", "broken driver"],
)
def test_gpus_drivers_and_builds(monkeypatch, torch_module, archs, problems):
    monkeypatch.setitem(sys.modules, "torch", torch_module)
    monkeypatch.setitem(sys.modules, "snnlstm._C", fake_core(archs))
    facts = report.collect()
    json.dumps(facts)
    assert report.table(facts)
    for said, problem in zip(facts["problems"], problems, strict=True):
        assert problem in said


def test_each_gpu_is_named_with_the_code_that_it_runs(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", fake_torch((8, 9), (12, 0), (7, 5)))
    monkeypatch.setitem(sys.modules, "snnlstm._C", fake_core("86 80+ptx"))
    said = report.table(report.collect())
    for words in (
        "GPU number 0 (sm_89), machine code of sm_86",
        "GPU number 1 (sm_120), PTX of compute_80",
        "GPU number 2 (sm_75), no code",
    ):
        assert words in said


def test_a_core_of_another_version(monkeypatch):
    """A core that lacks a function is a problem, not a crash."""
    monkeypatch.setitem(sys.modules, "snnlstm._C", types.SimpleNamespace(__file__="old.so"))
    facts = report.collect()
    assert any("isa_name" in problem for problem in facts["problems"])
    assert "old.so" in report.table(facts)


def test_what_torch_warns_of_is_shown(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", fake_torch(warning="the driver is too old"))
    assert "the driver is too old" in report.table(report.collect())
