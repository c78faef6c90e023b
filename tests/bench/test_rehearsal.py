"""`make gpu` goes through every step without a GPU, and its report holds together."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("pandas")

from benchmarks import gpu, report


@pytest.mark.skipif(not os.environ.get("SNNLSTM_LONG"), reason="part of `make test-all`")
def test_a_rehearsal_passes_every_step(tmp_path):
    """Nothing in the checkout changes. The clock is long: no verdict depends on a busy machine."""
    before = {path: path.stat().st_mtime_ns for path in gpu.ROOT.glob("*/_C*.so")}
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--minutes", "60", "--out", str(out),
         "--build", str(tmp_path / "build")],
        cwd=gpu.ROOT, env=os.environ | {"SNNLSTM_CUDA": "off"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    logs = "\n".join(log.read_text()[-2000:] for log in tmp_path.glob("build/work/*.log"))
    assert done.returncode == 0, f"{done.stdout}{done.stderr}{logs}"
    text = (out / "report.md").read_text()
    assert text.startswith("# Rehearsal of snnlstm on an emulated t4 (sm_75)")
    for name in ("build", "smoke fused", "algorithms", "layers", "tests", "large layers"):
        assert f"| {name} | passed" in text
    assert re.search(r"\| all \| (\d+) of \1 passed", text)
    assert before == {path: path.stat().st_mtime_ns for path in gpu.ROOT.glob("*/_C*.so")}

    assert {file.name for file in out.iterdir()} == {"report.md", "results.zip"}
    shutil.unpack_archive(out / "results.zip", tmp_path / "results")
    rows = report.read(tmp_path / "results" / "large")
    assert set(rows.case) == {"tiny"}
    assert set(rows.dtype) == {"float32", "autocast16", "float16"}
    assert rows.path[rows.provider == "snnlstm"].str.startswith("simt-").all()
