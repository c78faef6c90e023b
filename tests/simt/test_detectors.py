"""The emulator reports each kernel that does what it must not do, and not its innocent twin."""

import re

import numpy as np
import pytest

from tests.simt.emulator import EmulationError
from tests.simt.own import own_kernels, run_case

# The emulator changes seldom.
pytestmark = pytest.mark.simt_long

WAIT = r" it at .*, before its wait_for_launch_before\(\)"
# By kernel: what the report says, and whether the plain build has a report, too.
CASES = {
    "divergent_barriers": ("waits in __syncthreads .*: divergent barriers", True),
    "return_before_barrier": ("returns while others wait|have returned", True),
    "uneven_loop": ("returns while others wait|have returned", True),
    "barrier_in_one_warp": ("the block is stuck|divergent barriers", True),
    "barrier_against_shuffle": ("while others of its warp|lanes 0x00000008 wait", True),
    "places_differ": ("divergent collectives", True),
    "lane_has_returned": ("returns while others|lanes 0x80000000 have returned", True),
    "part_of_a_warp": ("with mask 0x0000ffff; accepted is the whole warp", True),
    "shared_index": ("index out of bounds: 64 at .*violations.cu", False),
    "shared_pointer": ("shared memory", True),
    "read_behind": ("out of bounds: .*0 bytes behind the end of 'in'", False),
    "write_before": ("out of bounds: .*4 bytes before the start of 'out'", False),
    "vector_behind": ("out of bounds: .*behind the end of 'in'", True),
    "copy_from_behind": ("out of bounds: .*behind the end of 'in'", True),
    "write_input": ("write to an input: .*'in'", False),
    "write_static": ("write to a static variable", False),
    "misaligned_vector": ("misaligned", True),
    "misaligned_copy": ("misaligned", True),
    "misaligned_rows": ("misaligned ldmatrix", True),
    "copy_to_register": ("cp_async .*: the target is no shared memory", True),
    "overflow": ("signed overflow in an addition at .*violations.cu", False),
    "read_before_wait": ("while a cp_async of its own to it is under way", False),
    "wait_for_too_little": ("while a cp_async of its own to it is under way", False),
    "wait_without_commit": ("while a cp_async of its own to it is under way", False),
    "return_with_copies": ("returns with copies under way", True),
    "wait_without_barrier": ("race|uninitialised", False),
    "read_before_write": ("race|uninitialised", False),
    "overwrite_before_read": ("race: .*, no barrier between them", False),
    "lanes_without_syncwarp": ("race|uninitialised", False),
    "shuffle_is_no_fence": ("race: .*neither a barrier nor a __syncwarp between them", False),
    "rows_without_syncwarp": ("race: .*neither a barrier nor a __syncwarp between them", False),
    "never_written": ("uninitialised: .*, which nobody has written", False),
    "same_element": ("race: .* writes byte 0 of 'out'", False),
    "halves_of_a_word": ("race|uninitialised", False),
    "bytes_of_a_word": ("race|uninitialised", False),
    "blocks_write": ("race: .*nothing orders blocks", False),
    "blocks_read": ("race: .*nothing orders blocks", False),
    "read_before_launch_wait": (f"race: .* reads .*launch before writes{WAIT}", False),
    "write_before_launch_wait": (f"race: .* writes .*launch before writes{WAIT}", False),
    "overwrite_before_launch_wait": (f"race: .* writes .*launch before reads{WAIT}", False),
    "half_before_launch_wait": (f"race: .* reads .*launch before writes{WAIT}", False),
    "another_thread_waits": (f"race: .* reads .*launch before writes{WAIT}", False),
    "return_without_launch_wait": ("of block .* returns without wait_for_launch_before", True),
}
SCHEDULES = [("in_order", 0), ("shuffled", 1), ("shuffled", 2), ("ahead", 1), ("ahead", 2)]


def violate(emulator, name, bad):
    """The report, or "" if there is none."""
    try:
        run_case(emulator, name, bad)
    except EmulationError as error:
        return str(error)
    return ""


@pytest.fixture
def emulator(variant):
    found = own_kernels(variant)
    found.settings.compute_capability = 90  # only there launches overlap
    yield found
    found.reset()


@pytest.mark.parametrize(
    ("name", "variant"),
    [(n, "checked") for n in CASES] + [(n, "plain") for n, (_, plain) in CASES.items() if plain],
)
def test_it_is_reported_under_every_schedule(emulator, name, variant):
    for schedule in SCHEDULES:
        emulator.schedule(*schedule)
        report = violate(emulator, name, True)
        assert re.search(CASES[name][0], report), f"{schedule}: {report!r}"
        assert f"kernel '{name}'" in report


@pytest.mark.parametrize("variant", ["plain", "checked"])
@pytest.mark.parametrize("name", CASES)
def test_the_innocent_twin_passes(emulator, name, variant):
    for schedule in SCHEDULES:
        emulator.schedule(*schedule)
        assert violate(emulator, name, False) == "", schedule


def test_a_report_names_the_thread_and_the_line():
    report = violate(own_kernels("checked"), "read_behind", True)
    assert "thread (63, 0, 0) [warp 1, lane 31] of block (0, 0, 0)" in report
    assert re.search(r"violations\.cu:\d+ \(.*read_behind", report)


def test_a_failed_launch_leaves_nothing_behind():
    emulator = own_kernels("checked")
    for name in ("read_before_wait", "divergent_barriers", "return_with_copies"):
        assert violate(emulator, name, True)
        assert violate(emulator, name, False) == ""


@pytest.mark.parametrize(
    ("blocks", "block_y", "threads", "shared_bytes", "message"),
    [
        (1, 1, 33, 0, "a block of 33 threads; accepted are multiples of 32 up to 1024"),
        (1, 1, 1056, 0, "a block of 1056 threads"),
        (1, 70000, 32, 0, "a grid of"),
        (1, 1, 32, 228 * 1024, "bytes of shared memory; a block has at most"),
    ],
)
def test_launches_that_no_gpu_accepts(blocks, block_y, threads, shared_bytes, message):
    with pytest.raises(EmulationError, match=message):
        own_kernels("plain").call("launch_nothing", blocks, block_y, threads, shared_bytes)


@pytest.mark.parametrize("variant", ["plain"])
def test_an_empty_grid_runs_nothing(emulator):
    emulator.checks(counters=True)
    emulator.call("launch_nothing", 0, 1, 32, 0)
    assert emulator.counters() == {}


@pytest.mark.parametrize(
    "name", ["read_behind", "write_before", "vector_behind", "copy_from_behind"]
)
@pytest.mark.parametrize("variant", ["checked"])
def test_an_array_beside_another_hides_no_access_beside_it(emulator, name):
    """The first array ends where the second begins."""
    given, out = np.arange(128, dtype=np.float32).reshape(2, 64)
    with pytest.raises(EmulationError, match=CASES[name][0]):
        run_case(emulator, name, True, given, out)
    run_case(emulator, name, False, given, out)
    assert out[0] != 64


@pytest.mark.parametrize("variant", ["plain"])
def test_a_schedule_repeats_itself(emulator):
    """Two threads write one element, which the plain build does not see: the last one wins."""

    def run(seed):
        emulator.schedule("ahead", seed)
        out = np.zeros(64, np.float32)
        run_case(emulator, "same_element", bad=True, out=out)
        return out[0]

    assert {run(seed) for seed in range(8)} == {0, 32}
    for seed in range(8):
        assert run(seed) == run(seed)


@pytest.mark.parametrize("variant", ["checked"])
def test_without_cp_async_copies_are_done_at_once(emulator):
    emulator.settings.compute_capability = 75
    assert violate(emulator, "read_before_wait", True) == ""


def test_overlapping_arrays_are_refused():
    x = np.zeros(8, np.float32)
    emulator = own_kernels("plain")
    overlap = pytest.raises(ValueError, match="the array 'b' overlaps 'a'")
    with overlap, emulator.arrays(a=x, b=x[4:]):
        pass
