"""Copies the package to a tree of its own, builds it with an instrument, and runs tests there.

    python tools/instrumented.py address     runs the kernels' tests under AddressSanitizer
    python tools/instrumented.py coverage    lists the lines and branches that no test reaches

Options come before --. The arguments after -- replace the usual choice of tests. The tree is
build/instrumented/NAME. A build there compiles only the changed files of csrc.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TREES = ROOT / "build" / "instrumented"

FLAGS = {
    "address": "-O1 -g1 -fsanitize=address -fno-omit-frame-pointer",
    "coverage": "-Og -g1 --coverage -fprofile-update=atomic",
}
TESTS = {
    "address": ["kernels", "autograd/test_loop.py", "system/test_threads.py",
                *(f"--ignore=tests/kernels/test_{of}.py" for of in (
                    "cuda_check", "math", "packing")),
                "-k", "not long and not gil"],
    "coverage": ["-n", "auto", "--maxprocesses", "8", "--dist", "worksteal",
                 "--ignore=tests/packaging/test_distribution.py",
                 "--ignore=tests/bench/test_demo.py",
                 # These files test the emulator itself, or build much more than other tests do.
                 *(f"--ignore=tests/simt/test_{of}.py" for of in (
                     "asan", "compiles", "core_counters", "core_mutations", "counters", "detectors",
                     "disassembly", "fragments"))],
}  # fmt: skip


def tree(name: str) -> Path:
    """Copies all that is built and tested; unchanged files keep their times."""
    to = TREES / name
    for part in ("csrc", "snnlstm", "tests", "tools", "benchmarks", "docs"):
        if part != "snnlstm":  # the folder snnlstm holds the core that was built
            shutil.rmtree(to / part, ignore_errors=True)
        shutil.copytree(
            ROOT / part, to / part, dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("*.so", "__pycache__", "_generated"),
        )  # fmt: skip
    for part in ("pyproject.toml", "Makefile", *ROOT.glob("*.md"), *ROOT.glob("LIC*")):
        shutil.copy2(ROOT / part, to)
    return to


def build(to: Path, instrument: str) -> None:
    arguments = f"-DCMAKE_CXX_FLAGS='{FLAGS[instrument]}' -DCMAKE_CXX_FLAGS_RELEASE="
    environment = os.environ | {"CMAKE_ARGS": arguments, "SNNLSTM_CUDA": "off"}
    command = ["make", "-s", "core", f"PYTHON={sys.executable}"]
    subprocess.run(command, cwd=to, env=environment, check=True)


def library(name: str) -> str:
    """Returns the path of one of the compiler's runtime libraries."""
    command = [os.environ.get("CXX", "g++"), f"-print-file-name={name}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def pytest(to: Path, tests: list[str], before: tuple[str, ...] = (), **environment: str) -> int:
    command = [sys.executable, *before, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += files(tests)
    inherited = {k: v for k, v in os.environ.items() if k != "SNNLSTM_ISA"}
    done = subprocess.run(
        command, cwd=to, env=inherited | {"PYTHONPATH": str(to)} | environment, check=False
    )
    return done.returncode


def address(tests: list[str]) -> int:
    to = tree("address")
    build(to, "address")
    return pytest(
        to, tests,
        LD_PRELOAD=f"{library('libasan.so')} {library('libstdc++.so.6')}",
        # At its end Python leaves most memory allocated, which is no leak.
        ASAN_OPTIONS="detect_leaks=0:detect_odr_violation=0",
    )  # fmt: skip


def coverage(tests: list[str], more: bool = False) -> int:
    """Runs tests and reports coverage; with `more`, of earlier runs and this one together."""
    to = tree("coverage")
    build(to, "coverage")
    for old in () if more else [*to.glob("build/**/*.gcda"), *to.glob(".coverage*")]:
        old.unlink()
    data = {"COVERAGE_FILE": str(to / ".coverage")}
    failed = pytest(to, tests, ("-m", "coverage", "run"), **data)
    for command in (
        ["coverage", "combine", "-q", "--append"],
        ["coverage", "report", "--show-missing", "--skip-covered"],
        # --merge-lines counts a line once for all instantiations. Inner loops run 2^32 times.
        ["gcovr", "--filter=csrc/", "--merge-lines", "--gcov-suspicious-hits-threshold=0", "build"],
    ):
        subprocess.run([sys.executable, "-m", *command], cwd=to, env=os.environ | data, check=True)
    return failed


def files(tests: list[str]) -> list[str]:
    """Returns the arguments with the names of files and folders of tests/ as paths."""
    return [f"tests/{test}" if (ROOT / "tests" / test).exists() else test for test in tests]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("instrument", choices=["address", "coverage"])
    parser.add_argument("--more", action="store_true", help="coverage: add to earlier runs")
    parser.add_argument("rest", nargs="*", metavar="-- ...", help="for pytest")
    chosen = parser.parse_args()
    tests = chosen.rest or TESTS[chosen.instrument]
    if chosen.instrument == "coverage":
        return coverage(tests, chosen.more)
    return address(tests)


if __name__ == "__main__":
    sys.exit(main())
