"""The kernels that go through a sequence in one launch: launches, costs, choice, what they save."""

from dataclasses import replace

import pytest
import torch

from tests.shared import flat
from tests.shared.cases import wanting_gradients
from tests.simt.backend import float32_precision
from tests.simt.emulator import EmulationError
from tests.simt.launches import FACTS
from tests.simt.modes import FITS, MODES, PLAIN, RESIDENT

TF32, DIRECT = 1, 1  # the numbers of csrc/cuda/plan.h


@pytest.mark.parametrize("mode", ["float32", "tf32x3", "bfloat16 states", "float16 autocast"])
@pytest.mark.parametrize("name", ["plain", "wide", "max pool", "quantised", "subtract"])
def test_all_that_training_keeps_is_what_the_kernels_of_one_step_keep(core, mode, name):
    """In the same layout, so that either backward pass can read it."""
    one, other = MODES[mode], RESIDENT[f"resident {mode}"]
    other = replace(other, compute_capability=one.compute_capability)
    case = one.of(FITS[name])
    seen = []
    for kernels in (one, other):
        with kernels.running(core):
            result = flat.forward(*case.inputs(), case.options, True, "direct")
        seen.append((*result[:3], result.saved.gates, result.saved.syn))
    for a, b in zip(*seen, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        torch.testing.assert_close(a, b, rtol=one.error, atol=one.error)


@pytest.mark.parametrize(("mode", "kind"), [("float32", "fma"), ("tf32", "mma")])
@pytest.mark.parametrize("time", [2, 7])
def test_a_sequence_is_one_launch_forward_and_one_backward(core, mode, kind, time):
    """The weight is packed before either. The launches behind the steps backward are for all steps:
    the gradients of x and of the parameters."""
    mode = RESIDENT[f"resident {mode}"]
    case = mode.of(FITS["long"].but(time=time))
    core.checks(counters=True)

    def launches():
        found = {name: c["launches"] for name, c in core.counters().items() if "pack" not in name}
        core.reset_counters()
        return found

    with mode.running(core):
        out = flat.run(*wanting_gradients(case.inputs()), case.options, "direct")
        assert launches() == {f"forward sequence ({kind})": 1}
        sum(o.sum() for o in out).backward()
    found = launches()
    assert found.pop(f"backward sequence ({kind})") == found.pop(f"data gradient ({kind})") == 1
    assert found == {f"weight gradient ({kind})": 1, "add gradients": 1}


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (PLAIN.but(batch=1, time=1, channels=200), "do not fit"),
        (PLAIN.but(dilation=(1_000, 1_000)), "do not fit"),
    ],
)
def test_cells_that_do_not_fit_are_left_to_the_kernels_of_one_step(core, case, message):
    mode = RESIDENT["resident tf32"]
    with mode.running(core), torch.no_grad(), pytest.raises(EmulationError, match=message):
        flat.run(*case.inputs(), case.options, "direct")
    core.device(algorithm="auto")  # the estimate chooses another way
    with core.installed(), torch.no_grad():
        flat.run(*case.inputs(), case.options, "direct")
    assert not flat.last_name().startswith("simt-resident")


@pytest.mark.parametrize(
    ("time", "batch", "channels", "size", "resident"),
    [
        (16, 32, (8, 8), 14, True),  # small images: a launch takes longer than a step
        (16, 100, (8, 8), 14, True),
        (16, 128, (1, 8), 28, True),  # as many samples as multiprocessors
        (16, 32, (1, 8), 28, False),  # more neurons than one multiprocessor updates in that time
        (1, 32, (8, 8), 14, False),  # one step is one launch anyway
        (16, 4, (64, 128), 32, False),  # does not fit
    ],
)
def test_it_is_chosen_if_launches_take_the_time(core, time, batch, channels, size, resident):
    core.device(90, 132, 227 * 1024, algorithm="auto")
    facts = {"T": time, "N": batch, "Cin": channels[0], "C": channels[1], "H": size, "W": size}
    device = core.kernels.device(None)
    found = core.module.CudaPlan(core.module.Cell(**FACTS | facts), device, TF32, DIRECT, False)
    assert found.name == ("resident-mma-tf32" if resident else "mma-tf32")


@pytest.mark.parametrize("mode", ["tf32", "bfloat16 states", "float32"])
@pytest.mark.parametrize(
    ("channels", "size", "sectors"),
    [
        ((1, 8), 28, 1.1),
        ((8, 8), 14, 1.4),  # rows of 14 begin anywhere within a sector
        ((2, 16), 16, 1.05),
    ],
)
def test_what_a_sequence_costs(core, mode, channels, size, sectors):
    resident = RESIDENT[f"resident {mode}"]
    case = resident.of(
        PLAIN.but(time=2, batch=1, in_channels=channels[0], channels=channels[1], height=size,
                  width=size, density=0.1)
    )  # fmt: skip
    core.checks(races=False, counters=True)
    with resident.running(core), torch.no_grad():
        flat.run(*case.inputs(), case.options, "direct")
    (seen,) = (c for name, c in core.counters().items() if "pack" not in name)
    assert seen.sectors <= sectors
    assert seen.banks <= 1.1
    if mode != "float32":
        tiles = -(-size * size // 32) * 2 * (2 * channels[1] // 4)
        per_step = 8 if mode == "tf32" else 16
        x = -(-9 * channels[0] // per_step) if channels[0] <= 4 else 9 * -(-channels[0] // per_step)
        assert seen.mma == 2 * tiles * (x + 9 * -(-channels[1] // per_step))


def test_the_backward_pass_is_chosen_by_itself(core):
    """If its own images fit: those of d_gates are larger than those of mem."""
    case = PLAIN.but(time=8, in_channels=1, channels=8, height=14, width=14)
    for kib, expected in ((227, "backward sequence (mma)"), (60, "backward step (mma)")):
        leaves = wanting_gradients(case.inputs())
        core.device(80, 132, kib * 1024, algorithm="auto")
        core.checks(counters=True)
        core.reset_counters()
        with core.installed(), float32_precision("tf32"):
            out = flat.run(*leaves, case.options, "direct")
            sum(o.sum() for o in out).backward()
        assert {n for n in core.counters() if n.startswith(("backward", "forward"))} == {
            "forward sequence (mma)",
            expected,
        }
