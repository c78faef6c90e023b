"""The demo's network: two spiking ConvLSTM layers and a linear readout of their spikes.

It exists twice, with the same layers of the same names, so that one seed gives both the same
weights bit for bit. They differ in what runs a layer over time, and in nothing else: snnTorch's
cell is called once a time step, in the loop that snnTorch's documentation teaches; ours takes the
whole sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CHANNELS = (16, 16)
THRESHOLD = 0.05
"""Low, because mem = o * tanh(syn) stays small while the weights are: at 1.0 nothing ever fires."""
SLOPE = 20.0
"""Sharpness alpha of the arctan surrogate: the threshold's scale of 0.05 wants it this narrow."""
CLASSES = 10


class Network(nn.Module):
    """Events (T, N, 2, S, S) to class scores (N, 10). Subclasses say how a layer runs over time.

    Both layers halve the image by max-pooling; the readout sees the mean of the second layer's
    spikes over time.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        first, second = CHANNELS
        self.layer1 = self.make_cell(2, first)
        self.layer2 = self.make_cell(first, second)
        self.readout = nn.Linear(second * (side // 4) ** 2, CLASSES)

    def make_cell(self, cin: int, cout: int) -> nn.Module:
        """A 3x3 cell with max-pooling over 2x2."""
        return self.cell_class()(
            cin,
            cout,
            3,
            max_pool=2,
            threshold=THRESHOLD,
            spike_grad=self.surrogate(),
        )

    def cell_class(self) -> type[nn.Module]:
        """The class of both layers."""
        raise NotImplementedError

    def surrogate(self) -> Any:
        """The surrogate gradient of both layers."""
        raise NotImplementedError

    def spikes(self, x: Tensor) -> Tensor:
        """The second layer's spikes (T, N, C, S / 4, S / 4), both layers starting from zero."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.spikes(x).mean(0).flatten(1))

    @property
    def path(self) -> str:
        """What ran the layers."""
        raise NotImplementedError


class SnnTorchNetwork(Network):
    """snnTorch's cells, one call a time step."""

    path = "snntorch.SConv2dLSTM, one call a time step"

    def cell_class(self) -> type[nn.Module]:
        import snntorch

        return snntorch.SConv2dLSTM

    def surrogate(self) -> Any:
        from snntorch import surrogate

        return surrogate.atan(alpha=SLOPE)

    def spikes(self, x: Tensor) -> Tensor:
        syn1, mem1 = self.layer1.reset_mem()
        syn2, mem2 = self.layer2.reset_mem()
        record = []
        for x_t in x.unbind(0):
            spk1, syn1, mem1 = self.layer1(x_t, syn1, mem1)
            spk2, syn2, mem2 = self.layer2(spk1, syn2, mem2)
            record.append(spk2)
        return torch.stack(record)


class SnnlstmNetwork(Network):
    """Our cells, one call a sequence."""

    def cell_class(self) -> type[nn.Module]:
        import snnlstm

        return snnlstm.SConv2dLSTM

    def surrogate(self) -> Any:
        from snnlstm import surrogate

        return surrogate.atan(alpha=SLOPE)

    def spikes(self, x: Tensor) -> Tensor:
        self.layer1.reset_mem()
        self.layer2.reset_mem()
        spk1, _, _ = self.layer1(x)
        spk2, _, _ = self.layer2(spk1)
        return spk2

    @property
    def path(self) -> str:
        return f"snnlstm.SConv2dLSTM, one call a sequence: {self.layer1.path}"


NETWORKS: dict[str, type[Network]] = {"snntorch": SnnTorchNetwork, "snnlstm": SnnlstmNetwork}
