"""Random calls such as those of ``make fuzz`` pass, and a fault in the kernels is found."""

import os

import pytest

from tests.shared.cpu_kernels import native
from tests.shared.gradients import ASKED, KEPT
from tools import fuzz

pytestmark = pytest.mark.skipif(native is None, reason="the core is not built")


@pytest.mark.drawn
@pytest.mark.slow
def test_random_calls():
    done = fuzz.run(120)
    assert done["gradients"] >= 60
    ways = [f"asked {asked}" for asked in ASKED] + [f"kept {kept}" for kept in KEPT]
    assert all(done[way] for way in (*fuzz.WAYS, *ways))


@pytest.mark.skipif(not os.environ.get("SNNLSTM_LONG"), reason="part of `make test-all`")
def test_a_fault_is_found_and_shrunk(monkeypatch):
    forward = native.cpu.Plan.forward

    def wrong(self, call, training):
        result = forward(self, call, training)
        if self.spec.pool == "max":
            result.mem[..., -1] *= 1.001
        return result

    monkeypatch.setattr(native.cpu.Plan, "forward", wrong)
    check, cases = fuzz.check, []
    monkeypatch.setattr(fuzz, "check", lambda case, **of: cases.append(case) or check(case, **of))
    with pytest.raises(AssertionError, match="close"):
        fuzz.run(200, seed=1)
    assert cases[-1].options.pool == "max"
    assert cases[-1].batch == cases[-1].time == 1
