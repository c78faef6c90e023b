"""torch's nn.Linear, nn.MaxPool2d and nn.AvgPool2d with a forward that runs the CPU kernels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dispatch.path import Path
from ..dispatch.reasons import Reason

try:
    from ..native import linear as products
    from ..native import pool2d as kernels
except ImportError:  # there is no core
    kernels, products = (
        F,
        SimpleNamespace(  # type: ignore[assignment]
            run=lambda *args: (F.linear(*args), "the core is not built")
        ),
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


class Linear(nn.Linear):
    """``torch.nn.Linear``, faster on the CPU where most of its input is zero, as behind neurons.

    A subclass with the same constructor, attributes and state_dict; results and gradients are equal
    to rounding. :func:`snnlstm.accelerate` gives torch's modules this class. The kernels sum over
    the nonzeros of an x of float32, if each call's x has enough zeros and the layer is large enough
    to gain; torch's function takes all other calls.
    """

    __jit_unused_properties__ = ("path",)

    def forward(self, input: Tensor):
        """Multiply by the weight, as ``torch.nn.Linear`` does."""
        if not torch.jit.is_scripting() and not torch.compiler.is_compiling():
            own = self._parameters  # nn.Module's __getattr__ takes longer than the decision
            if "weight" in own and "bias" in own:
                weight, bias = own["weight"], own["bias"]
            else:
                weight, bias = self.weight, self.bias
            out, ran = products.run(input, weight, bias)
            if isinstance(self, Linear):  # a stack calls this function with torch's layers, too
                self.__dict__["_ran"] = ran
            return out
        return F.linear(input, self.weight, self.bias)

    @property
    def path(self) -> Path | None:
        """What ran the last call, the kernels or torch's function, and why; None before it."""
        ran = self.__dict__.get("_ran")
        if ran is None:
            return None
        if isinstance(ran, str):
            return Path("torch", ran)
        return Path("linear by lists of nonzeros", f"{ran} % of x is not zero")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_ran"}


OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: Linear,
    nn.MaxPool2d: MaxPool2d,
    nn.AvgPool2d: AvgPool2d,
}
"""Our class for each of torch's."""
_RELEASED = {kind: kind.forward for kind in OURS}


def reason_against(layer: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why a layer of torch's class `kind`, or of a subclass, may compute something else."""
    if type(layer) not in (kind, OURS[kind]):
        name = type(layer).__name__
        return f"{name} is a subclass of nn.{kind.__name__} and may compute something else"
    if "forward" in layer.__dict__ or kind.forward is not _RELEASED[kind]:
        return Reason.REPLACED
    if kind is nn.Linear and "weight" not in layer._parameters:
        return "its weight is no parameter of its own"
    return None


def ours_for(layer: nn.Module) -> Any:
    """Our class whose forward may stand in for that of a layer without hooks, or None."""
    kind = type(layer)
    return OURS[kind] if kind in OURS and reason_against(layer, kind) is None else None
