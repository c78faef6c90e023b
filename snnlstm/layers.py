"""How a layer goes through a sequence: all steps at once, as a larger batch, or one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .path import global_hooks
from .rates import SpikeCount
from .sconv2dlstm import SConv2dLSTM
from .snntorch import SEQUENCE_NEURONS, Base, Neuron

__all__ = [
    "CELL", "PER_SAMPLE", "Frozen", "LayerReport", "changed", "may_write", "not_per_sample",
    "report_of",
]  # fmt: skip

CELL = SConv2dLSTM if Base is nn.Module else Base  # the class of our cells and of snnTorch's

LARGEST = 128 << 10
"""Bytes of a layer's input or output at one step, up to which the CPU gets all steps as one batch.

Larger steps run one by one, as in the loop: each of them goes through several layers while it is in
the cache, and all steps at once would be slower than the loop (benchmarks/NOTES.md).
"""

ALONE = "it treats every sample alone"
LARGE = "one step of its input or output is larger than 128 KiB"
PER_SAMPLE = ALONE, LARGE  # the reasons of layers that neither mix samples nor keep a state


@dataclass(frozen=True)
class LayerReport:
    """How one layer went through a sequence.

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


# The layers that treat every sample alone, and the number of dimensions, (N, C, ...), from which on
# the first one of a step is its batch.
_LEAST_DIM: dict[type[nn.Module], int] = {
    nn.Conv1d: 3, nn.MaxPool1d: 3, nn.AvgPool1d: 3,
    nn.Conv2d: 4, nn.MaxPool2d: 4, nn.AvgPool2d: 4, nn.AdaptiveAvgPool2d: 4,
    nn.Linear: 2, nn.Flatten: 2, nn.Identity: 2, nn.GroupNorm: 2,
    nn.ReLU: 2, nn.LeakyReLU: 2, nn.Sigmoid: 2, nn.Tanh: 2,
    nn.BatchNorm1d: 2, nn.BatchNorm2d: 4, nn.Dropout: 2, nn.Dropout2d: 4,
}  # fmt: skip


def report_of(name: str, layer: nn.Module, dim: int, size: int) -> LayerReport:
    """How a layer goes through a sequence.

    A step of it has `dim` dimensions and `size` bytes, or 0 where the size does not count.
    """
    kind, reason = "step", changed(layer)
    if isinstance(layer, SConv2dLSTM):
        if type(layer).forward is not SConv2dLSTM.forward:
            reason = "its class has a forward of its own"
        elif reason is None:
            kind, reason = "sequence", "one call for all steps"
    elif isinstance(layer, CELL):
        if type(layer) is not CELL:
            reason = "its class is a subclass of snntorch.SConv2dLSTM"
        reason = reason or "it is snntorch's, and snnlstm.accelerate(net) makes it ours"
    elif type(layer) in SEQUENCE_NEURONS:
        kind, reason = "sequence", "it takes sequences"
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
        return f"{type(layer).__name__} is not known to treat every sample alone"
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        own = layer.training or layer.running_mean is None
        return "its statistics are those of one step" if own else None
    if isinstance(layer, nn.Dropout | nn.Dropout2d):
        return "it draws a new mask for every step" if layer.training and layer.p != 0 else None
    return "it returns indices" if getattr(layer, "return_indices", False) else None


def _has_batch(layer: nn.Module, dim: int) -> bool:
    """Whether the first of `dim` dimensions is the batch, and the layer leaves it alone."""
    start = layer.start_dim if isinstance(layer, nn.Flatten) else 1
    return dim >= _LEAST_DIM[type(layer)] and start % dim != 0


def _widening(layer: Any) -> float:
    """How many times the size of its input the layer's output has, where that is more than 1."""
    if isinstance(layer, nn.Linear):
        return max(1, layer.out_features / max(1, layer.in_features))
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        return max(1, layer.out_channels / max(1, layer.in_channels))
    return 1


def may_write(layer: nn.Module) -> bool:
    """Whether a call of the layer may write to its input."""
    kind = type(layer)
    known = kind in _LEAST_DIM or kind.__module__.partition(".")[0] == "snntorch"
    return not known or getattr(layer, "inplace", False) or changed(layer) is not None


class Frozen:
    """Calls a layer step by step, and leaves samples behind their last step as they are.

    `call` is what calls the layer.

    The layer computes them, too, but its first result is 0 there. What it keeps of a sample, in
    tensors (N, ...) that are its attributes or buffers of no state_dict, and what it returns
    besides, stays what it was.
    """

    def __init__(self, layer: nn.Module, call: Callable[[Tensor], Any], lengths: Tensor) -> None:
        self._layer, self._call, self._lengths, self._step = layer, call, lengths, 0
        self._returned: Any = None

    def __call__(self, x: Tensor) -> Any:
        active = self._lengths > self._step
        before = {id(owner): _kept(owner) for owner in self._layer.modules()}
        out = self._call(x)
        for owner in self._layer.modules():
            for name, after in _kept(owner).items():
                if after.dim() > 1 and after.shape[0] == len(active):
                    setattr(owner, name, _chosen(active, after, before[id(owner)].get(name)))
        self._step, self._returned = self._step + 1, _stay(active, out, self._returned, True)
        return self._returned


def _stay(active: Tensor, out: Any, before: Any, first: bool) -> Any:
    """What a layer returns, with what it returned before for samples behind their last step."""
    if isinstance(out, Tensor):
        return _chosen(active, out, None if first else before)
    if not isinstance(out, tuple | list):
        return out
    olds = before if isinstance(before, tuple) else (None,) * len(out)
    pairs = zip(out, olds, strict=True)
    return tuple(_stay(active, *pair, first and k == 0) for k, pair in enumerate(pairs))


def _chosen(active: Tensor, new: Tensor, old: Tensor | None) -> Tensor:
    """Samples of `new` where they are at a step of their own, else of `old`, or 0."""
    if old is None or old.shape != new.shape:
        old = torch.zeros_like(new)
    return torch.where(active.reshape(-1, *(1,) * (new.dim() - 1)), new, old)


def _kept(owner: nn.Module) -> dict[str, Tensor]:
    """The tensors in which a module may keep something from step to step."""
    if isinstance(owner, SConv2dLSTM):
        return {"syn": owner._state.syn, "mem": owner._state.mem}
    temporary = owner._non_persistent_buffers_set
    tensors = owner.__dict__ | {k: v for k, v in owner._buffers.items() if k in temporary}
    return {k: v for k, v in tensors.items() if isinstance(v, Tensor)}
