"""The cell as fast as plain torch gets it: written by hand against snnTorch's parameters."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.providers.base import Tensor
from benchmarks.providers.with_snntorch import SnnTorchEager


class Hoisted(SnnTorchEager):
    """snnTorch's cell, rearranged over time.

    - The input half of the convolution runs once, over T * N images; only the recurrent half is
      left in the loop. The two halves are added where snnTorch concatenates x and mem.
    - The sigmoids of i, f and o run as one operation over adjoining channels.
    - Pooling, quantisation of what is thresholded, and the spike run once, over all T.
    """

    name = "hoisted"
    title = "plain torch by hand: input convolution over all T at once"
    states = 18

    def sequence(self, x: Tensor, syn: Tensor, mem: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        case, cell = self.case, self.cell
        weight = cell.conv.weight
        w_x, w_mem = weight[:, : case.cin], weight[:, case.cin :].contiguous()
        padding = cell.padding
        steps, batch = x.shape[:2]
        hoisted = F.conv2d(x.flatten(0, 1), w_x, cell.conv.bias, padding=padding)
        mems = []
        for gates_x in hoisted.unflatten(0, (steps, batch)).unbind(0):
            gates = gates_x + F.conv2d(mem, w_mem, None, padding=padding)
            i, f, o = torch.sigmoid(gates[:, : 3 * case.cout]).chunk(3, dim=1)
            g = torch.tanh(gates[:, 3 * case.cout :])
            reset = self.reset(mem)
            syn = torch.addcmul(f * syn, i, g)
            mem = o * torch.tanh(syn)
            if case.reset == "subtract":
                mem = mem - reset * cell.threshold
            elif case.reset == "zero":
                mem = mem * (1 - reset)
            if cell.state_quant:
                syn, mem = cell.state_quant(syn), cell.state_quant(mem)
            mems.append(mem)
        pooled = self.pool(torch.stack(mems).flatten(0, 1))
        if cell.state_quant and case.avg_pool:  # elsewhere the values are levels already
            pooled = cell.state_quant(pooled)
        spikes = cell.spike_grad(pooled - cell.threshold)
        return spikes.unflatten(0, (steps, batch)), syn, mem

    def reset(self, mem: Tensor) -> Tensor | None:
        """Where the membrane potential that came in is over the threshold; a constant."""
        if self.case.reset == "none":
            return None
        return (mem.detach() > self.cell.threshold).to(mem.dtype)

    def pool(self, mem: Tensor) -> Tensor:
        """The case's pooling of (T * N, C, H, W)."""
        if self.case.max_pool:
            return F.max_pool2d(mem, self.case.max_pool)
        if self.case.avg_pool:
            return F.avg_pool2d(mem, self.case.avg_pool)
        return mem
