"""The demo's digits move as they should, its networks train alike, and its command runs."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from importlib.util import find_spec

import pandas as pd
import pytest

from benchmarks.demo import __main__ as demo
from benchmarks.demo import compare, seeds, training
from benchmarks.demo.training import load_split
from tests.shared.helpers import long

pytestmark = [
    long,  # `make demo` runs it, too
    pytest.mark.skipif(
        not (find_spec("sklearn") and find_spec("matplotlib")), reason="the demo needs both"
    ),
]


@pytest.fixture
def _few_digits(monkeypatch):
    """Gives the training 40 digits and 20 test digits."""
    few = [digits[:n] for digits, n in zip(load_split(0), (40, 40, 20, 20), strict=True)]
    monkeypatch.setattr(training, "load_split", lambda seed: few)


@pytest.mark.usefixtures("_few_digits")
def test_the_demo_trains_both_from_one_start_and_they_learn(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "EVERY", 4)
    for wrong in (["--epochs", "0"], ["--seed", "-1"]):
        with pytest.raises(SystemExit):
            demo.main(wrong)
        assert f"argument {wrong[0]}: must be a whole number" in capsys.readouterr().err
    common = ["--epochs", "3", "--threads", "1"]
    demo.main([*common, "--out", str(tmp_path)])
    assert "Both started from the same" in capsys.readouterr().out
    results = json.loads((tmp_path / "demo.json").read_text())
    reference, ours = results["snntorch"], results["snnlstm"]
    assert len(ours["losses"]) == 3 * 3
    assert compare.furthest(reference, ours) < 0.1
    assert sum(ours["losses"][-3:]) < 0.95 * sum(ours["losses"][:3])
    for result in (reference, ours):
        seconds, found = zip(*result["tests"], strict=True)
        assert len(found) == 2 + 9 // 4  # before, after every fourth batch, and at the end
        assert [*seconds] == sorted(seconds)
        assert (seconds[0], seconds[-1]) == (0, result["seconds"])
        assert found[-1] == result["accuracy"]
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    training.main([*common, "--network", "snntorch"])
    said = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[1] for line in said[:-1]] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    assert said[-1] == f"test accuracy {reference['accuracy']:.1%}; {reference['path']}"


@pytest.mark.usefixtures("_few_digits")
def test_a_seed_is_trained_once_and_has_a_row(tmp_path, monkeypatch):
    rows = tmp_path / "rows.csv"
    for count in (1, 2):
        seeds.main(["--seeds", str(count), "--rows", str(rows)])
        found = pd.read_csv(rows)
        assert {*zip(found.library, found.seed, strict=True)} == {
            (library, seed) for library in seeds.LIBRARIES for seed in range(count)
        }
    assert found.columns[4:].tolist() == ["30"]  # four epochs of three batches
    assert found.accuracy.between(0, 1).all()


def test_training_reaches_the_same_accuracy_with_either_cell():
    """The committed rows say how far seeds move an accuracy."""
    committed = pd.read_csv(seeds.ROWS).accuracy
    spread = committed.max() - committed.min()
    rows = pd.DataFrame(seeds.trained(cell, seed) for seed in range(3) for cell in seeds.LIBRARIES)
    assert rows.accuracy.min() > committed.min() - spread, rows
    means = rows.groupby("library").accuracy.mean()
    assert abs(means.snntorch - means.snnlstm) < spread, rows


def test_a_copy_of_the_training_runs_alone(tmp_path, monkeypatch, capsys):
    from sklearn.datasets import load_digits  # an import of seconds

    copy = str(shutil.copy2(training.__file__, tmp_path))
    monkeypatch.setitem(sys.modules, "benchmarks", None)  # which a user's folder does not have
    digits = load_digits()
    digits.images, digits.target = digits.images[:200], digits.target[:200]
    monkeypatch.setattr("sklearn.datasets.load_digits", lambda: digits)
    monkeypatch.setattr(sys, "argv", [copy, "--quick", "--threads", "1"])
    runpy.run_path(copy, run_name="__main__")
    assert "test accuracy" in capsys.readouterr().out
