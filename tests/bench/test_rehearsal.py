"""`make gpu` goes through every step without a GPU, and its report holds together."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import torch
from torch.utils._pytree import tree_leaves

from benchmarks import devices, gpu, gpu_smoke
from tests.emulator.test_core_mutations import NOTICED_BY_SMOKE
from tests.shared.helpers import long


@long
def test_a_rehearsal_passes_every_step(tmp_path):
    """Nothing in the checkout changes."""
    before = {path: path.stat().st_mtime_ns for path in gpu.ROOT.glob("*/_C*.so")}
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--out", str(out)], cwd=gpu.ROOT,
        env=os.environ | {"SNNLSTM_CUDA": "off"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    logs = "\n".join(log.read_text()[-2000:] for log in tmp_path.glob("gpu-build/work/*.log"))
    assert done.returncode == 0, f"{done.stdout}{done.stderr}{logs}"
    text = (out / "report.md").read_text()
    assert text.startswith("# Rehearsal, without times of a GPU, of snnlstm on an emulated t4")
    for name in ("build", "smoke fused", "smoke cudnn", "layers", "tests", "large layers"):
        assert f"| {name} | passed" in text
    assert re.search(r"\| all \| (\d+) of \1 passed", text)
    assert before == {path: path.stat().st_mtime_ns for path in gpu.ROOT.glob("*/_C*.so")}

    assert {file.name for file in out.iterdir()} == {"report.md", "results.zip"}
    shutil.unpack_archive(out / "results.zip", tmp_path / "results")
    rows = pd.read_csv(tmp_path / "results" / "large" / "rows.csv")
    assert set(rows.dtype) == {"float32", "autocast16", "float16"}
    paths = {name: set(part.path) for name, part in rows.groupby("provider")}
    assert paths["sequence:fused"] == {"emulator-fma"}
    assert paths["sequence:cudnn"] == {"emulator-cudnn"}


needs_emulator = pytest.mark.skipif(not shutil.which("g++"), reason="no compiler")
SMALL = (2, 1, 3, 5, 6, 7)


def judged(device, precision, option, sizes=SMALL):
    """Returns what the smoke test says of a row, and its verdict."""
    with pytest.MonkeyPatch.context() as patch, devices.running(device):
        patch.setattr(devices, "precisions", lambda device: [precision])
        return next(gpu_smoke.run(device, sizes, ["fused"], [option]))


@needs_emulator
@pytest.mark.parametrize("option", ["plain", "Leaky, zero"])
def test_a_channel_without_spikes_is_wrong(option, monkeypatch):
    called = gpu_smoke.Cell.called

    def mutated(self, record=True):
        spk, *states = called(self, record)
        return spk * torch.ones_like(spk).index_fill(-3, torch.tensor(0), 0), *states

    monkeypatch.setattr(gpu_smoke.Cell, "called", mutated)
    line, right = judged("emulator-a100", "bfloat16", option)
    assert not right
    assert " 0 wrong" not in line


def test_the_smoke_test_sees_a_gradient_that_is_no_number(monkeypatch):
    results = gpu_smoke.Cell.results

    def mutated(self, record=None):
        out, grads = results(self, record)
        return out, [*grads[:-1], grads[-1] * torch.nan]

    monkeypatch.setattr(gpu_smoke.Cell, "results", mutated)
    found = list(gpu_smoke.run("cpu", algorithms=("direct",), names=("plain", "Leaky, zero")))
    assert [right for _, right in found] == [False] * 4


# The rows whose layers the emulator runs quickly; the others are part of `make test-all`.
QUICK = "one column", *(name for name in gpu_smoke.OPTIONS if "Leaky" in name)


@needs_emulator
@long
@pytest.mark.parametrize("device", ["emulator-a100", "emulator-t4"])
@pytest.mark.parametrize("algorithm", gpu_smoke.ALGORITHMS)
def test_the_smoke_test_passes_right_kernels_at_its_default_sizes(device, algorithm):
    with devices.running(device):
        found = list(gpu_smoke.run(device, algorithms=[algorithm]))
    assert [line for line, right in found if not right] == []


@needs_emulator
@pytest.mark.parametrize(
    ("device", "fault", "precision", "option"),
    [
        # Tiles and ways through the kernels differ between these cards.
        pytest.param(card, fault, *row, marks=() if quick else long)
        for card in ("emulator-a100", "emulator-t4", "emulator-4090")
        for row, names in NOTICED_BY_SMOKE.items()
        for quick in [card == "emulator-a100" and row[1] in QUICK]
        for fault in names
        if row[0] in devices.precisions(card)
    ],
)
def test_the_smoke_test_notices_wrong_kernels_at_its_default_sizes(
    device, fault, precision, option
):
    devices.emulator().fault(fault)
    line, right = judged(device, precision, option, gpu_smoke.SIZES)
    assert not right, line
    assert "all spike" in line  # not an error


@needs_emulator
@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize(
    ("precision", "option"),
    [("float32", "plain"), ("bfloat16", "step loop"), ("float16", "Leaky, steps")],
)
def test_a_graph_that_replays_old_numbers_is_wrong(precision, option, right, monkeypatch):
    def captured(run):
        found = run()

        def replay():
            for one, other in zip(tree_leaves(found), tree_leaves(run()), strict=True):
                one.copy_(other if right else one)

        return replay, found

    monkeypatch.setattr(devices, "captured", captured)
    monkeypatch.setattr(gpu_smoke, "GRAPHS", ("emulator-a100",))
    line, verdict = judged("emulator-a100", precision, option)
    assert verdict == right, line
    assert "; replayed 0 wrong" in line or not right


def test_an_error_that_ends_all_work_on_the_gpu_ends_no_other_row(monkeypatch, capsys):
    """Each process is a call here. The first error's row runs again, in a process that waits."""

    def begin(program, command, environment):
        monkeypatch.setattr(os, "environ", environment)
        assert command[:3] == [program, "-m", "benchmarks.gpu_smoke"]
        raise SystemExit(gpu_smoke.main(command[3:]))

    def judged(self):
        raise KeyError("not even a RuntimeError")

    monkeypatch.delenv("CUDA_LAUNCH_BLOCKING", raising=False)
    monkeypatch.setattr(gpu_smoke, "lost", lambda device: True)
    monkeypatch.setattr(os, "execve", begin)
    monkeypatch.setattr(gpu_smoke.Cell, "judged", judged)
    two = ["--device", "cpu", "--algorithms", "fused", "--options", "4 channels", "plain"]
    with pytest.raises(SystemExit, match="1"):
        gpu_smoke.main(two)
    assert os.environ["CUDA_LAUNCH_BLOCKING"] == "1"
    printed = re.findall("WRONG  fused, (float.., .)", capsys.readouterr().out)
    assert printed == ["float64, 4", "float64, 4", "float64, p", "float32, 4", "float32, p"]


@pytest.mark.parametrize(
    ("status", "verdict"),
    [(0, "passed"), (gpu.NOT_RUN, "incomplete"), (1, "failed (exit status 1)"), (124, "stopped")],
)
def test_a_report_has_each_step_and_the_console_what_failed(status, verdict, tmp_path, capsys):
    place = gpu.Place("emulator-t4", *[tmp_path] * 4)
    text = "WRONG a line" if status == 1 else "a line"
    command = f"sh -c 'echo {text}; seq 1001 1020; exit {status}'"
    (outcome,) = gpu.run_all(place, [gpu.Step("step", 60, command)])
    assert outcome.verdict.startswith(verdict)
    shown = capsys.readouterr().out
    assert ("WRONG a line" in shown) == (status == 1)
    assert re.findall(r"\b10\d\d\b", shown) == [str(1006 + i) for i in range(15 * (status == 1))]
    text = (tmp_path / "report.md").read_text()
    assert ("1 of 1 passed" in text) == (status == 0)
    assert "on an emulated t4 (sm_75)" in text


def test_the_core_is_built_for_all_gpus_and_each_later_step_has_a_limit(tmp_path):
    for quick in (True, False):
        planned = gpu.steps(gpu.Place("cuda", *[tmp_path] * 4), quick, [90, 75])
        configure, build, _, *others = planned
        assert "-DSNNLSTM_CUDA=ON '-DSNNLSTM_CUDA_ARCHS=90;75'" in configure.command
        assert configure.until == build.until == 0
        assert max(step.until for step in others) < (240 if quick else 1800)


def test_what_is_missing_is_listed_with_what_installs_it(monkeypatch):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: name == "torch")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    packages, card = gpu.lacking(rehearsal=False)
    assert "pip install pybind11 cmake ninja pytest" in packages
    assert "no torch that sees a GPU" in card
    assert gpu.lacking(rehearsal=True) == [packages]


@needs_emulator
@pytest.mark.parametrize("right", [True, False])
def test_equal_calls_that_differ_in_one_bit_are_wrong(right, monkeypatch):
    results, calls = gpu_smoke.Cell.results, itertools.count()

    def mutated(self, record=None):
        out, grads = results(self, record)
        # Of our own calls the second one, after the one that is judged.
        if self.inputs[0].dtype == torch.float32 and next(calls) == 1 and not right:
            grads[-1].view(torch.int32).view(-1)[-1] ^= 1
        return out, grads

    monkeypatch.setitem(gpu_smoke.OPTIONS["repeated"], "repeats", 2)
    monkeypatch.setattr(gpu_smoke.Cell, "results", mutated)
    line, verdict = judged("emulator-a100", "float32", "repeated")
    assert ("1 of 2 repeats differ" in line) == (not right), line
    assert verdict == right, line
