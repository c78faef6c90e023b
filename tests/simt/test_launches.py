"""Bounds on what launches.py prints: enough warps on every multiprocessor, few launches."""

import pytest
from launches import H100, LAYERS, calls, of_layer, warps

WIDE = ("mid", "big", "wide64")


@pytest.fixture(autouse=True)
def _an_h100(core):
    core.device(**H100)


@pytest.mark.parametrize("mode", ["tf32", "3xtf32", "bf16"])
@pytest.mark.parametrize("layer", WIDE)
def test_wide_layers_fill_the_multiprocessors(core, layer, mode):
    found = {launch.kernel: launch for launch in of_layer(core, LAYERS[layer], mode)}
    weights = found["weight gradient (mma)"]
    # One block a multiprocessor, whatever its registers.
    assert weights.threads >= 32 * 8
    waves = weights.blocks / H100["multiprocessors"]
    assert waves / -(-waves // 1) > 0.85
    assert warps(found["backward step (mma)"], registers=168) >= 4
    assert warps(found["forward step (mma)"], registers=128) >= 4


@pytest.mark.parametrize("layer", [name for name in LAYERS if name != "quant"])
def test_how_many_launches_a_sequence_takes(core, layer):
    found = [launch.kernel for launch in of_layer(core, LAYERS[layer], "tf32")]
    time = LAYERS[layer].steps
    forward = sum(name.startswith(("forward", "fire")) for name in found)
    assert forward <= time * (2 if "fire" in found else 1) + -(-time // 10)
    assert sum(name.startswith("backward") for name in found) == time
    # Packing twice, the data gradients, and of the parameters' gradients: parts and their sums.
    others = [n for n in found if not n.startswith(("forward", "backward", "fire", "spread"))]
    assert len(others) <= 8, others


def test_the_weight_gradient_of_many_steps(core):
    assert [launch.kernel for launch in calls(core, weight_gradient=True, T=7, C=16)] == [
        "weight gradient (mma)",
        "add weight gradients",
        "sum gate gradients",
        "add bias or threshold gradients",
    ]
