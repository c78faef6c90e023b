"""Programs that are drawn leave what they leave eagerly: results, gradients, buffers and states."""

from typing import Any

import pytest
import torch
from hypothesis import assume, given, note
from torch import Tensor, nn

from tests.loops.compiled import Outcome, equal, outcome
from tests.loops.programs import Program, programs, stacks
from tests.shared.cases import drawing

MARGIN = 1e-9  # between mem and a threshold, where results are compared with a tolerance
BITS = {torch.float32: 18, torch.float64: 44}  # of sums that are exact in any order


def bits(result: object) -> float:
    """Returns the number of bits from the highest to the lowest bit in a tensor."""
    if not isinstance(result, Tensor) or not result.is_floating_point():
        return 0
    mantissas, exponents = torch.frexp(result.detach().double())
    whole = (mantissas * 2.0**53).long()
    used = whole != 0
    if not used.any() or not result.isfinite().all():
        return 0 if result.isfinite().all() else float("inf")
    lowest = (whole & -whole).double().log2() - 53 + exponents
    return float(exponents[used].max() - lowest[used].min())


def margin_of(program: Program, training: bool) -> float:
    """Returns the least distance of any mem, before or after a step, from its threshold."""
    found = [float("inf")]

    def look(neuron: nn.Module, inputs: tuple, *_: object) -> None:
        for mem in (neuron.mem, *inputs[1:]):
            if isinstance(mem, Tensor) and mem.numel():
                found.append(float((mem.detach() - neuron.threshold.detach()).abs().min()))

    def make() -> nn.Module:
        net = program.made(torch.float64)
        for layer in net.children():
            if hasattr(layer, "reset_mem"):
                layer.register_forward_pre_hook(look)
                layer.register_forward_hook(look)
        return net

    run(program, make, torch.float64, training, compiled=False)
    return min(found)


def run(program, make, dtype, training, compiled, **options) -> Outcome:
    return outcome(
        make, program.x(dtype), training=training, compiled=compiled, times=program.times,
        graph_breaks=program.graph_breaks, **options,
    )  # fmt: skip


def check(program: Program, training: bool) -> None:
    """Compares a program's results; rejects a program that autograd refuses."""

    def ran(dtype: torch.dtype, compiled: bool, **options: Any) -> Outcome:
        return run(program, lambda: program.made(dtype), dtype, training, compiled, **options)

    try:
        wide = ran(torch.float64, False)
    except RuntimeError as error:
        if "modified by an inplace operation" in str(error) or "in-place" in str(error):
            assume(False)
        raise
    dtype, eager, error = torch.float64, wide, {"atol": 1e-9, "rtol": 1e-9}
    if program.exact:
        most = max(map(bits, (v for name, v in wide.results.items() if "random" not in name)))
        dtypes = [dtype for dtype, number in BITS.items() if most <= number]
        assume(dtypes)
        dtype, eager, error = dtypes[0], ran(dtypes[0], False), {}
    else:
        assume(margin_of(program, training) > MARGIN)
    equal(ran(dtype, True), eager, **error)
    if program.chain:
        unrolled = ran(dtype, False, run=program.unrolled)
        for found in (unrolled.results, eager.results):  # spk is that of all steps, in new memory
            for name in [*found]:
                if name.endswith(".spk") or name.startswith(("strides", "memory")):
                    del found[name]
        equal(unrolled, eager, **error)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.drawn
def test_stacks(training):
    @drawing(5)
    @given(stacks(training=training))
    def check_stack(program):
        note(str(program))
        check(program, training)

    check_stack()


@pytest.mark.drawn
@drawing(8)
@given(programs(training=True))
def test_training(program):
    note(str(program))
    check(program, training=True)


@pytest.mark.drawn
@drawing(4)
@given(programs(training=False))
def test_inference(program):
    note(str(program))
    check(program, training=False)
