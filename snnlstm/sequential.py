"""A stack of layers over whole sequences, layer by layer instead of step by step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from .sconv2dlstm import SConv2dLSTM
from .snntorch import Base, Neuron

__all__ = ["Sequential", "Way"]

logger = logging.getLogger("snnlstm")

_CELL = SConv2dLSTM if Base is nn.Module else Base  # ours, and snnTorch's


@dataclass(frozen=True)
class Way:
    """How one layer went through a sequence.

    Parameters
    ----------
    name : str
        Of the layer, as ``named_modules()`` gives it.
    layer : str
        Its class.
    kind : {"sequence", "fold", "step"}
        One call with the whole sequence; one call with the steps as a larger batch,
        (T * N, ...); or one call for each step.
    reason : str
        Why, in plain words.
    """

    name: str
    layer: str
    kind: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} {self.layer}: {self.kind} ({self.reason})"


class Sequential(nn.Sequential):
    """Time-distributed ``nn.Sequential``: takes and returns sequences, (T, N, ...).

    Equal to a loop over the steps that calls the layers one after the other, gradients and the
    states at the end included, but runs layer by layer. Each layer goes one of three ways,
    which :attr:`plan` shows after the call:

    - *sequence*: :class:`SConv2dLSTM`, one call for all steps;
    - *fold*: layers of torch that treat every sample alone (convolutions, linear layers,
      activations, pooling, eval-mode batch norm, ...), one call with T * N samples;
    - *step*: everything else, one call for each step: snnTorch's other neurons, batch norm in
      training (its statistics are those of one step), dropout in training (a new mask for every
      step), whatever carries hooks, and modules that are not known here.

    Stacks within the stack are gone into. Of a layer that returns a tuple, such as
    ``spk, syn, mem``, the next layer gets the first item. The last layer's tuple is
    returned, every item stacked over time.

    ``snnlstm.Sequential(*net)`` makes one from the layers of an ``nn.Sequential``; :meth:`of` keeps
    their names as well, where they have any. States start from the stored ones, as in step
    calls: reset them before every new sequence, for example with
    ``snntorch.utils.reset(net)`` or :meth:`SConv2dLSTM.reset_hidden`.

    Layers that share a state, such as one cell in two places, cannot be run one after the
    other: the steps are then taken one by one, and the log says so. With more than one random
    layer (dropout) the same random numbers are drawn in another order than in the loop.

    Attributes
    ----------
    plan : tuple of Way, or None
        How each layer went in the last call; None before it, and under torch.compile.

    Examples
    --------
    >>> net = snnlstm.Sequential(
    ...     snnlstm.SConv2dLSTM(2, 8, 3, threshold=0.1, max_pool=2, init_hidden=True),
    ...     nn.Flatten(),
    ...     nn.Linear(8 * 16 * 16, 10),
    ... )
    >>> net(torch.rand(20, 4, 2, 32, 32)).shape  # (T, N, C, H, W) -> (T, N, 10)
    torch.Size([20, 4, 10])
    """

    plan: tuple[Way, ...] | None = None

    @classmethod
    def of(cls, net: nn.Sequential) -> Sequential:
        """Make one with the layers, names and mode of `net`, so with the same state_dict.

        Hooks on `net` itself are not taken over.

        Raises
        ------
        TypeError
            If `net` is not an nn.Sequential.
        """
        if not isinstance(net, nn.Sequential):
            raise TypeError(f"net must be an nn.Sequential, got {type(net).__name__}")
        new = cls()
        for name, layer in net._modules.items():
            new.add_module(name, layer)
        new.training = net.training
        return new

    def forward(self, x: Tensor) -> Any:
        """Run all layers over a sequence.

        Parameters
        ----------
        x : Tensor
            (T, N, ...), T at least 1: what ``x[t]`` is to the first layer is one step's batch.

        Returns
        -------
        Tensor or tuple of Tensor
            (T, N, ...): what the last layer returned at every step, stacked.

        Raises
        ------
        TypeError
            If x is not a tensor, or a layer returns anything but tensors.
        ValueError
            If x has no step, or is not a sequence for a cell.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        if x.dim() < 2 or x.shape[0] == 0:
            raise ValueError(
                f"x must have shape (T, N, ...) with at least one step, got {tuple(x.shape)}"
            )
        layers = list(_layers(self, ""))
        shared = _shared_state(self)
        plan: list[Way] = []
        if shared is None:
            out = _run(layers, x, plan)
        else:  # within one step the order is the loop's
            out = _join("", [_run(layers, step, plan) for step in x.split(1)], torch.cat)
            reason = f"layer {shared} is in several places and may keep a state"
            plan = [Way(way.name, way.layer, "step", reason) for way in plan[: len(layers)]]
        if not torch.compiler.is_compiling():
            self._remember(tuple(plan), shared)
        return out

    def _remember(self, plan: tuple[Way, ...], shared: str | None) -> None:
        """Keep the plan, and log what is slower than one could expect."""
        cells = {name for name, layer in _layers(self, "") if isinstance(layer, _CELL)}
        before = set(self.plan or ())
        for way in plan:
            if way.kind == "step" and way.name in cells and way not in before:
                message = "Sequential runs layer %s (%s) step by step: %s"
                logger.warning(message, way.name, way.layer, way.reason)
        self.plan = plan


def _layers(stack: nn.Sequential, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Names and layers in order, those of plain nn.Sequentials in their places."""
    for name, layer in stack._modules.items():
        assert layer is not None
        if isinstance(layer, nn.Sequential) and _is_stack(layer) and _changed(layer) is None:
            yield from _layers(layer, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", layer


def _is_stack(layer: nn.Module) -> bool:
    """Whether a call of the layer is no more than one call of each of its layers, in order."""
    return type(layer).forward in (nn.Sequential.forward, Sequential.forward)


def _run(layers: list[tuple[str, nn.Module]], x: Tensor, plan: list[Way]) -> Any:
    """Run the layers over (T, N, ...), and say how in `plan`."""
    out: Any = x
    for position, (name, layer) in enumerate(layers):
        last = position == len(layers) - 1
        kind, reason = _choose(layer, x.dim() - 1)
        plan.append(Way(name, type(layer).__name__, kind, reason))
        if kind == "sequence":
            out = _sequence(name, layer, x, last)
        elif kind == "fold":
            out = layer(x.flatten(0, 1))
            out = out.reshape(*x.shape[:2], *out.shape[1:])
        else:
            out = _join(name, [layer(step) for step in x.unbind(0)], torch.stack)
        if not last:
            x = out
            while isinstance(x, tuple | list):
                x = x[0]
    return out


def _sequence(name: str, layer: nn.Module, x: Tensor, last: bool) -> Any:
    if not isinstance(layer, SConv2dLSTM):  # a Sequential with hooks
        return layer(x)
    if x.dim() != 5:
        raise ValueError(
            f"x must be a sequence for layer {name} ({type(layer).__name__}), "
            f"(T, N, {layer.in_channels}, H, W), got {tuple(x.shape)}"
        )
    # The states of every step are wanted where they are returned.
    return layer(x, record=last and (layer.output or not layer.init_hidden))


def _join(name: str, results: list[Any], join: Callable[[list[Tensor]], Tensor]) -> Any:
    """Join what the steps of a layer returned, item by item where that is a tuple."""
    if all(isinstance(result, Tensor) for result in results):
        return join(results)
    if all(isinstance(result, tuple | list) for result in results):
        return tuple(_join(name, list(items), join) for items in zip(*results, strict=True))
    raise TypeError(
        f"layer {name} must return tensors, or tuples of them, at every step, "
        f"got {type(results[0]).__name__}"
    )


# ---- which way ----------------------------------------------------------------------------


def _choose(layer: nn.Module, dim: int) -> tuple[str, str]:
    """Kind and reason for a layer that gets `dim` dimensions at each step."""
    changed = _changed(layer)
    if isinstance(layer, Sequential):
        return "sequence", "it takes sequences"
    if isinstance(layer, SConv2dLSTM):
        if type(layer).forward is not SConv2dLSTM.forward:
            changed = "its class has a forward of its own"
        if changed is None:
            return "sequence", "one call for all steps"
        return "step", changed
    if isinstance(layer, _CELL):
        return "step", "it is snntorch's, and snnlstm.accelerate(net) makes it ours"
    if Neuron is not None and isinstance(layer, Neuron):
        return "step", "it keeps a state from step to step"
    reason = changed or _not_per_sample(layer)
    if reason is None and not _has_batch(layer, dim):
        reason = f"at a step of {dim} dimensions it may mix samples"
    if reason is not None:
        return "step", reason
    return "fold", "it treats every sample alone"


def _changed(layer: nn.Module) -> str | None:
    """What makes a call of the layer more than its class's forward; None if nothing does."""
    if (
        layer._forward_pre_hooks
        or layer._forward_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
    ):
        return "it carries hooks"
    if nn_module._has_any_global_hook():
        return "global module hooks are registered"
    if "forward" in layer.__dict__:
        return "its forward was replaced"
    return None


# Dimensions that one step must have, (N, C, ...); with one less it would be a single sample.
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
# (N, C) at least.
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


def _not_per_sample(layer: nn.Module) -> str | None:
    """Why the result for one sample may depend on other samples, or on the steps before."""
    kind = type(layer)
    if kind in _BATCH_NORM:
        if layer.training or layer.running_mean is None:
            return "its statistics are those of one step"
        return None
    if kind in _DROPOUT:
        if layer.training and layer.p != 0:
            return "it draws a new mask for every step"
        return None
    if getattr(layer, "return_indices", False):
        return "it returns indices"
    if layer.training and getattr(layer, "track_running_stats", False):  # of an InstanceNorm
        return "its running statistics follow the steps"
    if kind in _BY_DIMENSION or kind in _BATCHED:
        return None
    return f"{kind.__name__} is not known to treat every sample alone"


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


def _shared_state(stack: nn.Module) -> str | None:
    """Name of a layer that occurs twice and may keep a state; None without any."""
    seen: set[int] = set()
    for name, module in stack.named_modules(remove_duplicate=False):
        again = id(module) in seen
        seen.add(id(module))
        if again and not _is_stack(module) and (_changed(module) or _not_per_sample(module)):
            return name
    return None
