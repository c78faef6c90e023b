"""`make gpu` goes through every step without a GPU, and its report holds together."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from benchmarks import compare, gpu
from benchmarks.rows import read_rows

LEFT_OUT = ("memcheck", "racecheck")  # where compute-sanitizer is not installed


@pytest.mark.slow
def test_a_rehearsal_passes_every_step(tmp_path, capsys):
    """Nothing in the checkout changes. The clock is long: no verdict depends on a busy machine."""
    before = {path: path.stat().st_mtime_ns for path in gpu.ROOT.glob("*/_C*.so")}
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--minutes", "60", "--out", str(out),
         "--build", str(tmp_path / "build")],
        cwd=gpu.ROOT, env=os.environ | {"SNNLSTM_CUDA": "off"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    logs = "\n".join(log.read_text()[-2000:] for log in out.glob("*.log"))
    assert done.returncode == 0, f"{done.stdout}{done.stderr}{logs}"
    report = (out / "report.md").read_text()
    assert report.startswith("# Rehearsal of snnlstm on an emulated t4 (sm_75)")
    for step in gpu.steps(True):
        verdicts = ("passed", "left out") if step.name in LEFT_OUT else ("passed",)
        assert any(f"| {step.name} | {verdict}" in report for verdict in verdicts)
    assert "simt-cudnn" in report
    assert before == {path: path.stat().st_mtime_ns for path in gpu.ROOT.glob("*/_C*.so")}

    rows = read_rows(out / "send.txt")
    assert {row.case for row in rows} == {"tiny", "pooled"}
    assert {row.dtype for row in rows} == {"float32", "autocast16", "float16"}
    assert all("an emulated t4 (sm_75)" in row.device for row in rows)
    ours = [row for row in rows if row.provider == "snnlstm"]
    assert ours
    assert all(row.path.startswith("simt-") for row in ours)
    assert compare.main([str(out / "send.txt")]) == 0
    assert "an emulated t4" in capsys.readouterr().out
