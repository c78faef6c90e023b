"""Winograd's tiles round little more than torch's float32 convolution, however large the weights.

docs/numerics.md has more errors. A gain is the root mean square of the gates per unit of input.
"""

import functools
import os
from statistics import median

import pytest
import torch
from torch import Tensor

from snnlstm.native import cpu
from tests.shared import flat
from tests.shared.cases import PLAIN, SILENT, Case, Inputs, wanting_gradients
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
        monkeypatch.setattr(cpu.PackedWeight, "GAINS", {4: 1e3})
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


@pytest.mark.parametrize(
    ("gain", "way"),
    [(1.4, "winograd4"), (1.6, "winograd2"), (900.0, "winograd2"), (1100.0, "direct")],
)
def test_the_gain_decides_on_the_tiles(isa, gain, way):
    case = LAYER.but(kernel_size=(5, 5), time=1, gain=gain)
    with torch.no_grad():
        flat.run(*case.inputs(), case.options)
    assert flat.last_name() == f"cpu-{isa}-{way}"


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
