"""Runs the emulator and its own kernels under AddressSanitizer, in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from builder import HERE, compiler
from helpers import HANG

pytestmark = pytest.mark.simt_long

GOOD = """
for schedule in "in_order", "shuffled", "ahead":
    emulator.schedule(schedule, 1)
    np.testing.assert_allclose(*own.gemm(emulator), rtol=1e-4, atol=1e-4)
"""


def run(code):
    library = subprocess.run(
        [compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(library).is_absolute():
        pytest.skip("there is no libasan")
    environment = os.environ | {
        "LD_PRELOAD": str(Path(library).resolve()),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "PYTHONPATH": str(HERE),
    }
    code = f"import numpy as np, own\nemulator = own.own_kernels('asan')\n{code}\nprint('returned')"
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, env=environment, check=False, timeout=HANG,
    )  # fmt: skip


def test_own_kernels_are_clean():
    done = run(GOOD)
    assert done.stdout == "returned\n", done.stderr[-3000:]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("read_behind", "heap-buffer-overflow"),
        ("write_before", "heap-buffer-overflow"),
        ("shared_pointer", "use-after-poison"),
    ],
)
def test_accesses_beside_an_array_are_seen(what, message):
    done = run(f"own.run_case(emulator, {what!r}, True)")
    assert done.returncode != 0
    assert "returned" not in done.stdout
    assert message in done.stderr
    assert "violations.cu" in done.stderr
