"""How a layer goes through a sequence: all steps at once, as a larger batch, or one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .path import global_hooks
from .rates import SpikeCount
from .sconv2dlstm import SConv2dLSTM
from .snntorch import Base, Neuron

__all__ = ["CELL", "Frozen", "LayerReport", "changed", "may_write", "not_per_sample", "report_of"]

CELL = SConv2dLSTM if Base is nn.Module else Base  # the class of our cells and of snnTorch's


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
        One call with the whole sequence; few calls with many steps as a larger batch each,
        (T * N, ...); or one call for each step.
    reason : str
        Reason, in plain words.
    """

    name: str
    layer: str
    kind: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} {self.layer}: {self.kind} ({self.reason})"


def report_of(name: str, layer: nn.Module, dim: int) -> LayerReport:
    """How a layer goes through a sequence of which a step has `dim` dimensions."""
    reason = _reason_for_steps(layer, dim)
    if reason is not None:
        kind = "step"
    elif isinstance(layer, SConv2dLSTM):
        kind, reason = "sequence", "one call for all steps"
    else:
        kind, reason = "fold", "it treats every sample alone"
    return LayerReport(name, type(layer).__name__, kind, reason)


def _reason_for_steps(layer: nn.Module, dim: int) -> str | None:
    """Why a layer needs one call for each step; None if it does not."""
    change = changed(layer)
    if isinstance(layer, SConv2dLSTM):
        own = type(layer).forward is not SConv2dLSTM.forward
        return "its class has a forward of its own" if own else change
    if isinstance(layer, CELL):
        if type(layer) is not CELL:
            return "its class is a subclass of snntorch.SConv2dLSTM"
        return change or "it is snntorch's, and snnlstm.accelerate(net) makes it ours"
    if Neuron is not None and isinstance(layer, Neuron):
        return "it keeps a state from step to step"
    reason = change or not_per_sample(layer)
    if reason is None and not _has_batch(layer, dim):
        reason = f"at a step of {dim} dimensions it may mix samples"
    return reason


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


# The number of dimensions of one step, (N, C, ...); an input with one less is a single sample.
_BY_DIMENSION: dict[type[nn.Module], int] = {
    getattr(nn, f"{name}{d}d"): d + 2
    for d in (1, 2, 3)
    for name in (
        "Conv", "ConvTranspose", "MaxPool", "AvgPool", "AdaptiveMaxPool", "AdaptiveAvgPool",
        "LPPool", "ConstantPad", "ReflectionPad", "ReplicationPad", "ZeroPad", "InstanceNorm",
    )
    if hasattr(nn, f"{name}{d}d")
}  # fmt: skip
_BY_DIMENSION |= dict.fromkeys((nn.Softmax2d, nn.PixelShuffle, nn.PixelUnshuffle), 4)
# One step has at least two dimensions, (N, C).
_BATCHED: set[type[nn.Module]] = {
    nn.Linear, nn.Flatten, nn.Unflatten, nn.GroupNorm, nn.PReLU, nn.LayerNorm, nn.Upsample,
    nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, nn.LocalResponseNorm,
    nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.GLU,
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU,
    nn.Mish, nn.Sigmoid, nn.LogSigmoid, nn.Hardsigmoid, nn.Tanh, nn.Hardtanh, nn.Hardswish,
    nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Softplus, nn.Softsign, nn.Threshold,
}  # fmt: skip
_BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_DROPOUT = (
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip
_KNOWN = _BATCHED.union(_BY_DIMENSION, _BATCH_NORM, _DROPOUT)


def not_per_sample(layer: nn.Module) -> str | None:
    """Why the result for one sample may depend on other samples, or on the steps before."""
    kind = type(layer)
    if kind in _BATCH_NORM:
        own = layer.training or layer.running_mean is None
        return "its statistics are those of one step" if own else None
    if kind in _DROPOUT:
        return "it draws a new mask for every step" if layer.training and layer.p != 0 else None
    if getattr(layer, "return_indices", False):
        return "it returns indices"
    if layer.training and getattr(layer, "track_running_stats", False):  # an InstanceNorm
        return "its running statistics follow the steps"
    if kind in _BY_DIMENSION or kind in _BATCHED:
        return None
    return f"{kind.__name__} is not known to treat every sample alone"


def may_write(layer: nn.Module) -> bool:
    """Whether a call of the layer may write to its input."""
    kind = type(layer)
    known = kind in _KNOWN or kind.__module__.partition(".")[0] == "snntorch"
    return not known or getattr(layer, "inplace", False) or changed(layer) is not None


def _has_batch(layer: nn.Module, dim: int) -> bool:
    """Whether the first of `dim` dimensions is the batch, and the layer leaves it alone."""
    kind = type(layer)
    if kind in _BY_DIMENSION:
        return dim == _BY_DIMENSION[kind]
    if isinstance(layer, nn.LayerNorm):
        return dim > len(layer.normalized_shape)
    if dim < 2:
        return False
    first: Any = 1
    if isinstance(layer, nn.Flatten):
        first = layer.start_dim
    elif isinstance(layer, nn.Unflatten | nn.Softmax | nn.LogSoftmax | nn.Softmin | nn.GLU):
        first = layer.dim
    return isinstance(first, int) and first % dim != 0


class Frozen:
    """Calls a layer step by step, and leaves samples behind their last step as they are.

    The layer computes them, too, but its first result is 0 there. What it keeps of a sample, in
    tensors (N, ...) that are its attributes or buffers of no state_dict, and what it returns
    besides, stays what it was.
    """

    def __init__(self, layer: nn.Module, lengths: Tensor) -> None:
        self._layer, self._lengths, self._step = layer, lengths, 0
        self._returned: Any = None

    def __call__(self, x: Tensor) -> Any:
        own = self._lengths > self._step
        before = {id(owner): _kept(owner) for owner in self._layer.modules()}
        out = self._layer(x)
        for owner in self._layer.modules():
            for name, after in _kept(owner).items():
                if after.dim() > 1 and after.shape[0] == len(own):
                    setattr(owner, name, _chosen(own, after, before[id(owner)].get(name)))
        self._step, self._returned = self._step + 1, self._stay(out, self._returned, own, True)
        return self._returned

    def _stay(self, out: Any, before: Any, own: Tensor, first: bool) -> Any:
        if isinstance(out, Tensor):
            return _chosen(own, out, None if first else before)
        if not isinstance(out, tuple | list):
            return out
        olds = before if isinstance(before, tuple) else (None,) * len(out)
        pairs = enumerate(zip(out, olds, strict=True))
        return tuple(self._stay(new, old, own, first and k == 0) for k, (new, old) in pairs)


def _chosen(own: Tensor, new: Tensor, old: Tensor | None) -> Tensor:
    """Samples of `new` where they are at a step of their own, else of `old`, or 0."""
    if old is None or old.shape != new.shape:
        old = torch.zeros_like(new)
    return torch.where(own.reshape(-1, *(1,) * (new.dim() - 1)), new, old)


def _kept(owner: nn.Module) -> dict[str, Tensor]:
    """The tensors in which a module may keep something from step to step."""
    if isinstance(owner, SConv2dLSTM):
        return {"syn": owner._state.syn, "mem": owner._state.mem}
    own = {k: v for k, v in owner.__dict__.items() if isinstance(v, Tensor)}
    temporary = owner._non_persistent_buffers_set
    buffers = {k: v for k, v in owner._buffers.items() if k in temporary and v is not None}
    return own | buffers
