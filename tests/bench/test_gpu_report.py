"""The steps and the report of `make gpu` work, as far as a machine without a GPU can run them."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import test_benchmarks
import torch
from helpers import HANG
from test_benchmarks import SMALL

from benchmarks import cli, gpu, gpu_goals, gpu_smoke
from benchmarks.kernel_times import kernel_times
from benchmarks.providers import PROVIDERS, Setting
from benchmarks.rows import Row

ROW = dataclasses.replace(test_benchmarks.ROW, case="small", dtype="tf32", mode="forward")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_at_once(capsys, tmp_path):
    assert gpu.main(["--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("no GPU: torch ")
    assert not (tmp_path / "out").exists()


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    needed = {"no_such_module": "no_such_module", "torch": "torch>=1000", "numpy": "numpy>=1.2"}
    monkeypatch.setattr(gpu, "NEEDED", needed)
    monkeypatch.setattr(gpu, "PROGRAMS", {"no-such-program": "no-such-program", "sh": "sh"})
    monkeypatch.setattr(gpu, "nvcc", lambda: None)
    said = gpu.lacking()
    wanted = f'-m pip install no_such_module "torch>=1000" no-such-program {gpu.NVCC}'
    assert said.startswith(f"missing or too old: {sys.executable} {wanted}")


def test_nothing_but_pythons_own_modules_is_imported_before_it_is_said():
    """A machine with torch alone gets one message and no traceback."""
    code = (
        "import sys, benchmarks.gpu; print(*(m for m in ('torch', 'snntorch') if m in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=gpu.ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_a_program_that_is_optional_is_left_out(tmp_path):
    step = gpu.Step("a step", 1.0, "no-such-program", optional=True)
    outcome = gpu.run(step, HANG, tmp_path)
    assert outcome.verdict == "left out: no-such-program is not installed"
    assert gpu.summary([outcome]) == "0 of 1 passed, 1 left out"


def test_every_command_exists_and_understands_what_it_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    shares = [step.until for step in gpu.STEPS]
    assert shares == sorted({*shares} - {1.0})
    assert [step.name for step in gpu.STEPS if step.needed] == ["build", "smoke"]
    assert [step.name for step in gpu.STEPS[2:4]] == ["smoke", "tests on cuda"]
    asked, begin = {}, time.monotonic()
    for step in gpu.STEPS:
        words = gpu.words(step, tmp_path, 90)
        assert not any("{" in word for word in words)
        checks = step.name in ("smoke", "memcheck", "racecheck")
        assert ("benchmarks.gpu_smoke" in words) == checks
        if "benchmarks" in words:
            args = cli.parser().parse_args(words[3:])
            assert args.out.parent == tmp_path
            plans = [cli.plan_from(args, dtype) for dtype in args.dtype]
            asked[step.name] = {case.name for case in plans[0].cases}
            for plan in plans:
                assert [kind.name for kind in plan.providers] == list(PROVIDERS)
                assert begin + 60 <= plan.deadline <= time.monotonic() + 60
                assert plan.kernels
    assert asked["GPU shapes"] >= {"dvs64", "wide128"}
    assert asked["the suite's own shapes"] >= {"tiny", "mnist", "big"}


def ran(tmp_path, code: str, left: float = HANG) -> gpu.Outcome:
    (tmp_path / "script.py").write_text(code)
    step = gpu.Step("a step", 1.0, "{python} {out}/script.py {left}", tail=2)
    return gpu.run(step, left, tmp_path)


def test_how_a_step_went(tmp_path):
    good = ran(tmp_path, "import sys; print(1, 2, int(sys.argv[1]), sep='\\n')", left=654.0)
    assert good.verdict == "passed"
    assert good.output == "2\n624"  # the last two lines; of 654 s, 30 s are for the last shape
    assert ran(tmp_path, "raise SystemExit(3)").verdict == "failed (exit status 3)"
    missing = gpu.run(gpu.Step("a step", 1.0, "no-such-program"), HANG, tmp_path)
    assert missing.verdict == "failed: no such program: no-such-program"
    assert ran(tmp_path, "", left=-6).verdict == "not begun: no time was left"


def test_a_step_whose_time_is_over_is_interrupted_and_keeps_its_output(tmp_path):
    code = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
try:
    print(child.pid, flush=True)
    time.sleep(3600)
except KeyboardInterrupt:
    print("what there is")
"""
    log, left = tmp_path / "a-step.log", 2
    late = ran(tmp_path, code, left)
    while not re.match(r"\d+\n", log.read_text()):  # too early: a busy machine needs longer
        left *= 2
        late = ran(tmp_path, code, left)
    assert late.verdict == f"stopped: its time was over after {left} s"
    assert "what there is" in log.read_text()
    child = Path(f"/proc/{log.read_text().split()[0]}/stat")
    for _ in range(10 * HANG):  # the child was interrupted, too
        if not child.exists() or child.read_text().split(")")[1].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"{child} still runs")


@pytest.mark.parametrize("needed", [False, True])
def test_the_report_goes_on_after_a_failure_but_of_what_all_need(
    tmp_path, monkeypatch, capsys, needed
):
    """The test runs the whole command, with other steps."""
    monkeypatch.setattr(gpu, "lacking", lambda: None)
    monkeypatch.setattr(gpu, "facts", lambda: {"GPU": "Some card (sm_90)", "driver": "580.1"})
    script = [
        gpu.Step("first", 0.5, "{python} -c 'raise SystemExit(\"broken\")'", needed=needed),
        gpu.Step("second", 0.9, "{python} -c 'print(12)'", ("A=b",)),
    ]
    monkeypatch.setattr(gpu, "STEPS", script)
    assert gpu.main(["--out", str(tmp_path / "out")]) == 1
    text = (tmp_path / "out/report.md").read_text()
    second = "not begun: first did not pass" if needed else "passed"
    for part in (
        "# snnlstm on Some card (sm_90)", "| driver | 580.1 |",
        "| first | failed (exit status 1) |", f"| second | {second} |", "broken", "`A=b ",
    ):  # fmt: skip
        assert part in text
    assert f"{0 if needed else 1} of 2 passed" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "STEPS", script[1:])
    assert gpu.main(["--out", str(tmp_path / "out")]) == 0


def test_the_smoke_test_runs_the_kernels_and_compares_them():
    said = gpu_smoke.run("cpu", algorithms=("direct",))
    assert len(said) == 2 * len(gpu_smoke.OPTIONS)
    assert all(": cpu-" in line for line in said)
    with pytest.raises(RuntimeError, match="ran, not the kernels"):
        gpu_smoke.run("meta", algorithms=("direct",))


@pytest.mark.parametrize("apart", [(float("nan"), 0.0), (0.0, 1.0)], ids=["mem", "gradients"])
def test_the_smoke_test_notices_what_differs(monkeypatch, apart):
    monkeypatch.setattr(gpu_smoke, "_apart", lambda *_: apart)
    with pytest.raises(RuntimeError, match=r"mem .*, gradients .* apart"):
        gpu_smoke.run("cpu", algorithms=("direct",))


@pytest.mark.parametrize("mode", ["forward", "backward", "both"])
def test_kernels_are_timed_one_by_one(mode):
    provider = PROVIDERS["snntorch"](SMALL, Setting())
    found = kernel_times(dataclasses.replace(ROW, mode=mode), provider.prepare(mode), "cpu")
    names = {kernel.kernel for kernel in found}
    assert any("conv" in name for name in names)
    assert sum(kernel.share for kernel in found) == pytest.approx(1)
    assert [k.microseconds for k in found] == sorted((k.microseconds for k in found), reverse=True)
    assert {kernel.mode for kernel in found} == {mode}


def test_the_compiled_baseline_is_channels_last(monkeypatch):
    seen = []

    def compiled(cell, **_):
        def step(x, syn, mem):
            seen.append([t.is_contiguous(memory_format=torch.channels_last) for t in (x, syn, mem)])
            return cell(x, syn, mem)

        return step

    monkeypatch.setattr(torch, "compile", compiled)
    provider = PROVIDERS["snntorch-compile-last"](SMALL, Setting())
    x, syn, mem = provider.inputs("both")
    assert x.is_leaf
    assert x.requires_grad
    provider.sequence(x, syn, mem)
    assert seen[0] == [True] * 3


def rows(**medians: float) -> list[Row]:
    names = {name.replace("_", "-"): time for name, time in medians.items()}
    return [dataclasses.replace(ROW, provider=n, p50_ms=time) for n, time in names.items()]


def test_goals_of_a_layer_that_launches_bind():
    found = gpu_goals.goals(
        rows(snntorch=10, snntorch_cudagraph=5, snntorch_compile=6, snnlstm=2, snnlstm_cudagraph=3)
    )
    assert [(g.against, g.wanted, g.found) for g in found] == [
        ("snntorch", 5, 5.0), ("snntorch-cudagraph", 2, 2.5), ("snntorch-cudagraph", 1, 2.5),
    ]  # fmt: skip
    assert all(goal.met for goal in found)


def test_goals_of_a_wide_layer():
    measured = rows(
        snntorch=10, snntorch_cudagraph=9, snntorch_compile_graph=6, hoisted=4, snnlstm=5,
        snnlstm_cudagraph=4.5,
    )  # fmt: skip
    backward = [dataclasses.replace(row, mode="backward") for row in measured]
    text = gpu_goals.verdict([*measured, *backward]).splitlines()
    assert text == [
        "0 of 2 goals for GPUs met:",
        "small forward tf32: 1.33x snntorch-compile-graph, goal 1.5x: missed",
        "small forward tf32: 0.89x hoisted, goal 1x: missed",
    ]
    assert gpu_goals.verdict(rows(snntorch=10)) == ""
