"""The demo's digits move as they should, its networks are equal, and its command runs."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.shared.helpers import HANG

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from benchmarks.demo import comparison as demo
from benchmarks.demo import training
from benchmarks.demo.digits import Motion, load_split, moving_digits, render, trajectories

ROOT = Path(__file__).resolve().parents[2]


def test_events_are_the_changes_between_consecutive_frames():
    images = load_split(0)[0][:6]
    motion = Motion(steps=5)
    corners = trajectories(6, motion, torch.Generator().manual_seed(3))
    frames = render(images, corners, motion)
    seen = moving_digits(images, motion, seed=3)
    assert seen.shape == (5, 6, 2, motion.canvas, motion.canvas)
    for t in range(5):
        change = frames[:, t + 1] - frames[:, t]
        assert torch.equal(seen[t, :, 0], (change > motion.contrast).float())
        assert torch.equal(seen[t, :, 1], (change < -motion.contrast).float())
    assert 0.02 < seen.mean() < 0.3


def test_a_digit_that_stands_still_sends_no_events():
    for still in (Motion(radius=(0.0, 0.0)), Motion(turns=0.0)):
        assert not moving_digits(load_split(0)[0][:3], still, seed=0).any()


def test_brightness_is_rendered_where_the_corner_says():
    image = torch.ones(1, 8, 8)
    motion = Motion(canvas=12, digit=8, steps=1, radius=(0.0, 0.0))
    frame = render(image, torch.tensor([[[3.0, 1.0], [3.0, 1.0]]]), motion)[0, 0]
    expected = torch.zeros(12, 12)
    expected[3:11, 1:9] = 1
    assert torch.allclose(frame, expected, atol=1e-5)


def test_digits_circle_inside_the_canvas():
    motion = Motion(canvas=24, digit=16, steps=40, radius=(1.0, 4.0))
    corners = trajectories(200, motion, torch.Generator().manual_seed(0))
    assert corners.shape == (200, 41, 2)
    assert corners.min() >= -1e-5
    assert corners.max() <= 8 + 1e-5
    torch.testing.assert_close(corners[:, 0], corners[:, -1])  # a digit goes round once
    radius = (corners[:, 0] - corners[:, 20]).norm(dim=-1) / 2
    assert 1 <= radius.min() < 1.2
    assert 3.8 < radius.max() <= 4
    turn = corners[:, 1] - corners[:, 0]
    inward = corners[:, 20] - corners[:, 0]
    left = turn[:, 0] * inward[:, 1] > turn[:, 1] * inward[:, 0]
    assert 70 < left.sum() < 130  # about half of the digits go either way round


def test_one_seed_gives_one_set_of_sequences():
    images = load_split(0)[0][:70]  # the images are rendered in two chunks
    motion = Motion(steps=2)
    first = moving_digits(images, motion, seed=1)
    assert torch.equal(first, moving_digits(images, motion, seed=1))
    assert torch.equal(first, moving_digits(images, motion, seed=1, out=torch.zeros_like(first)))
    assert not torch.equal(first, moving_digits(images, motion, seed=2))


def test_split_keeps_classes_in_proportion_and_digits_apart():
    images, labels, test_images, test_labels = load_split(5)
    assert len(images) + len(test_images) == 1797
    assert images.min() >= 0
    assert images.max() == 1
    share = torch.bincount(test_labels, minlength=10) / torch.bincount(labels, minlength=10)
    assert share.min() > 0.22
    assert share.max() < 0.28
    again = load_split(5)
    assert torch.equal(again[0], images)
    assert torch.equal(again[3], test_labels)
    assert not torch.equal(load_split(6)[1], labels)


def test_both_networks_start_alike_and_compute_alike():
    nets = {}
    for name in demo.TITLES:
        torch.manual_seed(0)
        nets[name] = training.Network(name, side=16)
    assert training.digest(nets["snntorch"]) == training.digest(nets["snnlstm"])
    x = (torch.rand(4, 3, 2, 16, 16, generator=torch.Generator().manual_seed(0)) < 0.2).float()
    scores = {name: net(x) for name, net in nets.items()}
    torch.testing.assert_close(scores["snnlstm"], scores["snntorch"], atol=1e-4, rtol=1e-4)
    assert nets["snntorch"].spikes(x).mean() > 0.01, "the test says nothing where nothing spikes"
    for net in nets.values():
        net(x).square().sum().backward()
    one, other = (net.layer1.conv.weight.grad for net in nets.values())
    assert (one - other).norm() < 1e-3 * one.norm()
    # The second call starts from zero states, as the first did.
    torch.testing.assert_close(nets["snnlstm"](x), scores["snnlstm"], atol=0, rtol=0)
    # Two equal training steps start from zero states and zero gradients.
    optimizer, grads = torch.optim.SGD(nets["snnlstm"].parameters(), lr=0.0), []
    for _ in range(2):
        training.learn(nets["snnlstm"], optimizer, x, torch.tensor([1, 2, 3]))
        grads.append(nets["snnlstm"].readout.weight.grad.clone())
    torch.testing.assert_close(*grads)


@pytest.fixture
def few_digits(monkeypatch):
    """Gives the training 40 digits and 20 test digits."""
    few = [digits[:n] for digits, n in zip(load_split(0), (40, 40, 20, 20), strict=True)]
    monkeypatch.setattr(training, "load_split", lambda seed: few)


def trained(**options) -> list[dict]:
    args = {"network": "snnlstm", "device": "cpu", "epochs": 4, "seed": 0, "threads": 1}
    return list(training.run(argparse.Namespace(**args | {"quick": False} | options)))


@pytest.mark.usefixtures("few_digits")
def test_one_seed_gives_one_training_and_it_learns():
    (start, *events, end), again, other = trained(), trained(), trained(seed=1)
    assert again[0] == start
    assert again[-1]["weights"] == end["weights"] != start["weights"]
    assert other[0]["weights"] != start["weights"]
    assert other[-1]["order"] != end["order"] == again[-1]["order"]
    losses = [event["loss"] for event in events if event["event"] == "batch"]
    assert len(losses) == start["steps"] == 4 * 3
    mean = [event["loss"] for event in events if event["event"] == "epoch"]
    assert mean[1] == pytest.approx(sum(losses[3:6]) / 3)
    assert mean[-1] < 0.95 * mean[0]
    assert end["training_mib"] > 1
    assert 0 <= end["accuracy"] <= 1


@pytest.mark.usefixtures("few_digits")
def test_each_epoch_has_motions_and_an_order_of_its_own():
    def epoch(data, number):
        events, labels = zip(*data.epoch(number), strict=True)
        return torch.cat(events, dim=1), torch.cat(labels)

    data = training.Data(0)
    (first, first_labels), (second, second_labels) = epoch(data, 0), epoch(data, 1)
    assert not torch.equal(first_labels, second_labels)
    assert torch.equal(first_labels.sort()[0], second_labels.sort()[0])
    assert not torch.equal(first.sum((0, 2, 3, 4)).sort()[0], second.sum((0, 2, 3, 4)).sort()[0])
    again = epoch(training.Data(0), 1)
    assert torch.equal(again[0], second)
    assert torch.equal(again[1], second_labels)


@pytest.mark.usefixtures("few_digits")
def test_accuracy_is_the_share_of_digits_that_are_read(monkeypatch):
    data = training.Data(0)
    answers = torch.nn.functional.one_hot(data.test_labels, 10)
    answers[:5] = answers[:5].roll(1, dims=1)
    network = torch.nn.Module()
    network.forward = lambda x: answers
    assert training.accuracy(network, data, "cpu") == 0.75


@pytest.mark.usefixtures("few_digits")
def test_the_training_script_says_what_it_does(capsys):
    training.main(["--epochs", "2", "--network", "snntorch", "--threads", "1"])
    said = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in said[:-1]] == ["epoch 1", "epoch 2"]
    assert said[-1].endswith("%; snntorch.SConv2dLSTM, one call a time step")


def test_curves_are_compared_point_by_point():
    one, other = [1.0, 2.0, 3.0, 4.0], [1.0, 2.5, 3.0, 4.0]
    assert demo.differences(one, other) == [0, 0.5, 0, 0]
    assert demo.smooth(one, window=2) == [1.0, 1.5, 2.5, 3.5]
    with pytest.raises(ValueError, match="zip"):
        demo.differences(one, other[:3])


def test_a_different_start_is_reported():
    one = demo.Result("snntorch", start={"weights": "a"}, end={"order": "x"})
    other = demo.Result("snnlstm", start={"weights": "b"}, end={"order": "y"})
    assert demo.same_start(one, one) == []
    assert len(demo.same_start(one, other)) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--epochs", "0"], "argument --epochs: must be a whole number, at least 1, got '0'"),
        (["--threads", "x"], "argument --threads: must be a whole number, at least 1, got 'x'"),
        (["--seed", "-1"], "argument --seed: must be a whole number, at least 0, got '-1'"),
        (["--device", "abacus"], "argument --device: invalid choice: 'abacus'"),
        pytest.param(
            ["--device", "cuda"],
            "torch sees no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_errors_name_the_argument(arguments, said, capsys):
    for main in (demo.main, training.main):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 2
        assert said in capsys.readouterr().err


def test_a_training_that_fails_is_named(capfd):
    broken = argparse.Namespace(device="cpu", epochs=1, seed="no number", threads=1, quick=True)
    with pytest.raises(RuntimeError, match="training snnlstm failed"):
        demo.train("snnlstm", broken)
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.slow
def test_demo_runs(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.demo", "--quick", "--threads", "1", "--out", tmp_path],
        cwd=ROOT, capture_output=True, text=True, timeout=HANG,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Both started from the same" in done.stdout
    found = json.loads((tmp_path / "demo.json").read_text())
    losses = [found[name]["losses"] for name in ("snntorch", "snnlstm")]
    assert len(losses[0]) == 8
    assert max(demo.differences(*losses)) < 0.1
    assert (tmp_path / "demo.png").stat().st_size > 10_000
