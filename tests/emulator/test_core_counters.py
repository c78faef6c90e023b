"""Bounds what a step costs on a GPU, counted in the emulation; traffic.py prints the counters.

The goals are ratios to the least possible: bytes moved; sectors of a request; wavefronts of shared
memory; tensor core instructions, for wide layers.
"""

import pytest

from tests.emulator.modes import MODES
from tests.emulator.traffic import LAYERS, cost, fewest_mma, measure, total

GOALS = {"bytes": 1.15, "sectors": 1.10, "banks": 1.05, "mma": 1.10}
WIDE = ("mid", "big")

# Costs that exceed their goals, with bounds that must hold.
ABOVE = {
    # Rows of 28 elements of 2 bytes begin and end within a sector.
    ("mnist", "bfloat16 states"): {"sectors": 1.20},
}


@pytest.mark.parametrize("mode", ["tf32", "bfloat16 states"])
@pytest.mark.parametrize(
    "layer", ["mnist", "mid", pytest.param("big", marks=pytest.mark.emulator_long)]
)
def test_a_step_costs_little_more_than_it_must(core, layer, mode):
    found = cost(measure(core, LAYERS[layer], MODES[mode]), LAYERS[layer], MODES[mode])
    goals = dict(GOALS)
    if layer not in WIDE:
        del goals["mma"]
    for name, bound in ABOVE.get((layer, mode), {}).items():
        assert found[name] > goals[name], f"{name} is within its goal: drop the exception"
        goals[name] = bound
    over = {n: round(found[n], 3) for n in goals if found[n] > goals[n]}
    assert not over, f"above {goals}: {over}"


@pytest.mark.emulator_long
@pytest.mark.parametrize("mode", ["bfloat16 states", "tf32"])
def test_training_costs_little_more_than_it_must(core, mode):
    """The gradients together multiply twice as much as the step."""
    seen = measure(core, LAYERS["mid"], MODES[mode], training=True)
    for name, c in seen.items():
        assert c.sectors <= GOALS["sectors"], name
        assert c.banks <= GOALS["banks"], name
    fewest = 3 * fewest_mma(LAYERS["mid"], MODES[mode])
    assert fewest <= total(seen).mma <= GOALS["mma"] * fewest
