"""The demo's training script: several processes, checkpoints, mixed precision, what it logs."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("snntorch")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

import snnlstm
from benchmarks.demo import checkpointing, options
from benchmarks.demo import cli as demo_cli
from benchmarks.demo.data import Data
from benchmarks.demo.distributed import Team
from benchmarks.demo.network import NETWORKS
from benchmarks.demo.options import Recipe
from benchmarks.demo.report import Result
from benchmarks.demo.training import Trainer, run
from benchmarks.moving_digits import Motion, load_split

ALONE = Team(torch.device("cpu"))
# Five digits a batch and one in the last: two processes get 3 and 2, and then 1 and none.
SMALL = Recipe(epochs=2, batch=5, samples=21, canvas=12, steps=4, threads=1)


@pytest.fixture(autouse=True)
def one_thread():
    """As a training with threads=1 leaves it; what runs after a test has all threads again."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def few_test_digits(monkeypatch):
    """Most of the time of a small training goes to the 360 digits it is tested on."""
    digits = load_split(0)
    monkeypatch.setattr(
        "benchmarks.demo.data.load_split", lambda seed: (*digits[:2], *(x[:20] for x in digits[2:]))
    )


few = pytest.mark.usefixtures("few_test_digits")


def changed(**fields) -> Recipe:
    return dataclasses.replace(SMALL, **fields)


def train(recipe: Recipe = SMALL, network: str = "snnlstm", **more) -> Result:
    """In this process, to the end."""
    result = Result(network)
    for event in run(network, recipe, ALONE, **more):
        if event["event"] == "batch":
            result.losses.append(event["loss"])
        elif event["event"] in ("start", "end"):
            setattr(result, event["event"], event)
    return result


def train_until(batches: int, recipe: Recipe = SMALL, **more) -> list[float]:
    """In this process, which is interrupted after so many batches."""
    losses = []
    for event in run("snnlstm", recipe, ALONE, **more):
        if event["event"] == "batch":
            losses.append(event["loss"])
            if len(losses) == batches:
                break
    return losses


def first_step(recipe: Recipe, measure: bool = True, network: str = "snnlstm"):
    trainer = Trainer(network, recipe, ALONE)
    batch = next(Data(recipe, ALONE).epoch(0))
    return trainer, batch, trainer.step(batch, measure)


# ---- several processes ---------------------------------------------------------------------------


@pytest.fixture
def direct_sums(tmp_path, monkeypatch):
    """Here and in the processes that a test starts, sums of products are direct ones.

    The choice of the algorithm depends on the batch, and the last bit of a sum decides which of
    several equal neurons max_pool gives the gradient to.
    """
    start = "import snnlstm\nsnnlstm.set_algorithm('direct')\n"
    (tmp_path / "sitecustomize.py").write_text(start)
    places = [str(tmp_path), str(Path(snnlstm.__file__).parents[1])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(places))
    with snnlstm.algorithm("direct"):
        yield


@pytest.mark.usefixtures("direct_sums")
@pytest.mark.parametrize("network", NETWORKS)
def test_two_processes_learn_what_one_does(network, tmp_path):
    recipe = dataclasses.replace(SMALL, threads=2)
    files = [tmp_path / "one.pt", tmp_path / "two.pt"]
    one = train(SMALL, network, checkpoint=files[0])
    two = demo_cli.train(network, recipe, 2, "--checkpoint", str(files[1]))
    assert two.start["processes"] == 2
    assert two.start["threads"] == 1
    assert two.start["weights"] == one.start["weights"]
    assert two.end["order"] == one.end["order"]
    assert len(two.losses) == 10
    assert two.losses == pytest.approx(one.losses, abs=1e-5)
    assert two.end["accuracy"] == one.end["accuracy"]
    saved = [torch.load(path, weights_only=True) for path in files]
    torch.testing.assert_close(saved[1]["model"], saved[0]["model"], atol=1e-5, rtol=0)
    assert len(saved[1]["random"]) == 2


def test_shares_are_disjoint_and_complete():
    whole = torch.arange(7)
    shares = [Team(torch.device("cpu"), rank, 3).share(whole) for rank in range(3)]
    assert sorted(torch.cat(shares).tolist()) == whole.tolist()
    assert [len(share) for share in shares] == [3, 2, 2]


def test_demo_passes_nproc_on(monkeypatch, tmp_path):
    asked = []

    def pretend(network, recipe, nproc):
        asked.append((network, nproc))
        raise RuntimeError("enough")

    monkeypatch.setattr(demo_cli, "train", pretend)
    assert demo_cli.main(["--quick", "--nproc", "3", "--out", str(tmp_path)]) == 1
    assert asked == [("snntorch", 3)]


# ---- seeds ---------------------------------------------------------------------------------------


@few
def test_one_seed_gives_one_training():
    one, again, other = train(), train(), train(changed(seed=1))
    assert again.end["weights"] == one.end["weights"]
    assert again.losses == one.losses
    assert other.start["weights"] != one.start["weights"]
    assert other.end["order"] != one.end["order"]


def test_each_epoch_has_motions_and_an_order_of_its_own():
    def epoch(data, number):
        events, labels = zip(*[(b.events, b.labels) for b in data.epoch(number)], strict=True)
        return torch.cat(events, dim=1), torch.cat(labels)

    data = Data(SMALL, ALONE)
    (first, first_labels), (second, second_labels) = epoch(data, 0), epoch(data, 1)
    assert not torch.equal(first_labels, second_labels)
    assert torch.equal(first_labels.sort()[0], second_labels.sort()[0])
    assert not torch.equal(first.sum((0, 2, 3, 4)).sort()[0], second.sum((0, 2, 3, 4)).sort()[0])
    again = epoch(Data(SMALL, ALONE), 1)  # as where a training goes on
    assert torch.equal(again[0], second)
    assert torch.equal(again[1], second_labels)


# ---- checkpoints ---------------------------------------------------------------------------------


@few
@pytest.mark.parametrize("amp", ["none", "float16"])
def test_an_interrupted_training_goes_on_bit_for_bit(amp, tmp_path):
    recipe, path = changed(samples=7, steps=2, amp=amp, clip=0.5), tmp_path / "run.pt"
    whole = train(recipe)
    assert train_until(3, recipe, checkpoint=path) == whole.losses[:3]  # in the second epoch
    torch.rand(5)  # the next process begins with other random numbers
    rest = train(recipe, checkpoint=path, resume=True)
    assert rest.start["epochs"] == 1
    assert rest.losses == whole.losses[2:]
    assert rest.end["weights"] == whole.end["weights"]
    assert rest.end["order"] == whole.end["order"]
    done = train(recipe, checkpoint=path, resume=True)  # nothing is left to do
    assert done.losses == []
    assert done.end["accuracy"] == whole.end["accuracy"]


def test_random_numbers_go_on_where_they_were(tmp_path):
    torch.manual_seed(3)
    checkpointing.save(tmp_path / "run.pt", {}, {}, {"epochs": 1}, ALONE)
    expected = torch.rand(4)
    assert checkpointing.load(tmp_path / "run.pt", {}, {}, ALONE) == {"epochs": 1}
    assert torch.equal(torch.rand(4), expected)


def test_an_interrupted_save_leaves_the_old_checkpoint(monkeypatch, tmp_path):
    path = tmp_path / "run.pt"
    checkpointing.write_atomically(path, {"epochs": 1})
    monkeypatch.setattr(torch, "save", lambda found, file: file.write(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        checkpointing.write_atomically(path, {"epochs": 2})
    assert torch.load(path, weights_only=True) == {"epochs": 1}
    assert list(tmp_path.iterdir()) == [path]


@few
def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    train_until(6, checkpoint=path)
    with pytest.raises(ValueError, match=r"--rate is 0\.1, .*run\.pt holds .* 0\.004"):
        train(changed(rate=0.1), checkpoint=path, resume=True)
    settings = {"network": "snnlstm", **SMALL.decisive()}
    with pytest.raises(ValueError, match=r"written by 1 processes .* got 2"):
        checkpointing.load(path, {}, settings, Team(torch.device("cpu"), 0, 2))


# ---- mixed precision and clipping ----------------------------------------------------------------


@few
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_mixed_precision_learns_with_states_in_float32(network, amp):
    trainer, full = (Trainer(network, changed(amp=kind), ALONE) for kind in (amp, "none"))
    batch = next(Data(SMALL, ALONE).epoch(0))
    losses = [trainer.step(batch, measure=False).loss for _ in range(8)]
    assert all(map(math.isfinite, losses))
    assert losses[-1] < 0.9 * losses[0]
    expected = full.step(batch, measure=False).loss
    assert losses[0] == pytest.approx(expected, abs=0.05)
    assert losses[0] != expected, "nothing was computed in less"
    for layer in (trainer.model.layer1, trainer.model.layer2):
        assert layer.syn.dtype == layer.mem.dtype == layer.conv.weight.dtype == torch.float32


@pytest.mark.parametrize("amp", ["none", "float16"])
def test_clipping_bounds_the_true_gradient(amp):
    def norm_of_gradients(trainer):
        return torch.stack([p.grad.norm() for p in trainer.model.parameters()]).norm().item()

    free, _, step = first_step(changed(amp=amp))
    assert norm_of_gradients(free) == pytest.approx(step.norm, rel=1e-4)
    assert step.norm == pytest.approx(first_step(SMALL)[2].norm, rel=0.1)  # unscaled
    clipped, _, other = first_step(changed(amp=amp, clip=step.norm / 2), measure=False)
    assert other.norm == pytest.approx(step.norm, rel=1e-4)
    assert norm_of_gradients(clipped) == pytest.approx(step.norm / 2, rel=1e-4)
    unhurt, _, _ = first_step(changed(amp=amp, clip=step.norm * 2))
    assert norm_of_gradients(unhurt) == pytest.approx(step.norm, rel=1e-4)


def test_an_overflow_is_no_step(tmp_path):
    trainer = Trainer("snnlstm", changed(amp="float16"), ALONE)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    batch = next(Data(SMALL, ALONE).epoch(0))
    rate = trainer.schedule.get_last_lr()
    trainer.step(batch, measure=True)
    assert trainer.scaler.get_scale() == 2.0**59
    assert trainer.schedule.get_last_lr() == rate
    for now, then in zip(trainer.model.parameters(), before, strict=True):
        assert torch.equal(now, then)
    checkpointing.save(tmp_path / "run.pt", trainer.parts(), {}, {}, ALONE)
    other = Trainer("snnlstm", changed(amp="float16"), ALONE)
    checkpointing.load(tmp_path / "run.pt", other.parts(), {}, ALONE)
    assert other.scaler.get_scale() == 2.0**59


# ---- what is logged ------------------------------------------------------------------------------


@few
def test_tensorboard_shows_every_batch_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    whole = train()
    more = {"checkpoint": tmp_path / "run.pt", "logdir": tmp_path / "log"}
    train_until(8, **more)
    rest = train(resume=True, **more)
    assert rest.end["weights"] == whole.end["weights"], "to watch has changed the training"
    log = EventAccumulator(str(tmp_path / "log"), size_guidance={"scalars": 0}).Reload()
    found = {name: log.Scalars(name) for name in log.Tags()["scalars"]}
    assert set(found) == {
        "train/loss", "train/accuracy", "train/learning_rate", "train/gradient_norm",
        "train/loss_scale", "train/step_seconds", "spikes/layer1", "spikes/layer2",
        "test/accuracy",
    }  # fmt: skip
    for name, points in found.items():
        steps = [5, 10] if name == "test/accuracy" else list(range(1, 11))
        assert [point.step for point in points] == steps, name
    values = {name: [point.value for point in points] for name, points in found.items()}
    assert values["train/loss"] == pytest.approx(whole.losses, rel=1e-6)
    assert values["test/accuracy"][-1] == pytest.approx(whole.end["accuracy"])
    rates = values["train/learning_rate"]
    assert rates[0] == pytest.approx(SMALL.rate / 5)
    assert max(rates) == pytest.approx(SMALL.rate)


@pytest.mark.parametrize("network", NETWORKS)
def test_spike_rates_are_those_of_training(network, tmp_path):
    pytest.importorskip("tensorboard")
    from benchmarks.demo.scalars import Log

    trainer, batch, _ = first_step(SMALL, network=network)
    log = Log(tmp_path, trainer.model, ALONE, first=0)
    spikes = trainer.model.spikes(batch.events)
    trainer.accuracy(Data(SMALL, ALONE))  # not counted
    rates = log.spike_rates()
    log.close()
    assert 0 < rates["spikes/layer1"] < 1
    assert 0 < rates["spikes/layer2"] < 1
    assert rates["spikes/layer2"] == pytest.approx(spikes.mean().item())


# ---- the command line ----------------------------------------------------------------------------


def test_the_command_line_says_the_whole_recipe():
    assert options.parse([])[1] == Recipe(threads=1)  # torch's number, here
    every = Recipe(3, 7, 0.01, 40, 5, 18, 6, "bfloat16", 1.5, "cpu", 1)
    assert not {f.default for f in dataclasses.fields(Recipe)} - {"cpu"} & set(vars(every).values())
    assert options.parse(every.arguments())[1] == every


def test_the_default_canvas_has_the_default_motion():
    assert Recipe().motion == Motion()
    assert Recipe(canvas=12).motion == Motion(12, 8, radius=(1.0, 1.75))
    for canvas in range(12, 60):
        assert Recipe(canvas=canvas).motion.canvas == canvas


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--epochs", "0"], "argument --epochs: must be a whole number, at least 1, got '0'"),
        (["--batch", "x"], "argument --batch: must be a whole number, at least 1, got 'x'"),
        (["--samples", "-1"], "argument --samples: must be a whole number, in 0..1437, got '-1'"),
        (["--canvas", "11"], "argument --canvas: must be a whole number, at least 12, got '11'"),
        (["--rate", "-1"], "argument --rate: must be a finite number above 0, got '-1'"),
        (["--clip", "nan"], "argument --clip: must be a finite number above 0, got 'nan'"),
        (["--amp", "int8"], "argument --amp: invalid choice: 'int8'"),
        (["--network", "lstm"], "argument --network: invalid choice: 'lstm'"),
        (["--resume"], "argument --resume: needs --checkpoint FILE"),
        (["--checkpoint", "{}/none/a.pt"], "argument --checkpoint: there is no directory {}/none"),
        (["--checkpoint", "{}/old.pt"], "argument --checkpoint: {}/old.pt exists: --resume"),
    ],
)  # fmt: skip
def test_training_errors_name_the_argument(arguments, said, capsys, tmp_path):
    (tmp_path / "old.pt").touch()
    with pytest.raises(SystemExit) as left:
        options.parse([argument.format(tmp_path) for argument in arguments])
    assert left.value.code == 2
    assert said.format(tmp_path) in capsys.readouterr().err


def test_a_missing_tensorboard_is_named(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        options.parse(["--logdir", "log"])
    assert "--logdir: needs the package tensorboard: pip install" in capsys.readouterr().err
    options.parse([])


def test_more_processes_than_gpus_is_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for main in (options.parse, demo_cli.main):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        with pytest.raises(SystemExit):
            main(["--device", "cuda"] + (["--nproc", "2"] if main is demo_cli.main else []))
        assert "--device: 2 processes need a CUDA device each, and torch sees 1" in (
            capsys.readouterr().err
        )
