"""What training looks like from inside, for TensorBoard."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from benchmarks.demo.distributed import Team
from benchmarks.demo.network import Network


class Log:
    """Scalars in a directory for `tensorboard --logdir DIR`, written by one process of the team.

    It also watches how much the layers of `model` spike. first: batches that came before; what an
    interrupted training logged after them is hidden.
    """

    def __init__(self, folder: Path, model: Network, team: Team, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # needs the package tensorboard

        purge = first + 1 if first else None
        self.writer = SummaryWriter(str(folder), purge_step=purge) if team.leads else None
        self.team = team
        self.spikes: dict[str, tuple[torch.Tensor | int, int]] = {}
        for name, layer in (("layer1", model.layer1), ("layer2", model.layer2)):
            layer.register_forward_hook(functools.partial(self._count, name))

    def _count(self, name: str, layer: nn.Module, args: object, result: tuple) -> None:
        if layer.training:
            spk, (spikes, places) = result[0].detach(), self.spikes.get(name, (0, 0))
            self.spikes[name] = spikes + spk.count_nonzero(), places + spk.numel()

    def spike_rates(self) -> dict[str, float]:
        """The share of neurons that spike in a time step, by layer, since the last call.

        Where it is 0 no gradient passes, and where it is near 1 the spikes say nothing: the first
        thing to look at when a spiking network does not learn. All processes have to call it.
        """
        rates = {}
        for name, counts in self.spikes.items():
            spikes, places = self.team.total(*map(float, counts))
            rates[f"spikes/{name}"] = spikes / places
        self.spikes.clear()
        return rates

    def add(self, step: int, scalars: Mapping[str, float | None]) -> None:
        """The values after that many batches, by their names."""
        if self.writer is not None:
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is still held back."""
        if self.writer is not None:
            self.writer.close()
