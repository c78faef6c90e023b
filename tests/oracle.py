"""Judges what kernels computed by the float64 reference, soundly in spite of rounding.

Two implementations round differently, so a potential within rounding of the threshold may
spike in one and not in the other, and with a reset the states go apart from there. Therefore a
sequence is not compared with the reference's own sequence but step by step: each step of the
reference starts from the states that the kernels under test came to. Within a step the reset
is then exact (it compares two given numbers), the states are continuous, and the spike is
judged by the potential that the kernels themselves returned.
"""

from collections.abc import Iterator
from dataclasses import replace

import flat
import torch
import torch.nn.functional as F
from cases import Case, Inputs
from torch import Tensor

from snnlstm import surrogate
from snnlstm.call import CellOptions


def assert_quantised(value: Tensor, exact: Tensor, levels: Tensor, band: float) -> None:
    """Check quantised values against the exact ones from before the quantisation.

    Every value must be a level, and no other level may be nearer by more than `band`.
    """
    levels = levels.double()
    nearest = (exact[..., None].double() - levels).abs().min(-1).values
    assert torch.isin(value.double(), levels.to(value.dtype).double()).all(), "not a level"
    excess = (value.double() - exact).abs() - nearest
    assert excess.max() <= 2 * band, f"a level is not the nearest, by {float(excess.max()):.3g}"


def steps_of(tensor: Tensor, options: CellOptions) -> Tensor:
    return tensor if options.sequence else tensor.unsqueeze(0)


def pooled(mem: Tensor, options: CellOptions) -> Tensor:
    """The potential that is compared with the threshold, before its quantisation."""
    if options.pool == "max":
        return F.max_pool2d(mem, options.pool_size)
    if options.pool == "avg":
        return F.avg_pool2d(mem, options.pool_size)
    return mem


def check_spikes(
    spk: Tensor, mem: Tensor, threshold: Tensor, graded: Tensor, options: CellOptions
) -> None:
    """Spikes of one step against the mem (N, C, Ho, Wo) that the same kernels returned.

    Exact but for average pooling, whose sum may round either way, and for half types, where spikes
    are those of mem before it is rounded: there a neuron within that rounding of a boundary
    (threshold, or middle between two levels) may do as it likes.
    """
    potential = pooled(mem.double(), options)
    band = 0.0
    if options.pool == "avg" or mem.element_size() == 2:
        band = 4 * torch.finfo(mem.dtype).eps * float(mem.abs().max())
    low, high = potential - band, potential + band
    if options.quant is not None:
        low, high = options.quant(low) - band / 4, options.quant(high) + band / 4  # levels round
    threshold = threshold.double()
    must, may = low > threshold, high > threshold
    if options.inhibition:
        flat_low, flat_high = low.flatten(1), high.flatten(1)
        if band == 0:
            winner = flat_low.argmax(1, keepdim=True)  # the first of equal ones
            winners = torch.zeros_like(flat_low, dtype=torch.bool).scatter(1, winner, True)
        else:
            winners = flat_high >= flat_low.amax(1, keepdim=True)
            assert (spk.flatten(1) != 0).sum(1).max() <= 1, "more than one winner"
        alone = winners.sum(1, keepdim=True) == 1
        must = must & (winners & alone).view_as(must)
        may = may & winners.view_as(may)
    spiked = spk != 0
    assert not (spiked & ~may).any(), f"{int((spiked & ~may).sum())} spikes too many"
    assert not (must & ~spiked).any(), f"{int((must & ~spiked).sum())} spikes missing"
    assert torch.equal(spk, torch.where(spiked, graded, torch.zeros_like(graded)))


def exact_steps(
    inputs: Inputs, syn: Tensor, mem: Tensor, options: CellOptions
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the exact syn and mem of each step, before they are quantised.

    `syn` and `mem` are every state of a run: each step starts from those before it.
    """
    step = replace(options, sequence=False, record=False, quant=None, surrogate=surrogate.NONE)
    wide = inputs.double()
    before = [wide.syn, wide.mem]
    steps = (steps_of(t.detach().double(), options) for t in (wide.x, syn, mem))
    for x, *after in zip(*steps, strict=True):
        yield flat.reference(x, *before, *wide[3:], step)[1:]
        before = after


def check_steps(
    case: Case, inputs: Inputs, out: tuple[Tensor, Tensor, Tensor], error: float
) -> None:
    """Outputs of a call that returned every state, step by step.

    Parameters
    ----------
    error : float
        Largest absolute error of syn and mem that one step may add; relative where they are
        larger than 1.
    """
    options = case.options
    steps = zip(*(steps_of(t.detach(), options) for t in out), strict=True)
    exact = exact_steps(inputs, *out[1:], options)
    for (spk, syn, mem), (exact_syn, exact_mem) in zip(steps, exact, strict=True):
        for value, wanted in ((syn, exact_syn), (mem, exact_mem)):
            band = error * max(1.0, float(wanted.abs().max()))
            if options.quant is not None:
                assert_quantised(value, wanted, options.quant.levels, band)
            else:
                torch.testing.assert_close(value.double(), wanted, atol=band, rtol=0)
        check_spikes(spk, mem, inputs.threshold.detach(), inputs.graded, options)


def is_clear(case: Case, inputs: Inputs, syn: Tensor, mem: Tensor, band: float) -> bool:
    """Tells whether no error of mem up to `band` changes a derivative of a recorded run.

    A change would be another level, another place of the largest in a pooling window, another
    winner, or the other side of a surrogate's jump.
    """
    options = case.options
    jumps = {"triangular": 0.0, "heaviside": 0.0, "LSO": 0.0, "SFS": options.surrogate.p1}
    jump = inputs.threshold.detach().double() + jumps.get(options.surrogate.name, torch.inf)
    for _, exact in exact_steps(inputs, syn, mem, options):
        if options.quant is not None:
            if not torch.equal(options.quant(exact - band), options.quant(exact + band)):
                return False
            continue
        (ph, pw), potential = options.pool_size, pooled(exact, options)
        windows = exact.unfold(2, ph, ph).unfold(3, pw, pw).flatten(-2)
        if options.pool == "max" and _least_lead(windows) <= 2 * band:
            return False
        if options.inhibition and _least_lead(potential.flatten(1)) <= 2 * band:
            return False
        if ((potential - jump).abs() <= band).any():
            return False
    return True


def _least_lead(values: Tensor) -> float:
    """Returns how far the largest along the last dimension is from the next, at the least."""
    if values.shape[-1] == 1:
        return torch.inf
    return float(values.topk(2).values.diff().abs().min())


def decisions(case: Case, inputs: Inputs, syn: Tensor, mem: Tensor) -> list[Tensor]:
    """Returns every decision of a recorded run: runs with equal ones have equal derivatives.

    The resets, the levels that the states were rounded to, the places of the largest in every
    pooling window, the winners, and on which sides of its jumps each surrogate stood.
    """
    options = case.options
    syn, mem = steps_of(syn.double(), options), steps_of(mem.double(), options)
    threshold = inputs.threshold.detach().double()
    found = [torch.cat([inputs.mem.detach().double()[None], mem]) > threshold]
    if options.quant is not None:
        found += [syn, mem]
    if options.pool == "max":
        found.append(F.max_pool2d(mem.flatten(0, 1), options.pool_size, return_indices=True)[1])
    potential = pooled(mem.flatten(0, 1), options)
    if options.quant is not None:
        if options.pool == "avg" and case.dtype == torch.float32:
            # Means of equidistant levels often lie in the middle between two, where float32
            # rounds either way: unequal decisions, so that the case is dropped.
            low, high = (options.quant(potential + sign * 1e-6) for sign in (-1, 1))
            found.append(torch.where(low == high, 0.0, torch.nan))
        potential = options.quant(potential)
        found.append(potential)
    if options.inhibition:
        found.append(potential.flatten(1).argmax(1))
    found += [potential > threshold, potential >= threshold]
    if options.surrogate.name == "SFS":
        found.append(potential - threshold > options.surrogate.p1)
    return found
