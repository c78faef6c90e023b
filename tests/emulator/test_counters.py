"""Counts access patterns whose cost on a GPU is known."""

import numpy as np
import pytest

from tests.emulator.library import run_case

# The emulator changes seldom.
pytestmark = pytest.mark.emulator_long


def count(emulator, name):
    emulator.checks(counters=True)
    emulator.reset_counters()
    run_case(emulator, name, given=np.zeros(512, np.float32), out=np.zeros(128, np.float32))
    return emulator.counters()[name]


@pytest.mark.parametrize(
    ("name", "requests", "sectors", "fewest", "bytes_read"),
    [
        ("neighbours", 1, 4, 4, 128),
        ("shifted", 1, 5, 4, 128),
        ("every_other", 1, 8, 4, 128),
        ("every_eighth", 1, 32, 4, 128),
        ("same_for_all", 1, 1, 1, 4),
        ("vectors", 1, 16, 16, 512),
        ("some_lanes", 1, 4, 2, 64),
        ("again", 4, 16, 16, 128),
        ("uneven", 8, 32, 32, 8 * 28 * 4),
        ("copies", 1, 16, 16, 512),
    ],
)
@pytest.mark.parametrize("schedule", ["in_order", "shuffled", "ahead"])
def test_global_reads(emulator, schedule, name, requests, sectors, fewest, bytes_read):
    emulator.schedule(schedule, 1)
    c = count(emulator, name)
    assert c["global_read_requests"] == requests
    assert c["global_read_sectors"] == sectors
    assert c["global_read_fewest"] == fewest
    assert c["bytes_read"] == bytes_read


@pytest.mark.parametrize(
    ("name", "wavefronts", "fewest"),
    [
        ("rows", 1, 1),
        ("columns", 32, 1),
        ("padded_columns", 1, 1),
        ("two_way", 2, 1),
        ("broadcast", 1, 1),
        ("shared_vectors", 4, 4),
        ("narrow_tile", 16, 4),
        ("wide_tile", 4, 4),
    ],
)
def test_shared_memory(emulator, name, wavefronts, fewest):
    filling = count(emulator, "only_fill")
    c = count(emulator, name)
    assert c["shared_wavefronts"] - filling["shared_wavefronts"] == wavefronts
    assert c["shared_fewest"] - filling["shared_fewest"] == fewest


def test_mma_and_writes(emulator):
    count(emulator, "three_mma")
    run_case(emulator, "three_mma", given=np.zeros(512, np.float32))
    c = emulator.counters()["three_mma"]
    assert [c[f"mma_{name}"] for name in ("fp16", "bf16", "tf32")] == [0, 4, 2]
    assert [c[f"global_write_{name}"] for name in ("requests", "sectors", "fewest")] == [2, 8, 8]
    assert c["bytes_written"] == 256
