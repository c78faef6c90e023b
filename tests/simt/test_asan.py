"""The kernels and the emulator itself under AddressSanitizer, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from builder import HERE, compiler

pytestmark = pytest.mark.simt_long


def run(what):
    library = subprocess.run(
        [compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(library).is_absolute():
        pytest.skip("there is no libasan")
    environment = dict(
        os.environ,
        LD_PRELOAD=str(Path(library).resolve()),
        ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=0",
        PYTHONPATH=str(HERE),
    )
    return subprocess.run(
        [sys.executable, str(HERE / "asan_probe.py"), what],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=300,
    )


def test_own_kernels_are_clean():
    done = run("good")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all good" in done.stdout


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("read_behind", "heap-buffer-overflow"),
        ("write_before", "heap-buffer-overflow"),
        ("shared_pointer", "use-after-poison"),
    ],
)
def test_accesses_beside_an_array_are_seen(what, message):
    done = run(what)
    assert done.returncode != 0
    assert "returned" not in done.stdout
    assert message in done.stderr
    assert "violations.cu" in done.stderr
