"""The examples run as a user runs them, with tiny sizes, and compare equal networks."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import snntorch
import torch

import snnlstm
from tests.shared.fresh import HANG, fresh
from tests.shared.helpers import long

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
GAIN = r"snnlstm trained \d+\.\d times as fast, in processor time"
PROGRESS = r"(?m)^batch \d+/\d+: "


def example(name: str) -> dict:
    """Returns the names of an example."""
    return runpy.run_path(str(EXAMPLES / name))


def test_examples_are_short():
    lengths = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert len(lengths) == 4
    assert sum(lengths.values()) <= 400, lengths


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_help_has_the_docstring_and_every_number_with_its_default(path, capsys):
    names = example(path.name)
    with pytest.raises(SystemExit, match=r"^0$"):
        names["main"](["--help"])
    said = capsys.readouterr().out
    assert names["__doc__"].strip() in said
    parts = re.split(r"\n  (?=-)", said)[2:]  # behind --help
    assert parts
    for part in parts:
        name, number, text = re.match(r"--(\w+) (\w+)\s+([^(]+)", part).groups()
        assert text
        if name == number.lower():  # the place of a number has its argument's name
            assert re.search(r"\(default:\s+\d+\)", part), part


@pytest.mark.parametrize(
    ("name", "tiny"), [("event_camera.py", "--recordings"), ("eeg.py", "--trials")]
)
def test_both_libraries_learn_from_samples_of_different_lengths(name, tiny, capsys):
    names = example(name)
    names["main"]([tiny, "24"])
    assert re.search(GAIN, capsys.readouterr().out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(names["main"].__globals__, "train", lambda *_: [True])
        names["main"]([tiny, "336"])
    lines = [f"batch {2 * k}/21: " for k in range(1, 11)]
    assert re.findall(PROGRESS, capsys.readouterr().out) == lines
    random = np.random.default_rng(0)
    one = (lambda k: names["moving_bar"](random)) if "moving_bar" in names else (lambda k: k % 2)
    batch = names["collate"]([one(k) for k in range(6)])
    assert len(batch[1].unique()) > 1
    weights = []
    for library in (snntorch, snnlstm):
        net = names["network"](library)
        names["train"](net, torch.optim.SGD(net.parameters(), lr=0.1), *batch)
        weights.append(net[-1].weight)
    theirs, ours = weights
    assert (theirs - ours).abs().lt(1e-4).float().mean() > 0.95  # rounding may decide a spike


@pytest.mark.parametrize("by", ["a stand-in", pytest.param("matplotlib", marks=long)])
def test_the_film_is_predicted_and_drawn(by, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = example("video.py")
    if by == "matplotlib":
        image = pytest.importorskip("matplotlib.image")
    else:
        panels = [[MagicMock() for _ in range(names["STEPS"])] for _ in range(3)]
        figure = MagicMock(**{"return_value.subplots.return_value": panels})
        monkeypatch.setitem(sys.modules, "matplotlib", SimpleNamespace())
        monkeypatch.setitem(sys.modules, "matplotlib.figure", SimpleNamespace(Figure=figure))
    names["main"](["--batches", "20"])  # the fewest of which 5 % are a whole number
    said = capsys.readouterr().out
    assert len(re.findall(PROGRESS, said)) == 10
    assert "times as fast as a loop" in said
    path = tmp_path / "out" / "video.png"
    assert said.endswith(f"wrote {path}\n")
    if by == "matplotlib":
        assert image.imread(path).shape[1] >= 800
    else:
        labels = [row[0].set_ylabel.call_args.args[0] for row in panels]
        assert labels == ["seen", "true", "predicted"]
        figure.return_value.savefig.assert_called_once_with("out/video.png")
    lstm = names["snnlstm"].ConvLSTM(1, [3, 4], 3, 2, batch_first=True, return_all_layers=True)
    film = names["films"](2, 4)
    torch.testing.assert_close(names["plain"](lstm, film), lstm(film)[0])


def test_without_matplotlib_the_video_is_not_even_begun(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        example("video.py")["main"]([])


def test_without_torchrun_the_line_to_type_is_printed():
    name = "examples/distributed.py"
    done = fresh(f"import runpy; runpy.run_path({name!r}, run_name='__main__')", [EXAMPLES.parent])
    assert done.returncode == 1
    start, line = done.stderr.strip().split("\n")
    assert start == "Start this script in several processes:"
    assert line == f"    torchrun --nproc-per-node 2 {name}"


def test_one_process_trains_where_several_may():
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    program = f"""
import os, runpy
os.environ.update({place!r})
runpy.run_path("examples/distributed.py")["main"](["--samples", "32"])
"""
    done = fresh(program, [EXAMPLES.parent])
    assert done.returncode == 0, done.stderr
    assert re.search(GAIN, done.stdout)
    assert len(re.findall(PROGRESS, done.stdout)) == 4


@long
def test_two_processes_train_together():
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*run, str(EXAMPLES / "distributed.py"), "--samples", "32"],
        capture_output=True, text=True, timeout=HANG, cwd=EXAMPLES.parent, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(GAIN, done.stdout)
