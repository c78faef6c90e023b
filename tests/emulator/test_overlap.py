"""On sm_90 the launches of a sequence's steps overlap. The emulator runs them in order, and reports
what a step does to the results of the one before while it has not waited for that."""

import itertools

import pytest
import torch

from tests.emulator import test_cell, test_cell_gradients
from tests.emulator.backend import float32_precision
from tests.emulator.launches import calls
from tests.emulator.modes import CASES, OVERLAPPING, SMOOTH
from tests.sequences.by_length import CELLS
from tests.sequences.by_length import check as check_lengths

LONG = pytest.mark.emulator_long
CALLS = ("plain", "wide", "channels last", "max pool", "uneven average pool", "inhibition")


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        pytest.param(*pair, marks=[] if {"tf32 on sm_90", "plain"} & {*pair} else LONG)
        for pair in itertools.product(OVERLAPPING, CALLS)
    ],
)
def test_steps_that_overlap(core, mode, name):
    core.schedule("ahead", 3)
    test_cell.check(core, CASES[name], OVERLAPPING[mode])
    if OVERLAPPING[mode].exact or name in SMOOTH:
        test_cell_gradients.check(core, CASES[name], OVERLAPPING[mode])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["plain", "odd-pool"])
def test_blocks_of_padded_samples_wait_too(core, name, dtype):
    core.device(compute_capability=90)
    with core.installed(), float32_precision("ieee"):
        check_lengths(dtype, name == "plain", **CELLS[name])


@pytest.mark.parametrize("matrix", [0, 1])
def test_each_step_but_the_first_overlaps(core, matrix):
    found = [launch for launch in calls(core, matrix, T=3, Cin=8) if "step" in launch.kernel]
    assert [launch.overlaps for launch in found] == [0, 1, 1, 0, 1, 1]
    assert not any(launch.overlaps for launch in calls(core, matrix, T=1, Cin=8))
