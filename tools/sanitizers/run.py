"""Builds the CPU kernels with a sanitizer and runs random calls of them.

    python tools/sanitizers/run.py address     finds out-of-bounds accesses, undefined behaviour
    python tools/sanitizers/run.py thread      finds data races
    python tools/sanitizers/run.py none        runs without a sanitizer, for another processor:
        CXX=aarch64-linux-gnu-g++ python tools/sanitizers/run.py none --isa baseline \
            --under "qemu-aarch64 -L /usr/aarch64-linux-gnu"
        CXX="python -m ziglang c++ -target x86_64-windows-gnu" python tools/sanitizers/run.py none \
            --under wine

The program, driver.cpp, calls the kernels of one instruction set without torch and Python. With
"address" csrc/testing/fences.h fences in the pieces of a workspace too, and every piece starts as
NaN. A build takes one to two minutes; build/sanitizers keeps it until a source changes. The
compiler must be GCC or Clang with the sanitizers' runtime libraries.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"

SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DSNNLSTM_FENCES=1"],
    "thread": ["-fsanitize=thread"],
    "none": [],
}
ISAS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "wide": ["-mavx2", "-mfma", "-DSNNLSTM_WIDE=1"],
    "avx512": ["-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mfma"],
}


def isas_here() -> list[str]:
    """Returns the instruction sets that this processor runs, as the installed core lists them."""
    from snnlstm import _C

    return _C.isa_names()


def build(sanitizer: str, isa: str) -> Path:
    """Compiles the driver with `sanitizer` for `isa`, unless that is done; returns its path."""
    cxx = shlex.split(os.environ.get("CXX") or ("g++" if shutil.which("g++") else "clang++"))
    assert shutil.which(cxx[0]), f"no C++ compiler: {cxx[0]}"
    sources = [
        *(CSRC / "cpu" / "kernels").iterdir(),
        *(CSRC / "cpu").glob("*.h"),
        *(CSRC / "args.h", CSRC / "cell.h", CSRC / "platform.h", CSRC / "testing" / "fences.h"),
        *HERE.iterdir(),
    ]
    content = b"".join(f.read_bytes() for f in sorted(sources) if f.is_file())
    key = hashlib.sha1(content).hexdigest()[:10]
    name = f"{sanitizer}-{isa}-{Path(cxx[0]).name}{''.join(cxx[1:])}"
    folder = ROOT / "build" / "sanitizers" / f"{name}-{key}"
    program = folder / "driver.exe"  # as Windows wants it
    if program.exists():
        return program
    for old in folder.parent.glob(f"{name}-*"):
        shutil.rmtree(old)
    folder.mkdir(parents=True)
    flags = ["-std=gnu++17", "-O1", "-g1", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
    flags += [*SANITIZERS[sanitizer], *ISAS[isa], f"-DSNNLSTM_ISA={isa}", f"-I{CSRC}"]

    def compile_one(source: Path) -> Path:
        out = folder / f"{source.stem}.o"
        command = [*cxx, *flags, "-c", str(source), "-o", str(out)]
        subprocess.run(command, check=True)
        return out

    units = sorted((CSRC / "cpu" / "kernels").glob("*.cpp"), key=lambda f: -f.stat().st_size)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, [*units, HERE / "driver.cpp"]))
    unfinished = program.with_suffix(".new")
    command = [*cxx, *flags, *map(str, objects), "-pthread", "-o", str(unfinished)]
    subprocess.run(command, check=True)
    unfinished.rename(program)
    return program


def run(
    sanitizer: str, isa: str, cases: int, seed: int = 0, under: str = ""
) -> subprocess.CompletedProcess[str]:
    """Runs `cases` random calls; a finding gives a non-zero exit status and a report on stderr.

    `under` is a command that runs the program, such as an emulator of another processor.
    """
    environment = {
        **os.environ,
        "ASAN_OPTIONS": "detect_leaks=1:halt_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1",
    }
    command = [*shlex.split(under), str(build(sanitizer, isa)), str(cases), str(seed)]
    return subprocess.run(command, env=environment, text=True, capture_output=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sanitizer", choices=SANITIZERS)
    parser.add_argument("--isa", choices=[*ISAS, "all"], default="all")
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--under", default="", help="command that runs the program")
    chosen = parser.parse_args()
    for isa in isas_here() if chosen.isa == "all" else [chosen.isa]:
        done = run(chosen.sanitizer, isa, chosen.cases, chosen.seed, chosen.under)
        print(f"{chosen.sanitizer}, {isa}: {done.stdout}{done.stderr}", end="", flush=True)
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
