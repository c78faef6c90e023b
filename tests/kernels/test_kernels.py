"""The kernels compute results and gradients of the float64 reference, on every instruction set.

The native calls of this file run on poisoned and fenced memory: see poison.py. fuzz.py draws random
combinations of all options.
"""

import itertools

import pytest
import torch

import snnlstm
from snnlstm.quant import state_quant
from tests.shared import flat
from tests.shared.cases import IN_KERNELS, LAYOUTS, PLAIN, SILENT, Inputs
from tests.shared.checks import check_gradients, check_results, infer
from tests.shared.cpu_kernels import ISAS, Kernels, native, needs_core, one_thread
from tests.shared.gradients import NAMES, compare, gradients
from tests.shared.helpers import same, steps, twins
from tests.shared.table import TABLE, tagged

pytestmark = needs_core

CASES = {name: case for name, (_, case) in TABLE.items()}
ALONE = {name: case for name, case in CASES.items() if name not in tagged("results")}
DOUBLE = PLAIN.but(dtype=torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_the_results_of_each_option_alone(kernels, name):
    for dtype in kernels.dtypes:
        check_results(CASES[name].but(dtype=dtype), kernels)


@pytest.mark.parametrize("channels", [1, 4, 8, 12, 16, 24])
def test_channels_around_the_length_of_each_vector(kernels, channels):
    """The numbers of channels lie around the vectors of 2, 4, 8 and 16 lanes."""
    for count in (channels - 1, channels, channels + 1):
        if count > 0:
            check_results(PLAIN.but(time=1, channels=count, height=3, width=9), kernels)


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "transposed"])
def test_outputs_are_channels_last_where_x_is(kernels, layout):
    is_last = layout == "channels_last"
    expected = torch.channels_last if is_last else torch.contiguous_format
    for options in ({}, {"record": False}, {"sequence": False, "record": False}):
        case = PLAIN.but(layouts=(layout,) * 4, **options)
        for tensor in infer(kernels, case, case.inputs()):
            assert tensor.flatten(0, -4).is_contiguous(memory_format=expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("where", Inputs._fields)
def test_nan_and_infinity_go_where_the_reference_lets_them(kernels, where, value):
    for options in (
        {"reset": "subtract", "pool": "max", "pool_size": (2, 2)},
        {"reset": "zero", "pool": "avg", "pool_size": (2, 2)},
        {"reset": "subtract", "quant": state_quant(4, threshold=0.4)},
    ):
        case = PLAIN.but(time=2, threshold="column", **options)
        if "quant" in options and kernels.algorithm != "direct":
            continue  # the quantiser makes a NaN the lowest level, so that it cannot be compared
        inputs = case.inputs()
        tensor = getattr(inputs, where)
        # Only the middle tap is changed: torch's convolutions differ in whether another tap reaches
        # pixels from which it meets only the border.
        taps = tuple(n // 2 for n in case.options.kernel_size) if where == "weight" else ()
        for end in (0, -1):
            tensor[(end,) * (tensor.dim() - len(taps)) + taps] = value
        out = infer(kernels, case, inputs)
        exactly = flat.last_name().endswith("-direct")
        with one_thread():
            exact = flat.reference(*inputs.double(), case.options)
        for name, actual, expected in zip(("spk", "syn", "mem"), out, exact, strict=True):
            if exactly:
                assert torch.equal(actual.isnan(), expected.isnan()), name
            else:  # Winograd's tiles mix and subtract their pixels
                assert not (expected.isnan() & ~actual.isnan()).any(), name
            settled = ~actual.isnan() & ~expected.isnan()
            if exactly or name != "spk":  # a potential that became NaN does not spike
                actual, expected = actual[settled], expected[settled].to(actual.dtype)
                torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_nan_spoils_no_other_sample(kernels):
    for case in (PLAIN, PLAIN.but(batch=5, channels=16)):
        inputs = case.inputs()
        clean = infer(kernels, case, inputs)
        inputs.x[1, 1] = torch.nan
        for actual, expected in zip(infer(kernels, case, inputs), clean, strict=True):
            assert torch.equal(actual[0], expected[0])  # an earlier step stays as it is, too
            assert torch.equal(actual[:, 0], expected[:, 0])
            assert torch.equal(actual[:, 2:], expected[:, 2:])


def _nan_gradients(cell, x, states, whole):
    """Runs a cell; returns where gradients of x, syn, mem and bias, and of weight, are NaN."""
    leaves = [t.clone().requires_grad_() for t in (x, *states)]
    if whole:
        spk, _, mem = cell(*leaves)
    else:
        steps, syn, mem = leaves
        for x in steps:
            spk, syn, mem = cell(x, syn, mem)
    (spk.sum() + mem.sum()).backward()
    *others, weight = (t.grad.isnan() for t in (*leaves, cell.conv.bias, cell.conv.weight))
    cell.zero_grad()
    return torch.cat([t.flatten() for t in others]), weight


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("channels", [3, 5, 13])
def test_gradients_are_nan_where_those_of_snntorch_are(isa, channels, value):
    """Neither the lanes that fill up a vector nor the border make NaN of zero times infinity."""
    calls = (1, 3), (3, 1), (3, 3)  # kernel and steps
    for dtype, (kernel, time) in itertools.product((torch.float32, torch.float64), calls):
        cell, reference = (c.to(dtype) for c in twins(3, channels, kernel, threshold=0.05))
        for spoiled, at in itertools.product(range(3), ((4, 4), (0, 7))):
            x = torch.randn(time, 2, 3, 8, 8, dtype=dtype)
            states = torch.zeros(2, 2, channels, 8, 8, dtype=dtype)
            (x[-1], *states)[spoiled][0, 0][at] = value
            with one_thread():
                expected, expected_weight = _nan_gradients(reference, x, states, whole=False)
            for whole in (True, False):
                with snnlstm.algorithm("direct"):
                    actual, weight = _nan_gradients(cell, x, states, whole)
                assert torch.equal(actual, expected)
                assert not (weight & ~expected_weight).any()  # torch multiplies borders in float64


def test_skipped_and_tiled_inputs_make_no_nan_of_infinity(isa):
    cell, reference = twins(8, 13, 3, threshold=0.05)
    x, states = steps(9, 2, 8, 16, 16, density=0.05), torch.zeros(2, 2, 13, 16, 16)
    x[-1, 0, 0, 4, 4] = torch.inf  # which the sample of x misses, or all sums would be direct
    for actual, expected in zip(
        _nan_gradients(cell, x, states, whole=True),
        _nan_gradients(reference, x, states, whole=False),
        strict=True,
    ):
        assert torch.equal(actual, expected)
    assert cell.path.name == f"cpu-{isa}-winograd4-sparse"


def test_the_cases_reach_every_kernel(isa):
    """The calls of ALONE run every kind of kernel and tile, so that the tests above test it."""
    seen, tiles = set(), set()
    for algorithm in native.cpu.ALGORITHMS:
        for case in ALONE.values():
            infer(Kernels(isa, algorithm), case, case.inputs())
            first, *last = flat.last_name().removeprefix(f"cpu-{isa}-").split("-")
            seen |= {first.rstrip("x1234"), *last}
            if first.startswith("winograd"):
                sides = first.removeprefix("winograd").split("x")
                tiles |= set(
                    zip(case.options.kernel_size, (int(s) for s in sides * 2), strict=False)
                )
    assert seen == {"direct", "winograd", "sparse"}
    # A pair is a kernel's taps along an axis, and the outputs of a tile; long kernels have parts.
    assert {(3, 2), (3, 3), (3, 4), (5, 2), (5, 4), (7, 4), (9, 3), (11, 4), (1, 1)} <= tiles


# ---- gradients ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALONE)
def test_the_gradients_of_each_option_alone(kernels, name):
    for dtype in kernels.dtypes:
        case = ALONE[name].but(dtype=dtype)
        # If rounding decides in one case, the next seed may give a case that can be compared.
        assert any(check_gradients(kernels, case.but(seed=seed)) for seed in range(3))


@pytest.mark.parametrize("kind", IN_KERNELS, ids=lambda s: s.name)
def test_each_surrogate(isa, kind):
    for pool in ({}, {"pool": "max", "pool_size": (2, 2)}, {"pool": "avg", "pool_size": (2, 2)}):
        assert check_gradients(Kernels(isa, "auto"), DOUBLE.but(surrogate=kind, **pool))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts(kernels, layout):
    """Equal numbers in another layout give bitwise equal results."""
    for which in range(4):
        layouts = ["contiguous"] * 4
        layouts[which] = layout
        case = PLAIN.but(time=2, batch=1, layouts=tuple(layouts))
        inputs, grads = case.inputs(), case.output_gradients()
        contiguous = Inputs(*(None if t is None else t.contiguous() for t in inputs))
        same(infer(kernels, case, inputs), infer(kernels, case, contiguous))
        actual = gradients(kernels.run, inputs, case.options, grads)
        expected = gradients(kernels.run, contiguous, case.options, [g.contiguous() for g in grads])
        for name in NAMES:
            assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (7, 7), (1, 3), (9, 5)], ids=str)
def test_every_size_of_image_up_to_13(isa, kernel):
    """The images cut off their last tile of 2, 3 or 4 pixels at every place, along either axis.

    The tiles of an axis do not depend on the other axis. The widest vectors meet each height with
    three widths, and others with one.
    """
    kernels, others = Kernels(isa, "winograd"), (0, 5, 8) if isa == ISAS[-1] else (0,)
    # Without spikes nothing jumps, so that every size can be compared.
    case = PLAIN.but(**SILENT, kernel_size=kernel, record=False, time=1, batch=1, in_channels=2)
    for height, other in itertools.product(range(1, 14), others):
        width = (height * 5 + other) % 13 + 1
        # 9 and 5 channels take whole and half vectors of AVX-512.
        sized = case.but(height=height, width=width, channels=9 if other else 5)
        check_results(sized, kernels)
        assert check_gradients(kernels, sized)


def test_long_sums_round_no_more_than_torchs(isa):
    """Direct convolution sums in pieces; one running sum would have five times the error."""
    kernels = Kernels(isa, "direct")
    case = PLAIN.but(kernel_size=(5, 5), reset="none", record=False)
    case = case.but(time=1, batch=2, in_channels=64, channels=64, density=1.0)
    inputs, grads = case.inputs(), [None, *case.output_gradients()[1:]]
    with one_thread():
        exact = gradients(flat.reference, inputs.double(), case.options, grads)
        torchs = gradients(flat.reference, inputs, case.options, grads)
        exact_out = flat.reference(*inputs.double(), case.options)
        torchs_out = flat.reference(*inputs, case.options)
    actual = gradients(kernels.run, inputs, case.options, grads)
    actual_out = kernels.run(*inputs, case.options)
    for ours, theirs, right in [
        (actual_out[1], torchs_out[1], exact_out[1]),
        *((actual[name], torchs[name], exact[name]) for name in ("x", "mem")),
    ]:
        assert (ours - right).norm() < 1.5 * (theirs - right).norm()


@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (3, 1), (9, 3)], ids=str)
@pytest.mark.parametrize("dilation", [1, 2])
def test_weights_of_silent_channels_have_a_gradient_of_exactly_zero(kernels, kernel, dilation):
    """With a rounding error as gradient, Adam would move such a weight as far as any other."""
    case = PLAIN.but(kernel_size=kernel, dilation=(dilation, dilation))
    case = case.but(time=1, batch=3, in_channels=8, channels=9, height=11, width=8)
    inputs, grads = case.inputs(), case.output_gradients()
    for t, channel in (inputs.x, 0), (inputs.x, 5), (inputs.mem, 1):
        t[..., channel, :, :] = 0
    actual = gradients(kernels.run, inputs, case.options, grads)
    with one_thread():
        exact = gradients(flat.reference, inputs.double(), case.options, grads)
    assert torch.equal(actual["weight"] == 0, exact["weight"] == 0)
    compare(actual, exact, kernels.gradient_error(case.dtype), grads)
