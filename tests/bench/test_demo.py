"""The demo's digits move as they should, its networks train alike, and its command runs."""

from __future__ import annotations

import json
import runpy
import shutil
import sys

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from sklearn.datasets import load_digits

from benchmarks.demo import __main__ as demo
from benchmarks.demo import training
from benchmarks.demo.training import load_split


@pytest.fixture
def _few_digits(monkeypatch):
    """Gives the training 40 digits and 20 test digits."""
    few = [digits[:n] for digits, n in zip(load_split(0), (40, 40, 20, 20), strict=True)]
    monkeypatch.setattr(training, "load_split", lambda seed: few)


@pytest.mark.usefixtures("_few_digits")
def test_the_demo_trains_both_from_one_start_and_they_learn(tmp_path, capsys):
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
    assert demo.furthest(reference, ours) < 0.1
    assert sum(ours["losses"][-3:]) < 0.95 * sum(ours["losses"][:3])
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    training.main([*common, "--network", "snntorch"])
    said = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[1] for line in said[:-1]] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    assert said[-1] == f"test accuracy {reference['accuracy']:.1%}; {reference['path']}"


def test_a_copy_of_the_training_runs_alone(tmp_path, monkeypatch, capsys):
    copy = str(shutil.copy2(training.__file__, tmp_path))
    monkeypatch.setitem(sys.modules, "benchmarks", None)  # which a user's folder does not have
    digits = load_digits()
    digits.images, digits.target = digits.images[:100], digits.target[:100]
    monkeypatch.setattr("sklearn.datasets.load_digits", lambda: digits)
    monkeypatch.setattr(sys, "argv", [copy, "--quick", "--threads", "1"])
    runpy.run_path(copy, run_name="__main__")
    assert "test accuracy" in capsys.readouterr().out
