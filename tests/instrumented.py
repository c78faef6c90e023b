"""The package in a tree of its own, built with an instrument, and the tests run there.

    python tests/instrumented.py address     the kernels' tests of Python under AddressSanitizer
    python tests/instrumented.py coverage    lines and branches that the tests reach
    python tests/instrumented.py mutants     changes of the code that no test notices

Arguments after -- go to pytest, in the place of the usual choice of tests. The tree is
build/instrumented/NAME; the core is built there anew where csrc changed.
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
    "coverage": "-O0 -g1 --coverage -fprofile-update=atomic",
}
TESTS = {
    "address": ["test_kernels.py", "test_kernel_gradients.py", "test_fuzz.py", "test_core.py",
                "test_loop.py", "test_threads.py", "-k", "not long and not gil"],
    "coverage": ["--ignore=tests/simt", "--ignore=tests/test_distribution.py",
                 "--ignore=tests/test_demo.py", "--ignore=tests/test_demo_training.py"],
}  # fmt: skip
# What mutants are made of, and the tests that are to notice them.
MUTATED = {
    "arguments": ["test_arguments.py", "test_messages.py", "test_semantics.py"],
    "state": ["test_state.py", "test_overrides.py", "test_transforms.py", "test_training.py"],
    "run": ["test_path.py", "test_overrides.py", "test_autocast.py"],
}


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
    for old in () if more else [*to.glob("build/**/*.gcda"), *to.glob(".coverage")]:
        old.unlink()
    data = {"COVERAGE_FILE": str(to / ".coverage")}
    run = ("-m", "coverage", "run", "--append", "--branch", "--source=snnlstm")
    failed = pytest(to, tests, run, **data)
    report = [sys.executable, "-m", "coverage", "report", "--show-missing", "--skip-covered"]
    subprocess.run(report, cwd=to, env=os.environ | data, check=True)
    command = [sys.executable, "-m", "gcovr", "--root", ".", "--filter", "csrc/", "build"]
    subprocess.run([*command, "--print-summary"], cwd=to, check=True)
    return failed


def mutants(names: list[str]) -> int:
    """Each mutant of the named modules of MUTATED, by cosmic-ray; lists those that no test saw."""
    if unknown := set(names) - set(MUTATED):
        raise SystemExit(f"modules must be among {', '.join(MUTATED)}, got {', '.join(unknown)}")
    to = tree("mutants")
    for built in (ROOT / "snnlstm").glob("_C*.so"):
        shutil.copy2(built, to / "snnlstm")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(to), os.environ.get("PYTHONPATH")]))
    }

    def cosmic_ray(module: str, *arguments: str | Path) -> None:
        command = [sys.executable, "-m", f"cosmic_ray.{module}", *map(str, arguments)]
        subprocess.run(command, cwd=to, env=environment, check=True)

    for name in names or MUTATED:
        tests = " ".join(f"tests/{test}" for test in MUTATED[name])
        module = ROOT / "snnlstm" / f"{name}.py"
        config, session = to / f"{name}.toml", to / f"{name}.sqlite"
        config.write_text(
            "[cosmic-ray]\n"
            f'module-path = "snnlstm/{name}.py"\ntimeout = 120.0\nexcluded-modules = []\n'
            f'test-command = "{sys.executable} -m pytest -x -q -p no:cacheprovider {tests}"\n'
            '[cosmic-ray.distributor]\nname = "local"\n'
            # Of annotations, which nobody evaluates.
            "[cosmic-ray.filters.operators-filter]\n"
            'exclude-operators = ["core/ReplaceBinaryOperator_BitOr_.*"]\n'
        )
        # One that was stopped goes on, unless the module has changed since.
        if not session.exists() or session.stat().st_ctime < module.stat().st_mtime:
            session.unlink(missing_ok=True)
            cosmic_ray("cli", "init", config, session)
            cosmic_ray("tools.filters.operators_filter", session, config)
        cosmic_ray("cli", "exec", config, session)
        print(f"== {name}", flush=True)
        cosmic_ray("tools.report", "--surviving-only", "--show-diff", session)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("instrument", choices=["address", "coverage", "mutants"])
    parser.add_argument("--more", action="store_true", help="coverage: add to earlier runs")
    parser.add_argument("rest", nargs="*", metavar="-- ...", help="for pytest; mutants: modules")
    chosen = parser.parse_args()
    tests = chosen.rest or TESTS.get(chosen.instrument, [])
    return globals()[chosen.instrument](tests, *([True] if chosen.more else []))


if __name__ == "__main__":
    sys.exit(main())
