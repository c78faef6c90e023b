"""torch's nn.Linear, nn.Conv2d and 2d pools with a forward that runs the CPU kernels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dispatch.path import Path
from ..dispatch.reasons import Reason

try:
    from ..native import conv2d, linear
    from ..native import pool2d as kernels
except ImportError:  # there is no core
    _lacks = "the core is not built"
    kernels, linear, conv2d = (
        F,
        SimpleNamespace(run=lambda *args: (F.linear(*args), _lacks)),  # type: ignore[assignment]
        SimpleNamespace(run=lambda *args, **_: (F.conv2d(*args), _lacks)),  # type: ignore[assignment]
    )

# Whatever records a call gets torch's function: a compiler may fuse it, and an export has it.
# torch.jit.script compiles the methods below, but not what their first condition excludes.


class MaxPool2d(nn.MaxPool2d):
    """``torch.nn.MaxPool2d``, faster on the CPU.

    A subclass with the same constructor, attributes, results and gradients, by bits.
    :func:`snnlstm.accelerate` gives torch's modules this class. The kernels take images
    (N, C, H, W) of float32 and float64, contiguous or channels-last; torch's function takes all
    other calls, such as those on other devices, with ``dilation`` or with ``return_indices``.
    """

    def forward(self, input: Tensor):
        """Pool images, as ``torch.nn.MaxPool2d`` does."""
        if not torch.jit.is_scripting() and not torch.compiler.is_compiling():
            return kernels.max_pool2d(
                input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode,
                self.return_indices,
            )  # fmt: skip
        return F.max_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.dilation,
            ceil_mode=self.ceil_mode, return_indices=self.return_indices,
        )  # fmt: skip


class AvgPool2d(nn.AvgPool2d):
    """``torch.nn.AvgPool2d``, faster on the CPU; see :class:`MaxPool2d`."""

    def forward(self, input: Tensor):
        """Pool images, as ``torch.nn.AvgPool2d`` does."""
        if not torch.jit.is_scripting() and not torch.compiler.is_compiling():
            return kernels.avg_pool2d(
                input, self.kernel_size, self.stride, self.padding, self.ceil_mode,
                self.count_include_pad, self.divisor_override,
            )  # fmt: skip
        return F.avg_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.ceil_mode,
            self.count_include_pad, self.divisor_override,
        )  # fmt: skip


class _Product(nn.Module):
    """What layers that multiply spikes by a weight share: they tell what ran their last call."""

    __jit_unused_properties__ = ("path",)
    _name: ClassVar[str]

    @property
    def path(self) -> Path | None:
        """What ran the last call, the kernels or torch's function, and why; None before it."""
        ran = self.__dict__.get("_ran")
        if ran is None:
            return None
        if isinstance(ran, str):
            return Path("torch", ran)
        algorithm = getattr(ran, "algorithm", "lists of nonzeros")
        return Path(f"{self._name} by {algorithm}", f"{ran} % of x is not zero")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_ran"}


def _noted(layer: nn.Module, result: tuple[Tensor, Any]) -> Tensor:
    """Return the result of a call, and note in our own layers what ran it."""
    out, ran = result
    if isinstance(layer, _Product):  # a stack calls our forward with torch's layers, too
        layer.__dict__["_ran"] = ran
    return out


def _weight_and_bias(layer: Any) -> tuple[Any, Any]:
    """The layer's parameters: nn.Module's __getattr__ takes longer than what a call decides."""
    own = layer._parameters
    if "weight" in own and "bias" in own:
        return own["weight"], own["bias"]
    return layer.weight, layer.bias


def _padded_otherwise(layer: nn.Conv2d) -> str:
    return f"padding_mode is {layer.padding_mode!r}, and the kernels pad with zeros"


class Linear(_Product, nn.Linear):
    """``torch.nn.Linear``, faster on the CPU where most of its input is zero, as behind neurons.

    A subclass with the same constructor, attributes and state_dict; results and gradients are equal
    to rounding. :func:`snnlstm.accelerate` gives torch's modules this class. The kernels sum over
    the nonzeros of an x of float32, if each call's x has enough zeros and the layer is large enough
    to gain; torch's function takes all other calls.
    """

    _name = "linear"

    def forward(self, input: Tensor):
        """Multiply by the weight, as ``torch.nn.Linear`` does."""
        if not torch.jit.is_scripting() and not torch.compiler.is_compiling():
            return _noted(self, linear.run(input, *_weight_and_bias(self)))
        return F.linear(input, self.weight, self.bias)


class Conv2d(_Product, nn.Conv2d):
    """``torch.nn.Conv2d``, faster on the CPU where most of its input is zero, and in training.

    The kernels sum over the nonzeros of x, if it has enough zeros, and compute the gradients of
    layers with stride 1 by Winograd. They take odd kernels and one group; else as :class:`Linear`.
    """

    _name = "conv2d"

    def forward(self, input: Tensor):
        """Convolve images, as ``torch.nn.Conv2d`` does."""
        if not torch.jit.is_scripting() and not torch.compiler.is_compiling():
            if self.padding_mode != "zeros":
                out = self._conv_forward(input, self.weight, self.bias)
                return _noted(self, (out, _padded_otherwise(self)))
            return Conv2d.convolved(self, input)  # a stack calls this with torch's layers, too
        return self._conv_forward(input, self.weight, self.bias)

    def convolved(self, input: Tensor, for_neurons: bool = False) -> Tensor:
        """Convolve images, by tiles too if neurons alone read the result."""
        geometry = self.stride, self.padding, self.dilation, self.groups
        return _noted(self, conv2d.run(input, *_weight_and_bias(self), *geometry, for_neurons))


OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: Linear,
    nn.Conv2d: Conv2d,
    nn.MaxPool2d: MaxPool2d,
    nn.AvgPool2d: AvgPool2d,
}
"""Our class for each of torch's."""
_THEIRS = {ours: theirs for theirs, ours in OURS.items()}
PRODUCTS = nn.Linear, nn.Conv2d
"""Those whose results are torch's to rounding, not by bits."""
_METHODS = "forward", "_conv_forward"
_RELEASED = {kind: [getattr(kind, name, None) for name in _METHODS] for kind in OURS}


def reason_against(layer: Any, kind: type[nn.Module]) -> str | None:
    """Why a layer of torch's class `kind`, or of a subclass, may compute something else."""
    if type(layer) not in (kind, OURS[kind]):
        name = type(layer).__name__
        return f"{name} is a subclass of nn.{kind.__name__} and may compute something else"
    methods = [getattr(kind, name, None) for name in _METHODS]
    if not layer.__dict__.keys().isdisjoint(_METHODS) or methods != _RELEASED[kind]:
        return Reason.REPLACED
    if kind in PRODUCTS and "weight" not in layer._parameters:
        return "its weight is no parameter of its own"
    if kind is nn.Conv2d and layer.padding_mode != "zeros":
        return _padded_otherwise(layer)
    return None


def ours_for(layer: nn.Module) -> Any:
    """Our class whose forward may stand in for the call of a layer without hooks, or None."""
    kind = _THEIRS.get(type(layer), type(layer))
    return OURS[kind] if kind in OURS and reason_against(layer, kind) is None else None
