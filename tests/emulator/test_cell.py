"""Compares the project's emulated CUDA kernels with the float64 reference, in every type and way.

The cases and the oracle are those of the CPU kernels (cases.py, oracle.py in tests/shared). The
emulator checks all runs: bounds, races, uninitialised shared memory, divergence. Outputs and
workspaces hold NaN before.
"""

import re

import pytest
import torch
from hypothesis import given

from benchmarks import devices, gpu_smoke
from tests.emulator.backend import float32_precision
from tests.emulator.builder import ROOT
from tests.emulator.modes import ALL, CASES, Mode, crossed
from tests.shared.cases import Case, cases, drawing, wanting_gradients
from tests.shared.oracle import check_steps


def check(core, case: Case, mode: Mode) -> None:
    """Judges an inference call step by step, and a training call by the inference call."""
    case = mode.applied(case.recorded() if case.options.sequence else case)
    inputs = case.inputs()
    with mode.running(core):
        with torch.no_grad():
            out = mode.run(*inputs, case.options)
        check_steps(case, inputs, out, mode.error)
        trained = mode.run(*wanting_gradients(inputs), case.options)
    torch.testing.assert_close(trained, out, atol=0, rtol=0, equal_nan=False)


@pytest.mark.parametrize(("mode", "case", "seed"), crossed(ALL, CASES))
def test_forward(core, mode, case, seed):
    core.settings.seed = seed
    check(core, case, ALL[mode])


@pytest.mark.emulator_long
def test_the_smoke_test_for_gpus_runs_every_kernel(core, monkeypatch):
    """The emulator checks every access of this run."""
    launched = set()
    for source in (ROOT / "csrc" / "cuda").rglob("*.cu"):
        launched |= set(re.findall(r'Launch how\{"([^"]+)"', source.read_text()))
    assert len(launched) >= 15
    core.device(shared_bytes=227 * 1024)
    core.kernels.name = lambda: "cpu"
    monkeypatch.setattr(devices, "precisions", lambda device: ("float64", "float32", "bfloat16"))
    with core.installed(), float32_precision("ieee"):
        for algorithm, names, count in (
            ("fused", ("plain", "max_pool, subtract", "quantised"), 7),
            ("cudnn", ("plain",), 3),
        ):
            lines = list(gpu_smoke.run("cpu", (2, 1, 3, 9, 4, 6), [algorithm], names))
            assert len(lines) == count
            assert all(right for _, right in lines), lines
    assert {launch.kernel for launch in core.launches()} == launched


@pytest.mark.drawn
@pytest.mark.emulator_long
@pytest.mark.parametrize("mode", ALL)
def test_forward_of_random_calls(core, mode):
    @drawing(60)
    @given(cases((ALL[mode].dtype,)))
    def check_case(case: Case) -> None:
        core.settings.seed = case.seed
        check(core, case, ALL[mode])

    check_case()
