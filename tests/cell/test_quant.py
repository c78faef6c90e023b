"""Quantisers of states have snnTorch's levels and values, and straight-through gradients."""

import inspect

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from snntorch.functional.quant import state_quant as theirs

import snnlstm
from benchmarks import peak_memory
from snnlstm.compat.snntorch import recognise_quant
from snnlstm.quant import StateQuant, state_quant
from tests.shared.cases import drawing
from tests.shared.helpers import measures_memory, ours, steps, train_alike, twins


def plainly(x, levels):
    """Computes the definition: least |level - x|, the lowest index on ties, index 0 for NaN."""
    return levels[(levels - x[..., None]).abs().min(-1).indices].to(x.dtype)


def hard_points(levels):
    """Returns numbers at which a shortcut could differ from the definition."""
    middles = (levels[1:] + levels[:-1]) / 2
    edges = torch.cat([levels, middles])
    near = torch.cat([torch.nextafter(edges, torch.full_like(edges, s * 9)) for s in (-1, 1)])
    huge = torch.tensor([1.0, -1.0])[:, None] * 2.0 ** torch.arange(0, 126, 3)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-45, 3.4e38])
    wide = torch.cat([torch.randn(300) * scale for scale in (1, 1e3, 1e7, 1e30)])
    return torch.cat([edges, near, huge.flatten(), huge.flatten() + 1, special, wide])


def test_its_defaults_are_snntorchs():
    defaults = [
        {name: parameter.default for name, parameter in inspect.signature(make).parameters.items()}
        for make in (state_quant, theirs)
    ]
    assert defaults[0] == defaults[1]
    assert len(state_quant(16).levels) == 2**16


LIMITS = ({}, {"threshold": 0.1, "lower_limit": 0.3, "upper_limit": 0.7}, {"multiplier": 0.6})


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8, 10])
@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("centred", [True, False])
def test_levels_and_values_equal_snntorchs(bits, uniform, centred):
    """Levels and values are equal to the last bit."""
    for kwargs in LIMITS:
        reference = theirs(bits, uniform, centred, **kwargs)
        quant = state_quant(bits, uniform, centred, **kwargs)
        levels = reference.__closure__[0].cell_contents
        assert torch.equal(quant.levels, levels)
        x = hard_points(levels)
        assert torch.equal(StateQuant(levels)(x), reference(x))


def test_levels_may_lie_on_one_side_of_the_centre_and_are_made_on_the_cpu():
    for centred, limits in ((False, {"lower_limit": -1}), (True, {"upper_limit": 0})):
        levels = theirs(3, False, centred, **limits).__closure__[0].cell_contents
        with torch.device("meta"):
            quant = state_quant(3, False, centred, **limits)
        assert torch.equal(quant.levels, levels)


@pytest.mark.drawn
@drawing(100)
@given(
    st.lists(st.floats(-8, 8, width=16), min_size=1, max_size=9),
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    st.randoms(use_true_random=False),
)
def test_any_levels_give_what_the_definition_gives(values, dtype, random):
    """The levels ascend, repeat themselves, or have no order at all."""
    shuffled = random.sample(values, len(values))
    for levels in (torch.tensor(sorted(values)), torch.tensor(shuffled)):
        x = hard_points(levels).to(dtype)
        actual = StateQuant(levels)(x)
        assert actual.dtype == dtype
        assert torch.equal(actual, plainly(x, levels))


@pytest.mark.parametrize("order", [1, -1], ids=["ascending", "descending"])
def test_images_of_many_blocks_in_any_order_of_memory(order):
    quant, x = StateQuant(order * torch.linspace(-1, 1, 33)), 3 * torch.randn(2, 3, 101, 127)
    for image in (x, x.to(memory_format=torch.channels_last), x.double()):
        assert torch.equal(quant(image), plainly(image, quant.levels))


TABLES = [
    *(state_quant(bits, **kwargs).levels for bits in (1, 3, 8) for kwargs in LIMITS),
    torch.tensor([0.25]),
    torch.tensor([-0.5, 0.0, 0.75]),
    torch.tensor([-1.0, -1.0, 0.0, 0.0, 0.0, 0.5, 2.0, 2.0]),  # the first of equal levels wins
    1000 + torch.arange(19) * 2.0**-13,  # neighbours, whose distances from many numbers are equal
]


def check_that_cells_quantise():
    """Compares syn of a step that keeps it, but for its quantisation, with the definition."""
    for levels in TABLES:
        for dtype in (torch.float32, torch.float64):
            cell = ours(1, 3, 1, state_quant=StateQuant(levels)).to(dtype)
            with torch.no_grad():
                cell.conv.weight.zero_()
                cell.conv.bias.copy_(torch.tensor([-99.0, 99.0, 0.0, 0.0]).repeat_interleave(3))
            syn = hard_points(levels).to(dtype)
            syn = syn[: len(syn) // 3 * 3].view(1, 3, 1, -1)
            actual = cell(torch.zeros_like(syn[:, :1]), syn, torch.zeros_like(syn))[1]
            assert torch.equal(actual, plainly(syn, levels))
    return cell.path


@pytest.mark.emulator_long
def test_cells_quantise_as_the_definition_says(backend):
    backend.check(check_that_cells_quantise())


def test_every_instruction_set_quantises_as_the_definition_says(isa):
    assert isa in str(check_that_cells_quantise())


def test_the_gradient_passes_straight_through_out_of_range_too():
    x = torch.tensor([-50.0, -0.3, 0.2, 50.0, torch.nan], requires_grad=True)
    grad = torch.tensor([1.0, -2.0, 3.0, 4.0, 5.0])
    state_quant(2)(x).backward(grad)
    assert torch.equal(x.grad, grad)


@measures_memory
def test_memory_is_not_elements_times_levels():
    """snnTorch needs 6 GiB for this tensor of 32 x 64 x 32 x 32 at 8 bits."""
    quant, x = state_quant(8), torch.randn(32, 64, 32, 32)
    quant(x[:1])
    peak = peak_memory.watching("cpu")
    quant(x)
    assert peak() < 3 * x.nbytes


def test_any_other_callable_works(backend):
    class Rounded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return (x * 8).round() / 8

        @staticmethod
        def backward(ctx, grad):
            return grad

    actual, expected = twins(state_quant=Rounded.apply, avg_pool=2)
    train_alike(actual, expected, steps(2, 2, 2, 6, 7))
    assert str(actual.path) == "reference (state_quant is unknown to the kernels)"


def test_levels_that_the_kernels_cannot_take_use_the_reference_path(backend):
    for levels, reason in (
        (torch.linspace(-1, 1, 5, dtype=torch.float64), "levels of torch.float64"),
        (torch.linspace(1, -1, 5), "levels that do not ascend"),
    ):
        cell = ours(state_quant=StateQuant(levels))
        assert torch.isin(cell(steps(1, 1, 2, 5, 5)[0])[2], levels.float()).all()
        assert reason in cell.path.reason
    cell = ours(state_quant=StateQuant(torch.linspace(-1, 1, 5, dtype=torch.float64))).double()
    cell(steps(1, 1, 2, 5, 5)[0].double())
    backend.check(cell.path)


def test_it_differentiates_forward_and_under_vmap():
    quant, x = state_quant(4), torch.linspace(-2, 2, 64)
    out, tangent = torch.func.jvp(quant, (x,), (torch.arange(64.0),))
    assert torch.equal(out, quant(x))
    assert torch.equal(tangent, torch.arange(64.0))
    assert torch.equal(torch.func.vmap(quant)(x.view(8, 8)).flatten(), quant(x))


def test_levels_are_copied():
    levels = torch.tensor([0.0, 1.0])
    quant = StateQuant(levels)
    levels.fill_(7)
    assert quant.levels.tolist() == [0, 1]


def test_snntorchs_quantiser_becomes_ours_and_others_stay_what_they_are():
    spoiled = theirs(2, threshold=float("inf"))
    cell = ours()
    cell.state_quant = theirs(4)
    assert cell.state_quant == state_quant(4)
    for foreign in (spoiled, len, snnlstm.surrogate.atan(), lambda x: x):
        assert recognise_quant(foreign) is foreign
