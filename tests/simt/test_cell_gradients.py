"""Gradients of the CUDA kernels, emulated, against float64 autograd through the reference.

Where products are as good as float32's, every option is tried and the decisions (resets, maxima,
levels) agree with the reference's. Coarser products decide otherwise here and there: they are
compared on calls without such decisions.
"""

from dataclasses import replace

import pytest
import torch
from backend import simt_core
from cases import Case, cases, wanting_gradients
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import decisions
from test_cell import CASES, MODES, PLAIN, Mode, crossed, with_options

from snnlstm import reference, surrogate

# Errors relative to the largest element of a gradient.
EXACT = {
    "float64": 1e-10,
    "float32": 3e-5,
    "float32 on sm_75": 3e-5,
    "tf32x3": 6e-5,
    "float32 behind torch": 3e-5,
    "float64 behind torch": 1e-10,
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
SCHEDULES = [("in_order", 0), ("shuffled", 1), ("ahead", 1)]
NAMES = ("x", "syn", "mem", "weight", "bias", "threshold")
OUTPUTS = ("spk", "syn", "mem")


@pytest.fixture
def core():
    found = simt_core("faults")
    yield found
    found.reset()


def agrees(case: Case, mode: Mode, inputs) -> bool:
    """Whether kernels and reference decide alike wherever the function jumps."""
    options = case.recorded().options
    with torch.no_grad():
        own = mode.run(*inputs, options)
        exact = reference.run(*inputs.double(), options)
    pairs = zip(decisions(case, inputs, *own[1:]), decisions(case, inputs, *exact[1:]), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def gradients(run, inputs, options, output_gradients, wanted=NAMES) -> dict[str, torch.Tensor]:
    """By name; an output whose gradient is None is not used."""
    leaves = wanting_gradients(inputs)
    for name in set(NAMES) - set(wanted):
        if getattr(leaves, name) is not None:
            getattr(leaves, name).requires_grad_(False)
    sources = {n: getattr(leaves, n) for n in wanted if getattr(leaves, n) is not None}
    out = run(*leaves, options)
    pairs = [
        (o, g.to(o.dtype))
        for o, g in zip(out, output_gradients, strict=True)
        if g is not None and o.requires_grad
    ]
    if not pairs or not sources:
        return {name: torch.zeros_like(leaf) for name, leaf in sources.items()}
    torch.manual_seed(0)  # for the stochastic surrogate
    found = torch.autograd.grad(
        [o for o, _ in pairs],
        list(sources.values()),
        [g for _, g in pairs],
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(sources, found, strict=True))


def output_gradients(case: Case, outputs=OUTPUTS) -> list[torch.Tensor | None]:
    """Random ones of the `outputs`, None for the others."""
    random = torch.Generator().manual_seed(case.seed + 1)
    shaped = reference.run(*case.inputs(), case.options)
    return [
        torch.randn(o.shape, generator=random, dtype=torch.float64).to(case.dtype)
        if name in outputs
        else None
        for name, o in zip(OUTPUTS, shaped, strict=True)
    ]


def compare(actual, exact, error: float, output_gradients) -> None:
    """Each gradient within `error` of its largest element; the threshold's within `error` of all
    the terms that it is the sum of."""
    terms = sum(float(g.double().abs().sum()) for g in output_gradients if g is not None)
    assert actual.keys() == exact.keys()
    for name, one in actual.items():
        other = exact[name].double()
        assert one.isfinite().all(), name
        scale = max(float(other.abs().max()), terms if name == "threshold" else 1e-30)
        worst = float((one.double() - other).abs().max())
        assert worst <= error * scale, f"{name}: {worst:.3g} where {scale:.3g} is largest"


def check(core, case: Case, mode: Mode, error: float, outputs=OUTPUTS, wanted=NAMES) -> bool:
    """False where rounding led kernels and reference to different decisions."""
    case = mode.of(case)
    inputs = case.inputs()
    grads = output_gradients(case, outputs)
    with mode.running(core):
        if error <= max(EXACT.values()) and not agrees(case, mode, inputs):
            return False
        actual = gradients(mode.run, inputs, case.options, grads, wanted)
    exact = gradients(reference.run, inputs.double(), case.options, grads, wanted)
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
@pytest.mark.parametrize("mode", ["float32 behind torch", "tf32x3"])
def test_only_what_is_wanted(core, mode, wanted):
    assert check(core, PLAIN, MODES[mode], EXACT[mode], wanted=wanted)


def test_results_are_the_same_under_every_schedule(core):
    """So torch.use_deterministic_algorithms has nothing to change."""
    mode = MODES["tf32"]
    case = mode.of(CASES["channels last"])
    inputs, grads = case.inputs(), output_gradients(case)
    seen = []
    for schedule in (*SCHEDULES, ("ahead", 2)):
        core.schedule(*schedule)
        with mode.running(core):
            seen.append(gradients(mode.run, inputs, case.options, grads))
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
        if case.options.surrogate.name == "SSO" and case.dtype != torch.float64:
            return
        core.schedule("ahead", case.seed)
        check(core, case, MODES[mode], EXACT[mode], wanted=wanted)

    check_case()
