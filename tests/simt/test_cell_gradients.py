"""Compares gradients of the emulated CUDA kernels with float64 autograd through the reference.

If products are as good as float32's, every option is tried, and the decisions (resets, maxima,
levels) agree with the reference's. Coarser products would decide otherwise here and there: they are
tried on calls without such decisions.
"""

import re

import pytest
import torch
from hypothesis import given, reject
from hypothesis import strategies as st

from tests.shared import flat
from tests.shared.cases import Case, cases, drawing
from tests.shared.gradients import NAMES, OUTPUTS, agrees, compare, gradients, of_outputs
from tests.simt.emulator import EmulationError
from tests.simt.modes import (
    ALL,
    BACKWARD,
    CASES,
    FITS,
    JUMPING,
    JUMPING_FITS,
    MODES,
    PLAIN,
    RESIDENT,
    SCHEDULES,
    SMOOTH,
    Mode,
    crossed,
    fitting,
    of,
)


def check(core, case: Case, mode: Mode, outputs=OUTPUTS, wanted=NAMES) -> bool:
    """Returns False if rounding led kernels and reference to different decisions."""
    case = mode.of(case)
    inputs = case.inputs()
    grads = of_outputs(case, outputs)
    with mode.running(core):
        if mode.exact and not agrees(mode.run, case, inputs):
            return False
        actual = gradients(mode.run, inputs, case.options, grads, wanted)
    exact = gradients(flat.reference, inputs.double(), case.options, grads, wanted)
    compare(actual, exact, mode.gradient, grads)
    return True


@pytest.mark.parametrize(
    ("mode", "case", "schedule"),
    crossed((of(BACKWARD, True), JUMPING), (of(RESIDENT, True), JUMPING_FITS)),
)
def test_exact_gradients(core, mode, case, schedule):
    double = ALL[mode].dtype == torch.float64
    if case is JUMPING["stochastic"] and not double:
        pytest.skip("the oracle draws the same noise in float64 alone")
    if double and mode in RESIDENT and (case is FITS["wide"] or case is FITS["many units"]):
        pytest.skip("in float64 it does not fit")
    core.schedule(*schedule)
    assert check(core, case, ALL[mode]) or mode in RESIDENT, "choose another seed"


@pytest.mark.parametrize(
    ("mode", "case", "schedule"),
    crossed((of(BACKWARD, False), SMOOTH), (of(RESIDENT, False), fitting(SMOOTH))),
)
def test_coarse_gradients(core, mode, case, schedule):
    core.schedule(*schedule)
    assert check(core, case, ALL[mode])


@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("syn", "mem"), ("threshold", "bias")])
@pytest.mark.parametrize("mode", ["float32 behind torch", "tf32x3", "float32 hybrid"])
def test_only_what_is_wanted(core, mode, wanted):
    assert check(core, PLAIN, ALL[mode], wanted=wanted)


@pytest.mark.parametrize(
    ("mode", "case"),
    [(MODES["tf32"], CASES["channels last"]), (RESIDENT["resident tf32"], FITS["long"])],
    ids=["fused", "resident"],
)
def test_results_are_the_same_under_every_schedule(core, mode, case):
    """Bit for bit: torch.use_deterministic_algorithms has nothing to change."""
    case = mode.of(case)
    inputs, grads = case.inputs(), of_outputs(case)
    seen = []
    for schedule in (*SCHEDULES, ("ahead", 2)):
        core.schedule(*schedule)
        with mode.running(core):
            seen.append(gradients(mode.run, inputs, case.options, grads))
    for other in seen[1:]:
        for name, gradient in seen[0].items():
            assert torch.equal(gradient, other[name]), name


@pytest.mark.drawn
@pytest.mark.simt_long
@pytest.mark.parametrize("mode", of(BACKWARD, True) + of(RESIDENT, True))
def test_gradients_of_random_calls(core, mode):
    subsets = st.sets(st.sampled_from(NAMES), min_size=1).map(lambda s: tuple(sorted(s)))
    resident = mode in RESIDENT

    @drawing(40)
    @given(cases((ALL[mode].dtype,)), subsets)
    def check_case(case: Case, wanted: tuple) -> None:
        # The oracle's noise depends on type and layout.
        if case.options.surrogate.name == "SSO" and (resident or case.dtype != torch.float64):
            return
        core.schedule("ahead", case.seed)
        try:
            check(core, case, ALL[mode], wanted=wanted)
        except EmulationError as problem:
            if not resident or not re.search("do not fit|at most 32 channels", str(problem)):
                raise
            reject()

    check_case()
