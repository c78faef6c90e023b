"""Compares the results of a provider with the baseline's, before anything is timed.

A spike may differ only if the baseline's membrane potential lies within rounding of the threshold.
States have to be close everywhere. If a spike or a quantiser feeds back into the states, a rounding
error can move a neuron by a whole step; then a few neurons may differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.cases import Case

if TYPE_CHECKING:
    from benchmarks.providers.base import Provider

TOLERANCE = {
    "float64": (1e-10, 1e-8),
    "float32": (3e-5, 1e-3),
    "tf32": (5e-3, 5e-2),
    "autocast": (1e-1, 3e-1),
    "autocast16": (2e-2, 1e-1),
    "float16": (2e-2, 1e-1),
    "bfloat16": (1e-1, 3e-1),
}
"""The largest differences over a short sequence, by dtype: an absolute difference of states, and a
relative difference of a gradient in norm."""

STEPS = 3
"""The number of compared time steps: states and gradients pass from step to step twice."""


class Disagreement(AssertionError):
    """This error says that a provider does not compute what the baseline computes."""


@dataclass(frozen=True)
class Results:
    """Holds the results of a provider, in float64 on the CPU."""

    spikes: Tensor
    syn: Tensor
    mem: Tensor
    gradient: Tensor
    gradient_x: Tensor


def compute(provider: Provider) -> Results:
    """Computes spikes (T, N, C, Ho, Wo), last states, and the gradients of weight and x.

    The gradient of x is empty if the case does not count it.
    """
    x, syn, mem = provider.inputs("both", STEPS)
    wanted = [provider.cell.conv.weight, *([x] if x.requires_grad else [])]
    with provider.context():
        spikes, syn, mem = provider.sequence(x, syn, mem)
        stacked = torch.stack(spikes) if isinstance(spikes, list) else spikes
        upstream = provider.spike_gradient()[:STEPS]
        loss = (stacked * upstream).sum() + mem.square().sum() + syn.sum()
        gradients = [*torch.autograd.grad(loss, wanted), x.new_zeros(0)][:2]
    found = (stacked, syn, mem, *gradients)
    return Results(*(tensor.detach().double().cpu() for tensor in found))


@torch.no_grad()
def potentials(provider: Provider) -> Tensor:
    """Computes the (pooled) membrane potential of each spike, (T, N, C, Ho, Wo)."""
    x, syn, mem = provider.inputs("forward", STEPS)
    seen = []
    with provider.context():
        for x_t in x.unbind(0):
            _, syn, mem = provider.step(x_t, syn, mem)  # type: ignore[attr-defined]
            seen.append(provider.case.pool(mem).double().cpu())
    return torch.stack(seen)


def compare(case: Case, dtype: str, expected: Results, got: Results, potential: Tensor) -> str:
    """Compares `got` with `expected`; returns a line that says how close they are.

    Raises Disagreement that says which result differs, and by how much.
    """
    tolerance, of_gradients = TOLERANCE[dtype]
    # A spike feeds back through the reset, a rounded level through the quantiser.
    feeds_back = case.reset != "none" or case.quant_bits > 0
    allowed = 2e-3 if feeds_back else 0.0
    flips = got.spikes != expected.spikes
    crossings = flips & ((potential - case.threshold).abs() <= tolerance)
    beyond = int((flips & ~crossings).sum())
    if beyond > allowed * flips.numel():
        raise Disagreement(
            f"{beyond} of {flips.numel()} spikes differ where the membrane potential is not "
            f"within {tolerance:g} of the threshold"
        )
    worst = relative = 0.0
    for name in ("syn", "mem"):
        one, other = getattr(expected, name), getattr(got, name)
        if one.shape != other.shape:
            raise Disagreement(f"{name} has shape {tuple(other.shape)}, not {tuple(one.shape)}")
        apart = (one - other).abs()
        # By ~(<=) NaN counts as a difference.
        far = int((~(apart <= tolerance * (1 + one.abs()))).sum())
        if far > allowed * apart.numel():
            raise Disagreement(
                f"{far} of {apart.numel()} values of {name} differ, by up to {apart.max():.2g}"
            )
        worst = max(worst, float(apart.median() if feeds_back else apart.max()))
    # max_pool may send the gradient to another of several nearly equal values.
    of_gradients = max(of_gradients, 5e-2 * feeds_back, 1e-2 * (case.max_pool > 0))
    for name, of in (("gradient", "weight"), ("gradient_x", "x")):
        one, other = getattr(expected, name), getattr(got, name)
        share = float((one - other).norm()) / (float(one.norm()) or 1.0)
        if not share <= of_gradients:
            raise Disagreement(f"the gradient of {of} differs by {share:.2g} of its norm")
        relative = max(relative, share)
    return f"states {worst:.1e}, gradient {relative:.1e}, flips {int(flips.sum())}"
