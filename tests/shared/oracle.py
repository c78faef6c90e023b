"""Compares results of kernels with the float64 reference, soundly in spite of rounding.

Two implementations round differently, so a potential within rounding of the threshold may spike in
one and not in the other. With a reset the states then differ from that step on. Therefore sequences
are compared step by step: each step of the reference starts from the kernels' own states. Within a
step the reset is then exact, because it compares two given numbers. The states are continuous
functions of their inputs. The spikes are compared with the potential that the kernels returned.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from snnlstm import surrogate
from tests.shared import flat
from tests.shared.cases import Case, Inputs, Options


def assert_quantised(value: Tensor, exact: Tensor, levels: Tensor, band: float) -> None:
    """Compares quantised values with exact ones from before the quantisation.

    Every value must be a level, and no other level may be nearer by more than `band`.
    """
    levels = levels.double()
    nearest = (exact[..., None].double() - levels).abs().min(-1).values
    assert torch.isin(value.double(), levels.to(value.dtype).double()).all(), "not a level"
    excess = (value.double() - exact).abs() - nearest
    assert excess.max() <= 2 * band, f"a level is not the nearest, by {float(excess.max()):.3g}"


def steps_of(tensor: Tensor, options: Options) -> Tensor:
    return tensor if options.sequence else tensor.unsqueeze(0)


def pooled(mem: Tensor, options: Options) -> Tensor:
    """Returns the potential that the threshold is compared with, before its quantisation."""
    if options.pool == "max":
        return F.max_pool2d(mem, options.pool_size)
    if options.pool == "avg":
        return F.avg_pool2d(mem, options.pool_size)
    return mem


def check_spikes(
    spk: Tensor, mem: Tensor, threshold: Tensor, graded: Tensor, options: Options
) -> None:
    """Compares spikes of one step with the mem (N, C, Ho, Wo) that the same kernels returned.

    Average pooling may round either way, and in half types the kernels form spikes from mem before
    they round it. In these cases a neuron may spike or not if its potential lies within rounding of
    the threshold or of the middle between two levels. In other cases the comparison is exact.
    """
    if not options.spiking:  # a step call returns mem alone
        assert not options.sequence or torch.equal(spk, mem)
        return
    potential = pooled(mem.double(), options)
    band = 0.0
    if options.pool == "avg" or mem.element_size() == 2:
        band = 4 * torch.finfo(mem.dtype).eps * float(mem.abs().max())
    low, high = potential - band, potential + band
    if options.quant is not None:
        # In half types the levels are rounded, too.
        low, high = options.quant(low) - band / 4, options.quant(high) + band / 4
    threshold = threshold.double()
    must, may = low > threshold, high > threshold
    spiked = spk != 0
    assert not (spiked & ~may).any(), f"{int((spiked & ~may).sum())} spikes too many"
    assert not (must & ~spiked).any(), f"{int((must & ~spiked).sum())} spikes missing"
    assert torch.equal(spk, torch.where(spiked, graded, torch.zeros_like(graded)))


def exact_steps(
    inputs: Inputs, syn: Tensor, mem: Tensor, options: Options
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the exact syn and mem of each step, before they are quantised.

    `syn` and `mem` hold all states of a run: each step starts from the states before it.
    """
    alone = {"sequence": False, "record": False, "lengths": None}
    step = replace(options, **alone, quant=None, surrogate=surrogate.NONE)
    wide = inputs.double()
    before = [wide.syn, wide.mem]
    steps = (steps_of(t.detach().double(), options) for t in (wide.x, syn, mem))
    for x, *after in zip(*steps, strict=True):
        yield flat.reference(x, *before, *wide[3:], step)[1:]
        before = after


def check_steps(
    case: Case, inputs: Inputs, out: tuple[Tensor, Tensor, Tensor], error: float
) -> None:
    """Compares the outputs of a call that returned every state, step by step.

    `error` bounds what one step may add to the error of syn and mem. It is an absolute error, or a
    relative one for states larger than 1. Padded samples keep their states, and do not spike.
    """
    options, before = case.options, inputs[1:3]
    steps = zip(*(steps_of(t.detach(), options) for t in out), strict=True)
    exact = exact_steps(inputs, *out[1:], options)
    for t, ((spk, syn, mem), wanted) in enumerate(zip(steps, exact, strict=True)):
        if options.lengths is not None:
            own = case.running[t]
            assert not spk[~own].any()
            for state, kept in zip((syn, mem), before, strict=True):
                assert torch.equal(state[~own], kept[~own])
            before = syn, mem
            spk, syn, mem, *wanted = (each[own] for each in (spk, syn, mem, *wanted))
            if not own.any():
                continue
        for value, exact_value in zip((syn, mem), wanted, strict=True):
            band = error * max(1.0, float(exact_value.abs().max()))
            if options.quant is not None:
                assert_quantised(value, exact_value, options.quant.levels, band)
            else:
                torch.testing.assert_close(value.double(), exact_value, atol=band, rtol=0)
        check_spikes(spk, mem, inputs.threshold.detach(), inputs.graded, options)


def decisions(case: Case, inputs: Inputs, syn: Tensor, mem: Tensor) -> list[Tensor]:
    """Returns every decision of a recorded run: runs with equal decisions have equal derivatives.

    Decisions are the resets, the levels of the states, the places of the largest in every pooling
    window, and the sides of the surrogate's jumps on which the potentials lie.
    """
    options = case.options
    if not options.spiking:
        return []
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
            # Means of equidistant levels often lie in the middle between two levels, where float32
            # rounds either way. NaN makes the decisions unequal, so that the case is dropped.
            low, high = (options.quant(potential + sign * 1e-6) for sign in (-1, 1))
            found.append(torch.where(low == high, 0.0, torch.nan))
        potential = options.quant(potential)
        found.append(potential)
    found += [potential > threshold, potential >= threshold]
    if options.surrogate.name == "SFS":
        found.append(potential - threshold > options.surrogate.p1)
    return found
