"""A complete training script for a spiking ConvLSTM, in one process or in several.

    python -m benchmarks.demo.training --epochs 2
    torchrun --standalone --nproc_per_node 2 -m benchmarks.demo.training --epochs 2

    ... --amp bfloat16 --clip 1.0                mixed precision, clipped gradients
    ... --checkpoint run.pt --resume             starts, or goes on where it was interrupted
    ... --logdir out/log                         look: tensorboard --logdir out/log
    ... --network snntorch --device cuda         snnTorch's cells, on the GPU

Any number of processes trains on the same batches and computes the same gradients, but for
rounding. The demo runs this script once for either network, in processes of their own, so that
the peak of memory is theirs.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.demo import checkpointing, distributed
from benchmarks.demo.data import Batch, Data
from benchmarks.demo.distributed import Team
from benchmarks.demo.measuring import Memory, count, digest
from benchmarks.demo.network import NETWORKS
from benchmarks.demo.options import AMP, Recipe, parse
from benchmarks.demo.scalars import Log

EPSILON = 1e-3
"""Adam divides a gradient by its size plus this. With the default of 1e-8 a gradient of the size of
a rounding error makes as large a step as any other, and two runs that differ in rounding alone part
within an epoch (two runs of one cell do, from weights that are 1e-7 apart)."""


class Trainer:
    """The network and what changes its weights; the same in every process of the team."""

    def __init__(self, network: str, recipe: Recipe, team: Team) -> None:
        self.recipe, self.team = recipe, team
        # The same seed gives every process the same weights. From then on each draws numbers of
        # its own, as dropout or noise would want it (nothing here does).
        torch.manual_seed(recipe.seed)
        self.model = NETWORKS[network](recipe.canvas).to(team.device)
        torch.manual_seed(recipe.seed + team.rank)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=recipe.rate, eps=EPSILON)
        steps = recipe.epochs * recipe.batches()
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            recipe.rate,
            total_steps=steps,
            pct_start=0.1 if steps != 10 else 0.2,  # a rise of one step makes it divide by zero
            div_factor=5,
        )
        # float16 has no number below 6e-8: the loss is scaled up so that gradients do not vanish.
        # bfloat16 has the range of float32 and needs no scale.
        self.scaler = torch.amp.GradScaler(team.device.type, enabled=recipe.amp == "float16")
        # Shares its weights with `model`, which is the one that is saved and tested.
        self.parallel = team.wrap(self.model)

    def parts(self) -> dict[str, checkpointing.Stateful]:
        """What a checkpoint holds.

        The hidden states syn and mem are in no state_dict and need not be: `Network.spikes` resets
        them before each batch, so that nothing reaches from one batch into the next.
        """
        names = ("model", "optimizer", "schedule", "scaler")
        return {name: getattr(self, name) for name in names}

    def precision(self) -> torch.autocast:
        """What forward and loss run in; backward follows by itself."""
        amp = AMP[self.recipe.amp]
        return torch.autocast(self.team.device.type, amp, enabled=amp is not None)

    def step(self, batch: Batch, measure: bool) -> Step:
        """Learn from this process's share of a batch; measure: the norm of the gradient too."""
        events, labels = batch.events.to(self.team.device), batch.labels.to(self.team.device)
        begin = time.perf_counter()
        rate, scale = self.schedule.get_last_lr()[0], self.scaler.get_scale()
        self.optimizer.zero_grad()
        with self.precision():
            scores = self.parallel(events)
            # Gradients are averaged over the processes, whose shares need not be equally large
            # and may be empty: so each sums over its share, and the average is the gradient of
            # the whole batch's mean.
            loss = F.cross_entropy(scores, labels, reduction="sum") / (batch.size / self.team.size)
        self.scaler.scale(loss).backward()
        norm = None
        if measure or self.recipe.clip is not None:
            self.scaler.unscale_(self.optimizer)  # the norm is to be the true gradient's
            limit = math.inf if self.recipe.clip is None else self.recipe.clip
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() >= scale:  # else there was an overflow, and no step was made
            self.schedule.step()
        # item() waits for the device, so that the time is all of it.
        value = self.team.total(loss.item())[0] / self.team.size
        seconds = time.perf_counter() - begin
        right = int((scores.argmax(1) == labels).sum())
        return Step(value, seconds, right, rate, scale, None if norm is None else float(norm))

    @torch.no_grad()
    def accuracy(self, data: Data) -> float:
        """Share of the test digits that get the highest score for their class."""
        self.model.eval()
        right = 0
        for part in torch.arange(len(data.test_labels)).split(60):
            with self.precision():
                scores = self.model(data.test[:, part].to(self.team.device))
            right += int((scores.argmax(1).cpu() == data.test_labels[part]).sum())
        read, tested = self.team.total(right, len(data.test_labels))
        return read / tested


@dataclass(frozen=True)
class Step:
    """One step: the mean loss of the whole batch, and what is logged.

    right: digits of this process's share that were read rightly. norm: None if not asked for.
    """

    loss: float
    seconds: float
    right: int
    rate: float
    scale: float
    norm: float | None


def run(
    network: str,
    recipe: Recipe,
    team: Team,
    checkpoint: Path | None = None,
    resume: bool = False,
    logdir: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """Train and test.

    Yields {"event": "start"}, then one "batch" each and one "epoch" each, and "end" with the
    results. Every process of a team has to take them all; the losses are the same in all.
    """
    torch.set_num_threads(max(1, recipe.threads // team.local_size))
    torch.backends.cudnn.allow_tf32 = False  # both networks in full float32
    data = Data(recipe, team)
    trainer = Trainer(network, recipe, team)
    model = trainer.model
    settings = {"network": network, **recipe.decisive()}
    progress: dict[str, Any] = {"epochs": 0, "order": data.order}
    if checkpoint is not None and resume and checkpoint.exists():
        progress = checkpointing.load(checkpoint, trainer.parts(), settings, team)
    done, data.order = progress["epochs"], progress["order"]
    number = done * recipe.batches()
    log = None if logdir is None else Log(logdir, model, team, first=number)
    yield {
        "event": "start",
        "epochs": done,
        "weights": digest(model),
        "parameters": count(model),
        "processes": team.size,
        "threads": torch.get_num_threads(),
    }
    memory = Memory(team.device)
    seconds = []
    for epoch in range(done, recipe.epochs):
        model.train()
        total = 0.0
        for batch in data.epoch(epoch):
            step = trainer.step(batch, measure=log is not None)
            seconds.append(step.seconds)
            total += step.loss * batch.size
            number += 1
            if log is not None:
                log.add(
                    number,
                    {
                        "train/loss": step.loss,
                        "train/accuracy": team.total(step.right)[0] / batch.size,
                        "train/learning_rate": step.rate,
                        "train/gradient_norm": step.norm,
                        "train/loss_scale": step.scale,
                        "train/step_seconds": step.seconds,
                        **log.spike_rates(),
                    },
                )
            yield {"event": "batch", "loss": step.loss, "epoch": epoch}
        if log is not None:
            log.add(number, {"test/accuracy": trainer.accuracy(data)})
        if checkpoint is not None:
            progress = {"epochs": epoch + 1, "order": data.order}
            checkpointing.save(checkpoint, trainer.parts(), settings, progress, team)
        mean = total / len(data.images)
        yield {"event": "epoch", "epoch": epoch, "loss": mean, "seconds": sum(seconds)}
    if log is not None:
        log.close()
    peak, beyond = team.total(*memory.peaks())
    yield {
        "event": "end",
        "accuracy": trainer.accuracy(data),
        "seconds": sum(seconds),
        "batch_ms": 1000 * statistics.median(seconds) if seconds else 0.0,
        "peak_mib": peak,
        "training_mib": beyond,
        "weights": digest(model),
        "order": data.order,
        "path": model.path,
    }


def describe(event: dict[str, Any], network: str, recipe: Recipe) -> str:
    """A line for the reader about an event; empty for those that come too often."""
    kind = event["event"]
    if kind == "start":
        return (
            f"{network}: {event['parameters']} weights, {event['processes']} process(es) on "
            f"{recipe.device} with {event['threads']} thread(s) each; "
            f"begins with epoch {event['epochs'] + 1} of {recipe.epochs}"
        )
    if kind == "epoch":
        return (
            f"epoch {event['epoch'] + 1}/{recipe.epochs}  loss {event['loss']:.3f}  "
            f"{event['seconds']:.1f} s"
        )
    if kind == "end":
        return (
            f"test accuracy {event['accuracy']:.1%}; {event['batch_ms']:.1f} ms per batch, median; "
            f"{event['path']}"
        )
    return ""


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    args, recipe = parse(arguments)
    # Both are imported whichever is trained, so that both processes start equally large.
    import snntorch  # noqa: F401

    import snnlstm  # noqa: F401

    with distributed.team(args.device) as team:
        for event in run(args.network, recipe, team, args.checkpoint, args.resume, args.logdir):
            line = json.dumps(event) if args.json else describe(event, args.network, recipe)
            if team.leads and line:
                print(line, flush=True)


if __name__ == "__main__":
    main()
