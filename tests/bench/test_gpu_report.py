"""The steps and the report of `make gpu` work, as far as a machine without a GPU can run them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import test_benchmarks
import torch
from test_benchmarks import SMALL

import snnlstm
from benchmarks import cli, compare, gpu, gpu_goals, gpu_needs, gpu_smoke
from benchmarks.kernel_times import kernel_times
from benchmarks.providers import PROVIDERS, Setting
from benchmarks.rows import BEGIN, END, Row, read_rows, to_text
from tests.shared.helpers import HANG

ROW = dataclasses.replace(test_benchmarks.ROW, case="small", dtype="tf32", mode="forward")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_at_once(capsys, tmp_path):
    assert gpu.main(["--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("no GPU: torch ")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def with_gpu(monkeypatch):
    """Returns the needs of a machine that has a GPU, and a driver of CUDA 13."""
    monkeypatch.setattr(gpu_needs, "without_gpu", lambda: None)
    monkeypatch.setattr(gpu_needs, "driver_version", lambda: 13000)
    monkeypatch.setattr(gpu_needs, "nvcc", lambda: None)
    monkeypatch.setattr(gpu_needs, "NEEDED", {})
    monkeypatch.setattr(gpu_needs, "PROGRAMS", {})
    return monkeypatch


def test_all_that_is_not_installed_is_in_one_message(with_gpu):
    needed = {"no_such_module": "no_such_module", "torch": "torch>=1000.1", "numpy": "numpy>=1.2"}
    with_gpu.setattr(gpu_needs, "NEEDED", needed)
    programs = {"no-such-program": "no-such-program", "sh": "sh", "python3": "python3>=99.1"}
    with_gpu.setattr(gpu_needs, "PROGRAMS", programs)
    with_gpu.setattr(gpu_needs, "COMPILERS", ("no-such-compiler",))
    with_gpu.delenv("CXX", raising=False)
    wanted = 'no_such_module "torch>=1000.1" no-such-program "python3>=99.1"'
    assert gpu_needs.lacking().splitlines()[:3] == [
        "missing or too old:",
        f"  {sys.executable} -m pip install {wanted} {gpu_needs.NVCC}",
        "  a C++ compiler: apt-get install g++",
    ]
    with_gpu.setattr(gpu_needs, "NEEDED", {"numpy": "numpy>=1.2"})
    with_gpu.setattr(gpu_needs, "PROGRAMS", {})
    assert gpu_needs.lacking(rehearsal=True).splitlines()[1:] == [
        "  a C++ compiler: apt-get install g++"
    ]


def test_a_python_that_takes_no_packages_is_told_how_to_make_one_that_does(with_gpu, tmp_path):
    with_gpu.setattr(sys, "prefix", sys.base_prefix)
    with_gpu.setattr(gpu_needs.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "PEP 668" not in gpu_needs.lacking()
    (tmp_path / "EXTERNALLY-MANAGED").touch()
    assert "-m venv --system-site-packages .venv" in gpu_needs.lacking()


def test_nvcc_and_driver_must_be_of_one_cuda(with_gpu, tmp_path):
    with_gpu.setattr(gpu_needs, "driver_version", lambda: 12040)
    said = gpu_needs.lacking()
    assert "nvcc of CUDA 12, since the driver runs CUDA 12.4 and PyPI has nvcc from 13 on" in said
    assert "pip install" not in said
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 13.0, V13.0.88\n")
    nvcc.chmod(0o755)
    with_gpu.setattr(gpu_needs, "nvcc", lambda: str(nvcc))
    assert f"{nvcc} is of CUDA 13, and the driver runs CUDA 12.4" in gpu_needs.lacking()
    with_gpu.setattr(gpu_needs, "driver_version", lambda: 13010)
    assert gpu_needs.lacking() is None


@pytest.mark.parametrize(
    ("version", "old"),
    [("3.31.6", False), ("3.9", True), ("cmake version 3.24.0", False), ("4.0.dev1", False)],
)
def test_versions_are_compared_number_by_number(version, old):
    assert gpu_needs.older(version, "cmake>=3.24") == old
    assert not gpu_needs.older(version, "cmake")


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
    outcome = place(tmp_path).run(step, HANG)
    assert outcome.verdict == "left out: no-such-program is not installed"
    assert gpu.summary([outcome]) == "0 of 1 passed, 1 left out"


@pytest.mark.parametrize(
    ("device", "capability", "rehearsal"),
    [("cuda", 75, False), ("cuda", 90, False), ("simt-t4", 75, True), ("simt-h100", 90, True)],
)
def test_every_command_exists_and_understands_what_it_is_asked(
    tmp_path, monkeypatch, device, capability, rehearsal
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    planned = gpu.steps(rehearsal)
    shares = [step.until for step in planned]
    assert shares == sorted({*shares} - {1.0})
    assert [step.name for step in planned if step.needed] == ["build", "smoke"]
    begin, asked, types = time.monotonic(), set(), []
    for step in planned:
        words = place(tmp_path, device, capability).words(step, 90)
        assert not any("{" in word for word in words)
        checks = step.name in ("smoke", "memcheck", "racecheck")
        assert ("benchmarks.gpu_smoke" in words) == checks
        if checks:
            assert words[words.index("--device") + 1] == device
        if "benchmarks" in words:
            args = cli.parser().parse_args(words[3:])
            assert args.out.parent == tmp_path
            types, plans = args.dtype, [cli.plan_from(args, dtype) for dtype in args.dtype]
            asked |= {case.name for case in plans[0].cases}
            for plan in plans:
                assert {"snntorch", "snnlstm", "snnlstm-step"} <= {p.name for p in plan.providers}
                assert rehearsal or begin + 60 <= plan.deadline <= time.monotonic() + 60
                assert plan.kernels
    assert asked == {"tiny", "pooled"} if rehearsal else asked > {"mnist", "big", "wide128"}
    halves = ["float16"] if capability < 80 else ["bfloat16", "float16"]
    assert [dtype for dtype in types if dtype in ("bfloat16", "float16")] == halves
    assert ("tf32" in types) == (capability >= 80)


def test_what_a_gpu_cannot_do_natively_is_not_smoke_tested():
    assert gpu_smoke.precisions("simt-t4") == ("float64", "float32", "float16")
    assert "bfloat16" in gpu_smoke.precisions("simt-a100")


def test_steps_keep_the_callers_modules(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "mine"))
    outcome = ran(tmp_path, "import os; print(os.environ['PYTHONPATH'])")
    assert outcome.output == f"{gpu.ROOT}{os.pathsep}{tmp_path / 'mine'}"


def test_steps_are_chosen_by_name():
    assert [s.name for s in gpu.chosen(["smoke", "build"], gpu.steps(False))] == ["build", "smoke"]
    with pytest.raises(ValueError, match="no step is called 'smok'; known: build, what is there"):
        gpu.chosen(["smok"], gpu.steps(False))


def place(out: Path, device: str = "cuda", capability: int = 90) -> gpu.Place:
    return gpu.Place(device, capability, None, out, out / "build")


def ran(tmp_path, code: str, left: float = HANG) -> gpu.Outcome:
    (tmp_path / "script.py").write_text(code)
    step = gpu.Step("a step", 1.0, "{python} {out}/script.py {left}", tail=2)
    return place(tmp_path).run(step, left)


def test_how_a_step_went(tmp_path):
    good = ran(tmp_path, "import sys; print(1, 2, int(sys.argv[1]), sep='\\n')", left=654.0)
    assert good.verdict == "passed"
    assert good.output == "2\n624"  # the last two lines; of 654 s, 30 s are for the last shape
    assert ran(tmp_path, "raise SystemExit(3)").verdict == "failed (exit status 3)"
    missing = place(tmp_path).run(gpu.Step("a step", 1.0, "no-such-program"), HANG)
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
    monkeypatch.setattr(gpu_needs, "lacking", lambda rehearsal: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    about = {"GPU": "Some card (sm_90)", "driver": "580.1"}
    monkeypatch.setattr(gpu, "facts", lambda place: about)
    script = [
        gpu.Step("first", 0.5, "{python} -c 'raise SystemExit(\"broken\")'", needed=needed),
        gpu.Step("second", 0.9, "{python} -c 'print(12)'", ("A=b",)),
    ]
    monkeypatch.setattr(gpu, "steps", lambda rehearsal: tuple(script))
    assert gpu.main(["--out", str(tmp_path / "out")]) == 1
    text = (tmp_path / "out/report.md").read_text()
    second = "not begun: first did not pass" if needed else "passed"
    for part in (
        "# snnlstm on Some card (sm_90)", "| driver | 580.1 |",
        "| first | failed (exit status 1) |", f"| second | {second} |", "broken", "`A=b ",
    ):  # fmt: skip
        assert part in text
    assert f"{0 if needed else 1} of 2 passed" in capsys.readouterr().out
    sent = (tmp_path / "out/send.txt").read_text()
    assert "GPU: Some card (sm_90)" in sent
    assert "\nfirst:\nbroken\n" in sent
    assert read_rows(tmp_path / "out/send.txt") == []
    monkeypatch.setattr(gpu, "steps", lambda rehearsal: tuple(script[1:]))
    assert gpu.main(["--out", str(tmp_path / "out")]) == 0


def test_the_block_of_text_holds_all_rows(tmp_path, capsys):
    """A block may be quoted and have anything around it; one that was changed is refused."""
    measured = rows(snntorch=10, snnlstm=2.5)
    block = to_text(measured)
    sent = tmp_path / "message.txt"
    sent.write_text("Hello,\n> " + block.replace("\n", "\n> ") + "\n\nand goodbye\n")
    assert read_rows(sent) == measured
    assert compare.main([str(sent)]) == 0
    assert "small  forward  tf32   snnlstm   2.5 " in capsys.readouterr().out
    assert compare.main([str(sent), str(sent)]) == 0
    assert "A: snnlstm" in capsys.readouterr().out
    for text, wrong in (
        ("nothing", f"no line {BEGIN}"),
        (block[: -len(END)], "the text ends before"),
        (block.replace(block.splitlines()[1][10:30], ""), "changed on its way"),
    ):
        sent.write_text(text)
        with pytest.raises(ValueError, match=wrong):
            read_rows(sent)


NOTEBOOK = gpu.ROOT / "benchmarks" / "gpu.ipynb"


def test_the_notebook_installs_what_is_needed_and_runs_commands_that_exist():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    sources = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    code = [line for source in sources for line in source.splitlines()]
    installed = [w for line in code if line.startswith("%pip") for w in shlex.split(line)[3:]]
    on_colab = {"numpy"}
    needed = {**gpu_needs.NEEDED, **gpu_needs.PROGRAMS}
    assert {*installed} == {pinned for name, pinned in needed.items() if name not in on_colab}
    steps = [word for line in code if "--steps" in line for word in shlex.split(line)[5:]]
    names = steps[steps.index("--steps") + 1 :] if "--steps" in steps else []
    assert names == ["build", "what is there", "smoke"]
    assert [s.name for s in gpu.chosen(names, gpu.steps(False))] == names
    (plot,) = (shlex.split(line) for line in code if "--plot" in line)
    assert cli.parser().parse_args(plot[3:]).plot == Path("out/colab/layers")


def test_the_smoke_test_runs_the_kernels_and_compares_them(monkeypatch):
    said = gpu_smoke.run("cpu", algorithms=("direct",))
    assert len(said) == 2 * len(gpu_smoke.OPTIONS)
    assert all(": cpu-" in line for line in said)
    monkeypatch.setattr(snnlstm.path, "_native", None)
    with pytest.raises(RuntimeError, match="ran, not the kernels"):
        gpu_smoke.run("cpu", algorithms=("direct",))


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
