"""The digits of the demo, and the order in which they come."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.demo.distributed import Team
from benchmarks.demo.options import Recipe
from benchmarks.moving_digits import load_split, moving_digits


@dataclass(frozen=True)
class Batch:
    """This process's share of a batch: events (T, n, 2, S, S), labels (n,); n may be 0.

    size: digits of the whole batch, over all processes.
    """

    events: Tensor
    labels: Tensor
    size: int


class Data:
    """Moving digits. The motions of the training digits are new in each epoch.

    Order and motions depend on the seed and on the number of the epoch alone: they are the same
    for any number of processes, and a training that goes on needs no saved position.
    """

    def __init__(self, recipe: Recipe, team: Team) -> None:
        images, labels, test_images, test_labels = load_split(recipe.seed)
        kept = recipe.samples or len(images)
        self.images, self.labels = images[:kept], labels[:kept]
        self.recipe, self.team, motion = recipe, team, recipe.motion
        mine = team.share(torch.arange(len(test_labels)))
        self.test_labels = test_labels[mine]
        self.test = moving_digits(test_images, motion, seed=1_000_000 + recipe.seed, kept=mine)
        # Made once and refilled, so that it is no part of what training allocates.
        count = sum(len(team.share(part)) for part in torch.arange(kept).split(recipe.batch))
        self.moving = torch.empty(motion.steps, count, *self.test.shape[2:]).zero_()
        self.order = ""
        """A hash of all labels that came, in their order, whichever process they went to."""

    def epoch(self, number: int) -> Iterator[Batch]:
        """The epoch's batches."""
        seed = 1000 * self.recipe.seed + number
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.images), generator=generator)
        parts = order.split(self.recipe.batch)
        mine = [self.team.share(part) for part in parts]
        moving_digits(self.images, self.recipe.motion, seed, out=self.moving, kept=torch.cat(mine))
        sizes = [len(share) for share in mine]
        for part, share, events in zip(parts, mine, self.moving.split(sizes, dim=1), strict=True):
            came = self.order.encode() + self.labels[part].numpy().tobytes()
            self.order = hashlib.sha256(came).hexdigest()
            yield Batch(events.contiguous(), self.labels[share], len(part))
