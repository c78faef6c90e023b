"""Quantisation of the states to a fixed set of levels, with a straight-through gradient.

:func:`state_quant` makes the same levels as ``snntorch.functional.quant.state_quant`` of
snntorch 1.0.0, and its result works as ``state_quant`` of any neuron of snnTorch. snnTorch's
quantiser needs memory for (elements x levels) numbers. This one needs little more than its result,
unless torch compiles or traces it.
"""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

import torch
from torch import Tensor

from .surrogate import finite_number, with_forward_mode

__all__ = ["StateQuant", "state_quant"]

_BLOCK = 1 << 17  # number of distances per block, which fit a core's cache


def _quantise(x: Tensor, levels: Tensor) -> Tensor:
    """Return the nearest level for every element, with the shape and dtype of x."""
    levels = levels.to(x.device)

    def nearest(part: Tensor) -> Tensor:
        return levels[(levels - part[..., None]).abs().min(-1).indices].to(x.dtype)

    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return nearest(x)
    size = max(1, _BLOCK // levels.numel())
    if x.numel() <= size:
        return nearest(x)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for part, result in zip(x.reshape(-1).split(size), out.view(-1).split(size), strict=True):
        result.copy_(nearest(part))
    return out


class _Quantise(torch.autograd.Function):
    """Nearest level; the gradient passes unchanged, even where x is out of range."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, levels: Tensor) -> Tensor:
        return _quantise(x, levels)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return grad, None


_QuantiseForwardMode = with_forward_mode(_Quantise)


class StateQuant:
    """Rounds to the nearest of a set of levels.

    It compares the distances ``|level - x|`` in floating point. An exact tie takes the lowest
    index; NaN and infinities take index 0. Two instances with the same levels are equal.

    Parameters
    ----------
    levels : Tensor
        (n,), n >= 1, finite, floating point. The constructor copies it to the CPU. The kernels
        support only ascending levels.

    Attributes
    ----------
    levels : Tensor
        The levels, (n,), on the CPU. Do not write to them.
    ascending : bool
        Whether no level is lower than the level before.
    text : str
        The levels and their dtype as text, for :meth:`from_text`.

    Raises
    ------
    TypeError
        If `levels` is not a floating point tensor.
    ValueError
        If `levels` is not one-dimensional, is empty, or contains NaN or infinity.
    """

    def __init__(self, levels: Tensor) -> None:
        if not isinstance(levels, Tensor) or not levels.is_floating_point():
            raise TypeError(f"levels must be a floating point tensor, got {levels!r}")
        if levels.dim() != 1 or levels.numel() == 0:
            raise ValueError(f"levels must have shape (n,) with n >= 1, got {tuple(levels.shape)}")
        infinite = levels.detach()[~levels.isfinite()]
        if infinite.numel():
            raise ValueError(f"levels must be finite, got {infinite[0].item()} among them")
        self.levels = levels.detach().to("cpu", copy=True).contiguous()
        self.ascending = bool((self.levels.diff() >= 0).all())
        dtype = str(self.levels.dtype).removeprefix("torch.")
        self.text = ",".join([dtype, *map(repr, self.levels.tolist())])  # here: dynamo could not

    @classmethod
    def from_text(cls, text: str) -> StateQuant:
        """Make the quantiser with this :attr:`text`."""
        dtype, *values = text.split(",")
        levels = torch.tensor([float(value) for value in values], dtype=getattr(torch, dtype))
        return cls(levels)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the nearest level for each element, with the shape, dtype and device of x."""
        if torch.compiler.is_compiling():
            return _Quantise.apply(x, self.levels)
        if torch.jit.is_tracing():  # a trace with a Python Function cannot be saved
            fixed = x.detach()
            straight_through = torch.where(fixed.isfinite(), x - fixed, 0)
            return _quantise(fixed, self.levels) + straight_through
        return _QuantiseForwardMode.apply(x, self.levels)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __repr__(self) -> str:
        values = self.levels.tolist()
        return f"StateQuant({len(values)} levels, {min(values):g} to {max(values):g})"


# The base of the geometric spacing for 1, 2, ... bits; more than 7 bits take the last base.
_MULTIPLIERS = (0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.925, 0.95)


def _gaps(count: int, base: float, span: float) -> list[float]:
    """Return `count` geometric gaps, the widest first, that add up to `span`."""
    # The gaps are added one by one from the smallest, and scaled by a quotient, so that the levels
    # equal snnTorch's to the last bit. (From 3.12 on, Python's sum rounds differently.)
    total = functools.reduce(operator.add, (base**j for j in reversed(range(count))), 0.0)
    room = total / span if count else 1.0
    return [base**j / room for j in range(count)]


def _geometric_levels(
    count: int, lowest: float, centre: float, highest: float, base: float
) -> list[float]:
    """Return levels from `lowest` to `highest` that are densest around `centre`."""
    below = math.floor(count * ((centre - lowest) / (highest - lowest)))
    levels, value = [], lowest
    for gap in _gaps(below, base, centre - lowest):
        levels.append(value)
        value += gap
    value = centre
    for gap in reversed(_gaps(count - below, base, highest - centre)):
        value += gap
        levels.append(value)
    return levels


def state_quant(
    num_bits: int = 8,
    uniform: bool = True,
    thr_centered: bool = True,
    threshold: float = 1,
    lower_limit: float = 0,
    upper_limit: float = 0.2,
    multiplier: float | None = None,
) -> StateQuant:
    """Make a quantiser with ``2**num_bits`` levels, like snnTorch's function of this name.

    Parameters
    ----------
    num_bits : int, default 8
        Number of bits of a state, at least 1 and at most 16.
    uniform : bool, default True
        Whether the levels are evenly spaced; otherwise the spacing is geometric.
    thr_centered : bool, default True
        Whether geometric levels are densest around the threshold; otherwise around 0.
    threshold : float, default 1
        Sets the range, together with the limits.
    lower_limit, upper_limit : float, default 0 and 0.2
        The levels range from ``-threshold * (1 + lower_limit)`` to
        ``threshold * (1 + upper_limit)``.
    multiplier : float, optional
        Base of the geometric spacing; by default it depends on `num_bits`.

    Returns
    -------
    StateQuant

    Raises
    ------
    TypeError, ValueError
        If an argument is not a number, or if the arguments leave no range.
    """
    if isinstance(num_bits, bool) or not isinstance(num_bits, int):
        raise TypeError(f"num_bits must be an int, got {num_bits!r}")
    if not 1 <= num_bits <= 16:
        raise ValueError(f"num_bits must lie between 1 and 16, got {num_bits}")
    numbers = {"threshold": threshold, "lower_limit": lower_limit, "upper_limit": upper_limit}
    if multiplier is not None:
        numbers["multiplier"] = multiplier
    for name, value in numbers.items():
        finite_number(name, value)

    count = 2**num_bits
    lowest = -threshold - threshold * lower_limit
    highest = threshold + threshold * upper_limit
    if uniform:
        return StateQuant(torch.linspace(lowest, highest, count, device="cpu"))
    centre = threshold if thr_centered else 0
    if not lowest < highest or not lowest <= centre <= highest:
        raise ValueError(
            "threshold, lower_limit and upper_limit must leave a range around the threshold, "
            f"got levels from {lowest:g} to {highest:g}"
        )
    base = _MULTIPLIERS[min(num_bits, 8) - 1] if multiplier is None else multiplier
    levels = _geometric_levels(count, lowest, centre, highest, base)
    return StateQuant(torch.tensor(levels, device="cpu"))
