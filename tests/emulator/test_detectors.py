"""The emulator reports each kernel that does what it must not do, and not its innocent twin.

Kinds of reports that a seeded fault of the project's kernels raises have no kernel here: see KINDS
in test_core_mutations.py.
"""

import re

import numpy as np
import pytest

from tests.emulator.library import EmulationError, run_case

# The emulator changes seldom.
pytestmark = pytest.mark.emulator_long

# By kernel: what the report says.
CASES = {
    "divergent_barriers": "waits in __syncthreads .*: divergent barriers",
    "return_before_barrier": "returns while others wait|have returned",
    "barrier_in_one_warp": "the block is stuck|divergent barriers",
    "barrier_against_shuffle": "while others of its warp|lanes 0x00000008 wait",
    "places_differ": "divergent collectives",
    "lane_has_returned": "returns while others|lanes 0x80000000 have returned",
    "part_of_a_warp": "with mask 0x0000ffff; accepted is the whole warp",
    "shared_index": "index out of bounds: 64 at .*violations.cu",
    "shared_pointer": "shared memory",
    "vector_behind": "out of bounds: .*behind the end of 'in'",
    "copy_from_behind": "out of bounds: .*behind the end of 'in'",
    "write_input": "write to an input: .*'in'",
    "write_static": "write to a static variable",
    "misaligned_copy": "misaligned",
    "misaligned_rows": "misaligned ldmatrix",
    "copy_to_register": "cp_async .*: the target is no shared memory",
    "overflow": "signed overflow in an addition at .*violations.cu",
    "wait_for_too_little": "while a cp_async of its own to it is under way",
    "return_with_copies": "returns with copies under way",
    "overwrite_before_read": "race: .*, no barrier between them",
    "shuffle_is_no_fence": "race: .*neither a barrier nor a __syncwarp between them",
    "same_element": "race: .* writes byte 0 of 'out'",
    "bytes_of_a_word": "race|uninitialised",
    "blocks_write": "race: .*nothing orders blocks",
    "blocks_read": "race: .*nothing orders blocks",
}
SEEDS = range(4)


def violate(emulator, name, bad):
    """The report, or "" if there is none."""
    try:
        run_case(emulator, name, bad)
    except EmulationError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", CASES)
def test_it_is_reported_under_every_schedule(emulator, name):
    for seed in SEEDS:
        emulator.settings.seed = seed
        report = violate(emulator, name, True)
        assert re.search(CASES[name], report), f"{seed}: {report!r}"
        assert f"kernel '{name}'" in report


@pytest.mark.parametrize("name", CASES)
def test_the_correct_twin_passes(emulator, name):
    for seed in SEEDS:
        emulator.settings.seed = seed
        assert violate(emulator, name, False) == "", seed


def test_a_report_names_the_thread_and_the_line(emulator):
    report = violate(emulator, "vector_behind", True)
    assert "thread (15, 0, 0) [warp 0, lane 15] of block (0, 0, 0)" in report
    assert re.search(r"violations\.cu:\d+ \(.*vector_behind", report)


@pytest.mark.parametrize(
    ("blocks", "block_y", "threads", "shared_bytes", "message"),
    [
        (1, 1, 33, 0, "a block of 33 threads; accepted are multiples of 32 up to 1024"),
        (1, 1, 1056, 0, "a block of 1056 threads"),
        (1, 70000, 32, 0, "a grid of"),
        (1, 1, 32, 228 * 1024, "bytes of shared memory; a block of this card has at most 232448"),
    ],
)
def test_launches_that_no_gpu_accepts(emulator, blocks, block_y, threads, shared_bytes, message):
    with pytest.raises(EmulationError, match=message):
        emulator.call("launch_nothing", blocks, block_y, threads, shared_bytes)


def test_a_schedule_repeats_itself(emulator):
    """Two threads write one element: the last one wins."""
    emulator.settings.races = 0

    def run(seed):
        emulator.settings.seed = seed
        out = np.zeros(64, np.float32)
        run_case(emulator, "same_element", bad=True, out=out)
        return out[0]

    assert {run(seed) for seed in range(8)} == {0, 32}
    for seed in range(8):
        assert run(seed) == run(seed)
