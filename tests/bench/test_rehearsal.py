"""`make gpu` goes through every step without a GPU, and its report holds together."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from torch.utils._pytree import tree_leaves

from benchmarks import (
    devices,
    gpu,
    gpu_smoke,
    host,
    machine,
    report,
    run,
)
from benchmarks.providers import BASELINE
from snnlstm.native import leaky, plan
from tests.emulator.test_core_mutations import NOTICED_BY_SMOKE
from tests.shared.helpers import long


@long
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
    assert text.startswith("# Rehearsal of snnlstm, without times of a GPU, on an emulated t4")
    for name in ("build", "smoke fused", "smoke cudnn", "layers", "tests", "large layers"):
        assert f"| {name} | passed" in text
    assert re.search(r"\| all \| (\d+) of \1 passed", text)
    assert before == {path: path.stat().st_mtime_ns for path in gpu.ROOT.glob("*/_C*.so")}

    assert {file.name for file in out.iterdir()} == {"report.md", "results.zip"}
    shutil.unpack_archive(out / "results.zip", tmp_path / "results")
    rows = report.read(tmp_path / "results" / "large")
    assert set(rows.case) == {"tiny"}
    assert set(rows.dtype) == {"float32", "autocast16", "float16"}
    assert rows.path[rows.provider == "sequence"].str.startswith("emulator-").all()
    assert (rows.path[rows.provider == "sequence:fused"] == "emulator-fma").all()
    assert (rows.path[rows.provider == "sequence:cudnn"] == "emulator-cudnn").all()


needs_emulator = pytest.mark.skipif(not shutil.which("g++"), reason="no compiler")

# What a broken kernel may do to its spikes (T, N, C, H, W), or (N, C, H, W) of one step.
MUTANTS = {
    "none": lambda spk: None,
    "no spikes": lambda spk: spk.zero_(),
    "spikes of the step before": lambda spk: spk.copy_(torch.cat([spk[:1] * 0, spk[:-1]])),
    "a missing channel": lambda spk: spk.select(-3, 0).zero_(),
}


@needs_emulator
@pytest.mark.parametrize(
    "mutant",
    [
        "none", "a missing channel",  # which every algorithm runs
        *(pytest.param(name, marks=long) for name in ("no spikes", "spikes of the step before")),
    ],
)  # fmt: skip
def test_each_step_that_checks_spikes_fails_where_they_are_wrong(
    mutant, monkeypatch, tmp_path, capsys
):
    """Coarse types are the harder ones: there rounding excuses some spikes."""
    forward = plan.Plan.forward

    def mutated(self, call, training):
        result = forward(self, call, training)
        MUTANTS[mutant](result.spk)
        return result

    run_leaky = leaky.Plan.forward

    def mutated_leaky(*call):
        result = run_leaky(*call)
        MUTANTS[mutant](result[0])
        return result

    monkeypatch.setattr(plan.Plan, "forward", mutated)
    monkeypatch.setattr(leaky.Plan, "forward", mutated_leaky)
    monkeypatch.setattr(gpu_smoke, "EXACT", ())
    device = ["--device", "emulator-a100"]
    sizes = ["--sizes", *["2", "1", "3", "5", "6", "7"]]
    rows = [("fused", "plain"), ("fused", "Leaky, zero")]
    if mutant == "a missing channel":  # an algorithm looks at the spikes, or does not
        rows += [(algorithm, "plain") for algorithm in gpu_smoke.ALGORITHMS[1:]]
    for algorithm, option in rows:
        smoke = [*device, *sizes, "--options", option, "--algorithms", algorithm]
        assert gpu_smoke.main(smoke) == (mutant != "none"), smoke
    layer = ["--shape", gpu.TINY.strip('"'), "--seconds", "0.01", "--mode", "inference"]
    layer += ["--dtype", "bfloat16", "--providers", "sequence"]
    wrong = run.main([*device, *layer, "--out", str(tmp_path)])
    assert wrong == (mutant != "none")
    right = {BASELINE} if wrong else {BASELINE, "sequence"}
    assert set(report.read(tmp_path).provider) == right
    said = "WRONG: tiny, bfloat16: sequence: computes something else:"
    assert (said in capsys.readouterr().out) == wrong


def test_the_smoke_test_sees_a_gradient_that_is_no_number(monkeypatch):
    largest = gpu_smoke._largest
    monkeypatch.setattr(
        gpu_smoke, "_largest", lambda numbers: largest([*numbers, numbers[0] * float("nan")])
    )
    names = ("plain", "Leaky, zero")  # every row of either kind is judged alike
    found = list(gpu_smoke.run("cpu", algorithms=("direct",), names=names))
    assert [right for _, right in found] == [False] * 4


CARDS = ("emulator-a100", "emulator-t4")
# Cards whose tiles and ways through the kernels differ: each fault is noticed on each of them.
FAULTY = (*CARDS, "emulator-4090")
# The rows whose layers the emulator runs quickly; the others are part of `make test-all`.
QUICK = "one column", *(name for name in gpu_smoke.OPTIONS if "Leaky" in name)
SMALL = (3, 2, 3, 5, 6, 7)


def judged(device, precision, options, algorithm="fused", sizes=gpu_smoke.SIZES):
    """Returns what the smoke test says of some rows, and their verdicts."""
    with pytest.MonkeyPatch.context() as patch, devices.running(device):
        patch.setattr(devices, "precisions", lambda device: [precision])
        return list(gpu_smoke.run(device, sizes, [algorithm], options))


@needs_emulator
@long
@pytest.mark.parametrize(
    ("device", "algorithm", "precision"),
    [
        (device, algorithm, precision)
        for device, algorithm in itertools.product(CARDS, gpu_smoke.ALGORITHMS)
        for precision in devices.precisions(device)
    ],
)
def test_the_smoke_test_passes_right_kernels_at_its_default_sizes(device, algorithm, precision):
    found = judged(device, precision, list(gpu_smoke.OPTIONS), algorithm)
    assert [line for line, right in found if not right] == []


@needs_emulator
@pytest.mark.parametrize(
    ("device", "fault", "precision", "option"),
    [
        pytest.param(card, fault, *row, marks=() if quick else long)
        for card in FAULTY
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
    ((line, right),) = judged(device, precision, [option])
    assert not right, line
    assert "all spike" in line  # not an error


def test_a_second_gpu_takes_no_memory_on_the_first_one_or_is_skipped(monkeypatch):
    memory = [300, 300, 300, 520]
    row = ("float32", "direct", "second GPU")
    monkeypatch.setattr(gpu_smoke, "SECOND", "cpu")
    monkeypatch.setattr(gpu_smoke, "rows", lambda *given: [row])
    monkeypatch.setattr(gpu_smoke, "trouble", lambda index: index != 1)
    monkeypatch.setattr(devices, "memory_of_first", lambda: memory.pop(0))
    assert next(iter(gpu_smoke.OPTIONS)) == row[-1]  # other rows make a context on the first GPU
    ((line, right),) = gpu_smoke.run("cpu")
    assert right, line
    ((line, right),) = gpu_smoke.run("cpu")
    assert not right
    assert "220 MiB taken on the first GPU" in line
    monkeypatch.setattr(gpu_smoke, "trouble", lambda index: "it is too old")
    said = "NOT RUN: direct, float32, second GPU: it is too old"
    assert list(gpu_smoke.run("cpu")) == [(said, True)]


@needs_emulator
@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize(
    ("precision", "option"),
    [("float32", "plain"), ("bfloat16", "step loop"), ("float16", "Leaky, steps")],
)  # fmt: skip
def test_a_graph_that_replays_old_numbers_is_wrong(precision, option, right, monkeypatch):
    def captured(run):
        found = run()

        def replay():
            for one, other in zip(tree_leaves(found), tree_leaves(run()), strict=True):
                one.copy_(other if right else one)

        return replay, found

    monkeypatch.setattr(devices, "captured", captured)
    monkeypatch.setattr(gpu_smoke, "GRAPHS", ("emulator-a100",))
    ((line, verdict),) = judged("emulator-a100", precision, [option], sizes=SMALL)
    assert verdict == right, line
    assert "; replayed 0 wrong" in line or not right


def test_an_error_that_ends_all_work_on_the_gpu_ends_no_other_row(monkeypatch, capsys):
    """Each process is a call here. It runs the rows up to the first error, which a second names."""
    started = []

    def begin(command, env=None, check=True):
        assert command[1:3] == ["-m", "benchmarks.gpu_smoke"]
        started.append((env or {}).get("CUDA_LAUNCH_BLOCKING"))
        gpu_smoke.main(command[3:])

    def judged(self):
        raise KeyError("not even a RuntimeError")

    monkeypatch.setattr(devices, "lost", lambda device: True)
    monkeypatch.setattr(devices.subprocess, "run", begin)
    monkeypatch.setattr(gpu_smoke.Cell, "judged", judged)
    two = ["--device", "cpu", "--algorithms", "fused", "--options", "4 channels", "plain"]
    assert gpu_smoke.main(two) == 1
    printed = capsys.readouterr().out.splitlines()
    names = ("float64, 4", "float64, 4", "float64, p", "float64, p", "float32, 4", "NOT RUN")
    assert len(printed) == len(names)
    assert all(name in line for name, line in zip(names, printed, strict=True))
    assert started == ["1", None, "1", None]


def test_cases_beyond_the_time_limit_are_not_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(machine, "peak", lambda setting: 100.0)
    two = [word for name in "ab" for word in ("--shape", f"2 1 2 4 6 6 3 name={name}")]
    limit = ["--seconds", "0.01", "--providers", "sequence", "--mode", "inference"]
    limit += ["--out", str(tmp_path / "rows"), "--limit"]
    assert run.main([*two, *limit, "0"]) == gpu.NOT_RUN
    assert run.main([*two, *limit, "100", "--dtype", "float32", "float64"]) == 0
    order = re.findall(r"(?m)^([ab]), inference .*, (float..), ms", capsys.readouterr().out)
    assert order == [(case, dtype) for case in "ab" for dtype in ("float32", "float64")]

    place = gpu.Place("emulator-t4", 75, None, *[tmp_path] * 4)
    verdicts = {
        0: "passed", gpu.NOT_RUN: "incomplete", 1: "failed (exit status 1)", 124: "stopped: its",
    }  # fmt: skip
    for status, verdict in verdicts.items():
        text = "WRONG a line" if status == 1 else "a line"
        step = gpu.Step("step", 1.0, f"sh -c 'echo {text}; seq 1001 1020; exit {status}'")
        (outcome,) = gpu.run_all(place, [step], 60)
        assert outcome.verdict.startswith(verdict)
        shown = capsys.readouterr().out
        assert ("WRONG a line" in shown) == (status == 1)
        last = [str(1006 + i) for i in range(15 * (status == 1))]
        assert re.findall(r"\b10\d\d\b", shown) == last
        text = (tmp_path / "report.md").read_text()
        assert ("1 of 1 passed" in text) == (status == 0)
        assert "on an emulated t4 (sm_75)" in text


@needs_emulator
def test_each_backend_has_its_time_on_the_host(monkeypatch, capsys):
    monkeypatch.setattr(host, "ROUNDS", 1)
    host.main([])
    assert len(re.findall(r"(?m)^  \S+, \w+ +[\d.]+ +[\d.]+$", capsys.readouterr().out)) == 3


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
    ((line, verdict),) = judged("emulator-a100", "float32", ["repeated"], sizes=SMALL)
    assert ("1 of 2 repeats differ" in line) == (not right), line
    assert verdict == right, line
