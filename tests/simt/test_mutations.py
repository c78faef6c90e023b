"""The emulator's own matrix product is right, and each fault that is seeded in it is caught.

One build switches the faults at run time. The tests also pin which schedules notice a fault by its
results alone: the race detector and the schedule "ahead" exist because others do not.
"""

import numpy as np
import pytest

from tests.simt import own
from tests.simt.emulator import SCHEDULES, EmulationError
from tests.simt.faults import fault_numbers, placed_faults
from tests.simt.own import own_kernels

NUMBERS = fault_numbers()
# By name and place of the fault: what the checked build says of it.
FAULTS = {
    ("missing_wait", 0): "race: .* under way",
    ("missing_barrier_read", 0): "race|uninitialised",
    ("missing_barrier_overwrite", 0): "race: .*barrier",
    ("missing_syncwarp", 0): "race|uninitialised",
    ("wrong_tail_mask", 0): "out of bounds",
    ("wrong_fragment_row", 0): "wrong values|uninitialised|race",
    ("missing_zero_fill", 0): "wrong values|uninitialised",
    ("wrong_split_k", 0): "wrong values",
}
IDS = [f"{name}-{place}" for name, place in FAULTS]


def outcome(emulator, *sizes):
    """What is wrong with the product, or "" if nothing is."""
    try:
        result, expected = own.gemm(emulator, *sizes)
    except EmulationError as error:
        return str(error)
    return "" if np.allclose(result, expected, rtol=1e-4, atol=1e-4) else "wrong values"


@pytest.fixture(params=["plain", "checked"])
def emulator(request):
    found = own_kernels(request.param)
    yield found
    found.reset()


only_checked = pytest.mark.parametrize("emulator", ["checked"], indirect=True)
only_plain = pytest.mark.parametrize("emulator", ["plain"], indirect=True)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sizes", [(64, 32, 96, 1), (33, 40, 72, 2), (5, 8, 8, 1)])
def test_results(emulator, schedule, sizes):
    for seed in range(1, 4):
        emulator.schedule(schedule, seed)
        assert outcome(emulator, *sizes) == ""


@only_plain
def test_a_schedule_repeats_itself(emulator):
    """Two threads write one element, which the plain build does not see: the last one wins."""

    def run(seed):
        emulator.schedule("ahead", seed)
        out = np.zeros(64, np.float32)
        own.run_case(emulator, "same_element", bad=True, out=out)
        return out[0]

    assert {run(seed) for seed in range(8)} == {0, 32}
    for seed in range(8):
        assert run(seed) == run(seed)


@only_checked
def test_without_cp_async_copies_are_done_at_once(emulator):
    """sm_75: the fault of a missing wait is none there."""
    emulator.settings.compute_capability = 75
    own.run_case(emulator, "read_before_wait", bad=True)
    with pytest.raises(EmulationError, match="needs sm_80"):
        own.gemm(emulator)


def test_every_placed_fault_is_tried():
    assert set(placed_faults(own.SOURCES)) == set(FAULTS)


@only_checked
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("key", FAULTS, ids=IDS)
def test_each_fault_is_caught_by_its_check(emulator, key, schedule):
    for seed in range(1 if schedule == "in_order" else 3):
        emulator.schedule(schedule, seed)
        emulator.fault(NUMBERS[key[0]], key[1])
        with pytest.raises(AssertionError, match=FAULTS[key]):
            assert outcome(emulator) == "", outcome(emulator)


@only_checked
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_which_schedules_miss_an_early_overwrite(emulator, schedule):
    """Threads in order or shuffled stay so close together that the values come out right."""
    emulator.checks(races=False)
    emulator.fault(NUMBERS["missing_barrier_overwrite"])
    caught = []
    for seed in range(12):
        emulator.schedule(schedule, seed)
        caught.append(outcome(emulator) != "")
    assert all(caught) if schedule == "ahead" else not any(caught)


@only_checked
@pytest.mark.parametrize("name", ["missing_wait", "missing_barrier_read", "missing_syncwarp"])
def test_poison_shows_data_that_is_not_there_yet(emulator, name):
    """Without the detector too: NaN where nobody has written, or a copy is under way."""
    emulator.checks(races=False)
    emulator.fault(NUMBERS[name])
    for schedule in SCHEDULES:
        emulator.schedule(schedule, 1)
        assert outcome(emulator) == "wrong values"


@only_plain
def test_a_normal_build_has_no_faults(emulator):
    """The switch exists in the variant "checked" alone."""
    for name, place in FAULTS:
        emulator.fault(NUMBERS[name], place)
        assert outcome(emulator) == ""
