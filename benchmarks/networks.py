"""Defines eight small networks, each with the structure, shapes and habits of one kind of users.

The networks are written for snnTorch's cell, as their users would. ``NETWORKS`` lists them. A
network class takes the cell's class as its first argument.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import snntorch as snn
import torch
import torch.nn.functional as F
from snntorch import surrogate, utils
from torch import Tensor, nn

import snnlstm

try:
    from lightning import LightningModule
except ImportError:
    LightningModule = nn.Module


@dataclass(frozen=True)
class Network:
    """Holds a network, its data and its training loop."""

    make: Callable[[Any], nn.Module]  # makes the network of a cell's class
    data: tuple[tuple[int, ...], ...]  # shapes of batches, which the loop takes in turn
    step: Callable[..., Tensor]  # makes a training step of (network, optimizer, x, y)
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam
    batch_dim: int = 0  # the dimension of x that is the batch
    autocast: bool = False  # under autocast our cell and snnTorch's round differently
    infer: Callable[[Any, Tensor], Any] = lambda net, x: net(x)

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Returns equal batches at every call: events of density 0.3, and labels."""
        generator = torch.Generator("cpu").manual_seed(7)
        made = []
        for shape in self.data:
            x = torch.rand(shape, generator=generator, device="cpu").lt(0.3)
            size = (shape[self.batch_dim],)
            y = torch.randint(3, size, generator=generator, device="cpu")
            like = torch.zeros(())
            made.append((x.to(like), y.to(like.device)))
        return made


def plain_step(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    """Averages the logits of all steps, (T, N, classes), as tutorials do."""
    optimizer.zero_grad()
    loss = F.cross_entropy(net(x).mean(0), y)
    loss.backward()
    optimizer.step()
    return loss


class ExplicitStates(nn.Module):
    """Carries states of reset_mem by hand; data is batch-first, and the last batch is smaller."""

    def __init__(self, cell: Any) -> None:
        super().__init__()
        self.lstm1 = cell(2, 4, 3, threshold=0.1, max_pool=2)
        self.lstm2 = cell(4, 4, 3, threshold=0.05, avg_pool=2)
        self.fc = nn.Linear(4 * 2 * 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        syn1, mem1 = self.lstm1.reset_mem()
        syn2, mem2 = self.lstm2.reset_mem()
        out = []
        for t in range(x.size(1)):  # (N, T, C, H, W)
            spk1, syn1, mem1 = self.lstm1(x[:, t], syn1, mem1)
            spk2, syn2, mem2 = self.lstm2(spk1, syn2, mem2)
            out.append(self.fc(spk2.flatten(1)))
        return torch.stack(out)


class Spectrogram(nn.Module):
    """Cuts a mel spectrogram into frames; cells of 9x9 have batch norm between them."""

    def __init__(self, cell: Any) -> None:
        super().__init__()
        self.lstm1 = cell(1, 4, 9, threshold=0.05, avg_pool=(2, 2), init_hidden=True)
        self.norm = nn.BatchNorm2d(4)
        self.lstm2 = cell(4, 4, 9, threshold=0.05, init_hidden=True, output=True)
        self.head = nn.Linear(4 * 10 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.lstm1.reset_mem()
        self.lstm2.reset_mem()
        out = []
        for frame in x.split(8, dim=-1):  # (N, 1, mels, frames * 8)
            spk = self.norm(self.lstm1(frame))
            spk, syn, mem = self.lstm2(spk)
            out.append(self.head(mem.flatten(1)))  # the head reads the membrane potential
        return torch.stack(out)


class Columns(nn.Module):
    """Reads a spectrogram column by column, 129x1 pixels, with states of torch.zeros, no bias."""

    def __init__(self, cell: Any) -> None:
        super().__init__()
        self.lstm = cell(1, 4, [3, 3], bias=False, threshold=0.02, reset_mechanism="zero")
        self.fc = nn.Linear(4 * 129, 3)
        self.out = snn.Synaptic(alpha=0.9, beta=0.8, threshold=0.5, init_hidden=True, output=True)

    def forward(self, x: Tensor) -> Tensor:
        mem = torch.zeros(x.shape[0], 4, 129, 1)
        syn = torch.zeros_like(mem)
        utils.reset(self)
        mem_rec = []
        for t in range(x.shape[-1]):
            spk, syn, mem = self.lstm(x[:, None, :, t : t + 1], syn, mem)
            _, _, mem_out = self.out(self.fc(torch.flatten(spk, 1)))
            mem_rec.append(mem_out)
        return torch.stack(mem_rec)


class Truncated(nn.Module):
    """Takes one step at a time; the training loop keeps the states."""

    def __init__(self, cell: Any) -> None:
        super().__init__()
        self.lstm = cell(2, 5, 3, threshold=0.05)
        self.fc = nn.Linear(5 * 6 * 6, 3)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        spk, *state = self.lstm(x, *state)
        return self.fc(spk.flatten(1)), state


def truncated_step(net: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> Tensor:
    """Trains by truncated BPTT under autocast, and calls backward under autocast, too."""
    state = net.lstm.reset_mem()
    losses = []
    for chunk in x.split(3):  # (T, N, C, H, W)
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16):
            out = 0
            for x_t in chunk:
                logits, state = net(x_t, state)
                out = out + logits
            loss = F.cross_entropy(out, y)
            loss.backward()
        optimizer.step()
        state = [s.detach() for s in state]
        losses.append(loss.detach())
    return torch.stack(losses).mean()


def truncated_infer(net: Any, x: Tensor) -> Tensor:
    """Carries the states through all steps, (T, N, C, H, W)."""
    state = net.lstm.reset_mem()
    out = []
    for x_t in x:
        logits, state = net(x_t, state)
        out.append(logits)
    return torch.stack(out)


class Recurrent(nn.Module):
    """Has the whole loop in forward, for DataParallel; data is batch-first."""

    def __init__(self, cell: Any) -> None:
        super().__init__()
        self.features = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.lstm1 = cell(4, 4, 3, threshold=0.02, init_hidden=True)
        self.lstm2 = cell(4, 4, 5, threshold=0.02, init_hidden=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.lstm1.reset_mem()
        self.lstm2.reset_mem()
        spikes = [
            self.lstm2(self.lstm1(torch.relu(self.features(x_t)))) for x_t in x.transpose(0, 1)
        ]
        return self.head(torch.stack(spikes).mean((-2, -1)))


class LearnedThreshold(nn.Module):
    """Trains thresholds, one for each channel, on channels_last data, with clipped gradients."""

    def __init__(self, cell: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.lstm1 = cell(
            4, 5, 3, threshold=torch.full((5, 1, 1), 0.03), learn_threshold=True, max_pool=2,
            reset_mechanism="subtract",
        )  # fmt: skip
        self.lstm2 = cell(5, 3, 3, threshold=0.02, learn_threshold=True)

    def forward(self, x: Tensor) -> Tensor:
        (syn1, mem1), (syn2, mem2) = self.lstm1.reset_mem(), self.lstm2.reset_mem()
        out = []
        for x_t in x:
            x_t = self.conv(x_t.to(memory_format=torch.channels_last))
            spk, syn1, mem1 = self.lstm1(x_t, syn1, mem1)
            spk, syn2, mem2 = self.lstm2(spk, syn2, mem2)
            out.append(spk.mean((-2, -1)))
        return torch.stack(out)


def clipped_step(net: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> Tensor:
    """Accumulates the gradients of two halves of the batch, then clips them."""
    optimizer.zero_grad()
    loss = torch.zeros(())
    for x_half, y_half in zip(x.chunk(2, dim=1), y.chunk(2), strict=True):
        part = F.cross_entropy(net(x_half).mean(0), y_half) / 2
        part.backward()
        loss = loss + part.detach()
    nn.utils.clip_grad_norm_(net.parameters(), 0.5)
    optimizer.step()
    return loss


def hidden(cell: Any) -> nn.Module:
    """Makes an nn.Sequential of layers that keep their states."""
    grad = surrogate.atan(alpha=2.0)
    return nn.Sequential(
        cell(2, 4, 3, threshold=0.1, init_hidden=True, max_pool=2, spike_grad=grad),
        cell(4, 4, kernel_size=3, threshold=0.1, init_hidden=True, spike_grad=grad),
        nn.Flatten(),
        nn.Linear(4 * 4 * 4, 3),
        snn.Leaky(beta=0.8, init_hidden=True, output=True, spike_grad=grad),
    )


def hidden_infer(net: nn.Module, x: Tensor) -> Tensor:
    """Loops over time outside of the network, (T, N, C, H, W)."""
    utils.reset(net)
    return torch.stack([net(x_t)[1] for x_t in x])


def hidden_step(net: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> Tensor:
    """Resets before each batch, and loops over time outside of the network."""
    utils.reset(net)
    net.train()
    spk_rec, mem_rec = [], []
    for step in range(x.size(0)):
        spk, mem = net(x[step])
        spk_rec.append(spk)
        mem_rec.append(mem)
    loss = torch.zeros(1)
    for mem in mem_rec:
        loss += nn.CrossEntropyLoss()(mem, y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


class Lit(LightningModule):
    """Is a module for Lightning's Trainer, or a plain module without Lightning."""

    def __init__(self, cell: Any) -> None:
        super().__init__()
        self.lstm = cell(2, 4, 3, threshold=0.05, spike_grad=surrogate.straight_through_estimator())
        self.head = nn.Linear(4 * 6 * 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.lstm.reset_mem()
        return torch.stack([self.head(self.lstm(x_t)[0].flatten(1)) for x_t in x.unbind(1)])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x).mean(0), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def lit_step(net: Any, optimizer: Any, x: Tensor, y: Tensor) -> Tensor:
    """Makes the training step of a Trainer."""
    loss = net.training_step((x, y), 0)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


_sgd = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
_adam = functools.partial(torch.optim.Adam, lr=1e-2)
NETWORKS = {
    "explicit": Network(
        ExplicitStates, ((4, 5, 2, 8, 8), (3, 5, 2, 8, 8)), plain_step, optimizer=_adam
    ),
    "spectrogram": Network(Spectrogram, ((4, 1, 20, 32),), plain_step, optimizer=_adam),
    "columns": Network(Columns, ((2, 129, 5),), plain_step, optimizer=_adam),
    "truncated": Network(
        Truncated,
        ((6, 3, 2, 6, 6),),
        truncated_step,
        optimizer=_sgd,
        batch_dim=1,
        autocast=True,
        infer=truncated_infer,
    ),
    "parallel": Network(
        lambda cell: nn.DataParallel(Recurrent(cell)), ((4, 4, 2, 12, 12),), plain_step
    ),
    "thresholds": Network(
        LearnedThreshold, ((4, 4, 3, 8, 8),), clipped_step, optimizer=_sgd, batch_dim=1
    ),
    "hidden": Network(
        hidden, ((5, 4, 2, 8, 8), (5, 2, 2, 8, 8)), hidden_step, batch_dim=1, infer=hidden_infer
    ),
    "lit": Network(Lit, ((4, 3, 2, 6, 6),), lit_step, optimizer=_adam),
}


def twins(make: Callable[[Any], nn.Module]) -> list[Any]:
    """Makes the same network with snnTorch's cell and with ours."""
    nets = []
    for cell in (snn.SConv2dLSTM, snnlstm.SConv2dLSTM):
        torch.manual_seed(0)
        nets.append(make(cell))
    return nets
