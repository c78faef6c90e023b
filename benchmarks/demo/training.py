"""Trains one of the two networks in a process of its own, so that its peak memory is its own.

`python -m benchmarks.demo.training '{"network": "snnlstm", ...}'` writes one JSON object a line:
{"event": "start"}, then one "batch" each and one "epoch" each, and "end" with the results.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import resident
from benchmarks.demo.network import NETWORKS
from benchmarks.moving_digits import Motion, load_split, moving_digits

MIB = 2**20

EPSILON = 1e-3
"""Adam divides a gradient by its size plus this. With the default of 1e-8 a gradient of the size of
a rounding error makes as large a step as any other, and two runs that differ in rounding alone part
within an epoch (two runs of one cell do, from weights that are 1e-7 apart)."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run, but for which network is trained.

    samples: how many of the training digits are used; 0 is all of them.
    """

    epochs: int = 12
    batch: int = 16
    rate: float = 4e-3
    samples: int = 0
    seed: int = 0
    device: str = "cpu"
    threads: int = 2

    def batches(self) -> int:
        """Batches of the whole training."""
        digits = self.samples or 1437
        return self.epochs * -(-digits // self.batch)


class Data:
    """Moving digits. The motions of the training digits are new in each epoch."""

    def __init__(self, recipe: Recipe, motion: Motion) -> None:
        images, labels, test_images, test_labels = load_split(recipe.seed)
        kept = recipe.samples or len(images)
        self.images, self.labels = images[:kept], labels[:kept]
        self.recipe, self.motion = recipe, motion
        # Made once and refilled, so that it is no part of what training allocates.
        self.moving = moving_digits(self.images, motion, seed=0)
        self.test = moving_digits(test_images, motion, seed=1_000_000 + recipe.seed)
        self.test_labels = test_labels

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches (events (T, N, 2, S, S), labels (N,)) in an order that the seed decides."""
        seed = 1000 * self.recipe.seed + number
        moving = moving_digits(self.images, self.motion, seed, out=self.moving)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.images), generator=generator)
        for part in order.split(self.recipe.batch):
            yield moving[:, part].contiguous(), self.labels[part]


def run(network: str, recipe: Recipe, motion: Motion) -> Iterator[dict[str, Any]]:
    """Train and test; yields what the module's documentation says."""
    device = torch.device(recipe.device)
    torch.set_num_threads(recipe.threads)
    torch.backends.cudnn.allow_tf32 = False  # both networks in full float32
    data = Data(recipe, motion)
    torch.manual_seed(recipe.seed)
    model = NETWORKS[network](motion.canvas).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.rate, eps=EPSILON)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.rate, total_steps=recipe.batches(), pct_start=0.1, div_factor=5
    )
    yield {"event": "start", "weights": digest(model), "parameters": count(model)}
    memory = Memory(device)
    seconds = []
    seen = hashlib.sha256()
    for epoch in range(recipe.epochs):
        total = 0.0
        for events, labels in data.epoch(epoch):
            seen.update(labels.numpy().tobytes())
            events, labels = events.to(device), labels.to(device)
            begin = time.perf_counter()
            loss = F.cross_entropy(model(events), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            value = loss.item()  # on CUDA this waits for the device: the time is all of it
            seconds.append(time.perf_counter() - begin)
            total += value * len(labels)
            yield {"event": "batch", "loss": value, "epoch": epoch}
        mean = total / len(data.images)
        yield {"event": "epoch", "epoch": epoch, "loss": mean, "seconds": sum(seconds)}
    peak, beyond = memory.peaks()
    yield {
        "event": "end",
        "accuracy": accuracy(model, data.test, data.test_labels, device),
        "seconds": sum(seconds),
        "batch_ms": 1000 * statistics.median(seconds),
        "peak_mib": peak,
        "training_mib": beyond,
        "order": seen.hexdigest(),
        "path": model.path,
    }


@torch.no_grad()
def accuracy(model: torch.nn.Module, events: Tensor, labels: Tensor, device: torch.device) -> float:
    """Share of the test digits that get the highest score for their class."""
    right = 0
    for part in torch.arange(len(labels)).split(60):
        scores = model(events[:, part].to(device))
        right += int((scores.argmax(1).cpu() == labels[part]).sum())
    return right / len(labels)


def digest(model: torch.nn.Module) -> str:
    """A hash of all parameters, names included: equal only if they are equal bit for bit."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        found.update(name.encode())
        found.update(parameter.detach().cpu().numpy().tobytes())
    return found.hexdigest()


def count(model: torch.nn.Module) -> int:
    """Number of trained values."""
    return sum(parameter.numel() for parameter in model.parameters())


class Memory:
    """Peak memory from here on: of the process on the CPU, of torch's allocator on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            self.before = resident.watch()

    def peaks(self) -> tuple[float, float]:
        """MiB in all, and MiB beyond what there was before."""
        peak = torch.cuda.max_memory_allocated() if self.cuda else resident.high_water()
        return peak / MIB, max(0, peak - self.before) / MIB


def request(network: str, recipe: Recipe, motion: Motion) -> str:
    """The argument that makes this module's process run `run`."""
    parts = {"recipe": dataclasses.asdict(recipe), "motion": dataclasses.asdict(motion)}
    return json.dumps({"network": network, **parts})


def _main() -> None:
    asked = json.loads(sys.argv[1])
    asked["motion"]["radius"] = tuple(asked["motion"]["radius"])
    # Both are imported whichever is trained, so that both processes start equally large.
    import snntorch  # noqa: F401

    import snnlstm  # noqa: F401

    for event in run(asked["network"], Recipe(**asked["recipe"]), Motion(**asked["motion"])):
        print(json.dumps(event), flush=True)


if __name__ == "__main__":
    _main()
