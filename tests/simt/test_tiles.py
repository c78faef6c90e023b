"""Tiles of many shapes, which other cards and other constants of the estimate choose.

The first sizes of images are odd, and no tile divides them.
"""

from dataclasses import replace

import pytest
import test_cell
import test_cell_gradients

from tests.simt.modes import MODES, PLAIN

SIZES = ((23, 29), (17, 40), (40, 11), (31, 6))
CARDS = (
    (1, ()),
    (8, ()),
    (2, (("cache_bytes", 0.5),)),
    (5, (("warps", 16.0),)),
)
CASES = {
    "plain": (PLAIN.but(time=2, batch=1, in_channels=3, channels=9), 3),
    "pool": (PLAIN.but(time=2, batch=1, channels=9, pool="avg", pool_size=(3, 2)), 2),
}


@pytest.mark.parametrize(
    "size", [SIZES[0], *(pytest.param(size, marks=pytest.mark.simt_long) for size in SIZES[1:])]
)
@pytest.mark.parametrize(
    "mode", ["float32 on sm_75", "float16 on sm_75", "tf32", "tf32x3", "bfloat16 states"]
)
@pytest.mark.parametrize("name", CASES)
def test_tiles_of_many_shapes(core, monkeypatch, name, mode, size):
    """The cards choose some tiles for the steps forward, and some backward."""
    case, least = CASES[name]
    case = case.but(height=size[0], width=size[1])
    tiles = {False: set(), True: set()}
    plan_of = core.kernels.__class__.core_plan

    def noting(kernels, sizes, tf32, algorithm, backward):
        plan = plan_of(kernels, sizes, tf32, algorithm, backward)
        tiles[backward].add(plan.tile)
        return plan

    monkeypatch.setattr(core.kernels.__class__, "core_plan", noting)
    for number, (multiprocessors, model) in enumerate(CARDS):
        core.schedule("ahead", number)
        card = replace(MODES[mode], multiprocessors=multiprocessors, model=model)
        test_cell.check(core, case, card)
        assert test_cell_gradients.check(core, case, card), "choose another seed"
    if size == SIZES[0]:
        assert len(tiles[False] | tiles[True]) >= least, tiles
