"""The CPU kernels compile for 64-bit Arm, and compute there what they compute here."""

import re
import shutil

import pytest
from sanitizers.run import CSRC, run

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CSRC.exists(), reason="not in a source tree"),
    pytest.mark.skipif(
        not (shutil.which(COMPILER) and shutil.which(EMULATOR) and shutil.which("g++")),
        reason="apt install g++ g++-aarch64-linux-gnu qemu-user",
    ),
]


def test_random_calls_give_on_arm_what_they_give_here(monkeypatch):
    """The driver prints the sum of all numbers that a hundred calls computed, to six digits."""
    sums = {}
    for compiler, under in (("g++", ""), (COMPILER, f"{EMULATOR} -L /usr/aarch64-linux-gnu")):
        monkeypatch.setenv("CXX", compiler)
        done = run("none", "baseline", cases=100, under=under)
        assert done.returncode == 0, done.stderr
        sums[compiler] = float(re.search(r"sum (\S+)", done.stdout)[1])
    assert sums[COMPILER] == pytest.approx(sums["g++"], rel=2e-5)
    assert sums["g++"] > 1e4
