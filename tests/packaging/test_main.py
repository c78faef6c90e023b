"""`python -m snnlstm` reports what is there, and never fails where something is missing."""

from __future__ import annotations

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
def test_the_table_tells_what_is_there_and_what_is_missing(monkeypatch, absent, problem):
    for module in absent.split():
        monkeypatch.setitem(sys.modules, module, None)  # an import raises ModuleNotFoundError
    report.module_of.cache_clear()
    facts = report.collect()
    report.module_of.cache_clear()
    table = report.table(facts)
    for name in (
        "snnlstm", "path", "python", "platform", "numpy", "snntorch", "torch", "native core",
        "in use", "OpenMP",
    ):  # fmt: skip
        assert facts[name] in table
        if name in absent.split():
            assert facts[name].startswith("missing: ModuleNotFoundError")
    assert ("Nothing is wrong." in table) == (not problem) == (not facts["problems"])
    assert not problem or problem in facts["problems"][-1]
    assert absent or facts["build"]["cuda"] in table


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
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": paths}, timeout=HANG,
    )  # fmt: skip
    assert done.returncode == status
    assert says in done.stdout + done.stderr


def test_gpus_are_shown_with_the_code_for_them(monkeypatch):
    capabilities = (8, 9), (12, 0), (7, 5)
    for name, found in (
        ("is_available", lambda: True),
        ("device_count", lambda: len(capabilities)),
        ("get_device_name", lambda index: "A GPU"),
        ("get_device_capability", lambda index: capabilities[index]),
    ):
        monkeypatch.setattr(torch.cuda, name, found)
    monkeypatch.setattr(report, "fact_of", lambda *_: {"cuda_archs": "86 80+ptx"})
    assert report.gpus() == [
        "A GPU (8, 9): machine code of 86", "A GPU (12, 0): PTX of 80", "A GPU (7, 5): no code",
    ]  # fmt: skip
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 12040, raising=False)
    assert report.driver() == "12.4"


def test_a_broken_driver_is_part_of_the_report(monkeypatch):
    def is_available() -> bool:
        warnings.warn("the driver is too old", stacklevel=1)
        raise RuntimeError("broken")

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    table = report.table(report.collect())
    assert "problem: torch cannot use the GPU (missing: RuntimeError: broken)" in table
    assert "notes              the driver is too old" in table
