"""Tiles of many shapes, which the rules choose for other images and cards.

The first sizes of images are odd, and no tile divides them.
"""

from dataclasses import replace

import pytest

from tests.emulator import test_cell, test_cell_gradients
from tests.emulator.launches import plan
from tests.emulator.modes import MODES, PLAIN
from tests.shared.helpers import watched

SIZES = ((23, 29), (17, 40), (40, 11), (31, 6))
CASES = {
    "plain": (PLAIN.but(time=2, batch=1, in_channels=3, channels=9), ((2, 32), (6, 10), (13, 4))),
    "pool": (
        PLAIN.but(time=2, batch=1, channels=9, pool="avg", pool_size=(3, 2)), ((3, 20), (9, 6))
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "size", [SIZES[0], *(pytest.param(size, marks=pytest.mark.emulator_long) for size in SIZES[1:])]
)
@pytest.mark.parametrize(
    "mode",
    [
        "tf32",
        *(pytest.param(mode, marks=pytest.mark.emulator_long)
          for mode in ("float32 on sm_75", "float16 on sm_75", "tf32x3", "bfloat16 states")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["plain", pytest.param("pool", marks=pytest.mark.emulator_long)])
def test_tiles_of_many_shapes(core, monkeypatch, name, mode, size):
    case, tiles = CASES[name]
    case = case.but(height=size[0], width=size[1])
    planned = watched(monkeypatch, type(core.kernels), "core_pass")
    for number, tile in enumerate(tiles):
        core.settings.seed = number
        forced = replace(MODES[mode], tile=tile)
        test_cell.check(core, case, forced)
        assert test_cell_gradients.check(core, case, forced), "choose another seed"
    seen = {(arguments[4], made.tile) for arguments, made in planned}
    assert seen == {(backward, tile) for backward in (False, True) for tile in tiles}


def test_tiles_reach_over_the_samples_of_a_batch_of_rows(core):
    """Rows of 129 and 32 pixels fill 50 and 67 % of tiles of their own."""
    for images in {"H": 129, "W": 1}, {"H": 1, "W": 32}, {"H": 32, "W": 1}:
        for backward in False, True:
            assert plan(core, backward=backward, N=128, C=64, **images).tile[0] > 1
            with_lengths = plan(core, backward=backward, lengths=True, N=128, **images)
            assert with_lengths.tile[0] == 1


def test_a_tile_that_no_block_has_is_refused(core):
    with pytest.raises(RuntimeError, match="no block has tiles of 1000x1000 pixels"):
        test_cell.check(core, PLAIN, replace(MODES["tf32"], tile=(1000, 1000)))
