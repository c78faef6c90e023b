"""Each fault that is seeded in the project's CUDA kernels must be caught.

One build switches the faults at run time. A fault is caught if a check reports it or the result is
judged wrong. The runs are cases of test_cell.py and test_cell_gradients.py, the likeliest first.
"""

from functools import cache

import pytest
import test_cell
import test_cell_gradients
import torch

from tests.simt.backend import simt_core
from tests.simt.emulator import EmulationError, fault_numbers, placed_faults
from tests.simt.modes import ALL, CASES

RUNS = {
    "float32": ("plain", "wide", "max pool", "kernel 5x1", "odd sizes"),
    "tf32": ("wide", "max pool", "one channel", "inhibition", "odd sizes"),
    "bfloat16 states": ("channels last", "short chunks", "plain"),
    "tf32x3": ("sliced",),
    "float16 autocast": ("wide",),
    "float16 on sm_75": ("channels last",),
    "float32 cudnn": ("plain", "max pool"),
    "tf32 on sm_90": ("plain",),
    "float64 on sm_90": ("plain",),
}
BACKWARD_RUNS = {
    "float32": ("plain", "max pool", "inhibition"),
    "tf32x3": ("plain", "wide", "stride, dilation"),
    "bfloat16 states": ("channels last", "short chunks"),
    "float32 cudnn": ("max pool",),
    "float64 on sm_90": ("plain",),
}


def report_of(core, check, mode, case) -> str:
    """What is wrong with a run, or ""."""
    try:
        check(core, CASES[case], ALL[mode])
    except (AssertionError, EmulationError) as error:
        return str(error) or type(error).__name__
    return ""


def by_likelihood(near: str):
    """All runs; those come first that run the kernels of the file `near`."""
    runs = [
        (check, mode, case)
        for check, table in ((test_cell.check, RUNS), (test_cell_gradients.check, BACKWARD_RUNS))
        for mode, cases in table.items()
        for case in cases
    ]

    def distance(run):
        check, mode, _ = run
        backward = "backward" in near or "grad" in near
        return (
            ((check is test_cell_gradients.check) != backward)
            + (("fma" in near) != (mode == "float32"))
            + (("neurons" in near) != ("cudnn" in mode))
        )

    return sorted(runs, key=distance)


@cache
def without_a_fault(*run) -> str:
    return report_of(simt_core(), *run)


@pytest.mark.parametrize(("name", "file"), placed_faults())
def test_a_fault_is_caught(core, name, file):
    """A run must notice it, and pass without it."""
    core.fault(name)
    core.schedule("ahead", 1)
    for run in by_likelihood(file):
        if report_of(core, *run):
            core.fault("none")
            assert without_a_fault(*run) == ""
            return
    pytest.fail(f"no run notices {name}")


def test_a_tensor_beside_another_hides_no_access_beside_it(core):
    """All tensors of the call lie in one storage, without gaps."""
    mode, case = ALL["tf32"], CASES["odd sizes"]
    inputs = mode.of(case).inputs()
    parts = torch.cat([t.reshape(-1) for t in inputs]).split([t.numel() for t in inputs])
    inputs = [part.view(t.shape) for part, t in zip(parts, inputs, strict=True)]
    core.fault("wrong_tail_mask")
    core.schedule("ahead", 1)
    with (
        mode.running(core),
        torch.no_grad(),
        pytest.raises(EmulationError, match="0 bytes behind the end of 'syn0'"),
    ):
        mode.run(*inputs, case.options)


def test_every_fault_has_one_place():
    assert sorted(name for name, _ in placed_faults()) == sorted(set(fault_numbers()) - {"none"})
