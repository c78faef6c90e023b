"""Loops of step calls: snnTorch's cell and ours on the same events, and what is compared."""

import snntorch
import torch
from torch import Tensor, nn

import snnlstm

STEPS = 5


def cells(**arguments) -> tuple[nn.Module, nn.Module]:
    """Makes snnTorch's cell and ours, of the same weights, in float64."""
    torch.manual_seed(1)
    arguments = {"threshold": 0.05, "reset_mechanism": "subtract"} | arguments
    theirs = snntorch.SConv2dLSTM(2, 4, 3, **arguments).double()
    ours = snnlstm.SConv2dLSTM(2, 4, 3, **arguments).double()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def events(steps: int = STEPS, batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return (
        torch.rand(steps, batch, 2, 6, 7, generator=generator, dtype=torch.float64).gt(0.7).double()
    )


def zeros(batch: int = 3) -> tuple[Tensor, Tensor]:
    return torch.zeros(batch, 4, 6, 7).double(), torch.zeros(batch, 4, 6, 7).double()


def unroll(cell: nn.Module, x: Tensor, state=None) -> list[tuple[Tensor, Tensor, Tensor]]:
    syn, mem = zeros(x.shape[1]) if state is None else state
    out = []
    for x_t in x:
        spk, syn, mem = cell(x_t, syn, mem)
        out.append((spk, syn, mem))
    return out


def gradients(cell: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in cell.parameters()]


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(gradients(one), gradients(other), strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-10)


def loss_of(out: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    return sum(
        (k + 1) * spk.sum() + syn.square().sum() + mem.sum()
        for k, (spk, syn, mem) in enumerate(out)
    )
