"""Seeded faults in the emulator's own kernels: each must be caught, and by the check it belongs to.

Every fault is tried in one build that switches them at run time. Which schedules notice a fault by
its results alone is pinned here too: it is why the race detector and the schedule "ahead" exist.
"""

import numpy as np
import own
import pytest
from emulator import EmulationError
from faults import fault_numbers, placed_faults

NUMBERS = fault_numbers()


# The kernel that holds the fault, and what the checked build says of it.
FAULTS = {
    ("missing_wait", 0): (own.gemm, "race: .* under way"),
    ("missing_wait", 1): (own.sum_all, "race: .*nothing orders blocks"),
    ("missing_barrier_read", 0): (own.gemm, "race|uninitialised"),
    ("missing_barrier_overwrite", 0): (own.gemm, "race: .*barrier"),
    ("missing_syncwarp", 0): (own.gemm, "race|uninitialised"),
    ("wrong_halo", 0): (own.box_sum, "wrong values"),
    ("wrong_tail_mask", 0): (own.gemm, "out of bounds"),
    ("swapped_gates", 0): (own.lstm_update, "wrong values"),
    ("wrong_fragment_row", 0): (own.gemm, "wrong values|uninitialised|race"),
    ("missing_zero_fill", 0): (own.gemm, "wrong values|uninitialised"),
    ("wrong_split_k", 0): (own.gemm, "wrong values"),
}
IDS = [f"{name}-{place}" for name, place in FAULTS]


def outcome(emulator, run):
    """ "" where all is well, else what is wrong."""
    try:
        result, expected = run(emulator)
    except EmulationError as error:
        return str(error)
    good = np.allclose(result, expected, rtol=1e-4, atol=1e-4)
    return "" if good else "wrong values"


@pytest.fixture
def faults():
    emulator = own.own_kernels("checked")
    yield emulator
    emulator.reset()


def test_every_placed_fault_is_tried():
    assert set(placed_faults(own.SOURCES)) == set(FAULTS)


@pytest.mark.parametrize("schedule", ["in_order", "shuffled", "ahead"])
@pytest.mark.parametrize("key", FAULTS, ids=IDS)
def test_each_fault_is_caught_by_its_check(faults, key, schedule):
    run, message = FAULTS[key]
    for seed in range(1 if schedule == "in_order" else 3):
        faults.schedule(schedule, seed)
        faults.fault(0)
        assert outcome(faults, run) == ""
        faults.fault(NUMBERS[key[0]], key[1])
        with pytest.raises(AssertionError, match=message):
            assert outcome(faults, run) == "", outcome(faults, run)


@pytest.mark.parametrize("schedule", ["in_order", "shuffled", "ahead"])
def test_which_schedules_miss_an_early_overwrite(faults, schedule):
    """Threads in order or shuffled stay so close together that the values come out right."""
    faults.checks(races=False)
    faults.fault(NUMBERS["missing_barrier_overwrite"])
    caught = []
    for seed in range(12):
        faults.schedule(schedule, seed)
        caught.append(outcome(faults, own.gemm) != "")
    assert all(caught) if schedule == "ahead" else not any(caught)


@pytest.mark.parametrize("name", ["missing_wait", "missing_barrier_read", "missing_syncwarp"])
def test_poison_shows_data_that_is_not_there_yet(faults, name):
    """Without the detector too: NaN where nobody has written, or a copy is under way."""
    faults.checks(races=False)
    faults.fault(NUMBERS[name])
    for schedule in ("in_order", "shuffled", "ahead"):
        faults.schedule(schedule, 1)
        assert outcome(faults, own.gemm) == "wrong values"


def test_a_normal_build_has_no_faults():
    """The switch exists in the variant "checked" alone."""
    emulator = own.own_kernels("plain")
    for key, (run, _) in FAULTS.items():
        emulator.fault(NUMBERS[key[0]], key[1])
        assert outcome(emulator, run) == ""
    emulator.reset()
