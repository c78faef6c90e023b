"""How each layer of a network goes through a sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..compat.snntorch import SEQUENCE_NEURONS, Neuron, TheirLeaky
from ..dispatch.path import HOOKS, REPLACED, beyond_forward
from ..neurons.leaky import Leaky
from ..neurons.sconv2dlstm import SConv2dLSTM
from .spikes import CELL, SpikeCount

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
    """How a layer goes through a sequence: x, or a step of it where x has `dim` dimensions.

    A step has `dim` dimensions and `size` bytes, or 0 where the size does not count.
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
        elif reason is None and (
            torch.compiler.is_compiling() or not layer.takes(x, x.dim() > dim)
        ):
            reason = "plain torch runs it, and its path says why"
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
    reason = beyond_forward(layer, harmless=SpikeCount)
    return {HOOKS: f"it {HOOKS}", REPLACED: f"its {REPLACED}"}.get(str(reason), reason)


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
    listed = type(layer) in _LEAST_DIM or type(layer).__module__.startswith("snntorch.")
    safe = listed and not getattr(layer, "inplace", False) and changed(layer) is None
    return x if safe else x.clone()
