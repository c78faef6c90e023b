"""Each command of the benchmarks runs on a tiny case and has rows; no test asserts a time."""

from __future__ import annotations

import dataclasses
import re
import runpy
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pandas as pd
import pytest
import torch

import snnlstm
from benchmarks import (
    accuracy,
    arguments,
    gpu,
    gpu_smoke,
    host,
    machine,
    networks,
    peak_memory,
    products,
    providers,
    report,
    run,
)
from benchmarks.cases import Case, parse_case
from benchmarks.providers import FORMS, MODES, Provider, Setting
from tests.shared.helpers import long, measures_memory

SMALL = Case("small", 3, 2, 5, 4, 6, 7, threshold=0.02, density=0.3)
TINY = ["--shape", "2 1 2 4 6 6 3 name=small", "--seconds", "0.01"]


@pytest.fixture(autouse=True)
def peaks(monkeypatch):
    """Returns the machine's peaks, which are measured in no time."""
    measured = [100.0] * 20
    monkeypatch.setattr(machine, "peak", lambda setting: measured.pop(0))
    return measured


def suite(out: Path, *arguments: str) -> tuple[int, pd.DataFrame]:
    return run.main([*arguments, "--out", str(out)]), pd.read_csv(out / "rows.csv")


BRINGS = 'which the extra "bench" brings: in the checkout run'


@pytest.mark.parametrize(
    ("missing", "arguments", "status", "said"),
    [
        ("snntorch pandas tqdm matplotlib sklearn scipy", ["--help"], 0, "python -m benchmarks"),
        ("pandas tqdm", ["--threads", "0"], 2, "--threads"),
        ("pandas", [], None, f"pandas, {BRINGS}"),
        ("snntorch", [], None, f"snntorch, {BRINGS}"),
        ("pandas tqdm matplotlib", ["demo", "--help"], 0, "python -m benchmarks.demo"),
        ("pandas", ["demo", "--quick"], None, f"pandas, {BRINGS}"),
    ],
)
def test_arguments_are_read_before_a_package_is_missed(
    missing, arguments, status, said, monkeypatch, capsys
):
    """A program's last words are its status."""
    demo = arguments[:1] == ["demo"]
    monkeypatch.setattr(sys, "argv", ["", *arguments[demo:]])
    with mock.patch.dict(sys.modules, dict.fromkeys(missing.split())):
        for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
            del sys.modules[name]
        with pytest.raises(SystemExit) as left:
            runpy.run_module(f"benchmarks{'.demo' * demo}", run_name="__main__")
    assert said in f"{''.join(capsys.readouterr())}{left.value.code}"
    assert left.value.code == status or (status is None and "\n" not in left.value.code)


def test_the_reference_path_is_not_timed_as_ours(monkeypatch, capsys):
    monkeypatch.setattr(snnlstm.dispatch.reasons, "backends", None)
    monkeypatch.setattr(snnlstm.calls.entries, "BACKENDS", {})
    with pytest.raises(SystemExit):
        run.main(TINY)
    assert "--device: cpu takes the reference path: the compiled" in capsys.readouterr().err


def test_the_suite_writes_rows_and_a_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(peak_memory, "measure", lambda *job, device: 3.0)
    providers = ("snntorch", "loop", "sequence:direct")
    asked = ["--shapes", "documentation-n1", "--providers", *providers, "--memory"]
    status, rows = suite(tmp_path, *TINY, *asked)
    assert status == 0
    assert (rows.mib == 3).all()
    cases = ("small", "documentation-n1")
    expected = {(case, mode, name) for case in cases for mode in MODES for name in providers}
    assert {*zip(rows.case, rows["mode"], rows.provider, strict=True)} == expected
    assert ((rows.p20 <= rows.ms) & (rows.ms <= rows.p80) & (rows["clock"] == "processor")).all()
    for _, group in rows.groupby(["case", "mode"]):
        assert group.speedup.tolist() == pytest.approx((group.ms.iloc[0] / group.ms).tolist())
    said, table = capsys.readouterr().out, (tmp_path / "table.md").read_text()
    assert said.count("small, training  [2->4 6x6, k3, T=2 N=1], 1 thread, float32") == 1
    shape = rows["shape"].dropna().max()
    assert parse_case(shape).shape == shape
    assert re.search(r"\*\*small\*\*: .* \| [\d.]+ / [\d.]+ \| [\d.]+ / [\d.]+ \| ", table)
    for history in (tmp_path / "history.csv", report.HISTORY):
        assert history.read_text().startswith(f"{','.join(report.COLUMNS)}\n")


@pytest.fixture
def own(tmp_path):
    """Returns a function that times the network of a text, which becomes a file."""

    def timed(text: str, modes: Sequence[str] = ("inference",)) -> pd.DataFrame:
        (tmp_path / "mine.py").write_text(f"import torch, snnlstm, snntorch\n{text}")
        place = str(tmp_path / "mine.py")
        network = ["--network", place, "--seconds", "0.01", "--mode", *modes]
        status, rows = suite(tmp_path, *network)
        assert status == 0
        assert set(rows.provider) == {"snntorch", "loop", "compiled-loop"}
        return rows

    return timed


def test_ones_own_network_is_timed_with_either_librarys_layers(own):
    for library, stack, sizes in (
        ("snntorch", "torch.nn.Sequential", (2, 2, 5, 5)),
        ("snnlstm", "snnlstm.Sequential", (3, 2, 2, 5, 5)),
    ):
        rows = own(
            "def make():\n"
            f"    cell = {library}.SConv2dLSTM(2, 3, 3, threshold=0.05, init_hidden=True)\n"
            f"    readout = torch.nn.Flatten(), {library}.Leaky(beta=0.9, init_hidden=True)\n"
            f"    return {stack}(cell, *readout), torch.rand{sizes}\n"
        )
        paths = dict(zip(rows.provider, rows.path, strict=True))
        assert pd.isna(paths["snntorch"])
        assert paths["loop"].startswith("cpu-")


def test_ones_own_loop_runs_the_network_step_by_step(own, tmp_path, capsys):
    own(
        "def run(net, x):\n"
        "    assert x.dim() == 5 and not net[0][0].mem.any()\n"
        "    return torch.stack([net(step) for step in x])\n"
        "def make():\n"
        "    cell = snntorch.SConv2dLSTM(2, 3, 3, threshold=0.05, init_hidden=True)\n"
        "    block = torch.nn.Sequential(cell)\n"
        "    return torch.nn.Sequential(block), torch.rand(3, 2, 2, 5, 5), run\n"
    )
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def alone(): return torch.nn.Sequential()\n"
        "def neither(): return torch.nn.ReLU(), torch.rand(2, 3)\n"
    )
    for wrong, said in (
        (f"{tmp_path}/mine.py:other", "no function 'other'"),
        (f"{tmp_path}/mine.py:alone", "a network and its input x, got Sequential"),
        ("none.py", "No such file"),
    ):
        with pytest.raises(SystemExit):
            run.main(["--network", wrong])
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
    with pytest.raises(ValueError, match="no network with SConv2dLSTM or Leaky"):
        networks.from_file(f"{tmp_path}/mine.py:neither").make(snnlstm.SConv2dLSTM)


@pytest.mark.parametrize(("feedback", "modes"), [("", MODES), (" + spk", MODES[:1])])
def test_the_report_of_ones_own_network_says_what_compiling_took(feedback, modes, own, capsys):
    rows = own(
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.fc, self.lif = torch.nn.Linear(3, 3), snntorch.Leaky(beta=0.9)\n"
        "    def forward(self, x):\n"
        "        spk, mem = torch.zeros_like(x), self.lif.reset_mem()\n"
        "        for _ in range(4):\n"
        f"            spk, mem = self.lif(self.fc(x{feedback}), mem)\n"
        "        return mem\n"
        "def make(): return Net(), torch.rand(2, 3)\n",
        modes,
    )
    compiled = rows.provider == "compiled-loop"
    assert (rows.compiling.notna() == compiled).all()
    assert rows.path[compiled].str.startswith("cpu-").all()
    said = capsys.readouterr().out
    line = (
        r'\ncompiled-loop: compiling took [\d.]+ s of processor time, with backend="eager" [\d.]+ s'
    )
    warned = "; torch.compile: layer lif (Leaky) stays a loop of steps: "
    assert len(re.findall(line + re.escape(warned if feedback else "\n"), said)) == len(modes)
    assert "| snntorch, ms | loop | compiled-loop | compiling, s |\n" in said
    if modes is MODES:
        assert re.search(r" \| [\d.]+ / [\d.]+ \| [\d.]+ / [\d.]+ \|\n", said)


def test_a_loop_that_does_not_compile_is_not_timed_and_the_line_says_why(monkeypatch, capsys):
    def fail(graph):
        raise ValueError("no steps in this graph")

    asked = [*TINY, "--mode", "inference", "--providers", "compiled-loop"]
    monkeypatch.setattr(providers.backend, "Loop", fail)
    assert run.main(asked) == 1
    said = capsys.readouterr().out
    assert "WRONG: small, float32: compiled-loop: no steps in this graph\n" in said
    monkeypatch.setattr(providers.backend, "OLDEST", (99, 1))
    assert run.main(asked) == 0
    said = capsys.readouterr().out
    assert "NOT TIMED: small, float32: compiled-loop: compiled loops need torch 99.1\n" in said
    monkeypatch.setitem(FORMS, "inductor", FORMS["inductor"]._replace(backend="none"))
    assert run.main([*asked[:-1], "inductor"]) == 0
    assert "NOT TIMED: small, float32: inductor: Invalid backend: 'none'" in capsys.readouterr().out


@long
def test_inductor_compiles_snntorchs_loop_anew_each_time():
    """The cache has what it compiled for the comparison."""
    from torch._inductor import metrics  # whose import takes seconds

    case = dataclasses.replace(networks.NETWORKS["dense"], shapes=((2, 2, 3, 1, 1),))
    case = dataclasses.replace(case, make=lambda cell: networks.dense(cell, (1, 1, 3), 4, 3))
    provider = Provider(case, FORMS["inductor"], Setting())
    for _ in range(2):
        metrics.reset()
        assert provider.first_run("inference")[1].seconds > 0
        assert metrics.generated_kernel_count > 0
    assert not any(isinstance(m, snnlstm.Leaky) for m in provider.net.modules())


def test_an_older_number_of_steps_is_no_reason_to_warn():
    """Two networks have the same loop, one with more steps."""
    for name in ("dense", "dense-small"):
        case = dataclasses.replace(networks.NETWORKS["dense"], shapes=((2, len(name), 3, 1, 1),))
        case = dataclasses.replace(case, make=lambda cell: networks.dense(cell, (1, 1, 3), 4, 3))
        provider = Provider(case, FORMS["compiled-loop"], Setting())
        assert not provider.first_run("inference")[1].warnings


def test_the_memory_of_a_compiled_loop_is_not_that_of_compiling():
    setup, once = run.prepared("dense", "compiled-loop", Setting(), "training", True)
    setup()
    with providers.compiling() as found:
        once()
    assert found.seconds == 0


def test_one_image_is_that_of_each_step():
    one, all_steps = networks.NETWORKS["dense-image"], networks.NETWORKS["dense"]
    net, x = one.make(snnlstm.SConv2dLSTM), one.batches()[0][0]
    steps = x.unsqueeze(1).expand(-1, all_steps.shapes[0][1], *x.shape[1:])
    assert torch.equal(one.loop(net, x), all_steps.loop(net, steps))
    assert one.title.endswith(f"T={steps.shape[1]} N={len(x)}, one image")


def test_a_network_is_not_captured_with_its_optimizers_step():
    with pytest.raises(providers.Unavailable, match="CUDA graphs need"):
        Provider(networks.NETWORKS["dense"], FORMS["loop-cudagraph"], Setting("cuda"))


def test_cases_beyond_the_time_limit_are_not_run(tmp_path, capsys):
    two = [word for name in "ab" for word in ("--shape", f"2 1 2 4 6 6 3 name={name}")]
    limit = ["--seconds", "0.01", "--providers", "sequence", "--mode", "inference"]
    limit += ["--out", str(tmp_path / "rows"), "--limit"]
    assert run.main([*two, *limit, "0"]) == gpu.NOT_RUN
    assert run.main([*two, *limit, "inf", "--dtype", "float32", "float64"]) == 0
    order = re.findall(r"(?m)^([ab]), inference .*, (float..), ms", capsys.readouterr().out)
    assert order == [(case, dtype) for case in "ab" for dtype in ("float32", "float64")]


def test_a_name_means_one_layer_or_network():
    assert len(arguments.CASES) == sum(map(len, arguments.TABLES.values()))


@pytest.mark.parametrize(
    "table",
    [
        "convlstm",
        *(pytest.param(t, marks=long) for t in ("lengths", "sparse", "networks", "one-sample")),
    ],
)
def test_all_forms_of_every_case_compute_the_same(table):
    small = {
        name: dataclasses.replace(case, batch=3, steps=3, height=6, width=7)
        if isinstance(case, Case)
        else networks.NETWORKS.get(name, case)
        for name, case in arguments.TABLES[table].items()
    }
    if table == "convlstm":
        small = {k: dataclasses.replace(n, shapes=((2, 3, 1, 6, 7),)) for k, n in small.items()}
    suite = run.Suite(arguments.parser().parse_args([]))
    for name, case in small.items():
        built = suite.checked(name, case, Setting())
        own = getattr(case, "forms", {}).keys()
        forms = own if table == "convlstm" else own & suite.providers or suite.providers
        assert len(built) == len(forms), name
    assert not any(suite.failed.values())


@pytest.mark.parametrize(
    ("beside", "after", "arguments", "status"),
    [
        (0.4, 100, ["--threads", "2"], 3),
        (0.2, 89, ["--threads", "2"], 3),
        (0.2, 91, ["--threads", "2"], 0),
        (1.0, 50, ["--threads", "1"], 0),
    ],
)
def test_a_busy_machine_gets_no_ratios_of_several_threads(
    beside, after, arguments, status, peaks, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(machine, "others", lambda: beside * time.monotonic())
    peaks[1] = after
    few = ["--mode", "inference", "--providers", "sequence"]
    found, rows = suite(tmp_path, *TINY, *few, *arguments)
    assert found == status
    assert rows.speedup.isna().all() == (status == 3)
    assert rows.speedup.notna().all() == (status == 0)
    assert ("NO RATIOS" in capsys.readouterr().err) == (status == 3)


def test_a_loss_may_be_as_far_from_the_true_one_as_eagers():
    network = networks.NETWORKS["dense"]
    one = Provider(network, FORMS["snntorch"], Setting())
    right, true = one.results(), one.exact_loss()
    run.compare(network, "float32", right, right, true)
    wrong = {"loss": true * (1 + 2e-5)}
    with pytest.raises(run.Disagreement, match="the loss differs by"):
        run.compare(network, "float32", right, wrong, true)
    run.compare(network, "float32", {"loss": true * (1 - 3e-5)}, wrong, true)


@pytest.mark.parametrize("result", ["spikes", "syn", "mem", "gradient of weight", "gradient of x"])
def test_agreement_notices_a_difference_in_each_result(result):
    expected = Provider(SMALL, FORMS["snntorch"], Setting()).results()
    actual = Provider(SMALL, FORMS["sequence"], Setting()).results()
    run.compare(SMALL, "float32", expected, actual)
    right = actual[result].clone()
    for wrong in (right + 0.1 * right.norm(), right * float("nan")):
        with pytest.raises(run.Disagreement, match="differ"):
            run.compare(SMALL, "float32", expected, actual | {result: wrong})


@long
@measures_memory
def test_peak_memory_is_the_memory_that_is_used():
    """Training keeps at least gates, states and spikes of every step."""
    case = Case("large", 10, 8, 2, 8, 64, 64, kernel=(1, 1))
    state = 8 * 8 * 64 * 64 * 4 / peak_memory.MIB
    mib = peak_memory.measure(run.prepared, case, "snntorch", Setting(), "training")
    assert 7 * 10 * state < mib < 16 * 10 * state


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--shapes", "midd"], "--shapes"),
        (["--shape", "8 8 4 8 9 9 4"], "--shape"),
        (["--providers", "sequence:fft"], "--providers"),
        (["--dtype", "tf32"], "--dtype"),
        (["--threads", "0"], "--threads"),
    ],
)
def test_errors_name_the_argument(arguments, named, capsys):
    with pytest.raises(SystemExit) as left:
        run.main(arguments)
    assert left.value.code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]


def test_the_other_commands_print_their_tables(capsys, monkeypatch):
    for name, few in (("STEPS", 2), ("SIDE", 6), ("SCALES", (1,))):
        monkeypatch.setattr(accuracy, name, few)
    accuracy.main()
    assert capsys.readouterr().out.count("\n| ") == len(accuracy.LAYERS)
    few = {"ROWS": (4,), "CONVOLUTIONS": ((2, 3, 4, 6, 3, 1),), "SHORTEST": 1e-5, "SECONDS": 0}
    for name, value in few.items():
        monkeypatch.setattr(products, name, value)
    products.main(["0.5", "--channels-last"])
    assert capsys.readouterr().out.count("\n| ") == len(products.LINEAR) + 1
    lines = list(gpu_smoke.run("cpu", algorithms=("direct",)))
    assert len(lines) == len(gpu_smoke.rows("cpu", ["direct"], list(gpu_smoke.OPTIONS)))
    assert all(right for _, right in lines)


@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler for the emulator")
def test_each_backend_has_its_time_on_the_host(monkeypatch, capsys):
    monkeypatch.setattr(host, "ROUNDS", 1)
    host.main([])
    assert len(re.findall(r"(?m)^  \S+, \w+ +[\d.]+ +[\d.]+$", capsys.readouterr().out)) == 3


@long
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_a_network_that_a_release_was_not_timed_with_has_no_label(mode, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    rows = pd.read_csv(report.HISTORY)[1:]  # without the first network's loop
    monkeypatch.setattr(report, "HISTORY", tmp_path / "history.csv")
    rows.to_csv(report.HISTORY)
    labels = [text.get_text() for text in report.draw_history(mode).axes[-1].texts]
    assert "" in labels
    assert not any("nan" in label for label in labels)
