"""Before anything is timed: do all providers compute the same thing?

Spikes are compared with a boundary band: a spike may differ only where the membrane potential lies
within rounding of the threshold, in either provider. States have to be close everywhere; where a
spike or a quantiser feeds back into them, one rounding error can move a neuron by a whole step,
so that there a few neurons may differ and no more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from benchmarks.cases import Case
from benchmarks.providers.base import Provider, Tensor

TOLERANCE = {
    "float64": 1e-10,
    "float32": 3e-5,
    "tf32": 5e-3,
    "autocast": 1e-1,
    "float16": 2e-2,
    "bfloat16": 1e-1,
}
"""Largest difference of states (|mem| <= 1) over a short sequence, by dtype."""

GRADIENT_TOLERANCE = {
    "float64": 1e-8,
    "float32": 1e-3,
    "tf32": 5e-2,
    "autocast": 3e-1,
    "float16": 1e-1,
    "bfloat16": 3e-1,
}
"""Largest difference of a gradient, in its norm, relative."""

STEPS = 3
"""Time steps that are compared: enough for states and gradients to go round."""


class Disagreement(AssertionError):
    """A provider does not compute what the baseline computes."""


@dataclass(frozen=True)
class Results:
    """What a provider computed, in float64 on the CPU."""

    spikes: Tensor
    syn: Tensor
    mem: Tensor
    gradient: Tensor
    gradient_x: Tensor


def compute(provider: Provider) -> Results:
    """Spikes (T, N, C, Ho, Wo), last states, and the gradients of weight and x through both.

    The gradient of x is of size 0 where the case does not count it.
    """
    x, syn, mem = provider.inputs("both", STEPS)
    weight = provider.cell.conv.weight
    with provider.context():
        spikes, syn, mem = provider.sequence(x, syn, mem)
        stacked = torch.stack(spikes) if isinstance(spikes, list) else spikes
        upstream = provider.spike_gradient()[:STEPS]
        loss = (stacked * upstream).sum() + mem.square().sum() + syn.sum()
        wanted = (weight, x) if x.requires_grad else (weight,)
        gradients = torch.autograd.grad(loss, wanted)
    gradient_x = gradients[1] if x.requires_grad else x.new_zeros(0)
    found = (stacked, syn, mem, gradients[0], gradient_x)
    return Results(*(tensor.detach().double().cpu() for tensor in found))


def potentials(provider: Provider) -> Tensor:
    """The (pooled) membrane potential that each spike was decided on, (T, N, C, Ho, Wo)."""
    x, syn, mem = provider.inputs("forward", STEPS)
    case = provider.case
    seen = []
    with torch.no_grad(), provider.context():
        for x_t in x.unbind(0):
            _, syn, mem = provider.step(x_t, syn, mem)  # type: ignore[attr-defined]
            pooled = mem
            if case.max_pool:
                pooled = F.max_pool2d(mem, case.max_pool)
            elif case.avg_pool:
                pooled = F.avg_pool2d(mem, case.avg_pool)
            seen.append(pooled.double().cpu())
    return torch.stack(seen)


def compare(case: Case, dtype: str, expected: Results, got: Results, potential: Tensor) -> str:
    """Hold `got` against `expected`; returns a line that says how close they are.

    Raises Disagreement that says what differs, where and by how much.
    """
    tolerance = TOLERANCE[dtype]
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
    worst = 0.0
    for name in ("syn", "mem"):
        one, other = getattr(expected, name), getattr(got, name)
        if one.shape != other.shape:
            raise Disagreement(f"{name} has shape {tuple(other.shape)}, not {tuple(one.shape)}")
        apart = (one - other).abs()
        # not (<=), so that NaN counts as a difference
        far = int((~(apart <= tolerance * (1 + one.abs()))).sum())
        if far > allowed * apart.numel():
            raise Disagreement(
                f"{far} of {apart.numel()} values of {name} differ, by up to {apart.max():.2g}"
            )
        worst = max(worst, float(apart.median() if feeds_back else apart.max()))
    relative = 0.0
    limit = max(GRADIENT_TOLERANCE[dtype], 5e-2 * feeds_back)
    for name, of in (("gradient", "weight"), ("gradient_x", "x")):
        one, other = getattr(expected, name), getattr(got, name)
        apart = float((one - other).norm()) / (float(one.norm()) or 1.0)
        if not apart <= limit:
            raise Disagreement(f"the gradient of {of} differs by {apart:.2g} of its norm")
        relative = max(relative, apart)
    return f"states {worst:.1e}, gradient {relative:.1e}, flips {int(flips.sum())}"
