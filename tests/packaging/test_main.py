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
from helpers import HANG

import snnlstm
from snnlstm import __main__ as report
from snnlstm.native import cuda_check


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


@pytest.mark.parametrize(
    ("capability", "driver", "archs", "said"),
    [
        ((8, 9), 13000, "86 80+ptx", "A GPU (sm_89), machine code of sm_86"),
        ((7, 5), 13000, "80", "path: A GPU (compute capability 7.5) is not among the GPUs"),
        ((8, 0), 12040, "80", "path: the NVIDIA driver is too old: it runs CUDA 12.4"),
        (None, 13000, "80", "problem: torch cannot use the GPU (missing: RuntimeError: broken)"),
        (None, 13000, "80", "note              the driver is too old"),
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
    assert len(facts["problems"]) == ("sm_" not in said)
