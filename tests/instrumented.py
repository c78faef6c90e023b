"""The package in a tree of its own, built with an instrument, and the tests run there.

    python tests/instrumented.py address     the kernels' tests of Python under AddressSanitizer
    python tests/instrumented.py coverage    lines and branches that the tests reach
    python tests/instrumented.py mutants     changes of the code that no test notices

Options come first. Arguments after -- go to pytest, in the place of the usual choice of tests, or
name modules. The tree is build/instrumented/NAME; the core is built there anew where csrc changed.
"""

from __future__ import annotations

import argparse
import os
import random
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
    "address": ["test_kernels.py", "test_kernel_gradients.py", "test_fuzz.py", "test_core.py",
                "test_loop.py", "test_threads.py", "-k", "not long and not gil"],
    "coverage": ["--ignore=tests/test_distribution.py", "--ignore=tests/test_demo.py",
                 # What tests the emulator itself, or builds more than the tests of calls do.
                 *(f"--ignore=tests/simt/test_{of}.py" for of in (
                     "asan", "compiles", "core_counters", "core_mutations", "counters", "detectors",
                     "disassembly", "emulator", "fragments", "mutations", "sizes"))],
}  # fmt: skip
# What mutants are made of, and the tests that are to notice them, the likeliest first.
MUTATED = {
    "arguments": ["test_arguments.py", "test_messages.py", "test_semantics.py"],
    "state": ["test_state.py", "test_overrides.py", "test_transforms.py", "test_training.py"],
    "run": ["test_path.py", "test_semantics.py", "test_overrides.py", "test_transforms.py",
            "test_autocast.py"],
}  # fmt: skip
# Annotations, which nobody evaluates, and comparisons that mean the same for what is compared.
EQUIVALENT = ["core/ReplaceBinaryOperator_BitOr_.*", "core/ReplaceComparisonOperator_Is_Eq",
              "core/ReplaceComparisonOperator_IsNot_NotEq"]  # fmt: skip


def tree(name: str) -> Path:
    """A copy of what is built and tested; files that did not change keep their times."""
    to = TREES / name
    for part in ("csrc", "snnlstm", "tests", "benchmarks", "docs"):
        shutil.copytree(
            ROOT / part, to / part, dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("*.so", "__pycache__", "_generated"),
        )  # fmt: skip
    for part in ("setup.py", "pyproject.toml", "Makefile", *ROOT.glob("*.md"), *ROOT.glob("LIC*")):
        shutil.copy2(ROOT / part, to)
    return to


def build(to: Path, flags: str) -> None:
    arguments = f"-DCMAKE_CXX_FLAGS='{flags}' -DCMAKE_CXX_FLAGS_RELEASE="
    environment = os.environ | {"CMAKE_ARGS": arguments, "SNNLSTM_CUDA": "off"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=to, env=environment, check=True)


def library(name: str) -> str:
    """Path of a runtime library of the compiler's."""
    command = [os.environ.get("CXX", "g++"), f"-print-file-name={name}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def pytest(to: Path, tests: list[str], before: tuple[str, ...] = (), **environment: str) -> int:
    named = [
        f"tests/{test}" if test.endswith(".py") and "/" not in test else test for test in tests
    ]
    command = [sys.executable, *before, "-m", "pytest", "-q", "-p", "no:cacheprovider", *named]
    inherited = {k: v for k, v in os.environ.items() if k != "SNNLSTM_ISA"}
    done = subprocess.run(
        command, cwd=to, env=inherited | {"PYTHONPATH": str(to)} | environment, check=False
    )
    return done.returncode


def address(tests: list[str]) -> int:
    to = tree("address")
    build(to, FLAGS["address"])
    return pytest(
        to, tests,
        LD_PRELOAD=f"{library('libasan.so')} {library('libstdc++.so.6')}",
        # Python frees little at its end; NumPy and torch are not instrumented.
        ASAN_OPTIONS="detect_leaks=0:detect_odr_violation=0",
    )  # fmt: skip


def coverage(tests: list[str], more: bool = False) -> int:
    """`more`: add to what earlier runs have reached, so that a long run can be cut in pieces."""
    to = tree("coverage")
    build(to, FLAGS["coverage"])
    for old in () if more else [*to.glob("build/**/*.gcda"), *to.glob(".coverage*")]:
        old.unlink()
    data = {"COVERAGE_FILE": str(to / ".coverage")}
    failed = pytest(to, tests, ("-m", "coverage", "run"), **data)
    for command in (
        ["coverage", "combine", "-q", "--append"],
        ["coverage", "report", "--show-missing", "--skip-covered"],
        # A line counts once, whichever instantiation reached it. Inner loops run 2^32 times.
        ["gcovr", "--filter=csrc/", "--merge-lines", "--gcov-suspicious-hits-threshold=0", "build"],
    ):
        subprocess.run([sys.executable, "-m", *command], cwd=to, env=os.environ | data, check=True)
    return failed


def mutants(names: list[str], most: int = 0) -> int:
    """Makes mutants of what MUTATED names, and lists those that no test saw.

    `most`: a random sample of so many of each; 0 takes all.
    """
    if unknown := set(names) - set(MUTATED):
        raise SystemExit(f"modules must be among {', '.join(MUTATED)}, got {', '.join(unknown)}")
    for name in names or MUTATED:
        to = tree(f"mutants-{name}")
        for built in (ROOT / "snnlstm").glob("_C*.so"):
            shutil.copy2(built, to / "snnlstm")
        tests = " ".join(f"tests/{test}" for test in MUTATED[name])
        run = f"{sys.executable} -m pytest -x -q -p no:cacheprovider -k 'not simt' {tests}"
        mutants_of_module(name, to, run, most)
    return 0


def mutants_of_module(name: str, to: Path, run: str, most: int) -> None:
    """Those of a module of the package, by cosmic-ray; a run that was stopped goes on."""
    paths = os.pathsep.join(filter(None, [str(to), os.environ.get("PYTHONPATH")]))

    def cosmic_ray(module: str, *arguments: str) -> None:
        command = [sys.executable, "-m", f"cosmic_ray.{module}", *arguments]
        subprocess.run(command, cwd=to, env=os.environ | {"PYTHONPATH": paths}, check=True)

    config, session = to / "config.toml", to / "session.sqlite"
    config.write_text(
        f'[cosmic-ray]\nmodule-path = "snnlstm/{name}.py"\ntimeout = 120.0\n'
        f'excluded-modules = []\ntest-command = "{run}"\n'
        f'[cosmic-ray.distributor]\nname = "local"\n'
        f"[cosmic-ray.filters.operators-filter]\nexclude-operators = {EQUIVALENT}\n"
    )
    module = ROOT / "snnlstm" / f"{name}.py"
    if not session.exists() or session.stat().st_ctime < module.stat().st_mtime:
        session.unlink(missing_ok=True)
        cosmic_ray("cli", "init", config.name, session.name)
        cosmic_ray("tools.filters.operators_filter", session.name, config.name)
        skip_all_but(most, session)
    cosmic_ray("cli", "baseline", config.name)  # an error where the tests fail as it is
    cosmic_ray("cli", "exec", config.name, session.name)
    print(f"== {name}", flush=True)
    cosmic_ray("tools.report", "--surviving-only", "--show-diff", session.name)


def skip_all_but(most: int, session: Path) -> None:
    """Leave a random sample of so many mutants to be run."""
    from cosmic_ray.work_db import use_db
    from cosmic_ray.work_item import WorkerOutcome, WorkResult

    with use_db(session) as mutations:
        pending = sorted(mutations.pending_work_items, key=lambda item: str(item.mutations))
        random.Random(0).shuffle(pending)
        for item in pending[most or None :]:
            mutations.set_result(item.job_id, WorkResult(worker_outcome=WorkerOutcome.SKIPPED))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("instrument", choices=["address", "coverage", "mutants"])
    parser.add_argument("--more", action="store_true", help="coverage: add to earlier runs")
    parser.add_argument("--most", type=int, default=0, help="mutants: so many of each, by chance")
    parser.add_argument("rest", nargs="*", metavar="-- ...", help="for pytest; mutants: modules")
    chosen = parser.parse_args()
    tests = chosen.rest or TESTS.get(chosen.instrument, [])
    if chosen.instrument == "coverage":
        return coverage(tests, chosen.more)
    return mutants(tests, chosen.most) if chosen.instrument == "mutants" else address(tests)


if __name__ == "__main__":
    sys.exit(main())
