"""The emulator's own kernels compute what they should, under every schedule and in every build."""

import numpy as np
import own
import pytest
from own import own_kernels

SCHEDULES = [("in_order", 0), ("shuffled", 1), ("ahead", 1), ("ahead", 2), ("ahead", 3)]


@pytest.fixture(params=["plain", "checked"])
def emulator(request):
    found = own_kernels(request.param)
    yield found
    found.reset()


@pytest.fixture(params=SCHEDULES, ids=lambda s: f"{s[0]}{s[1]}")
def scheduled(emulator, request):
    emulator.schedule(*request.param)
    return emulator


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
@pytest.mark.parametrize(
    ("M", "N", "K", "splits"), [(64, 32, 96, 1), (33, 40, 72, 2), (5, 8, 8, 1)]
)
def test_products_of_16_bit_types(scheduled, kind, M, N, K, splits):
    result, expected = own.half_gemm(scheduled, kind, M, N, K, splits)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("M", "N", "K"), [(64, 32, 64), (35, 33, 20)])
def test_products_in_tf32(scheduled, M, N, K):
    result, rounded, exact = own.tf32_gemm(scheduled, M, N, K, exact=False)
    np.testing.assert_allclose(result, rounded, rtol=1e-5, atol=1e-5)
    error = np.abs(result - exact).max()
    thrice = np.abs(own.tf32_gemm(scheduled, M, N, K, exact=True)[0] - exact).max()
    assert error > 1e-4
    assert thrice < 3e-5


@pytest.mark.parametrize("width", [4, 8, 32])
@pytest.mark.parametrize(("rows", "columns"), [(16, 40), (13, 7)])
def test_sums_by_shuffles(scheduled, width, rows, columns):
    x = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)
    sums = np.full(rows, np.nan, np.float32)
    with scheduled.arrays(x=x, sums=(sums, "w")):
        scheduled.call("run_sum_rows", x, sums, rows, columns, width)
    np.testing.assert_allclose(sums, x.sum(1), rtol=1e-5, atol=1e-5)


def test_halves_of_a_warp_go_their_own_ways(scheduled):
    x = np.random.default_rng(0).standard_normal((8, 50)).astype(np.float32)
    sums = np.full(8, np.nan, np.float32)
    with scheduled.arrays(x=x, sums=(sums, "w")):
        scheduled.call("run_sum_halves", x, sums, 8, 50)
    np.testing.assert_allclose(sums, x.sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("H", "W"), [(32, 16), (17, 21), (1, 1)])
def test_stencil(scheduled, H, W):
    result, expected = own.box_sum(scheduled, H, W)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


def test_gates(scheduled):
    result, expected = own.lstm_update(scheduled, 200)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


def test_last_block_sees_what_the_others_wrote(scheduled):
    result, expected = own.sum_all(scheduled, 3000, 5)
    np.testing.assert_allclose(result, expected, rtol=1e-4)


def test_atomics_of_many_blocks(scheduled):
    x = np.random.default_rng(0).standard_normal((20, 50)).astype(np.float32)
    sums = np.zeros(50, np.float32)
    with scheduled.arrays(x=x, sums=(sums, "w")):
        scheduled.call("run_sum_columns", x, sums, 20, 50)
    np.testing.assert_allclose(sums, x.sum(0), rtol=1e-4, atol=1e-5)


def test_a_schedule_repeats_itself():
    """Sums by atomics depend on the order of blocks: the same seed gives the same bits."""
    emulator = own_kernels("plain")
    x = np.random.default_rng(0).standard_normal((300, 50)).astype(np.float32)

    def run(policy, seed):
        emulator.schedule(policy, seed)
        sums = np.zeros(50, np.float32)
        emulator.call("run_sum_columns", x, sums, 300, 50)
        return sums.tobytes()

    seen = {run("ahead", seed) for seed in range(4)}
    assert len(seen) > 1
    assert all(run("ahead", 1) == run("ahead", 1) for _ in range(3))
    emulator.reset()


def test_without_cp_async_copies_are_done_at_once():
    """sm_75: the plain path must not rely on the asynchrony."""
    emulator = own_kernels("checked")
    emulator.compute_capability(75)
    result, expected = own.box_sum(emulator, 17, 21)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="needs sm_80"):
        own.half_gemm(emulator, "bf16", 32, 32, 32)
    emulator.reset()
