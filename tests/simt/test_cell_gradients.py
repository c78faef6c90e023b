"""Gradients of the CUDA kernels, emulated, against float64 autograd through the reference.

Where products are as good as float32's, every option is tried and the decisions (resets, maxima,
levels) agree with the reference's. Coarser products decide otherwise here and there: they are
compared on calls without such decisions.
"""

from dataclasses import replace

import pytest
import torch
from backend import SOURCES, simt_core
from cases import Case, cases
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cell import CASES, MODES, PLAIN, Mode, with_options
from test_kernel_gradients import NAMES, OUTPUTS, agrees, compare, gradients

from snnlstm import autograd, reference, surrogate

pytestmark = pytest.mark.skipif(
    not any("void backward(const BackwardArgs" in p.read_text() for p in SOURCES),
    reason="there is no CUDA backward pass",
)

# Errors relative to the largest element of a gradient.
EXACT = {"float64": 1e-10, "float32": 3e-5, "float32 on sm_75": 3e-5, "tf32x3": 6e-5}
COARSE = {
    "tf32": 1e-2,
    "float16 states": 2e-2,
    "bfloat16 states": 1.2e-1,
    "float16 autocast": 1e-2,
    "bfloat16 autocast": 8e-2,
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
    "no bias": replace(PLAIN, bias=False),
}
SCHEDULES = [("in_order", 0), ("shuffled", 1), ("ahead", 1)]


@pytest.fixture
def core():
    found = simt_core("faults")
    yield found
    found.reset()


def check(core, case: Case, mode: Mode, error: float, outputs=OUTPUTS, wanted=NAMES) -> bool:
    """False where rounding led kernels and reference to different decisions."""
    case = replace(case, dtype=mode.dtype)
    inputs = case.inputs()
    core.target(
        matrix=mode.matrix, algorithm=mode.algorithm, compute_capability=mode.compute_capability
    )
    with core.installed():
        if error <= max(EXACT.values()) and not agrees(case, inputs):
            return False
        exact_out = reference.run(*inputs.double(), case.options)
        grads = [
            g if name in outputs else None
            for name, g in zip(OUTPUTS, case.output_gradients(exact_out), strict=True)
        ]
        actual = gradients(autograd.run, inputs, case.options, grads, wanted)
    exact = gradients(reference.run, inputs.double(), case.options, grads, wanted)
    compare(actual, exact, error, grads)
    return True


@pytest.mark.parametrize("name", JUMPING)
@pytest.mark.parametrize("mode", EXACT)
def test_exact_gradients(core, mode, name):
    if name == "stochastic" and mode != "float64":
        pytest.skip("in float64 the oracle draws the same noise")
    core.schedule(*SCHEDULES[(list(EXACT).index(mode) + list(JUMPING).index(name)) % 3])
    assert check(core, JUMPING[name], MODES[mode], EXACT[mode]), "choose another seed"


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("mode", COARSE)
def test_coarse_gradients(core, mode, name):
    core.schedule(*SCHEDULES[(list(COARSE).index(mode) + list(SMOOTH).index(name)) % 3])
    assert check(core, SMOOTH[name], MODES[mode], COARSE[mode])


@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("syn", "mem"), ("threshold", "bias")])
@pytest.mark.parametrize("mode", ["float32", "tf32x3"])
def test_only_what_is_wanted(core, mode, wanted):
    assert check(core, PLAIN, MODES[mode], EXACT[mode], wanted=wanted)


def test_a_deterministic_result_is_the_same_under_every_schedule(core):
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        case = CASES["wide"]
        inputs = case.inputs()
        grads = case.output_gradients(reference.run(*inputs.double(), case.options))
        seen = []
        for schedule in (*SCHEDULES, ("ahead", 2)):
            core.schedule(*schedule)
            core.target(matrix="tf32", algorithm="mma")
            with core.installed():
                seen.append(gradients(autograd.run, inputs, case.options, grads))
    finally:
        torch.use_deterministic_algorithms(before)
    for other in seen[1:]:
        for name, gradient in seen[0].items():
            assert torch.equal(gradient, other[name]), name


@pytest.mark.simt_long
@pytest.mark.parametrize("mode", EXACT)
def test_gradients_of_random_calls(core, mode):
    subsets = st.sets(st.sampled_from(NAMES), min_size=1).map(lambda s: tuple(sorted(s)))

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(cases((MODES[mode].dtype,)), subsets)
    def check_case(case: Case, wanted: tuple) -> None:
        if case.options.surrogate.name == "SSO" and mode != "float64":
            return
        core.schedule("ahead", case.seed)
        check(core, case, MODES[mode], EXACT[mode], wanted=wanted)

    check_case()
