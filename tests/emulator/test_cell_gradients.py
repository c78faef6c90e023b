"""Compares gradients of the emulated CUDA kernels with float64 autograd through the reference.

If products are as good as float32's, every option is tried, and the decisions (resets, maxima,
levels) agree with the reference's. Coarser products would decide otherwise here and there: they are
tried on calls without such decisions.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.emulator.modes import (
    ALL,
    CASES,
    JUMPING,
    MODES,
    PLAIN,
    SMOOTH,
    Mode,
    crossed,
    named,
)
from tests.shared import flat
from tests.shared.cases import Case, cases, drawing
from tests.shared.gradients import (
    NAMES,
    OUTPUTS,
    agrees,
    exact_or_undecided,
    gradients,
    gradients_for,
)


def check(core, case: Case, mode: Mode, outputs=OUTPUTS, wanted=NAMES) -> bool:
    """Returns False if gradients differ because rounding led to different decisions."""
    case = mode.applied(case)
    inputs = case.inputs()
    grads = gradients_for(case, outputs)
    with mode.running(core):
        actual = gradients(mode.run, inputs, case.options, grads, wanted)
    exact = gradients(flat.reference, inputs.double(), case.options, grads, wanted)

    def decided() -> bool:
        with mode.running(core):
            return not mode.exact or agrees(mode.run, case, inputs)

    return exact_or_undecided(actual, exact, mode.gradient, grads, decided)


@pytest.mark.parametrize(("mode", "case", "seed"), crossed(named(ALL, True), JUMPING))
def test_exact_gradients(core, mode, case, seed):
    core.settings.seed = seed
    assert check(core, case, ALL[mode]), "choose another seed"


@pytest.mark.parametrize(("mode", "case", "seed"), crossed(named(ALL, False), SMOOTH))
def test_coarse_gradients(core, mode, case, seed):
    core.settings.seed = seed
    assert check(core, case, ALL[mode])


# One block of a call has as many pixels as blocks of large calls.
ONE = MODES["float32 on sm_75"], replace(MODES["float32"], multiprocessors=1)
NARROW = PLAIN.but(in_channels=20, channels=8, height=16, time=2)
TINY = PLAIN.but(time=2, batch=1, height=4)
FEW = [
    # Data gradients of a stride, and windows that are larger than a tile.
    *((mode, NARROW.but(stride=(2, 1))) for mode in ONE),
    *((mode, NARROW.but(width=18, batch=1, time=1, pool="max", pool_size=(16, 18)))
      for mode in (*ONE, MODES["float64"])),
    (MODES["tf32"], SMOOTH["average pool"].but(time=2)),  # pooled in float32
    # Blocks of padded samples end at once, and cuDNN convolves padded samples.
    *((ALL[name], CASES[case])
      for name in ("float32 on sm_75", "float64", "tf32", "float64 cudnn")
      for case in ("lengths", "lengths, avg_pool")),
]  # fmt: skip


@pytest.mark.parametrize(("mode", "case"), FEW)
def test_kernels_that_few_calls_reach(core, mode, case):
    assert check(core, case, mode), "choose another seed"


@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("syn", "mem"), ("threshold", "bias")])
@pytest.mark.parametrize("mode", ["float32 cudnn", "float32"])
def test_only_wanted_gradients_are_computed(core, mode, wanted):
    assert check(core, CASES["two steps"], ALL[mode], wanted=wanted)


def test_results_are_the_same_under_every_schedule(core):
    """Gradients are bitwise equal, so torch.use_deterministic_algorithms has nothing to change."""
    mode = MODES["tf32"]
    case = mode.applied(CASES["channels last"])
    inputs, grads = case.inputs(), gradients_for(case)
    seen = []
    for seed in range(3):
        core.settings.seed = seed
        with mode.running(core):
            seen.append(gradients(mode.run, inputs, case.options, grads))
    for other in seen[1:]:
        for name, gradient in seen[0].items():
            assert torch.equal(gradient, other[name]), name


@pytest.mark.drawn
@pytest.mark.emulator_long
@pytest.mark.parametrize("mode", named(ALL, True))
def test_gradients_of_random_calls(core, mode):
    subsets = st.sets(st.sampled_from(NAMES), min_size=1).map(lambda s: tuple(sorted(s)))

    @drawing(40)
    @given(cases((ALL[mode].dtype,)), subsets)
    def check_case(case: Case, wanted: tuple) -> None:
        core.settings.seed = case.seed
        check(core, case, ALL[mode], wanted=wanted)

    check_case()
