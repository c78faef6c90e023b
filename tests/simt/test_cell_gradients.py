"""Gradients of the CUDA kernels, emulated, against float64 autograd through the reference.

Where products are as good as float32's, every option is tried and the decisions (resets, maxima,
levels) agree with the reference's. Coarser products decide otherwise here and there: they are
compared on calls without such decisions.
"""

from dataclasses import replace

import flat
import pytest
import torch
from backend import simt_core
from cases import Case, cases
from gradients import NAMES, OUTPUTS, agrees, compare, gradients, of_outputs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cell import CASES, HYBRID, MODES, PLAIN, Mode, crossed, with_options

from snnlstm import surrogate

# Errors relative to the largest element of a gradient.
EXACT = {
    "float64": 1e-10,
    "float32": 3e-5,
    "float32 on sm_75": 3e-5,
    "tf32x3": 3e-5,
    "float32 behind torch": 3e-5,
    "float64 behind torch": 1e-10,
    "float32 hybrid": 3e-5,
    "float64 hybrid": 1e-10,
    "tf32x3 hybrid": 3e-5,
}
COARSE = {
    "tf32": 1e-2,
    "float16 states": 2e-2,
    "bfloat16 states": 1.2e-1,
    "float16 autocast": 1e-2,
    "bfloat16 autocast": 8e-2,
    "bfloat16 autocast on sm_75": 8e-2,
    "bfloat16 behind torch": 1.2e-1,
    "bfloat16 autocast behind torch": 8e-2,
    "bfloat16 states hybrid": 1.2e-1,
    "bfloat16 autocast hybrid": 8e-2,
}
SMOOTH = {
    "plain": PLAIN,
    "one step": with_options(sequence=False, record=False),
    "last states": with_options(record=False),
    "wide": CASES["wide"],
    "channels last": CASES["channels last"],
    "short chunks": CASES["short chunks"],
    "stride, dilation": CASES["stride, dilation"],
    "average pool": with_options(pool="avg", pool_size=(2, 2)),
    "one pixel": CASES["one pixel"],
    "threshold per channel": CASES["threshold per channel"],
}
JUMPING = {
    **CASES,
    "every neuron's own surrogate": with_options(surrogate=surrogate.sigmoid(25), reset="zero"),
    "stochastic": with_options(surrogate=surrogate.SSO(0.1, 0.2)),
    "no gradient of spikes": with_options(surrogate=surrogate.NONE),
    "kernel 5x5": with_options(kernel_size=(5, 5)),
    "no bias": replace(PLAIN, bias=False),
}
MODES = MODES | HYBRID
SCHEDULES = [("in_order", 0), ("shuffled", 1), ("ahead", 1)]


@pytest.fixture
def core():
    found = simt_core("faults")
    yield found
    found.reset()


def check(core, case: Case, mode: Mode, error: float, outputs=OUTPUTS, wanted=NAMES) -> bool:
    """False where rounding led kernels and reference to different decisions."""
    case = mode.of(case)
    inputs = case.inputs()
    grads = of_outputs(case, outputs)
    with mode.running(core):
        if error <= max(EXACT.values()) and not agrees(mode.run, case, inputs):
            return False
        actual = gradients(mode.run, inputs, case.options, grads, wanted)
    exact = gradients(flat.reference, inputs.double(), case.options, grads, wanted)
    compare(actual, exact, error, grads)
    return True


@pytest.mark.parametrize(("mode", "name"), crossed(EXACT, JUMPING))
def test_exact_gradients(core, mode, name):
    if name == "stochastic" and MODES[mode].dtype != torch.float64:
        pytest.skip("in float64 the oracle draws the same noise")
    core.schedule(*SCHEDULES[(list(EXACT).index(mode) + list(JUMPING).index(name)) % 3])
    assert check(core, JUMPING[name], MODES[mode], EXACT[mode]), "choose another seed"


@pytest.mark.parametrize(("mode", "name"), crossed(COARSE, SMOOTH))
def test_coarse_gradients(core, mode, name):
    core.schedule(*SCHEDULES[(list(COARSE).index(mode) + list(SMOOTH).index(name)) % 3])
    assert check(core, SMOOTH[name], MODES[mode], COARSE[mode])


@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("syn", "mem"), ("threshold", "bias")])
@pytest.mark.parametrize("mode", ["float32 behind torch", "tf32x3", "float32 hybrid"])
def test_only_what_is_wanted(core, mode, wanted):
    assert check(core, PLAIN, MODES[mode], EXACT[mode], wanted=wanted)


def check_every_schedule(core, mode, case):
    """The gradients are the same, bit for bit, whichever warp runs ahead."""
    inputs, grads = case.inputs(), of_outputs(case)
    seen = []
    for schedule in (*SCHEDULES, ("ahead", 2)):
        core.schedule(*schedule)
        with mode.running(core):
            seen.append(gradients(mode.run, inputs, case.options, grads))
    for other in seen[1:]:
        for name, gradient in seen[0].items():
            assert torch.equal(gradient, other[name]), name


def test_results_are_the_same_under_every_schedule(core):
    """So torch.use_deterministic_algorithms has nothing to change."""
    mode = MODES["tf32"]
    check_every_schedule(core, mode, mode.of(CASES["channels last"]))


@pytest.mark.simt_long
@pytest.mark.parametrize("mode", EXACT)
def test_gradients_of_random_calls(core, mode):
    subsets = st.sets(st.sampled_from(NAMES), min_size=1).map(lambda s: tuple(sorted(s)))

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(cases((MODES[mode].dtype,)), subsets)
    def check_case(case: Case, wanted: tuple) -> None:
        if case.options.surrogate.name == "SSO" and case.dtype != torch.float64:
            return
        core.schedule("ahead", case.seed)
        check(core, case, MODES[mode], EXACT[mode], wanted=wanted)

    check_case()
