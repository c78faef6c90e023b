"""The counters, on access patterns whose cost on a GPU is known."""

import ctypes

import counters
import numpy as np
import own
import pytest
from own import own_kernels


def aligned(count):
    """float32 zeros whose address is a multiple of 128, as those of torch's CUDA tensors are."""
    raw = np.zeros(count + 32, np.float32)
    return raw[(-raw.ctypes.data % 128) // 4 :][:count]


@pytest.fixture
def emulator():
    found = own_kernels("checked")
    found.checks(counters=True)
    found.reset_counters()
    yield found
    found.reset()


def count(emulator, name):
    x, y = aligned(512), aligned(128)
    function = emulator.lib.count_case
    function.restype = ctypes.c_char_p
    emulator.reset_counters()
    with emulator.arrays(x=x, y=(y, "w")):
        problem = function(
            name.encode(), ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(y.ctypes.data)
        )
    assert problem is None, problem
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


def test_global_writes(emulator):
    c = count(emulator, "vectors")
    assert c["global_write_requests"] == 1
    assert (c["global_write_sectors"], c["global_write_fewest"]) == (16, 16)
    assert c["bytes_written"] == 512
    assert count(emulator, "atomics")["global_atomics"] == 1  # one request of a warp


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


def test_mma(emulator):
    c = count(emulator, "three_mma")
    assert (c["mma_fp16"], c["mma_bf16"], c["mma_tf32"]) == (0, 2, 1)


def test_a_product_by_kernel(emulator):
    """64 x 32 x 96 in tiles of 32 x 32: 2 blocks of 4 warps, 3 steps of 2 x 2 mma."""
    own.half_gemm(emulator, "bf16", 64, 32, 96)
    seen = emulator.counters()
    assert list(seen) == ["half_gemm"]
    c = seen["half_gemm"]
    assert (c["launches"], c["blocks"], c["threads"]) == (1, 2, 128)
    assert counters.mma(c) == 2 * 4 * 3 * 2 * 2
    assert c["bytes_read"] == 2 * (64 * 96 + 96 * 32)
    assert c["bytes_written"] == 4 * 64 * 32
    # b is read by both blocks.
    assert c["bytes_requested"] == c["bytes_read"] + 2 * 96 * 32 + c["bytes_written"]
    assert "half_gemm" in counters.table(seen)
    own.half_gemm(emulator, "bf16", 64, 32, 96)
    assert counters.mma(emulator.counters()["half_gemm"]) == 2 * counters.mma(c)


def test_without_counters_nothing_is_counted(emulator):
    emulator.checks(counters=False)
    own.half_gemm(emulator, "bf16", 64, 32, 96)
    assert emulator.counters() == {}


def test_the_most_wasteful_line_comes_first(emulator):
    count(emulator, "columns")
    worst = emulator.spots()[0]
    assert (worst.kernel, worst.space, worst.cost, worst.fewest) == ("columns", "shared", 32, 1)
    assert "counts.cu" in worst.place
