"""Builds the CPU kernels with a sanitizer, and runs random calls of them, or tests.

    python tools/instrumented.py address     random calls: accesses out of bounds, undefined results
    python tools/instrumented.py thread      random calls: data races
    python tools/instrumented.py none        without a sanitizer, for another processor:
        CXX=aarch64-linux-gnu-g++ python tools/instrumented.py none --isa baseline \
            --under "qemu-aarch64 -L /usr/aarch64-linux-gnu"
        CXX="python -m ziglang c++ -target x86_64-windows-gnu" python tools/instrumented.py none \
            --under wine
    python tools/instrumented.py tests       the kernels' tests under AddressSanitizer

Random calls come from sanitizers/driver.cpp, which calls the kernels of one instruction set without
torch and Python. With "address" the pieces of a workspace have fences (workspace.h), and
every piece starts as NaN. The compiler must be GCC or Clang with the sanitizers' runtime libraries.

Tests run in a copy of the package, build/instrumented/tests, where a build compiles only the
changed files of csrc. Options come before --; the arguments after -- replace the usual choice of
tests.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CSRC, TREES = ROOT / "csrc", ROOT / "build" / "instrumented"

SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DSNNLSTM_FENCES=1"],
    "thread": ["-fsanitize=thread"],
    "none": [],
}
# GCC aligns vectors of 64 bytes wrongly on the stack that finds uses after a return.
PLAIN_STACK = "detect_stack_use_after_return=0"
ISAS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "wide": ["-mavx2", "-mfma", "-DSNNLSTM_WIDE=1"],
    "avx512": ["-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mfma"],
}
TESTS = [
    "kernels", "products", "pool/test_pool2d.py", "autograd/test_loop.py", "cell/test_threads.py",
    *(f"--ignore=tests/kernels/test_{name}.py" for name in ("cuda_check", "math", "packing")),
    "-k", "not long and not gil",
]  # fmt: skip


# ---- random calls --------------------------------------------------------------------------------


def build_driver(sanitizer: str, isa: str) -> Path:
    """Compiles the driver with `sanitizer` for `isa`, in one to two minutes; returns its path."""
    cxx = shlex.split(os.environ.get("CXX") or ("g++" if shutil.which("g++") else "clang++"))
    assert shutil.which(cxx[0]), f"no C++ compiler: {cxx[0]}"
    folder = TREES / f"{sanitizer}-{isa}"
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["-std=gnu++17", "-O1", "-g1", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
    flags += [*SANITIZERS[sanitizer], *ISAS[isa], f"-DSNNLSTM_ISA={isa}", f"-I{CSRC}"]

    def compiled(source: Path) -> str:
        out = str(folder / f"{source.stem}.o")
        subprocess.run([*cxx, *flags, "-c", str(source), "-o", out], check=True)
        return out

    units = sorted((CSRC / "cpu" / "kernels").glob("*.cpp"), key=lambda f: -f.stat().st_size)
    units.append(ROOT / "tools" / "sanitizers" / "driver.cpp")
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        objects = list(workers.map(compiled, units))
    program = folder / "driver.exe"  # as Windows wants it
    subprocess.run([*cxx, *flags, *objects, "-pthread", "-o", str(program)], check=True)
    return program


def random_calls(sanitizer: str, isa: str, under: str) -> int:
    """Runs random calls; a finding gives a non-zero exit status and a report on stderr.

    `isa` may be "all" that this processor runs, as the installed core lists them. `under` is a
    command that runs the program, such as an emulator of another processor.
    """
    isas = import_module("snnlstm._C").isa_names() if isa == "all" else [isa]
    options = {
        "ASAN_OPTIONS": PLAIN_STACK,
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1",
    }
    for name in isas:
        print(f"{sanitizer}, {name}:", flush=True)
        program = build_driver(sanitizer, name)
        command = [*shlex.split(under), str(program), "300"]
        if status := subprocess.run(command, env=os.environ | options).returncode:
            return status
    return 0


# ---- tests ---------------------------------------------------------------------------------------


def run_tests(tests: list[str]) -> int:
    """Builds the core of a copy of all that is tested with AddressSanitizer, and runs tests."""
    to = TREES / "tests"
    for old in {*to.glob("*")} - {to / "build", to / "snnlstm"}:  # which hold what was built
        shutil.rmtree(old, ignore_errors=True)  # copies take the place of files
    built = ".*", "build", "dist", "out", "*.so", "__pycache__", "_generated"
    # Unchanged files keep their times.
    shutil.copytree(ROOT, to, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*built))
    flags = "-DCMAKE_CXX_FLAGS='-O1 -g1 -fsanitize=address -fno-omit-frame-pointer'"
    settings = {"CMAKE_ARGS": f"{flags} -DCMAKE_CXX_FLAGS_RELEASE=", "SNNLSTM_CUDA": "off"}
    make = ["make", "-s", "core", f"PYTHON={sys.executable}"]
    subprocess.run(make, cwd=to, env=os.environ | settings, check=True)
    environment = {k: v for k, v in os.environ.items() if k != "SNNLSTM_ISA"}
    environment |= {
        "PYTHONPATH": str(to),
        "LD_PRELOAD": " ".join(map(library, ("libasan.so", "libstdc++.so.6"))),
        # At its end Python leaves most memory allocated, which is no leak.
        "ASAN_OPTIONS": f"{PLAIN_STACK}:detect_leaks=0:detect_odr_violation=0",
    }
    paths = [f"tests/{test}" if (ROOT / "tests" / test).exists() else test for test in tests]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths]
    return subprocess.run(command, cwd=to, env=environment, check=False).returncode


def library(name: str) -> str:
    """Returns the path of one of the compiler's runtime libraries."""
    command = [os.environ.get("CXX", "g++"), f"-print-file-name={name}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("instrument", choices=[*SANITIZERS, "tests"])
    parser.add_argument("--isa", choices=[*ISAS, "all"], default="all")
    parser.add_argument("--under", default="", help="command that runs the program")
    parser.add_argument("rest", nargs="*", metavar="-- ...", help="for pytest")
    chosen = parser.parse_args()
    if chosen.instrument == "tests":
        return run_tests(chosen.rest or TESTS)
    return random_calls(chosen.instrument, chosen.isa, chosen.under)


if __name__ == "__main__":
    sys.exit(main())
