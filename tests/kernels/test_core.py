"""Random calls pass, and of nonsense the compiled core raises an exception, and never crashes."""

import shutil
from pathlib import Path

import pytest
import torch  # before the core

from tests.shared.cases import FACTS, INPUT_LAYOUTS, PLAIN
from tests.shared.cpu_kernels import ISAS, native
from tests.shared.gradients import ASKED, KEPT
from tests.shared.helpers import long, python
from tools import fuzz

_C = pytest.importorskip("snnlstm._C")
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("core", "count"), [("cpu", 50), ("cuda", 100), ("emulator", 15)])
def test_random_calls_with_nonsense_among_the_arguments(core, count):
    """fuzz.py runs as a process, whose last line of output names the call that went wrong."""
    if core == "cuda" and not (hasattr(_C, "CudaPlan") and torch.cuda.is_available()):
        pytest.skip("no GPU")
    if core == "emulator" and not ((ROOT / "csrc").exists() and shutil.which("g++")):
        pytest.skip("no sources or no compiler for the emulator")
    what = f"-m tools.fuzz --nonsense {core} --minutes 0 --round {count} --seed 0"
    done = python(*what.split(), cwd=ROOT)
    last = done.stdout.strip().rpartition("\n")[2]
    assert done.returncode == 0, f"{done.returncode} at call {last}\n{done.stderr}"


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"dtype": 99}, "dtype must be less than 4, got 99"),
        ({"C": 0}, "every size of a cell must be positive"),
        ({"T": 0}, "T and N must be at least 1"),
        ({"N": 0}, "T and N must be at least 1"),
        ({"H": 2**62}, "the sizes of a cell are too large"),
        ({"kernel": (2, 3)}, "kernel must be odd"),
        ({"pool": 1, "pool_size": (9, 1)}, "pool_size must fit into the state"),
        ({"spiking": False}, "spiking=False excludes reset, pool, surrogate"),
    ],
    ids=str,
)
def test_messages_name_what_is_wrong(changed, says):
    with pytest.raises(ValueError, match=says):
        _C.Cell(**FACTS | changed)


def test_the_cpu_kernels_take_no_half_type():
    with pytest.raises(ValueError, match="float32 and float64"):
        _C.CpuPlan(_C.Cell(**FACTS | {"dtype": 2}), 0, 1.0, 8, 1)


def test_an_image_too_large_for_lists_of_nonzeros_has_none():
    """Places in such an image exceed the lists' 32 bits: a call would read and write elsewhere."""

    def algorithm(width):
        facts = {"Cin": 512, "C": 16, "H": 1, "W": width, "kernel": (1, 3)}
        return _C.CpuPlan(_C.Cell(**FACTS | facts), 0, 0.01, 8, 1).name

    assert algorithm(2**10).endswith("-sparse")
    assert not algorithm(2**20).endswith("-sparse")


# ---- random calls --------------------------------------------------------------------------------


@pytest.mark.drawn
@pytest.mark.slow
def test_random_calls():
    done = fuzz.run(120)
    assert done["gradients"] >= 60
    assert all(done[way] for way in fuzz.WAYS)
    layouts = {f"{what} {layout}" for what in fuzz.LAID_OUT for layout in INPUT_LAYOUTS}
    assert all(done[layout] for layout in layouts | {"gradients negated"})


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("way", ["one call", "steps", "a cell's calls"])
@pytest.mark.parametrize(
    ("asked", "kept"),
    [*((asked, "as it is") for asked in ASKED), *(("plain", kept) for kept in KEPT)],
)
def test_gradients_that_are_asked_for_in_unusual_ways(asked, kept, way, checkpoint):
    case = PLAIN.but(checkpoint=checkpoint)
    assert fuzz.check(case, ISAS[-1], "auto", way, asked=asked, kept=kept)


@long
def test_a_fault_is_found_and_shrunk(monkeypatch):
    forward = native.cpu.Plan.forward

    def wrong(self, call, training):
        result = forward(self, call, training)
        if self.spec.pool == "max":
            result.mem[..., -1] *= 1.001
        return result

    monkeypatch.setattr(native.cpu.Plan, "forward", wrong)
    check, cases = fuzz.check, []
    monkeypatch.setattr(fuzz, "check", lambda case, **how: cases.append(case) or check(case, **how))
    with pytest.raises(AssertionError, match="close"):
        fuzz.run(200, seed=1)
    assert cases[-1].options.pool == "max"
    assert cases[-1].batch == cases[-1].time == 1
