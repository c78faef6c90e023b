"""How often the neurons of a network spike: :func:`snnlstm.spike_rates`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..calls.spec import a_module, pooling
from ..compat.snntorch import Neuron
from ..compat.torch_private import exporting, transforms_are_active
from ..neurons.attributes import CELL
from ..neurons.sconv2dlstm import SConv2dLSTM
from ..quant import StateQuant


@dataclass(eq=False)
class SpikeCount:
    """The spikes of one neuron layer, counted by this object as a forward hook of the layer.

    Parameters
    ----------
    layer : str
        Name of its class.
    threshold : float or None
        Its lowest threshold.
    spikes : Tensor
        Number of spikes, a scalar.
    chances : Tensor
        Number of neurons, times samples, times steps, a scalar.
    highest : Tensor or None
        The highest mem that calls have left or returned, pooled as the cell compares it with its
        threshold, a scalar; None without one.
    compared : Tensor or None
        The mem of the last call, as the cell compares it.
    """

    layer: str
    threshold: float | None
    spikes: Tensor | int = 0
    chances: Tensor | int = 0
    highest: Tensor | None = None
    compared: Tensor | None = None

    def __call__(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        if exporting() or transforms_are_active():  # such tensors hold no numbers of their own
            return
        mem = getattr(layer, "mem", None)
        while isinstance(output, tuple | list):  # a tuple ends with mem
            output, mem = output[0], output[-1]
        spikes = output.count_nonzero()
        self.spikes = self.spikes + spikes
        # Compiled code takes a number of Python's for a constant, and would be made anew.
        self.chances = self.chances + torch.full_like(spikes, output.numel())
        if isinstance(mem, Tensor) and mem.numel():
            self.compared = _compared(layer, mem.detach())
            highest = self.compared.max()
            before = highest if self.highest is None else self.highest
            self.highest = torch.maximum(highest, before)

    @property
    def rate(self) -> float:
        """Spikes per neuron and step; NaN if the layer was not called."""
        return int(self.spikes) / int(self.chances) if self.chances else float("nan")

    @property
    def exceeded(self) -> float | None:
        """A threshold, to two digits, that 5 % of the last call's mem exceed; None without one."""
        if self.compared is None:
            return None
        mem = self.compared.flatten().float()
        # Equal values do not exceed themselves, and the digits are rounded down.
        value = 0.999 * float(mem.kthvalue(max(1, int(0.95 * len(mem))))[0])
        if not 0 < value < math.inf:
            return None
        unit = 10.0 ** (math.floor(math.log10(value)) - 1)
        return math.floor(value / unit) * unit


def _compared(layer: Any, mem: Tensor) -> Tensor:
    """What a cell compares with its threshold: mem, pooled, and then quantised again."""
    if not isinstance(layer, CELL):
        return mem
    dims = getattr(layer, "_dims", 2)
    kind, size = pooling(layer.max_pool, layer.avg_pool, dims)
    if kind == "none":
        return mem
    images = (mem if dims == 2 else mem.unsqueeze(-2)).flatten(0, -3)
    if kind == "max":
        return F.max_pool2d(images, size)
    mem = F.avg_pool2d(images, size)
    return layer.state_quant(mem) if type(layer.state_quant) is StateQuant else mem


class SpikeRates(dict[str, SpikeCount]):
    """What :func:`snnlstm.spike_rates` counts, by name of the layer. Printed, it is a table."""

    def __init__(self, model: nn.Module, show: bool) -> None:
        super().__init__()
        self._model, self._show = model, show
        self._handles: list[Any] = []

    def __enter__(self) -> SpikeRates:
        if self._handles:
            raise RuntimeError(
                "these spikes are being counted: call spike_rates again for a nested block"
            )
        for name, layer in self._model.named_modules():
            if isinstance(layer, SConv2dLSTM if Neuron is None else (SConv2dLSTM, Neuron)):
                threshold = getattr(layer, "threshold", None)
                lowest = float(threshold.detach().min()) if isinstance(threshold, Tensor) else None
                self[name] = SpikeCount(type(layer).__name__, lowest)
                self._handles.append(layer.register_forward_hook(self[name]))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()
        if self._show and kind is None:
            print(self)

    def __str__(self) -> str:
        if not self:
            return "spike_rates: the model has no spiking neurons"
        rows = [("layer", "", "rate", "spikes", "mem up to", "threshold", "")]
        for name, count in self.items():
            rate, note = f"{count.rate:.2%}", ""
            if not count.spikes:
                fits = count.exceeded
                note = f"never spiked; 5 % of mem > {fits:.2g}" if fits else "never spiked"
            if not count.chances:
                rate, note = "", "not called, compiled before, or under torch.func"
            numbers = (count.highest, count.threshold)
            highest, threshold = ("" if n is None else f"{float(n):.3g}" for n in numbers)
            spikes = str(int(count.spikes))
            rows.append((name or ".", count.layer, rate, spikes, highest, threshold, note))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        line = "  ".join(f"{{:{side}{n}}}" for side, n in zip("<<>>>><", widths, strict=True))
        return "\n".join(line.format(*row).rstrip() for row in rows)

    __repr__ = __str__


def spike_rates(model: nn.Module, show: bool = True) -> SpikeRates:
    """Count the spikes of every neuron layer of a network within a ``with`` block.

    The layers are our cells, snnTorch's cells and its other neurons. Counting changes neither their
    results nor the kernels that run. Code that torch.compile compiled before the block is not
    counted: compile within the block, or call the uncompiled network. Calls within a
    transform of torch.func are not counted either. ::

        with snnlstm.spike_rates(net):
            net(x)

    prints, at the end of the block::

        layer                rate  spikes  mem up to  threshold
        lstm1  SConv2dLSTM  5.31%    1203      0.192        0.1
        lstm2  SConv2dLSTM  0.00%       0     0.0871          1  never spiked; 5 % of mem > 0.033

    Parameters
    ----------
    model : nn.Module
    show : bool, default True
        Print the table when the block ends.

    Returns
    -------
    SpikeRates
        A dictionary: ``rates["lstm1"].rate`` is the number of spikes per neuron and step.

    Raises
    ------
    TypeError
        If `model` is not an nn.Module.
    """
    return SpikeRates(a_module("model", model), show)
