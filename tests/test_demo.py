"""The demo: its moving digits, its two networks and its command, without a clock."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("snntorch")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

from benchmarks.demo import cli as demo_cli
from benchmarks.demo import report as demo_report
from benchmarks.demo.measuring import digest
from benchmarks.demo.network import NETWORKS
from benchmarks.moving_digits import Motion, load_split, moving_digits, render, trajectories

ROOT = Path(__file__).resolve().parent.parent


# ---- moving digits -------------------------------------------------------------------------------


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
    images = load_split(0)[0][:3]
    assert moving_digits(images, Motion(radius=(0.0, 0.0)), seed=0).sum() == 0
    assert moving_digits(images, Motion(turns=0.0), seed=0).sum() == 0


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
    torch.testing.assert_close(corners[:, 0], corners[:, -1])  # once round
    radius = (corners[:, 0] - corners[:, 20]).norm(dim=-1) / 2
    assert 1 <= radius.min() < 1.2
    assert 3.8 < radius.max() <= 4
    turn = corners[:, 1] - corners[:, 0]
    inward = corners[:, 20] - corners[:, 0]
    left = turn[:, 0] * inward[:, 1] > turn[:, 1] * inward[:, 0]
    assert 70 < left.sum() < 130  # either way round, about as often


def test_one_seed_gives_one_set_of_sequences():
    images = load_split(0)[0][:70]  # more than one chunk
    motion = Motion(steps=2)
    first = moving_digits(images, motion, seed=1)
    assert torch.equal(first, moving_digits(images, motion, seed=1))
    assert torch.equal(first, moving_digits(images, motion, seed=1, out=torch.zeros_like(first)))
    assert not torch.equal(first, moving_digits(images, motion, seed=2))
    some = torch.arange(70)[1::2].flip(0)
    assert torch.equal(first[:, some], moving_digits(images, motion, seed=1, kept=some))


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


@pytest.mark.parametrize(
    ("field", "value"),
    [("digit", 30), ("digit", 4), ("steps", 0), ("contrast", 1.5), ("radius", (1.0, 5.0))],
)
def test_motion_errors_name_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        Motion(**{field: value})


# ---- the demo's two networks ---------------------------------------------------------------------


def test_both_networks_start_alike_and_compute_alike():
    nets = {}
    for name, network in NETWORKS.items():
        torch.manual_seed(0)
        nets[name] = network(16)
    assert digest(nets["snntorch"]) == digest(nets["snnlstm"])
    x = (torch.rand(4, 3, 2, 16, 16, generator=torch.Generator().manual_seed(0)) < 0.2).float()
    scores = {name: net(x) for name, net in nets.items()}
    torch.testing.assert_close(scores["snnlstm"], scores["snntorch"], atol=1e-4, rtol=1e-4)
    assert nets["snntorch"].spikes(x).mean() > 0.01, "the test says nothing where nothing spikes"
    for net in nets.values():
        net(x).square().sum().backward()
    one, other = (net.layer1.conv.weight.grad for net in nets.values())
    assert (one - other).norm() < 1e-3 * one.norm()
    # The second call starts from zero states as the first did.
    torch.testing.assert_close(nets["snnlstm"](x), scores["snnlstm"], atol=0, rtol=0)


def test_curves_are_compared_point_by_point():
    one, other = [1.0, 2.0, 3.0, 4.0], [1.0, 2.5, 3.0, 4.0]
    assert demo_report.largest_difference(one, other) == 0.5
    assert demo_report.smooth(one, window=2) == [1.0, 1.5, 2.5, 3.5]
    with pytest.raises(ValueError, match="zip"):
        demo_report.largest_difference(one, other[:3])


def test_a_different_start_is_reported():
    one = demo_report.Result("snntorch", start={"weights": "a"}, end={"order": "x"})
    other = demo_report.Result("snnlstm", start={"weights": "b"}, end={"order": "y"})
    assert demo_report.same_start(one, one) == []
    assert len(demo_report.same_start(one, other)) == 2


# ---- the command -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--epochs", "0"], "--epochs"),
        (["--threads", "-1"], "--threads"),
        (["--seed", "-1"], "--seed"),
        (["--device", "abacus"], "--device"),
        (["--nproc", "0"], "--nproc"),
    ],
)
def test_demo_errors_name_the_argument(arguments, named, capsys):
    with pytest.raises(SystemExit) as left:
        demo_cli.main(arguments)
    assert left.value.code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said(capsys):
    with pytest.raises(SystemExit):
        demo_cli.main(["--device", "cuda"])
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_demo_runs(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.demo", "--quick", "--threads", "1", "--out", tmp_path],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Both started from the same" in done.stdout
    found = json.loads((tmp_path / "demo.json").read_text())
    losses = [found[name]["losses"] for name in ("snntorch", "snnlstm")]
    assert len(losses[0]) == 8
    assert demo_report.largest_difference(*losses) < 0.1
    assert (tmp_path / "demo.png").stat().st_size > 10_000
