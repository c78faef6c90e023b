"""Runs the backward pass step by step, and forms the weight's gradient of all steps in one call.

So does the autograd node that the steps of a loop share: each step's backward pass leaves the
gradient of its gate sums behind, and one call forms the gradients of weight and bias from them.
"""

from __future__ import annotations

from dataclasses import replace

import flat
import pytest
import torch
from cases import Case
from gradients import compare
from gradients import gradients as of_reference
from modes import CASES, MODES, PLAIN, Mode

import snnlstm.run
from snnlstm.call import make_call
from snnlstm.native.tensors import Step


def choice_of(call):
    return snnlstm.run._native.choose(call, "direct")


def step_by_step(core, case: Case, mode: Mode, in_place: bool):
    """Gradients of x, syn, mem, weight and bias, and the output gradients that they belong to."""
    case = mode.of(case)
    inputs, grads, kept = case.inputs(), case.output_gradients(), []
    options = case.but(sequence=False, record=False).options
    with mode.running(core):
        syn, mem = inputs.syn, inputs.mem
        for x in inputs.x:
            call = make_call((x, syn, mem, *inputs[3:], options))
            _, syn, mem, saved = choice_of(call).forward(call, True)
            kept.append((call, saved))
        steps, of_x, of_states = [], [], (torch.zeros_like(syn), torch.zeros_like(mem))
        for (call, saved), of_spk, *of_later in reversed(list(zip(kept, *grads, strict=True))):
            d_gates = choice_of(call).empty_d_gates(call, saved if in_place else None)
            given = (of_spk, *(a + b for a, b in zip(of_states, of_later, strict=True)))
            wanted = (True, True, True, False, False, False)
            found = choice_of(call).backward(call, saved, given, wanted, d_gates)
            of_x.insert(0, found.x)
            of_states = found.syn, found.mem
            steps.insert(0, Step(call.x, call.mem, d_gates, None))
        weight, bias = choice_of(call).weight_gradient(steps, (True, True))
    names = ("x", "syn", "mem", "weight", "bias")
    all_found = (torch.stack(of_x), *of_states, weight, bias)
    return dict(zip(names, all_found, strict=True)), inputs, grads


def weight_gradient(core, case: Case, mode: Mode, x, mem, d_gates, wanted=(True, True)):
    """Gradients of weight and bias over the steps of x (T, N, ...), mem and d_gates."""
    inputs = case.inputs()
    options = case.but(sequence=False, record=False).options
    call = make_call((x[0], inputs.syn, inputs.mem, *inputs[3:], options))
    steps = [Step(*step, None) for step in zip(x, mem, d_gates.unsqueeze(1), strict=True)]
    with mode.running(core):
        return choice_of(call).weight_gradient(steps, wanted)


def random_gates(case: Case, mode: Mode, generator) -> torch.Tensor:
    """Gradients of gate sums, in the layout in which a step leaves them, in [0.5, 1.5)."""
    n, c, ho, wo = case.state_shape
    padded = -(-c // 8) * 8
    d_gates = torch.rand((case.time, n, ho * wo, 4, padded), generator=generator) + 0.5
    d_gates[..., c:] = 0
    return d_gates.to(mode.operands or case.dtype).flatten(3)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("float64", "plain"),
        ("float32", "plain"),
        ("tf32x3", "max pool"),
        ("tf32", "wide"),
        ("tf32x3", "channels last"),
        ("float32", "stride, dilation"),
        ("tf32x3", "stride, dilation"),
        ("bfloat16 autocast", "plain"),
        ("float16 states", "channels last"),
    ],
)
def test_steps_and_one_weight_gradient_equal_the_reference(core, mode, name, in_place):
    core.schedule("ahead", 1)
    case = CASES[name]
    found, inputs, grads = step_by_step(core, case, MODES[mode], in_place)
    options = MODES[mode].of(case).options
    exact = of_reference(flat.reference, inputs.double(), options, grads, tuple(found))
    compare(found, exact, MODES[mode].gradient, grads)


@pytest.mark.parametrize("mode", ["float64", "tf32x3"])
def test_steps_equal_the_sequence(core, mode):
    """The same kernels sum the same numbers, from states rounded alike."""
    case = PLAIN.but(reset="subtract")
    found, inputs, grads = step_by_step(core, case, MODES[mode], in_place=True)
    case = MODES[mode].of(case)
    with MODES[mode].running(core):
        whole = of_reference(MODES[mode].run, inputs, case.options, grads, tuple(found))
    for name, gradient in whole.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)


def test_only_one_of_both_is_wanted(core):
    mode, case = MODES["tf32"], MODES["tf32"].of(PLAIN)
    generator = torch.Generator().manual_seed(0)
    d_gates = random_gates(case, mode, generator)
    mem = torch.randn((case.time, *case.state_shape), generator=generator)
    given = core, case, mode, case.inputs().x, mem, d_gates
    weight, bias = weight_gradient(*given)
    assert torch.equal(weight_gradient(*given, wanted=(True, False))[0], weight)
    assert torch.equal(weight_gradient(*given, wanted=(False, True))[1], bias)
    exact = d_gates.unflatten(3, (4, -1))[..., : case.channels].double().sum((0, 1, 2)).flatten()
    torch.testing.assert_close(bias.double(), exact, atol=1e-4, rtol=1e-5)


def test_no_images_give_zeros(core):
    mode = MODES["tf32"]
    case = mode.of(PLAIN.but(batch=0))
    mem = torch.zeros((case.time, *case.state_shape))
    d_gates = random_gates(case, mode, None)
    found = weight_gradient(core, case, mode, case.inputs().x, mem, d_gates)
    assert not any(gradient.any() for gradient in found)


def test_a_step_takes_few_launches(core):
    mode = MODES["tf32"]
    core.checks(counters=True)
    step_by_step(core, CASES["channels last"], mode, in_place=True)
    seen = core.counters()
    time = CASES["channels last"].time
    launches = {name: c["launches"] for name, c in seen.items()}
    backward = {n: k for n, k in launches.items() if n.startswith(("backward", "data"))}
    assert backward == {"backward step (mma)": time, "data gradient (mma)": time}
    assert seen["weight gradient (mma)"]["launches"] == 1
    assert seen["sum gate gradients"]["launches"] == 1


def long_sums(core, mode: str, time: int, special: float | None = None):
    """Gradients of a 1x1 convolution of few channels in one block, and the same in float64."""
    one = replace(MODES[mode], multiprocessors=1)
    case = one.of(PLAIN.but(kernel_size=(1, 1), time=time, batch=1, in_channels=1,
                                    channels=8, height=32, width=32))  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    x = torch.rand((time, 1, 1, 32, 32), generator=generator) + 0.5
    mem = torch.rand((time, 1, 8, 32, 32), generator=generator) + 0.5
    if special is not None:
        x[0, 0, 0, 3, 5] = special
    d_gates = random_gates(case, one, generator)
    core.checks(races=False)
    found, _ = weight_gradient(core, case, one, x, mem, d_gates)
    inputs = torch.cat([x, mem], 2).double().flatten(3)
    exact = torch.einsum("tnpg,tnip->gi", d_gates.double(), inputs)
    return found.double().reshape(32, 9), exact


@pytest.mark.parametrize("mode", ["tf32", "tf32x3", "bfloat16 autocast"])
def test_long_sums_bear_tensor_cores_that_truncate(core, mode):
    """One accumulator over all of a block's tiles would shrink them by 5e-5 and more."""
    nearest, exact = long_sums(core, mode, time=128)
    core.settings.truncates = 1
    found, _ = long_sums(core, mode, time=128)
    assert abs(float((found / nearest).mean()) - 1) < 6e-6
    assert float((found / exact - 1).abs().max()) < {"tf32x3": 6e-6}.get(mode, 1e-3)


def test_long_sums_without_tensor_cores(core):
    found, exact = long_sums(core, "float32", time=64)
    assert float((found / exact - 1).abs().max()) < 2e-6


@pytest.mark.parametrize("special", [torch.inf, -torch.inf, torch.nan, 1e30])
@pytest.mark.parametrize("mode", ["tf32", "tf32x3"])
def test_infinity_and_nan_come_out_as_they_are(core, mode, special):
    found, exact = long_sums(core, mode, 1, special)
    if mode == "tf32x3":  # low parts of either sign meet an infinity: it, or NaN
        assert torch.equal(found.isfinite(), exact.isfinite())
        found, exact = (torch.where(exact.isfinite(), t, 0) for t in (found, exact))
    torch.testing.assert_close(found, exact, atol=0, rtol=1e-3, equal_nan=True)
