"""`python -m snnlstm` reports what is there, and never fails where something is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import snnlstm
from snnlstm import __main__ as report
from tests.shared.helpers import HANG


@pytest.mark.parametrize(
    ("absent", "problem"),
    [
        ("", ""),
        ("snntorch numpy", ""),
        ("snnlstm._C", "so that every call runs in plain torch, and slower: "),
        ("snnlstm._C numpy snntorch torch", "pip install torch"),
    ],
)
def test_table_and_json_tell_the_same(monkeypatch, capsys, absent, problem):
    for module in absent.split():
        monkeypatch.setitem(sys.modules, module, None)  # an import raises ModuleNotFoundError
    assert (report.main([]), report.main(["--json"])) == (0, 0)
    table, brace, facts = capsys.readouterr().out.partition("{")
    facts = json.loads(brace + facts)
    native = facts["native"]
    for fact in (
        facts["version"], facts["path"], facts["python"], facts["platform"], facts["numpy"],
        facts["snntorch"], facts["torch"]["version"], native["core"], native["isa"],
        native["openmp"], *facts["problems"],
    ):  # fmt: skip
        assert fact in table
    assert ("Nothing is wrong." in table) == (not problem) == (not facts["problems"])
    assert not problem or problem in facts["problems"][-1]
    assert absent or native["build"]["cuda"] in table


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["-m", "snnlstm"], 0, "problem: torch cannot be imported"),
        (["-m", "snnlstm", "--xml"], 2, "unrecognized arguments: --xml"),
        (["-c", "import snnlstm"], 1, "ModuleNotFoundError: No module named 'torch'"),
    ],
)
def test_a_broken_torch_is_an_error_for_every_other_program(tmp_path, arguments, status, says):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")")
    paths = os.pathsep.join([str(tmp_path), str(Path(snnlstm.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": paths}, timeout=HANG,
    )  # fmt: skip
    assert done.returncode == status
    assert says in done.stdout + done.stderr


def test_gpus_are_shown_with_the_code_for_them():
    for capability, said in (
        ([8, 9], "A GPU (sm_89), machine code of sm_86"),
        ([12, 0], "A GPU (sm_120), PTX of compute_80"),
        ([7, 5], "A GPU (sm_75), no code"),
    ):
        gpu = {"name": "A GPU", "capability": capability}
        assert report.gpu_and_code({"cuda_archs": "86 80+ptx"}, gpu) == said


def test_a_broken_driver_is_part_of_the_report(monkeypatch):
    def is_available() -> bool:
        warnings.warn("the driver is too old", stacklevel=1)
        raise RuntimeError("broken")

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    table = report.table(report.collect())
    assert "problem: torch cannot use the GPU (missing: RuntimeError: broken)" in table
    assert "note              the driver is too old" in table
