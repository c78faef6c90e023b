"""Copies the package to a tree of its own, builds it with an instrument, and runs tests there.

    python tools/instrumented.py address     runs the kernels' tests under AddressSanitizer
    python tools/instrumented.py coverage    lists the lines and branches that no test reaches
    python tools/instrumented.py mutants     lists changes of the code that no test notices

Options come before --. The arguments after -- replace the usual choice of tests of "address" and
"coverage", and for "mutants" name what is mutated: cell, package, or modules of the package such as
path. The tree is
build/instrumented/NAME. A build there compiles only the changed files of csrc.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TREES = ROOT / "build" / "instrumented"

FLAGS = {
    "address": "-O1 -g1 -fsanitize=address -fno-omit-frame-pointer",
    "coverage": "-Og -g1 --coverage -fprofile-update=atomic",
    "cell": "-O1",
}
TESTS = {
    "address": ["kernels", "autograd/test_loop.py", "system/test_threads.py",
                *(f"--ignore=tests/kernels/test_{of}.py" for of in (
                    "cuda_check", "headers", "math", "measured", "packing")),
                "-k", "not long and not gil"],
    "coverage": ["-n", "auto", "--maxprocesses", "8", "--dist", "worksteal",
                 "--ignore=tests/packaging/test_distribution.py",
                 "--ignore=tests/bench/test_demo.py",
                 # These files test the emulator itself, or build much more than other tests do.
                 *(f"--ignore=tests/simt/test_{of}.py" for of in (
                     "asan", "compiles", "core_counters", "core_mutations", "counters", "detectors",
                     "disassembly", "fragments")),
                 "-k", "not shares_a_function"],  # without optimisation much is not inlined
}  # fmt: skip
# These tests should notice mutants of the package and of cell.h.
NOTICE = {
    "package": ["cell", "autograd", "docs/test_messages.py", "networks/test_loops.py", "sequences",
                "snntorch/test_drop_in.py", "snntorch/test_swap.py", "system/test_caches.py",
                "torch/test_dtypes.py", "torch/test_training.py"],
    "cell": ["cell/test_quant.py", "cell/test_surrogate.py",
             "kernels/test_kernels.py",
             "snntorch/test_equivalence.py"],
}  # fmt: skip
# pytest leaves out tests of the emulator, a test of line numbers, which mutmut changes, and tests
# of exports and of torch.compile, which cannot look through mutmut's functions.
LEFT_OUT = "not simt and not every_error_is_shown and not export and not compile and not one_graph"
MUTMUT = """
[tool.mutmut]
source_paths = ["snnlstm"]
only_mutate = {modules}
also_copy = ["benchmarks", "csrc", "docs", "tools", "setup.py",
             "README.md", "CHANGELOG.md", "SECURITY.md"]
"""


MUTATED = (  # of the package, if no module is named
    "options", "layers", "rates", "quant", "surrogate", "path", "checks", "call", "state",
    "lengths", "settings",
)  # fmt: skip


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
    for part in ("setup.py", "pyproject.toml", "Makefile", *ROOT.glob("*.md"), *ROOT.glob("LIC*")):
        shutil.copy2(ROOT / part, to)
    return to


def build(to: Path, instrument: str) -> None:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=to, env=building(instrument), check=True)


def building(instrument: str) -> dict[str, str]:
    """Returns the environment in which setup.py compiles with the instrument's flags."""
    arguments = f"-DCMAKE_CXX_FLAGS='{FLAGS[instrument]}' -DCMAKE_CXX_FLAGS_RELEASE="
    if instrument == "cell":  # all instruction sets have the same cell.h; one compiles quickly
        arguments += " -DSNNLSTM_BASELINE_ALONE=ON"
    return os.environ | {"CMAKE_ARGS": arguments, "SNNLSTM_CUDA": "off"}


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


def mutants(what: list[str], most: int, seconds: str) -> int:
    """Makes mutants of the package, of some of its modules, or of cell.h; lists the survivors.

    mutmut makes those of the package, and judge.py judges them by `seconds` of tests each, but for
    those that an earlier run killed and whose function is as it was. universalmutator makes those
    of "cell", of which a random sample of at most `most` is tested.
    """
    modules = [name for name in what if (ROOT / f"snnlstm/{name}.py").exists()]
    modules += MUTATED if "package" in what else ()
    if unknown := {*what} - {*modules, "package", "cell"}:
        raise SystemExit(f"mutants are made of package, cell or modules, not of {unknown}")
    if modules:
        to = tree("mutants")
        for built in (ROOT / "snnlstm").glob("_C*.so"):
            shutil.copy2(built, to / "snnlstm")
        tests = files(NOTICE["package"])
        for name in modules:
            tests += [str(path.relative_to(ROOT)) for path in ROOT.glob(f"tests/*/test_{name}.py")]
        sources = [f"snnlstm/{name}.py" for name in modules]
        settings = MUTMUT.format(modules=sources)
        (to / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + settings)
        command = [sys.executable, ROOT / "tools/judge.py", "--modules", *modules]
        command += ["--tests", *tests, "-k", LEFT_OUT, "--seconds", seconds]
        subprocess.run(command, cwd=to, check=True)
    if "cell" in what:
        mutants_of_cell(tree("mutants-cell"), most)
    return 0


def mutants_of_cell(to: Path, most: int) -> None:
    made, cell = to / "mutants", to / "csrc/cell.h"
    cell.touch()  # a run that was stopped leaves the core of a mutant
    build(to, "cell")
    built = next(to.glob("snnlstm/_C*.so"))
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    shutil.copy2(built, made)
    # Comments and the preprocessor's lines are not mutated.
    code = [str(n) for n, line in enumerate(cell.read_text().splitlines(), 1)
            if not re.match(r"\s*(//|#|$)", line)]  # fmt: skip
    (made / "lines").write_text("\n".join(code))
    python, build_again = sys.executable, "setup.py -q build_ext --inplace"
    test = f"{python} -m pytest -x -q -p no:cacheprovider -k '{LEFT_OUT}' "
    test += " ".join(files(NOTICE["cell"]))
    # CUDA alone gives quantise() all numbers: the CPU gives it ties, NaN and infinities.
    test += f" && {python} -m pytest -x -q -p no:cacheprovider -k simt tests/cell/test_quant.py"
    # A mutant that does not compile, or that compiles to equal bytes, does not count.
    compiles = f"{python} {build_again} && ! cmp -s {built} {made / built.name}"
    tool = f"{python} -m universalmutator"
    for command in (
        test,  # the command fails if the tests fail without a mutant
        f"{tool}.genmutants {cell} cpp --noCheck --lines {made / 'lines'} --mutantDir {made}",
        f'{tool}.analyze {cell} "{test}" --compileCommand "{compiles}" --mutantDir {made} '
        f"--timeout 200 --seed 0 --numMutants {most}",
        f"for survivor in $(cat notkilled.txt); do diff {cell} {made}/$survivor; done; true",
    ):
        environment = building("cell") | {"PYTHONPATH": str(to)}
        subprocess.run(command, shell=True, cwd=to, env=environment, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("instrument", choices=["address", "coverage", "mutants"])
    parser.add_argument("--more", action="store_true", help="coverage: add to earlier runs")
    parser.add_argument("--most", type=int, default=150, help="this many mutants of cell.h")
    parser.add_argument("--seconds", default="inf", help="of tests for a mutant of the package")
    parser.add_argument(
        "rest", nargs="*", metavar="-- ...", help="for pytest; package, path, cell ..."
    )
    chosen = parser.parse_args()
    tests = chosen.rest or TESTS.get(chosen.instrument, [])
    if chosen.instrument == "coverage":
        return coverage(tests, chosen.more)
    if chosen.instrument == "mutants":
        return mutants(tests or list(NOTICE), chosen.most, chosen.seconds)
    return address(tests)


if __name__ == "__main__":
    sys.exit(main())
