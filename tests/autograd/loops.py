"""Runs loops of step calls of snnTorch's cell and ours on equal events, and compares gradients."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.shared.helpers import same_gradients, steps, twins

STEPS = 5


def cells(**arguments) -> tuple[nn.Module, nn.Module]:
    """Makes snnTorch's cell and ours in float64, with equal weights."""
    arguments = {"threshold": 0.05, "reset_mechanism": "subtract", "seed": 1} | arguments
    ours, theirs = twins(2, 4, 3, **arguments)
    return theirs.double(), ours.double()


def events(time: int = STEPS, batch: int = 3) -> Tensor:
    return steps(time, batch, 2, 6, 7, seed=2).double()


def zeros(batch: int = 3) -> tuple[Tensor, Tensor]:
    return torch.zeros(batch, 4, 6, 7).double(), torch.zeros(batch, 4, 6, 7).double()


def unroll(cell: nn.Module, x: Tensor, state=None) -> list[tuple[Tensor, Tensor, Tensor]]:
    syn, mem = zeros(x.shape[1]) if state is None else state
    out = []
    for x_t in x:
        spk, syn, mem = cell(x_t, syn, mem)
        out.append((spk, syn, mem))
    return out


def both(work: Callable[[nn.Module], object], **arguments) -> tuple[nn.Module, nn.Module]:
    """Calls `work` with snnTorch's cell and ours; asserts that parameters have equal gradients."""
    pair = cells(**arguments)
    for cell in pair:
        work(cell)
    same_gradients(*pair, atol=1e-11, rtol=1e-10)
    return pair


def loss_of(out: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    return sum(
        (k + 1) * spk.sum() + syn.square().sum() + mem.sum()
        for k, (spk, syn, mem) in enumerate(out)
    )
