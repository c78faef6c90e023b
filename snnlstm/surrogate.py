"""Surrogate gradients replace the derivative of a spike, which is zero nearly everywhere.

The forward pass of every surrogate is the Heaviside step ``spk = (x > 0)``; only the backward
passes differ. A :class:`Surrogate` is an immutable description: a kind and at most two numbers,
which the native kernels evaluate in their own loops. It is also callable, so it works as
``spike_grad`` of any neuron of snnTorch::

    snntorch.Leaky(beta=0.9, spike_grad=snnlstm.surrogate.atan(alpha=2.0))

The formulas follow snntorch 1.0.0 (``snntorch/surrogate.py``), and repair two of its defects:
:func:`sigmoid` stays finite for very negative inputs, and :func:`LSO` can be called.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .compat.torch_private import forward_level, is_tracing, transforms_are_active

__all__ = [
    "LSO",
    "NONE",
    "SFS",
    "SSO",
    "Surrogate",
    "atan",
    "custom_surrogate",
    "fast_sigmoid",
    "heaviside",
    "sigmoid",
    "spike_rate_escape",
    "straight_through_estimator",
    "triangular",
]


def is_number(value: object) -> bool:
    """Whether `value` is a real number, and not a bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def fixed(number: float) -> float:
    """Return the number itself. If it is a symbol of torch.compile, this guards on its value."""
    (same,) = {number}  # the compiler allows only constants as members of a set
    return same


def finite_number(name: str, value: Any) -> float:
    """Check an argument that must be a finite real number."""
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {value!r}")
    number = float(fixed(value))
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {value!r}")
    return number


def _check_tensor(x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x of a surrogate must be a tensor, got {type(x).__name__}")


class Kind(NamedTuple):
    """One row of the table of surrogates."""

    name: str
    parameters: tuple[str, ...]
    factor: Callable[[Tensor, float, float], Tensor]
    """(x, p0, p1) -> the factor of the incoming gradient, with the shape and dtype of x."""


def _fast_sigmoid(x: Tensor, slope: float) -> Tensor:
    return 1 / (slope * x.abs() + 1) ** 2


def _noise(x: Tensor, mean: float) -> Tensor:
    # Numbers are drawn in the order of the dimensions, so equal seeds agree in every memory format.
    return torch.rand_like(x, memory_format=torch.contiguous_format) - 0.5 + mean


# The position in this tuple is the number of the kind in csrc/args.h.
KINDS: tuple[Kind, ...] = (
    Kind("none", (), lambda x, *_: torch.zeros_like(x)),
    Kind("atan", ("alpha",), lambda x, a, _: a / 2 / (1 + (math.pi / 2 * a * x) ** 2)),
    Kind("fast_sigmoid", ("slope",), lambda x, k, _: _fast_sigmoid(x, k)),
    # s(kx) * s(-kx) instead of e^(-kx) / (1 + e^(-kx))^2, which overflows for very negative x
    Kind("sigmoid", ("slope",), lambda x, k, _: k * torch.sigmoid(k * x) * torch.sigmoid(-k * x)),
    Kind("straight_through_estimator", (), lambda x, *_: torch.ones_like(x)),
    Kind(
        "triangular", ("threshold",), lambda x, t, _: torch.where(x >= 0, torch.full_like(x, -t), t)
    ),
    Kind("heaviside", (), lambda x, *_: (x > 0).to(x.dtype)),
    Kind("spike_rate_escape", ("beta", "slope"), lambda x, b, k: k * torch.exp(-b * (x - 1).abs())),
    Kind("SFS", ("slope", "B"), lambda x, k, b: torch.where(x > b, _fast_sigmoid(x, k), 0)),
    Kind("SSO", ("mean", "variance"), lambda x, m, v: torch.where(x > 0, 1, _noise(x, m) * v)),
    Kind("LSO", ("slope",), lambda x, k, _: torch.where(x > 0, torch.ones_like(x), k)),
)

_NUMBERS = {kind.name: number for number, kind in enumerate(KINDS)}
MAKERS = frozenset(_NUMBERS)
"""The names of the functions of this module that make a surrogate."""


def heaviside_step(x: Tensor, *_: Any) -> Tensor:
    """Return 1 where x > 0, else 0, also for NaN; without a gradient.

    torch takes six times as long for ``x > 0`` and its conversion to numbers, on a CPU.
    """
    return x.detach().sign().relu_()


class _Spike(torch.autograd.Function):
    """Heaviside step with the derivative of its kind; differentiable any number of times."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, *_: Any) -> Tensor:
        return heaviside_step(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, ctx.kind, ctx.p0, ctx.p1 = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        (x,) = ctx.saved_tensors
        return grad * KINDS[ctx.kind].factor(x, ctx.p0, ctx.p1), None, None, None


def with_forward_mode(function: Any) -> Any:
    """A Function of each element of x alone, with forward-mode AD: its jvp is its backward.

    It is for eager calls only, because dynamo refuses a Function with a jvp.
    """

    class ForwardMode(function):
        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
            function.setup_context(ctx, inputs, output)
            ctx.save_for_forward(inputs[0])

        @staticmethod
        def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
            return function.backward(ctx, tangent.view_as(tangent))[0]

    return ForwardMode


_SpikeForwardMode = with_forward_mode(_Spike)
# This is apply without its inspection of signatures, which takes longer than a small step.
_plain_apply: Any = super(torch.autograd.Function, _SpikeForwardMode).apply


@dataclass(frozen=True)
class Surrogate:
    """A surrogate gradient, described by its kind and parameters.

    The functions of this module make instances. Instances with equal kind and parameters are equal
    and have equal hashes. They can be copied and pickled.

    Parameters
    ----------
    kind : int
        Row of the table ``KINDS``; 0 means no gradient (``surrogate_disable``).
    p0, p1 : float
        Parameters in the order of the row; 0.0 if the kind has none.
    """

    kind: int
    p0: float = 0.0
    p1: float = 0.0

    @property
    def name(self) -> str:
        """Name of the kind, such as ``"atan"``."""
        return KINDS[self.kind].name

    @property
    def is_random(self) -> bool:
        """Whether the backward pass draws random numbers, which the native kernels cannot."""
        return self.name == "SSO"

    def __call__(self, x: Tensor) -> Tensor:
        """Return the spikes for x, the membrane potential minus the threshold.

        x has any shape and floating point dtype, and the result has the same. It is 1 where
        ``x > 0``, and 0 elsewhere and for NaN.
        """
        _check_tensor(x)
        if self.kind == 0:
            return (x > 0).to(x.dtype)
        if torch.compiler.is_compiling():
            # dynamo fails at an apply() without a gradient.
            spike: Any = _Spike.apply if x.requires_grad else heaviside_step
        elif transforms_are_active() or is_tracing():
            spike = _SpikeForwardMode.apply
        elif forward_level() < 0 and not (x.requires_grad and torch.is_grad_enabled()):
            return heaviside_step(x)
        else:
            spike = _plain_apply
        return spike(x, self.kind, self.p0, self.p1)

    def factor(self, x: Tensor) -> Tensor:
        """Return the backward pass's d spk / d x, with the shape and dtype of x."""
        return KINDS[self.kind].factor(x, self.p0, self.p1)

    def __repr__(self) -> str:
        parameters = zip(KINDS[self.kind].parameters, (self.p0, self.p1), strict=False)
        return f"{self.name}({', '.join(f'{name}={value:g}' for name, value in parameters)})"


NONE = Surrogate(0)
"""No gradient through the spike, as with ``surrogate_disable=True``."""


def make(name: str, **parameters: Any) -> Surrogate:
    """Make the surrogate called `name`.

    A parameter that is not a number raises TypeError; infinity and NaN raise ValueError.
    """
    numbers = [finite_number(f"{key} of {name}", value) for key, value in parameters.items()]
    return Surrogate(_NUMBERS[name], *numbers)


def atan(alpha: float = 2.0) -> Surrogate:
    r"""Arc tangent, the default: ``alpha/2 / (1 + (pi/2 * alpha * x)^2)``.

    Fang et al., "Incorporating learnable membrane time constants to enhance learning of
    spiking neural networks", ICCV 2021.
    """
    return make("atan", alpha=alpha)


def fast_sigmoid(slope: float = 25) -> Surrogate:
    r"""Fast sigmoid: ``1 / (slope * |x| + 1)^2``.

    Zenke and Ganguli, "SuperSpike", Neural Computation 30, 2018.
    """
    return make("fast_sigmoid", slope=slope)


def sigmoid(slope: float = 25) -> Surrogate:
    r"""Derivative of the sigmoid: ``slope * s * (1 - s)`` with ``s = 1 / (1 + e^(-slope * x))``.

    It is finite for every finite x. Zenke and Ganguli, "SuperSpike", Neural Computation 30, 2018.
    """
    return make("sigmoid", slope=slope)


def straight_through_estimator() -> Surrogate:
    """Straight-through estimator: 1 everywhere.

    Bengio et al., "Estimating or propagating gradients through stochastic neurons", 2013.
    """
    return make("straight_through_estimator")


def triangular(threshold: float = 1) -> Surrogate:
    """``threshold`` where x < 0 and ``-threshold`` where x >= 0, as snnTorch runs it."""
    return make("triangular", threshold=threshold)


def heaviside() -> Surrogate:
    """The Heaviside step itself: 1 where x > 0, else 0."""
    return make("heaviside")


def spike_rate_escape(beta: float = 1, slope: float = 25) -> Surrogate:
    """Escape rate of the Boltzmann distribution: ``slope * e^(-beta * |x - 1|)``.

    Gerstner and Kistler, "Spiking neuron models", Cambridge University Press, 2002.
    """
    return make("spike_rate_escape", beta=beta, slope=slope)


def SFS(slope: float = 25, B: float = 1) -> Surrogate:
    """Sparse fast sigmoid: :func:`fast_sigmoid`'s factor where x > B, else 0.

    Perez-Nieves and Goodman, "Sparse spiking gradient descent", NeurIPS 2021.
    """
    return make("SFS", slope=slope, B=B)


def SSO(mean: float = 0, variance: float = 0.2) -> Surrogate:
    """Stochastic spike operator: 1 where x > 0, else ``(u - 0.5 + mean) * variance``.

    Every backward pass draws u uniformly from [0, 1), with torch's global generator for the device
    of x. A layer with this surrogate takes the reference path.
    """
    return make("SSO", mean=mean, variance=variance)


def LSO(slope: float = 0.1) -> Surrogate:
    """Leaky spike operator: 1 where x > 0, else ``slope``."""
    return make("LSO", slope=slope)


class _CustomSpike(_Spike):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, ctx.function = inputs
        ctx.save_for_backward(x, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, spk = ctx.saved_tensors
        # The function gets a clone, because users' functions may work in place.
        return ctx.function(x, grad.clone(), spk), None


@dataclass(frozen=True)
class _Custom:
    function: Callable[[Tensor, Tensor, Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        _check_tensor(x)
        return _CustomSpike.apply(x, self.function)


def custom_surrogate(
    function: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Callable[[Tensor], Tensor]:
    """Make a surrogate whose backward pass is ``function(x, grad, spk)``.

    Parameters
    ----------
    function : callable
        Takes the membrane potential minus the threshold, the incoming gradient and the spikes, all
        of one shape, and returns the gradient of x. A cell with this surrogate takes the reference
        path.

    Raises
    ------
    TypeError
        If `function` is not callable.
    """
    if not callable(function):
        raise TypeError(f"function must be a callable f(x, grad, spk), got {function!r}")
    return _Custom(function)
