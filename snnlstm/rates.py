"""Counts how often the neurons of a network spike; a network that does not learn may be silent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch as functorch

from .sconv2dlstm import SConv2dLSTM
from .snntorch import Neuron
from .spec import a_module

__all__ = ["SpikeCount", "SpikeRates", "spike_rates"]


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
    chances : int
        Number of neurons, times samples, times steps.
    highest : Tensor or None
        The highest mem at the end of a call, a scalar; None without one.
    """

    layer: str
    threshold: float | None
    spikes: Tensor | int = 0
    chances: int = 0
    highest: Tensor | None = None

    def __call__(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        with torch.no_grad():
            while isinstance(output, tuple | list):
                output = output[0]
            output, mem = _bare(output), getattr(layer, "mem", None)
            self.spikes = _bare(self.spikes + output.count_nonzero())
            self.chances += output.numel()
            if isinstance(mem, Tensor) and mem.numel():
                highest = _bare(mem).detach().max()
                before = highest if self.highest is None else self.highest
                self.highest = _bare(torch.maximum(highest, before))

    @property
    def rate(self) -> float:
        """Spikes per neuron and step; NaN if the layer was not called."""
        return float(self.spikes) / self.chances if self.chances else float("nan")


def _bare(tensor: Tensor) -> Tensor:
    """The tensor within torch.func's wrappers; under vmap it holds all samples."""
    while not torch.compiler.is_compiling() and functorch.maybe_get_level(tensor) >= 0:
        tensor = functorch.get_unwrapped(tensor)
    return tensor


class SpikeRates(dict[str, SpikeCount]):
    """What :func:`snnlstm.spike_rates` counts, by name of the layer. Printed, it is a table."""

    def __init__(self, model: nn.Module, show: bool) -> None:
        super().__init__()
        self._model, self._show = model, show
        self._handles: list[Any] = []

    def __enter__(self) -> SpikeRates:
        if self._handles:
            raise RuntimeError(
                "these spikes are being counted: call spike_rates again for a block in a block"
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
        rows = [("layer", "", "rate", "spikes", "mem up to", "threshold", "")]
        for name, count in self.items():
            rate, note = f"{count.rate:.2%}", "" if count.spikes else "never spiked"
            if not count.chances:
                rate, note = "", "not called, or compiled before"
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

    The layers are our cells, snnTorch's cells and its other neurons. Counting changes neither what
    they compute nor the kernels that run. Code that torch.compile compiled before the block does
    not count: compile within the block, or call the network that is not compiled. ::

        with snnlstm.spike_rates(net):
            net(x)

    prints, at the end of the block::

        layer                rate  spikes  mem up to  threshold
        lstm1  SConv2dLSTM  5.31%    1203      0.192        0.1
        lstm2  SConv2dLSTM  0.00%       0     0.0871          1  never spiked

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
