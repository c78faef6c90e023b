"""`make gpu`, as far as a machine without a GPU can run it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("tqdm")

from benchmarks import cli, gpu, gpu_subset
from benchmarks.providers import PROVIDERS

PYTHON = (sys.executable, "-c")
GPU = torch.cuda.is_available()


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_without_a_gpu_it_says_so_at_once(capsys, tmp_path):
    assert gpu.main(["--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("no GPU: torch ")
    assert not (tmp_path / "out").exists()


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "NEEDED", {"no_such_module": "some-package==1.0", "torch": "torch"})
    monkeypatch.setattr(gpu, "PROGRAMS", ("no-such-program",))
    assert gpu.lacking() == "missing: pip install some-package==1.0 no-such-program"


def test_the_steps_are_there_in_order_and_within_the_time(tmp_path):
    planned = gpu.steps(tmp_path)
    assert [step.name for step in planned] == [
        "build", "what is there", "tests on cuda", "memcheck", "racecheck", "GPU shapes",
        "the suite's own shapes",
    ]  # fmt: skip
    shares = [step.until for step in planned]
    assert shares == sorted(set(shares))
    assert shares[-1] < 1
    for name in ("memcheck", "racecheck"):
        (step,) = (step for step in planned if step.name == name)
        assert f"--tool={name}" in step.command
        assert step.command[-1] == "benchmarks.gpu_subset"


def test_the_suite_understands_what_it_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = {}
    for step in gpu.steps(tmp_path)[-2:]:
        words = ["60" if word == gpu.LEFT else word for word in step.command[3:]]
        args = cli.parser().parse_args(words)
        plans = [cli.plan_from(args, dtype) for dtype in args.dtype]
        asked[step.name] = (plans[0], args.dtype)
        for plan in plans:
            assert [kind.name for kind in plan.providers] == list(PROVIDERS)
            assert plan.deadline - time.monotonic() < 61
    plan, dtypes = asked["GPU shapes"]
    assert {case.name for case in plan.cases} == {"dvs64", "dvs128", "wide64", "wide128"}
    assert dtypes == ["float32", "tf32", "bfloat16"]
    assert {"tiny", "mnist", "big"} <= {c.name for c in asked["the suite's own shapes"][0].cases}


def ran(tmp_path, code: str, until: float = 1.0, seconds: float = 60.0) -> gpu.Outcome:
    step = gpu.Step("a step", (*PYTHON, code, gpu.LEFT), until, tail=2)
    return gpu.run(step, time.monotonic(), seconds, tmp_path / "log")


def test_how_a_step_went(tmp_path):
    good = ran(tmp_path, "import sys; print(1, 2, int(sys.argv[1]), sep='\\n')", until=0.9)
    assert good.verdict == "passed"
    assert good.output == "2\n24"  # the last lines; 54 s but 30 are left to begin something in
    bad = ran(tmp_path, "raise SystemExit(3)")
    assert bad.verdict == "failed (exit status 3)"
    step = gpu.Step("a step", ("no-such-program",), 1.0)
    missing = gpu.run(step, time.monotonic(), 60, tmp_path / "log")
    assert missing.verdict == "failed: No such file or directory: no-such-program"


def test_a_step_whose_time_is_over_is_interrupted_and_keeps_its_output(tmp_path):
    code = """
import time
print("begun", flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("what there is")
"""
    late = ran(tmp_path, code, until=0.5, seconds=4.0)
    assert late.verdict.startswith("stopped: its time was over after 2 s")
    assert late.output == "begun\nwhat there is"
    assert late.seconds < 20
    over = gpu.run(late.step, time.monotonic() - 10, 4.0, tmp_path / "log")
    assert over.verdict == "not begun: no time was left"


def test_a_step_that_will_not_end_is_killed_with_its_children(tmp_path):
    code = """
import signal, subprocess, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
child.wait()
"""
    stuck = ran(tmp_path, code, until=0.5, seconds=4.0)
    assert stuck.verdict.startswith("stopped")
    child = int(stuck.output)
    for _ in range(50):
        try:
            state = Path(f"/proc/{child}/stat").read_text().split(")")[1].split()[0]
        except FileNotFoundError:
            break
        if state == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"process {child} still runs")


def test_the_report_goes_on_after_a_failure(tmp_path, monkeypatch, capsys):
    """The whole command, with other steps."""
    monkeypatch.setattr(gpu, "lacking", lambda: None)
    monkeypatch.setattr(gpu, "facts", lambda: {"GPU": "Some card (sm_90)", "driver": "580.1"})
    script = [
        gpu.Step("first", (*PYTHON, "raise SystemExit('broken')"), 0.5),
        gpu.Step("second", (*PYTHON, "print('fine')"), 0.9, environment=(("A", "b"),)),
    ]
    monkeypatch.setattr(gpu, "steps", lambda out: script)
    assert gpu.main(["--out", str(tmp_path / "out")]) == 1
    text = (tmp_path / "out/report.md").read_text()
    for part in (
        "# snnlstm on Some card (sm_90)", "| driver | 580.1 |",
        "| first | failed (exit status 1) |", "| second | passed |", "1 of 2 passed", "broken",
        "fine", "`A=b ",
    ):  # fmt: skip
        assert part in text
    assert "1 of 2 passed" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "steps", lambda out: script[1:])
    assert gpu.main(["--out", str(tmp_path / "out")]) == 0


def test_the_sanitizers_subset_runs_the_kernels():
    said = gpu_subset.run("cpu")
    assert len(said) == len(gpu_subset.OPTIONS)
    assert all(": cpu-" in line for line in said)
    with pytest.raises(RuntimeError, match="ran, not meta's kernels"):
        gpu_subset.run("meta")
