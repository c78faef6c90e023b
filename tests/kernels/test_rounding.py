"""Winograd's tiles round little more than torch's float32 convolution, however large the weights.

docs/numerics.md has more errors. A gain is the root mean square of the gates per unit of input.
"""

import functools
import os
from statistics import median

import pytest
import torch
from torch import Tensor

import snnlstm
from snnlstm.native import cpu
from tests.shared import flat
from tests.shared.cases import LAYOUTS, PLAIN, SILENT, Case, Inputs, laid_out, wanting_gradients
from tests.shared.cpu_kernels import needs_core, one_thread
from tests.shared.gradients import Run

pytestmark = needs_core

# Without spikes and resets nothing jumps.
LAYER = PLAIN.but(**SILENT, in_channels=2, channels=16, height=16, width=16)
GRADIENTS = ("x", "syn", "mem", "weight", "bias")


def results(run: Run, case: Case, inputs: Inputs) -> list[Tensor]:
    """Returns mem of every step, and the gradients that a random gradient of mem gives."""
    leaves = wanting_gradients(inputs)
    mem = run(*leaves, case.options)[2]
    wanted = [getattr(leaves, name) for name in GRADIENTS]
    return [mem.detach(), *torch.autograd.grad(mem, wanted, case.output_gradients()[2].to(mem))]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


@functools.cache
def expected(case: Case) -> tuple[list[Tensor], list[float]]:
    """Returns the results in float64, and the errors of torch's in float32."""
    inputs = case.inputs()
    with one_thread():
        exact = results(flat.reference, case, inputs.double())
        return exact, errors(results(flat.reference, case, inputs), exact)


@pytest.mark.parametrize(
    ("kernel", "side", "factor", "lowest"),
    # Only a patch makes 4 inputs along an axis the most. The other tiles have at most 6: below a
    # gain of 1.5, that holds for kernels of 3 and 9 taps alone.
    [((3, 3), 4, 1.8, 0.5), ((3, 3), 6, 7, 0.5), ((5, 5), 6, 7, 1.6), ((9, 3), 6, 7, 0.5)],
    ids=str,
)
def test_errors_are_a_small_multiple_of_torchs(isa, kernel, side, factor, lowest, monkeypatch):
    """The multiples are medians of three seeds, for mem and for each gradient.

    At T=20 and a gain of 15, torch's own error of mem is 1e-4, and grows with each step. The slow
    "wide" instructions take the larger kernels' tiles, whose numbers are those of avx2, at length.
    """
    if isa == "wide" and kernel != (3, 3) and not os.environ.get("SNNLSTM_LONG"):
        pytest.skip("part of `make test-all`")
    if side == 4:
        monkeypatch.setattr(cpu.PackedWeight, "LIMITS", {4: (16.0, 300.0)})
    calls = (1, 2, lowest), (1, 2, 3.0), (1, 2, 15.0), (20, 1, lowest), (20, 1, 7.0)
    for time, batch, gain in calls:
        ratios = []
        for seed in range(3):
            case = LAYER.but(kernel_size=kernel, time=time, batch=batch, gain=gain, seed=seed)
            exact, torchs = expected(case)
            ours = errors(results(flat.run, case, case.inputs()), exact)
            ratios.append([a / b for a, b in zip(ours, torchs, strict=True)])
            assert "winograd" in flat.last_name()
        medians = [median(column) for column in zip(*ratios, strict=True)]
        assert max(medians) < factor, (time, gain, medians)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("gain", "largest", "way"),
    [
        (1.4, 20.0, "winograd4"),
        (1.4, 22.0, "winograd2"),
        (1.4, 200.0, "winograd2"),
        (1.4, 230.0, "direct"),
        (0.1, 250.0, "winograd4"),
        (1.6, 0.5, "winograd2"),
        (15.5, 19.0, "winograd2"),
        (15.5, 20.0, "direct"),
        (16.5, 0.5, "direct"),
        (0.1, torch.inf, "direct"),
    ],
)
def test_gain_and_largest_x_decide_on_the_tiles(isa, dtype, gain, largest, way):
    case = LAYER.but(kernel_size=(5, 5), time=1, gain=gain, dtype=dtype)
    inputs = case.inputs()
    inputs.x.mul_(0.5 / inputs.x.abs().max())[0, 1, 0, 7, 5] = -largest
    with torch.no_grad():
        flat.run(*inputs, case.options)
    assert flat.last_name() == f"cpu-{isa}-{way}"


def facts(case: Case, x: Tensor) -> tuple[int, float]:
    """Returns x's percentage of nonzeros, and its largest magnitude, as the core finds them."""
    plan = flat.plan_of((*case.inputs()._replace(x=x), case.options), "auto")
    lengths = torch.tensor(case.options.lengths or [case.time] * case.batch)
    return snnlstm._C.facts(plan.passes.cell, (x.data_ptr(), plan.x_strides), lengths.data_ptr())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_one_value_is_found_in_images_of_any_layout(isa, channels, layout):
    """The images with 5 channels have so few values that each is in the sample."""
    single, double = torch.float32, torch.float64
    for height, width, dtype in ((1, 1, single), (20, 1, double), (5, 40, single), (7, 13, double)):
        case = LAYER.but(
            in_channels=channels, channels=1, height=height, width=width, time=1, dtype=dtype,
            lengths=(1, 0),
        )  # fmt: skip
        own, padded, found = (0, 0, -1, -1, -1), (0, 1, -1, -1, -1), []
        for value, place in (
            (-50, own),
            (0, own),
            (torch.nan, own),
            (torch.inf, own),
            (50, padded),
        ):
            x = torch.full((1, 2, channels, height, width), 0.5, dtype=dtype)
            x[place] = value
            found.append(facts(case, laid_out(x, layout)))
        without_one = 100 if channels <= 2 else round(100 - 100 / (channels * height * width))
        percentages = 100, without_one, 100, 100, 100
        assert found == list(zip(percentages, (50, 1, 1, torch.inf, 1), strict=True))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded"])
def test_every_third_value_or_row_of_a_wider_x_is_looked_at(isa, layout):
    case = LAYER.but(in_channels=5, channels=1, height=60, width=61, time=1)
    x = torch.arange(2 * 5 * 60 * 61.0).view(1, 2, 5, 60, 61)
    sample = (x.movedim(2, -1) if layout == "channels_last" else x).flatten()[::3]
    if layout in ("sliced", "strided", "transposed"):
        sample = x.reshape(-1, 61)[::3].flatten()
    x[torch.isin(x, sample[::4])] = 0
    assert facts(case, laid_out(x, layout)) == (75, sample.max())


def test_threads_look_at_all_of_a_large_x():
    case = LAYER.but(channels=1, batch=33, height=96, width=97, in_channels=3, time=1)
    x = torch.zeros(1, 33, 3, 96, 97)
    x[0, :11] = 0.5
    with one_thread():
        torch.set_num_threads(4)
        assert facts(case, x) == (33, 1)
        for sample in (0, 13, 32):
            x[0, sample, 2, 95, 96] = 5 + sample
            assert facts(case, x) == (33, 5 + sample)


@pytest.mark.parametrize("value", [3e38, torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_weight_too_large_for_tiles_spoils_no_other_pixel(isa, dtype, value):
    """The square of 3e38 overflows, and so would sums and differences of the weight's tile."""
    case = LAYER.but(dtype=dtype, time=1)
    inputs = case.inputs()
    inputs.weight[3, 1, 1, 1] = value
    with torch.no_grad(), one_thread():
        mem = flat.run(*inputs, case.options)[2]
        exact = flat.reference(*inputs.double(), case.options)[2].to(dtype)
    torch.testing.assert_close(mem, exact, atol=1e-6, rtol=torch.finfo(dtype).eps, equal_nan=True)
