"""The benchmark suite compares, measures and reports as it should; no test asserts a time."""

from __future__ import annotations

import csv
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.shared.helpers import HANG, measures_memory

pytest.importorskip("matplotlib")

from benchmarks import agreement, cli, compare, convlstm, host, memory, report, suite
from benchmarks.cases import CPU_CASES, Case, find_cases, parse_case, random_cases
from benchmarks.plots import STYLE
from benchmarks.providers import DETAILS, PROVIDERS, Setting
from benchmarks.rows import Row, read_rows, write_rows
from benchmarks.timing import Budget, Quantiles, time_interleaved

ROOT = Path(__file__).resolve().parents[2]
SMALL = Case("small", 3, 2, 5, 4, 6, 7, threshold=0.02, density=0.3)
VARIANTS = {
    "plain": {},
    "first layer": {"cin": 2},
    "kernel 3x5": {"kernel": (3, 5)},
    "max_pool": {"max_pool": 2},
    "avg_pool": {"avg_pool": 2},
    "subtract": {"reset": "subtract"},
    "zero": {"reset": "zero"},
    "quant": {"quant_bits": 4},
    "quant and avg_pool": {"quant_bits": 4, "avg_pool": 2},
    "dense x": {"density": None},
}


# ---- providers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "variant", "dtype"),
    [
        # snnTorch's levels are float32 in a cell of any type.
        *((name, variant, "float32" if "quant" in variant else "float64")
          for name in ("hoisted", "snnlstm", "snnlstm-step") for variant in VARIANTS),
        *((name, "plain", "autocast") for name in ("snntorch-compile-last", "hoisted", "snnlstm")),
    ],
)  # fmt: skip
def test_provider_computes_what_snntorch_computes(monkeypatch, name, variant, dtype):
    monkeypatch.setattr(torch, "compile", lambda cell, **_: cell)
    case, setting = dataclasses.replace(SMALL, **VARIANTS[variant]), Setting(dtype=dtype)
    reference, provider = PROVIDERS["snntorch"](case, setting), PROVIDERS[name](case, setting)
    expected, potential = agreement.compute(reference), agreement.potentials(reference)
    with provider.context():
        assert torch.is_autocast_enabled("cpu") == (dtype == "autocast")
    got = agreement.compute(provider)
    agreement.compare(case, setting.dtype, expected, got, potential)
    assert expected.spikes.mean() > 0.01
    assert (expected.gradient_x.numel() > 0) == case.grad_x


@pytest.fixture(scope="module")
def small():
    """Returns snnTorch's results of the small case, and the potentials of its spikes."""
    provider = PROVIDERS["snntorch"](SMALL, Setting())
    return agreement.compute(provider), agreement.potentials(provider)


@pytest.mark.parametrize("field", ["spikes", "syn", "mem", "gradient", "gradient_x"])
def test_agreement_notices_a_difference_in_each_result(small, field):
    expected, potential = small
    wrong = getattr(expected, field).clone()
    if field == "spikes":
        far = (potential - SMALL.threshold).abs().argmax()
        wrong.view(-1)[far] = 1 - wrong.view(-1)[far]
    else:
        wrong.view(-1)[0] += 0.1 * wrong.norm()
    for values in (wrong, wrong * float("nan")):
        got = dataclasses.replace(expected, **{field: values})
        with pytest.raises(agreement.Disagreement, match="differ"):
            agreement.compare(SMALL, "float32", expected, got, potential)


def test_a_flip_on_the_boundary_is_allowed_and_one_off_it_is_not(small):
    expected, potential = small
    flipped, near = expected.spikes.clone(), potential.clone()
    flipped.view(-1)[7] = 1 - flipped.view(-1)[7]
    got = dataclasses.replace(expected, spikes=flipped)
    near.view(-1)[7] = SMALL.threshold + 1e-6
    assert "flips 1" in agreement.compare(SMALL, "float32", expected, got, near)
    near.view(-1)[7] = SMALL.threshold + 0.01
    with pytest.raises(agreement.Disagreement, match="spikes"):
        agreement.compare(SMALL, "float32", expected, got, near)


@pytest.mark.parametrize("name", ["snntorch", "hoisted", "snnlstm", "snnlstm-step"])
def test_each_training_round_sees_new_weights_and_gives_gradients(name):
    provider = PROVIDERS[name](SMALL, Setting())
    weight = provider.cell.conv.weight
    for mode in ("backward", "both"):
        setup, run = provider.prepare(mode)
        setup()
        before = weight.detach().clone()
        run()
        first = weight.grad.clone()
        assert first.norm() > 0
        setup()
        run()
        assert not torch.equal(before, weight.detach())
        # The second gradient must not be added to the first.
        torch.testing.assert_close(weight.grad, first, rtol=1e-3, atol=1e-3)


def test_operations_are_counted_as_direct_convolution():
    case = CPU_CASES["mid"]
    forward = 2 * 8 * 32 * 32 * 9 * (4 * 64) * (32 + 64)
    assert case.flops("forward") == forward
    assert case.flops("both") == 3 * forward  # with the gradient of x
    first = dataclasses.replace(case, cin=2)
    assert not first.grad_x
    assert first.flops("backward") < 2 * first.flops("forward")


def test_x_has_the_density_it_is_told():
    x = CPU_CASES["mid"].make_input(torch.device("cpu"), torch.float32)
    assert set(x.unique().tolist()) == {0.0, 1.0}
    assert abs(float(x.mean()) - 0.1) < 0.01
    dense = CPU_CASES["mid-dense"].make_input(torch.device("cpu"), torch.float32)
    assert abs(float(dense.std()) - 1) < 0.01


# ---- timing and memory ---------------------------------------------------------------------------


def test_rounds_are_interleaved_and_every_provider_runs_in_each():
    calls: list[str] = []
    runners = {
        name: (lambda: None, lambda name=name: calls.append(name)) for name in ("a", "b", "c")
    }
    shares: list[float] = []
    budget = Budget(seconds=0.0, fewest=4, most=10)
    found = time_interleaved(runners, "cpu", budget, shares.append)
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == 4
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1
    assert all(q.rounds == 4 and 0 <= q.p20 <= q.p50 <= q.p80 for q in found.values())
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_the_host_is_measured_with_both_backends_stubbed(capsys):
    host.main(["--rounds", "20"])
    assert re.search(
        r"cpu stubbed +[\d.]+ +[\d.]+\n.*cuda stubbed +[\d.]+", capsys.readouterr().out
    )


def test_quantiles():
    found = Quantiles.of([float(i) for i in range(11)])
    assert (found.p20, found.p50, found.p80, found.rounds) == (2.0, 5.0, 8.0, 11)
    assert Quantiles.of([3.0]) == Quantiles(3.0, 3.0, 3.0, 1)


@measures_memory
def test_peak_memory_is_the_memory_that_is_used():
    # Inference ends with T spikes and two states, and holds little more than the gates besides.
    # Training keeps at least gates, states and spikes of every step.
    case = Case("weighed", 10, 8, 2, 32, 32, 32)
    state = 8 * 32 * 32 * 32 * 4 / memory.MIB
    jobs = [memory.Job(case, mode, "snntorch") for mode in ("forward", "both")]
    forward, both = memory.measure(jobs, Setting(), threads=1)
    assert not forward.note
    assert 12 * state < forward.live < 40 * state
    assert 7 * 10 * state < both.live < 16 * 10 * state
    assert both.resident >= 0.9 * both.live


def test_a_run_that_does_not_fit_is_refused_in_words():
    huge = dataclasses.replace(CPU_CASES["quant"], batch=100_000)
    note = memory.shortage(PROVIDERS["snntorch"], huge, Setting(), "forward")
    assert note is not None
    assert "GiB" in note
    assert memory.shortage(PROVIDERS["snntorch"], SMALL, Setting(), "both") is None


# ---- rows and their comparison -------------------------------------------------------------------

ROW = Row(
    version="0.1.0", commit="abc", device="a CPU", date="2025-01-01T00:00:00+00:00",
    torch="2.13.0", snntorch="1.0.0", python="3.11.0", threads=2, dtype="float32",
    case="mid", steps=8, batch=8, cin=32, cout=64, height=32, width=32, kernel="3x3",
    options='max_pool=2, "x"', density=0.1, mode="both", provider="snnlstm",
    path="cpu-avx2-direct (why, not)", rounds=20, p20_ms=9.0, p50_ms=10.0, p80_ms=11.0,
    speedup=3.25, goal=None, gflops=1.5, peak_gflops=100.0, peak_gbytes=20.0, intensity=33.25,
    live_mib=None, resident_mib=12.5, note="line",
)  # fmt: skip


def test_rows_survive_csv_and_json(tmp_path):
    rows = [ROW, dataclasses.replace(ROW, density=None, goal=4.5, note="", options="")]
    as_csv, as_json = write_rows(rows, tmp_path / "new" / "dir")
    assert read_rows(as_csv) == rows
    assert read_rows(as_json) == rows
    assert read_rows(as_csv.parent) == rows


def test_files_that_hold_no_rows_are_named(tmp_path):
    for name, text in (("rows.csv", "a,b\n1,2\n"), ("rows.json", '[{"a": 1}]'), ("x.json", "{")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=name):
            read_rows(tmp_path / name)
    with pytest.raises(ValueError, match="nowhere"):
        read_rows(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("factor", "width", "rounds", "verdict"),
    [
        (0.8, 0.05, 20, "faster"),
        (1.25, 0.05, 20, "slower"),
        (1.0, 0.05, 20, "noise"),
        (0.8, 0.3, 20, "noise"),  # the bands overlap
        (1.25, 0.3, 20, "noise"),
        (0.98, 0.001, 20, "noise"),  # the bands are apart, but the change is too small
        (0.5, 0.01, 3, "too few rounds"),
    ],
)
def test_noise_verdicts(factor, width, rounds, verdict):
    def row(median: float) -> Row:
        low, high = median * (1 - width), median * (1 + width)
        return dataclasses.replace(ROW, rounds=rounds, p20_ms=low, p50_ms=median, p80_ms=high)

    (change,) = compare.compare_rows([row(10.0)], [row(10.0 * factor)])
    assert change.verdict == verdict
    assert change.change == pytest.approx(factor - 1)
    assert change.spread == pytest.approx(2 * width)


def test_only_the_same_measurement_is_compared():
    changes = {
        "mode": "forward", "provider": "hoisted", "dtype": "float64", "steps": 9, "density": None,
        "options": "", "p50_ms": None,
    }  # fmt: skip
    others = [dataclasses.replace(ROW, **{name: value}) for name, value in changes.items()]
    assert compare.compare_rows([ROW], others) == []
    assert "no timed row in common" in compare.report([ROW], others)


def test_goals_are_counted_and_every_provider_of_a_plot_has_a_style():
    baseline = dataclasses.replace(ROW, provider="snntorch", speedup=1.0)
    slow = [dataclasses.replace(row, mode="forward") for row in (ROW, baseline)]
    slow[0] = dataclasses.replace(slow[0], goal=3.5)
    text = report.summary([dataclasses.replace(ROW, goal=3.25), baseline, *slow], goals=True)
    assert [line.split()[-2:] for line in text.splitlines()[4:6]] == [
        ["3.25x", "met"],
        ["3.5x", "missed"],
    ]
    assert "1 of 2 goals met (the goals are for snnlstm)." in text
    assert set(PROVIDERS) - set(DETAILS) | set(suite.WEIGHED_LONG) <= set(STYLE)


def test_comparison_says_what_else_changed():
    baseline = dataclasses.replace(ROW, provider="snntorch")
    slower = dataclasses.replace(
        baseline, p20_ms=18.0, p50_ms=20.0, p80_ms=22.0, device="another CPU"
    )
    text = compare.report([baseline, ROW], [slower, ROW])
    assert "Not the same device" in text
    assert "+100.0%" in text
    assert "1 slower, 1 noise" in text
    assert "baseline itself" in text


# ---- the command lines ---------------------------------------------------------------------------

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--shapes", "midd"], "--shapes"),
        (["--shape", "1 2 3"], "--shape"),
        (["--shape", "8 8 4 8 0 9 3"], "H"),
        (["--shape", "8 8 4 8 9 9 4"], "k must be odd"),
        (["--shape", "8 8 4 8 9 9 3 reset=on"], "reset"),
        (["--shape", "8 8 4 8 9 9 3 colour=red"], "colour"),
        (["--shape", "8 8 4 8 9 9 3 max_pool=10"], "pool"),
        (["--shape", "8 8 4 8 9 9 3 max_pool=2 avg_pool=2"], "avg_pool"),
        (["--shape", "8 8 4 8 9 9 3 quant=40"], "quant"),
        (["--providers", "tensorflow"], "--providers"),
        (["--density", "2"], "--density"),
        (["--threads", "0"], "--threads"),
        (["--seconds", "0"], "--seconds"),
        (["--mode", "sideways"], "--mode"),
        (["--dtype", "tf32"], "--dtype"),
        (["--compare", "nowhere", "else"], "nowhere"),
        pytest.param(["--device", "cuda"], "torch sees no CUDA device", marks=no_gpu),
    ],
)
def test_suite_errors_name_the_argument(arguments, named, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]


def test_own_shapes_read_back_what_they_say():
    case = parse_case("8 4 32 48 30 40 3x5 reset=zero max_pool=2 density=dense name=mine")
    assert case == Case(
        "mine", 8, 4, 32, 48, 30, 40, (3, 5), max_pool=2, reset="zero", density=None
    )
    assert parse_case(f"8 4 32 48 30 40 3x5 density=dense name=mine {case.options}") == case
    assert parse_case("8 4 2 3 6 6 3 threshold=0").options == "threshold=0.0"
    assert [c.name for c in find_cases(["cpu", "mid"])] == list(CPU_CASES)


def test_the_lowest_ratios_of_a_random_sample_are_named():
    drawn = random_cases(12, seed=3)
    assert drawn == random_cases(12, seed=3) != random_cases(12, seed=4)
    rows = [
        dataclasses.replace(
            ROW, provider="snnlstm", mode="both", case=case.name, steps=case.steps,
            batch=case.batch, cin=case.cin, cout=case.cout, height=case.height, width=case.width,
            kernel="x".join(map(str, case.kernel)), options=case.options, density=case.density,
            speedup=3.0 - k / 10,
        )
        for k, case in enumerate(drawn)
    ]  # fmt: skip
    text = report.ranking([ROW, *rows]).splitlines()
    assert "12 random shapes: 1.90 2.00 2.10" in text[1]
    assert len(text) == 2 + report.WORST
    worst = parse_case(text[2].split('"')[1])
    assert dataclasses.replace(worst, name=drawn[-1].name) == drawn[-1]
    assert report.ranking([ROW]) == ""


TINY = ["--shape", "2 1 2 4 6 6 3 name=small", "--quick", "--seconds", "0.1", "--memory", "off",
        "--no-plots", "--mode", "forward", "--providers", "snnlstm"]  # fmt: skip


def test_no_shape_is_begun_after_the_limit(tmp_path, capsys):
    assert cli.main([*TINY, "--limit", "0", "--out", str(tmp_path)]) == 0
    assert "No time left for small (float32)" in capsys.readouterr().out
    assert read_rows(tmp_path) == []


def test_an_interrupted_run_keeps_its_rows(tmp_path, monkeypatch, capsys):
    plain = suite.Suite.run_case

    def run_case(self, case):
        if case.name == "second":
            raise KeyboardInterrupt
        plain(self, case)

    monkeypatch.setattr(suite.Suite, "run_case", run_case)
    second = ["--shape", "2 1 2 4 6 6 3 name=second"]
    assert cli.main([*TINY, *second, "--out", str(tmp_path)]) == 130
    said = capsys.readouterr()
    assert "interrupted" in said.err
    assert "Speed-up over snntorch" in said.out
    assert {row.case for row in read_rows(tmp_path)} == {"small"}


@pytest.mark.slow
def test_suite_runs(tmp_path, capsys):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--shape", "2 1 2 4 6 6 3 name=small", "--quick",
         "--seconds", "0.1", "--memory", "off", "--goals", "--kernels",
         "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=HANG,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path)
    assert {(row.mode, row.provider) for row in rows} == {
        (mode, provider)
        for mode in ("forward", "both")
        for provider in ("snntorch", "hoisted", "snnlstm-step", "snnlstm")
    }
    baseline = {row.mode: row.p50_ms for row in rows if row.provider == "snntorch"}
    for row in rows:
        assert row.rounds >= 5
        assert row.p20_ms <= row.p50_ms <= row.p80_ms
        assert row.speedup == pytest.approx(baseline[row.mode] / row.p50_ms)
        flops = Case("small", 2, 1, 2, 4, 6, 6).flops(row.mode)
        assert row.gflops == pytest.approx(flops / row.p50_ms / 1e6)
    assert "Speed-up over snntorch" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {
        "rows.csv", "rows.json", "table.md", "speedup.png", "roofline.png", "kernels.csv",
    }  # fmt: skip
    kernels = list(csv.DictReader((tmp_path / "kernels.csv").open()))
    assert {kernel["provider"] for kernel in kernels} == {"snntorch", "snnlstm"}
    assert sum(float(kernel["share"]) for kernel in kernels) == pytest.approx(4)  # 2 modes
    header, _, small = (tmp_path / "table.md").read_text().splitlines()
    assert header == "| layer | snntorch, ms a step | hoisted | snnlstm-step | snnlstm |"
    times = {(row.provider, row.mode): row for row in rows}
    fast = [report.number(times["snnlstm", mode].speedup) for mode in ("forward", "both")]
    assert small.startswith("| **small** T=2 N=1 2→4 6x6, 3x3, 10% of x | ")
    assert small.endswith(f" | {fast[0]}x / {fast[1]}x |")
    assert cli.main(["--compare", str(tmp_path), str(tmp_path)]) == 0
    assert f"{len(rows)} noise" in capsys.readouterr().out


def test_the_convlstms_that_are_timed_compute_the_same():
    small = convlstm.Case("small", [3, 2], 3, (2, 3, 1, 5, 7), (1, 1))
    x = torch.rand(small.shape)
    expected = convlstm.outputs(small.build(convlstm.Stack), x)
    providers = {n: p for n, p in convlstm.PROVIDERS.items() if "compiled" not in n}
    assert len(providers) >= 2
    for name, build in providers.items():
        torch.testing.assert_close(convlstm.outputs(build(small), x), expected, msg=name)
