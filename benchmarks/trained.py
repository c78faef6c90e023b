"""Defines networks that read the demo's digits, with fresh weights and with trained ones.

In training the weights grow, and layers come to spike more or less, on which times may depend.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import snnlstm
from benchmarks.networks import Classifier, Network, averaged, layers

EPOCHS, SEED, BATCH = 4, 0, 16
DATA = "24x24; T=8 N=16, digits"


@dataclass(frozen=True)
class Digits(Network):
    """A network on the demo's events (T, N, 2, H, W)."""

    def batches(self, *_: Any) -> list[tuple[Any, Any]]:
        """Returns the first test digits."""
        from benchmarks.demo import training  # which needs packages that --help does not

        like = torch.zeros(())
        with torch.device("cpu"):
            _, _, images, labels = training.load_split(SEED)
            x = training.moving_digits(images[:BATCH], 1_000_000 + SEED)
        return [(x.to(like), labels[:BATCH].to(like.device))]


def demo(cell: Any) -> nn.Module:
    """Makes the demo's network."""
    from benchmarks.demo import training

    return training.Network("snnlstm" if issubclass(cell, snnlstm.SConv2dLSTM) else "snntorch")


def counted(run: Callable[..., Tensor], net: nn.Module, optimizer: Any, x: Tensor, y: Tensor):
    """Trains on the class scores (N, 10) of counted spikes, as the demo does."""
    optimizer.zero_grad()
    loss = F.cross_entropy(run(net, x), y)
    loss.backward()
    optimizer.step()
    return loss


def documentation(cell: Any) -> nn.Module:
    """Makes the network of snnTorch's documentation, for two channels of 24x24 pixels."""
    first, last = layers(2, 8, threshold=0.1, max_pool=2), layers(8, 8, threshold=0.03, avg_pool=2)
    return Classifier(cell, first + last, pixels=6 * 6)


ADAM = functools.partial(torch.optim.Adam, lr=4e-3, eps=1e-3)  # the demo's
FRESH = {
    "demo": Digits(
        f"the demo's: 2->16->16, max_pool 2, {DATA}", demo, (), counted, optimizer=ADAM,
        loop=lambda net, x: net.loop(x), sequences=lambda net, x: net.sequence(x),
    ),
    "documentation-digits": Digits(
        f"documentation's: 2->8, max_pool 2, 8->8, avg_pool 2, {DATA}", documentation, (), averaged,
        optimizer=ADAM, loop=lambda net, x: net(x.transpose(0, 1)),
        sequences=lambda net, x: net.sequence(x.transpose(0, 1)),
    ),
}  # fmt: skip


@functools.cache
def weights(name: str) -> dict[str, Tensor]:
    """Returns a network's weights after EPOCHS of training with our cell, which takes seconds."""
    from benchmarks.demo import training

    case, losses = FRESH[name], list[float]()
    with torch.device("cpu"):
        torch.manual_seed(SEED)
        net = case.make(snnlstm.SConv2dLSTM)
        optimizer = case.optimizer(net.parameters())
        images, labels, _, _ = training.load_split(SEED)
        schedule = training.schedule_of(optimizer, EPOCHS * -(-len(images) // training.BATCH))
        for number in range(EPOCHS):
            for batch in training.epoch(images, labels, number):
                losses.append(case.train(case.sequences, net, optimizer, *batch).item())
                schedule.step()
    part = len(losses) // EPOCHS
    begin, end = (sum(some) / part for some in (losses[:part], losses[-part:]))
    print(f"{name}: training took the loss of an epoch from {begin:.2f} to {end:.2f}", flush=True)
    return net.state_dict()


def trained(cell: Any, name: str) -> nn.Module:
    """Makes a network with the weights after training."""
    net = FRESH[name].make(cell)
    net.load_state_dict(weights(name))
    return net


TRAINED = {}
for name, case in FRESH.items():
    make = functools.partial(trained, name=name)
    after = dataclasses.replace(case, title=f"{case.title}, after training", make=make)
    TRAINED |= {name: case, f"{name}-trained": after}
TABLES = {"trained": TRAINED}
