"""The forward kernels compute what the float64 reference does, on every instruction set.

All native calls of this file run on poisoned and fenced memory: see poison.py. fuzz.py draws random
combinations of all options.
"""

import flat
import pytest
import torch
from alone import ALONE, LEVELS
from cases import PLAIN
from checks import check_results, infer
from cpu_kernels import Kernels, native, one_thread

import snnlstm
from snnlstm.functional import sconv2dlstm
from snnlstm.quant import state_quant

pytestmark = pytest.mark.skipif(native is None, reason="the core is not built")

CASES = ALONE | LEVELS


@pytest.mark.parametrize("name", CASES)
def test_each_option_alone(kernels, name):
    for dtype in kernels.dtypes:
        check_results(CASES[name].but(dtype=dtype), kernels)


@pytest.mark.parametrize("channels", [1, 4, 8, 12, 16, 24])
def test_whole_and_broken_vectors(kernels, channels):
    """The numbers of channels lie around the vectors of 2, 4, 8 and 16 lanes."""
    for count in (channels - 1, channels, channels + 1):
        if count > 0:
            check_results(PLAIN.but(time=1, channels=count, height=3, width=9), kernels)


def test_outputs_are_channels_last_where_x_is(kernels):
    for options in ({}, {"record": False}, {"sequence": False, "record": False}):
        case = PLAIN.but(layouts=("channels_last",) * 4, **options)
        for tensor in infer(kernels, case, case.inputs()):
            assert tensor.flatten(0, -4).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kernel", [(3, 3), (5, 3)], ids=str)
def test_pixels_that_see_the_same_have_the_same_bits_directly(isa, kernel):
    """With equal bits max_pool chooses as torch does on a blank background."""
    for dtype in (torch.float32, torch.float64):
        case = PLAIN.but(kernel_size=kernel, dtype=dtype, time=2, channels=17)
        case = case.but(height=23, width=29)
        inputs = case.inputs()
        for one in (inputs.x, inputs.syn, inputs.mem):  # two equal parts, with zeros around them
            one[..., 12:23, 15:29] = one[..., :11, :14].clone()
            one[..., 11, :], one[..., 14] = 0, 0
        mem = infer(Kernels(isa, "direct"), case, inputs)[2]
        margin = 2 * case.time  # pixels within this margin depend on pixels beyond their part
        inner = slice(margin, 11 - margin), slice(margin, 14 - margin)
        first, second = mem[..., :11, :14], mem[..., 12:23, 15:29]
        assert torch.equal(first[..., inner[0], inner[1]], second[..., inner[0], inner[1]])


def test_inhibition_lets_the_lowest_of_equal_neurons_win(kernels):
    """All potentials are equal, so neuron (0, 0, 0) wins in every sample and step."""
    case = PLAIN.but(height=40, width=30, bias=False, reset="none", inhibition=True)
    inputs = case.inputs()
    inputs.weight.zero_()
    inputs.threshold.fill_(0.01)
    spk = infer(kernels, case, inputs._replace(syn=torch.ones_like(inputs.syn)))[0]
    assert (spk.flatten(2).argmax(-1) == 0).all()
    assert (spk.flatten(2).sum(-1) == 1).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("where", ["x", "syn", "mem", "weight", "bias", "threshold"])
def test_nan_and_infinity_go_where_the_reference_lets_them(kernels, where, value):
    for options in (
        {"reset": "subtract", "pool": "max", "pool_size": (2, 2)},
        {"reset": "zero", "pool": "avg", "pool_size": (2, 2)},
        {"reset": "subtract", "quant": state_quant(4, threshold=0.4)},
        {"inhibition": True},
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
        for name, one, other in zip(("spk", "syn", "mem"), out, exact, strict=True):
            if exactly:
                assert torch.equal(one.isnan(), other.isnan()), name
            else:  # Winograd's tiles mix and subtract their pixels
                assert not (other.isnan() & ~one.isnan()).any(), name
            settled = ~one.isnan() & ~other.isnan()
            if exactly or name != "spk":  # a potential that became NaN does not spike
                one, other = one[settled], other[settled].to(one.dtype)
                torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_nan_spoils_no_other_sample(kernels):
    for case in (PLAIN, PLAIN.but(batch=5, channels=16)):
        inputs = case.inputs()
        clean = infer(kernels, case, inputs)
        inputs.x[1, 1] = torch.nan
        for one, other in zip(infer(kernels, case, inputs), clean, strict=True):
            assert torch.equal(one[0], other[0])  # an earlier step stays as it is, too
            assert torch.equal(one[:, 0], other[:, 0])
            assert torch.equal(one[:, 2:], other[:, 2:])


@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (3, 0, 2, 5, 5), (0, 2, 2, 5, 5)], ids=str)
def test_an_empty_batch_or_sequence_needs_no_kernel(shape):
    weight = torch.randn(12, 5, 3, 3, requires_grad=True)
    record = len(shape) == 5
    spk, syn, mem = sconv2dlstm(torch.zeros(shape), weight=weight, max_pool=2, record=record)
    assert spk.shape == (*shape[:-3], 3, 2, 2)
    assert syn.shape == mem.shape == (*shape[:-3], 3, 5, 5)
    if spk.requires_grad:  # a sequence without steps has no graph
        (spk.sum() + mem.sum()).backward()
        assert not weight.grad.any()


def test_the_module_takes_these_kernels(kernels):
    cell = snnlstm.SConv2dLSTM(3, 16, 3, threshold=0.1)
    cell(torch.zeros(2, 3, 6, 6))
    assert str(cell.path).startswith(f"cpu-{kernels.isa}-")
    assert kernels.algorithm == "auto" or kernels.algorithm in cell.path.name


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
