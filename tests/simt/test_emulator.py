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


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s[0]}{s[1]}")
@pytest.mark.parametrize(
    ("kernel", "sizes"),
    [
        (own.gemm, (64, 32, 96, 1)),
        (own.gemm, (33, 40, 72, 2)),
        (own.gemm, (5, 8, 8, 1)),
        (own.box_sum, (32, 16)),
        (own.box_sum, (17, 21)),
        (own.box_sum, (1, 1)),
        (own.lstm_update, (200,)),
        (own.sum_all, (3000, 5)),
        (own.sum_columns, (20,)),
    ],
    ids=lambda part: getattr(part, "__name__", str(part)),
)
def test_results(emulator, schedule, kernel, sizes):
    emulator.schedule(*schedule)
    result, expected = kernel(emulator, *sizes)
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


def test_a_schedule_repeats_itself():
    """Sums by atomics depend on the order of blocks: the same seed gives the same bits."""
    emulator = own_kernels("plain")

    def run(policy, seed):
        emulator.schedule(policy, seed)
        return own.sum_columns(emulator, 300)[0].tobytes()

    seen = {run("ahead", seed) for seed in range(4)}
    assert len(seen) > 1
    assert all(run("ahead", 1) == run("ahead", 1) for _ in range(3))
    emulator.reset()


def test_without_cp_async_copies_are_done_at_once():
    """sm_75: the plain path must not rely on the asynchrony."""
    emulator = own_kernels("checked")
    emulator.settings.compute_capability = 75
    result, expected = own.box_sum(emulator)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="needs sm_80"):
        own.gemm(emulator)
    emulator.reset()
