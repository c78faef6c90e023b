"""Layers of a network: how each goes through a sequence, and how often it spikes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .leaky import Leaky
from .quant import StateQuant
from .sconv2dlstm import SConv2dLSTM
from .snntorch import SEQUENCE_NEURONS, Base, Neuron, TheirLeaky
from .spec import a_module, pooling
from .torch_private import NO_LEVEL, global_hooks, level_of, unwrapped

__all__ = [
    "CELL", "PER_SAMPLE", "TAKES", "LayerReport", "SpikeCount", "SpikeRates", "changed",
    "not_per_sample", "report_of", "spike_rates", "unshared",
]  # fmt: skip

# ---- through a sequence -------------------------------------------------------------------------

CELL = SConv2dLSTM if Base is nn.Module else Base  # the class of our cells and of snnTorch's

LARGEST = 128 << 10
"""The most bytes of a layer's input or output at one step with which the CPU folds the steps.

Larger steps run one by one, as in the loop: each of them goes through several layers while it is in
the cache, and all steps at once would be slower than the loop (benchmarks/NOTES.md).
"""

LARGEST_STACKED = 1 << 20
"""The most bytes of a step that the CPU stacks for the cell or Leaky behind it.

A stack of larger steps, whose memory is fresh, takes longer than one call for all steps saves.
"""

ALONE = "it treats every sample by itself"
LARGE = "one step of its input or output is larger than 128 KiB"
LARGE_STATE = "it keeps a state, and one step of it is larger than 128 KiB"
TO_STACK = "the layers before it run step by step, and one of their steps is larger than 1 MiB"
ONE_CALL = "one call for all steps"
TAKES = "it takes sequences"
PER_SAMPLE = ALONE, LARGE  # the reasons of layers that neither mix samples nor keep a state


@dataclass(frozen=True)
class LayerReport:
    """How one layer ran over a sequence.

    Parameters
    ----------
    name : str
        Name of the layer, as ``named_modules()`` gives it.
    layer : str
        Name of its class.
    kind : {"sequence", "fold", "step"}
        One call with the whole sequence; one call with all steps as a larger batch, (T * N, ...);
        or one call for each step.
    reason : str
        Reason, in plain words.
    """

    name: str
    layer: str
    kind: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} {self.layer}: {self.kind} ({self.reason})"


# The layers that treat every sample by itself, and the least number of dimensions, (N, C, ...), of
# a step whose first one is the batch.
_LEAST_DIM: dict[type[nn.Module], int] = {
    nn.Conv1d: 3, nn.MaxPool1d: 3, nn.AvgPool1d: 3,
    nn.Conv2d: 4, nn.MaxPool2d: 4, nn.AvgPool2d: 4, nn.AdaptiveAvgPool2d: 4,
    nn.Linear: 2, nn.Flatten: 2, nn.Identity: 2, nn.GroupNorm: 2,
    nn.ReLU: 2, nn.LeakyReLU: 2, nn.Sigmoid: 2, nn.Tanh: 2,
    nn.BatchNorm1d: 2, nn.BatchNorm2d: 4, nn.Dropout: 2, nn.Dropout2d: 4,
}  # fmt: skip


def report_of(name: str, layer: nn.Module, x: Tensor, dim: int, size: int) -> LayerReport:
    """How a layer goes through a sequence, of which x is a part.

    A step of it has `dim` dimensions and `size` bytes, or 0 where the size does not count.
    """
    kind, reason = "step", changed(layer)
    if isinstance(layer, SConv2dLSTM):
        if type(layer).forward is not SConv2dLSTM.forward:
            reason = "its class has a forward of its own"
        elif reason is None:
            kind, reason = "sequence", ONE_CALL
    elif isinstance(layer, CELL):
        if type(layer) is not CELL:
            reason = "its class is a subclass of snntorch.SConv2dLSTM"
        reason = reason or "it is snntorch's, and snnlstm.accelerate(net) makes it ours"
    elif type(layer) in SEQUENCE_NEURONS:
        kind, reason = "sequence", TAKES
    elif type(layer) in (Leaky, TheirLeaky):
        if type(layer) is not Leaky:
            reason = reason or "it is snntorch's, and snnlstm.accelerate(net) makes it ours"
        elif reason is None and (torch.compiler.is_compiling() or not layer.takes(x)):
            reason = "snntorch's own forward runs, and its path says why"
        elif reason is None and size > LARGEST:
            reason = LARGE_STATE
        if reason is None:
            kind, reason = "sequence", ONE_CALL
    elif Neuron is not None and isinstance(layer, Neuron):
        reason = "it keeps a state from step to step"
    else:
        reason = reason or not_per_sample(layer)
        if reason is None and not _has_batch(layer, dim):
            reason = f"at a step of {dim} dimensions it may mix samples"
        if reason is None and size * _widening(layer) > LARGEST:
            reason = LARGE
        if reason is None:
            kind, reason = "fold", ALONE
    return LayerReport(name, type(layer).__name__, kind, reason)


def changed(layer: nn.Module) -> str | None:
    """What makes a call of the layer more than its class's forward; None if nothing does."""
    others = layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    counts = all(isinstance(hook, SpikeCount) for hook in layer._forward_hooks.values())
    if any(others) or not counts:
        return "it carries hooks"
    if global_hooks():
        return "global module hooks are registered"
    if "forward" in layer.__dict__:
        return "its forward was replaced"
    return None


def not_per_sample(layer: nn.Module) -> str | None:
    """Why the result for one sample may depend on other samples, or on the steps before."""
    if type(layer) not in _LEAST_DIM:
        return f"{type(layer).__name__} is not known to treat every sample by itself"
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        own = layer.training or layer.running_mean is None
        return "its statistics are those of one step" if own else None
    if isinstance(layer, nn.Dropout | nn.Dropout2d):
        return "it draws a new mask for every step" if layer.training and layer.p != 0 else None
    return "it returns indices" if getattr(layer, "return_indices", False) else None


def _has_batch(layer: nn.Module, dim: int) -> bool:
    """Whether the first of `dim` dimensions is the batch, which the layer keeps."""
    start = layer.start_dim if isinstance(layer, nn.Flatten) else 1
    return dim >= _LEAST_DIM[type(layer)] and start % dim != 0


def _widening(layer: Any) -> float:
    """The size of the layer's output over that of its input, at least 1."""
    if isinstance(layer, nn.Linear):
        return max(1, layer.out_features / max(1, layer.in_features))
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        return max(1, layer.out_channels / max(1, layer.in_channels))
    return 1


def unshared(x: Tensor, layer: nn.Module) -> Tensor:
    """A copy of a view of a tensor, if the layer may write to it; else x.

    Autograd refuses to let a layer change one of several views in place; without it no copy is
    made, as in the loop.
    """
    if not torch.is_grad_enabled() or not (torch.compiler.is_compiling() or x._is_view()):
        return x
    known = type(layer) in _LEAST_DIM or type(layer).__module__.startswith("snntorch.")
    safe = known and not getattr(layer, "inplace", False) and changed(layer) is None
    return x if safe else x.clone()


# ---- spikes -------------------------------------------------------------------------------------


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
        The highest mem that calls have left or returned, pooled as the cell compares it with its
        threshold, a scalar; None without one.
    compared : Tensor or None
        The mem of the last call, as the cell compares it.
    """

    layer: str
    threshold: float | None
    spikes: Tensor | int = 0
    chances: int = 0
    highest: Tensor | None = None
    compared: Tensor | None = None

    def __call__(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        with torch.no_grad():
            mem = getattr(layer, "mem", None)
            while isinstance(output, tuple | list):  # mem comes last, perhaps of every step
                output, mem = output[0], output[-1]
            output = _bare(output)
            self.spikes = _bare(self.spikes + output.count_nonzero())
            self.chances += output.numel()
            if isinstance(mem, Tensor) and mem.numel():
                self.compared = _compared(layer, _bare(mem).detach())
                highest = self.compared.max()
                before = highest if self.highest is None else self.highest
                self.highest = _bare(torch.maximum(highest, before))

    @property
    def rate(self) -> float:
        """Spikes per neuron and step; NaN if the layer was not called."""
        return float(self.spikes) / self.chances if self.chances else float("nan")

    @property
    def exceeded(self) -> float | None:
        """A threshold, in two digits, that 5 % of the last call's mem exceed; None without one."""
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


def _bare(tensor: Tensor) -> Tensor:
    """The tensor within torch.func's wrappers; under vmap it holds all samples."""
    while not torch.compiler.is_compiling() and level_of(tensor) != NO_LEVEL:
        tensor = unwrapped(tensor)
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
        if not self:
            return "spike_rates: the model has no spiking neurons"
        rows = [("layer", "", "rate", "spikes", "mem up to", "threshold", "")]
        for name, count in self.items():
            rate, note = f"{count.rate:.2%}", ""
            if not count.spikes:
                fits = count.exceeded
                note = f"never spiked; 5 % of mem > {fits:.2g}" if fits else "never spiked"
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

    The layers are our cells, snnTorch's cells and its other neurons. Counting changes neither their
    results nor the kernels that run. Code that torch.compile compiled before the block is not
    counted: compile within the block, or call the network that is not compiled. ::

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
