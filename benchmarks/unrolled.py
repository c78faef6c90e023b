"""Defines networks whose loops over time became sequences, as docs/sequences.md teaches.

``SEQUENCES`` has each network of ``NETWORKS`` in this form, with the same parameters, data and
training. ``DOCUMENTED`` is the network of snnTorch's documentation of the cell in both forms, and
``FRONTS`` has layers in front of a cell, which a loop or ``unroll`` runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import snntorch as snn
import torch
import torch.nn.functional as F
from snntorch import surrogate, utils
from torch import Tensor, nn

import snnlstm
from benchmarks import networks
from benchmarks.networks import NETWORKS, Network, plain_step
from snnlstm import unroll


def _reset(*layers: Any) -> None:
    for layer in layers:
        layer.reset_mem()


class ExplicitStates(networks.ExplicitStates):
    def forward(self, x: Tensor) -> Tensor:
        _reset(self.lstm1, self.lstm2)
        return unroll(x.transpose(0, 1), self.lstm1, self.lstm2, nn.Flatten(), self.fc)


class Spectrogram(networks.Spectrogram):
    def forward(self, x: Tensor) -> Tensor:
        _reset(self.lstm1, self.lstm2)
        frames = torch.stack(x.split(8, dim=-1))
        _, _, mem = unroll(frames, self.lstm1, self.norm, self.lstm2)
        return self.head(mem.flatten(2))


class Columns(networks.Columns):
    def forward(self, x: Tensor) -> Tensor:
        utils.reset(self)
        columns = x.permute(2, 0, 1)[:, :, None, :, None]
        return unroll(columns, self.lstm, nn.Flatten(), self.fc, self.out)[2]


class Truncated(networks.Truncated):
    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        spk, *state = self.lstm(x, *state)
        return self.fc(spk.flatten(2)), state


def truncated_step(net: Any, optimizer: Any, x: Tensor, y: Tensor) -> Tensor:
    """Trains as networks.truncated_step, with each chunk as a sequence."""
    state = net.lstm.reset_mem()
    losses = []
    for chunk in x.split(3):
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16):
            logits, state = net(chunk, state)
            loss = F.cross_entropy(logits.sum(0), y)
            loss.backward()
        optimizer.step()
        state = [s.detach() for s in state]
        losses.append(loss.detach())
    return torch.stack(losses).mean()


class Recurrent(networks.Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        _reset(self.lstm1, self.lstm2)
        spikes = unroll(x.transpose(0, 1), self.features, nn.ReLU(), self.lstm1, self.lstm2)
        return self.head(spikes.mean((-2, -1)))


class LearnedThreshold(networks.LearnedThreshold):
    def forward(self, x: Tensor) -> Tensor:
        _reset(self.lstm1, self.lstm2)
        images = x.flatten(0, 1).to(memory_format=torch.channels_last)
        steps = images.unflatten(0, x.shape[:2])
        return unroll(steps, self.conv, self.lstm1, self.lstm2)[0].mean((-2, -1))


def hidden_infer(net: nn.Sequential, x: Tensor) -> Tensor:
    """Runs all layers over the sequence, and returns the last neurons' mem."""
    utils.reset(net)
    return unroll(x, *net)[1]


def hidden_step(net: nn.Sequential, optimizer: Any, x: Tensor, y: Tensor) -> Tensor:
    """Trains as networks.hidden_step."""
    net.train()
    loss = torch.zeros(1)
    for mem in hidden_infer(net, x).unbind(0):
        loss += nn.CrossEntropyLoss()(mem, y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


class Lit(networks.Lit):
    def forward(self, x: Tensor) -> Tensor:
        self.lstm.reset_mem()
        return unroll(x.transpose(0, 1), self.lstm, nn.Flatten(), self.head)


_FORMS: dict[str, dict[str, Any]] = {
    "explicit": {"make": ExplicitStates},
    "spectrogram": {"make": Spectrogram},
    "columns": {"make": Columns},
    "truncated": {
        "make": Truncated,
        "step": truncated_step,
        "infer": lambda net, x: net(x, net.lstm.reset_mem())[0],
    },
    "parallel": {"make": lambda cell: nn.DataParallel(Recurrent(cell))},
    "thresholds": {"make": LearnedThreshold},
    "hidden": {"step": hidden_step, "infer": hidden_infer},
    "lit": {"make": Lit},
}
SEQUENCES = {name: replace(NETWORKS[name], **form) for name, form in _FORMS.items()}


class Documented(nn.Module):
    """Is built as the example in snnTorch's documentation of the cell; x (N, T, 1, 28, 28)."""

    def __init__(self, cell: Any) -> None:
        super().__init__()
        grad = surrogate.straight_through_estimator()
        self.lstm1 = cell(1, 8, 3, max_pool=2, threshold=0.1, spike_grad=grad)
        self.lstm2 = cell(8, 8, 3, avg_pool=2, threshold=0.1, spike_grad=grad)
        self.fc = nn.Linear(8 * 7 * 7, 10)
        self.lif = snn.Leaky(beta=0.5, spike_grad=surrogate.fast_sigmoid(slope=5))

    def forward(self, x: Tensor) -> Tensor:
        syn1, mem1 = self.lstm1.reset_mem()
        syn2, mem2 = self.lstm2.reset_mem()
        mem3 = self.lif.reset_mem()
        out = []
        for t in range(x.size(1)):
            spk1, syn1, mem1 = self.lstm1(x[:, t], syn1, mem1)
            spk2, syn2, mem2 = self.lstm2(spk1, syn2, mem2)
            _, mem3 = self.lif(self.fc(spk2.flatten(1)), mem3)
            out.append(mem3)
        return torch.stack(out)


class DocumentedSequence(Documented):
    def forward(self, x: Tensor) -> Tensor:
        _reset(self.lstm1, self.lstm2, self.lif)
        x = x.transpose(0, 1)
        return unroll(x, self.lstm1, self.lstm2, nn.Flatten(), self.fc, self.lif)[1]


_documented = Network(Documented, ((32, 10, 1, 28, 28),), plain_step)
DOCUMENTED = _documented, replace(_documented, make=DocumentedSequence)


# ---- layers in front of a cell -------------------------------------------------------------------


def _leaky() -> nn.Module:
    return snn.Leaky(0.9, threshold=0.2, init_hidden=True)


def _conv(cin: int, cout: int, **options: Any) -> nn.Module:
    return nn.Conv2d(cin, cout, 3, padding=1, **options)


_LAYERS: dict[str, Callable[[], list[nn.Module]]] = {
    "conv": lambda: [_conv(2, 8), nn.ReLU()],
    "leaky": lambda: [_conv(2, 8), _leaky()],
    "leaky-leaky": lambda: [_conv(2, 8), _leaky(), _conv(8, 8), _leaky()],
    "norm-pool": lambda: [_conv(2, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)],
    "stride-dropout": lambda: [_conv(2, 8, stride=2), _leaky(), nn.Dropout(0.2)],
}


def _fronted(front: str, cell: Any) -> nn.Sequential:
    return nn.Sequential(*_LAYERS[front](), cell(8, 16, 3, threshold=0.02, init_hidden=True))


def loop_infer(net: nn.Sequential, x: Tensor) -> Tensor:
    """Runs the layers step by step."""
    utils.reset(net)
    return torch.stack([net(x_t) for x_t in x.unbind(0)])


def unroll_infer(net: nn.Sequential, x: Tensor) -> Tensor:
    """Runs the layers as sequences."""
    utils.reset(net)
    return snnlstm.unroll(x, *net)


def _step_of(infer: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def step(net: nn.Sequential, optimizer: Any, x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = infer(net, x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    return step


SIZES = (32, 64, 128, 256)


def _front(front: str, size: int) -> tuple[Network, Network]:
    steps = 10 if size < 128 else 5
    make, data = functools.partial(_fronted, front), ((steps, 4, 2, size, size),)
    one, other = (
        Network(make, data, _step_of(infer), torch.optim.SGD, batch_dim=1, infer=infer)
        for infer in (loop_infer, unroll_infer)
    )
    return one, other


FRONTS = {f"{front}-{size}": _front(front, size) for front in _LAYERS for size in SIZES}
