"""Builds kernels for the CPU: g++, csrc/cuda/primitives.cuh and the emulator.

``build(name, sources, variant)`` returns the path of a shared library. Objects and libraries are
kept under ``build/simt`` and rebuilt if a file that went into them has changed.

Variants:
    plain     fast; primitives are checked, ``p[i]`` is not
    checked   every access is checked: bounds, alignment, races, uninitialised shared memory;
              counters are exact; seeded faults can be switched on at run time
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = Path(os.environ.get("SNNLSTM_SIMT_CACHE", ROOT / "build" / "simt"))
EMULATOR = sorted((HERE / "emulator").glob("*.cpp"))
KERNELS = HERE / "kernels"

COMMON = [
    "-std=c++17",
    "-O2",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-march=native",
    "-ffp-contract=off",
    "-fno-strict-aliasing",  # kernels look at shared memory as words and as elements
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Wno-unused-parameter",
]
# Reports and counters name accesses by their address in the code, which must not be duplicated.
VARIANTS = {
    "plain": [],
    "checked": [
        "-O1",  # compiles in half the time, and runs hardly slower
        "-fsanitize=thread",
        "-fsanitize=bounds,signed-integer-overflow,shift,integer-divide-by-zero",
        "-fno-sanitize-recover=all",
        "--param=tsan-instrument-func-entry-exit=0",
        "-fno-thread-jumps",
        "-fno-ipa-icf",
        "-fno-threadsafe-statics",
        "-DSNNLSTM_FAULT_SWITCH",
    ],
}


class BuildError(RuntimeError):
    pass


def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++")
    if not found:
        raise BuildError("the emulation needs g++ (or CXX)")
    return found


@functools.cache
def compiler_id() -> str:
    text = _run([compiler(), "--version"]).splitlines()[0]
    # -march=native means something else on another machine that shares the directory.
    native = _run([compiler(), "-march=native", "-Q", "--help=target"])
    return text + hashlib.sha1(native.encode()).hexdigest()


def build(
    name: str,
    sources: list[Path],
    variant: str = "plain",
    includes: tuple[Path, ...] = (),
    host_sources: tuple[Path, ...] = (),
) -> Path:
    """Builds ``sources`` (.cu) together with the emulator, and returns the library's path.

    name: of the library, without suffix. includes: further directories of headers.
    host_sources: files without kernels, compiled plainly in every variant.
    A BuildError has the compiler's output.
    """
    folders = (*includes, ROOT / "csrc" / "cuda", ROOT / "csrc", HERE / "emulator")
    common = [f"-I{folder}" for folder in folders]
    # The emulator is never instrumented. It comes first: the linker takes the first of equal inline
    # functions.
    jobs = [
        (source, ["-O3", *common])
        for source in EMULATOR
        if variant == "checked" or source.name != "hooks.cpp"
    ]
    jobs += [(source, [*VARIANTS[variant], *common]) for source in sources]
    jobs += [(source, ["-O1", *common]) for source in host_sources]
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # parallel test workers want the same objects
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 2) as pool:
            objects = list(pool.map(lambda job: _object(*job), jobs))
        key = hashlib.sha1("".join(map(str, objects)).encode())
        for o in objects:
            key.update(o.with_suffix(".json").read_bytes())
        library = CACHE / f"{name}-{variant}-{key.hexdigest()[:16]}.so"
        if not library.exists():
            link = [compiler(), "-shared", *map(str, objects), "-ldl", "-o"]
            _replace(library, lambda to: _run([*link, to]))
    return library


def _object(source: Path, flags: list[str]) -> Path:
    command = [compiler(), *COMMON, *flags]
    if source.suffix == ".cu":
        command += ["-x", "c++"]
    key = hashlib.sha1("\0".join([compiler_id(), str(source), *command]).encode()).hexdigest()[:16]
    target = CACHE / f"{source.stem}-{key}.o"
    manifest = target.with_suffix(".json")
    if target.exists() and manifest.exists() and _unchanged(manifest):
        return target
    deps = CACHE / f"{source.stem}-{key}-{os.getpid()}.d"
    _replace(
        target,
        lambda to: _run([*command, "-MMD", "-MF", str(deps), "-c", str(source), "-o", to]),
    )
    names = deps.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    deps.unlink()
    ours = {n: _digest(Path(n)) for n in names if Path(n).resolve().is_relative_to(ROOT)}
    _replace(manifest, lambda to: Path(to).write_text(json.dumps(ours)))
    return target


def _unchanged(manifest: Path) -> bool:
    files = json.loads(manifest.read_text())
    return all(Path(n).exists() and _digest(Path(n)) == d for n, d in files.items())


def _digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


def _replace(target: Path, write) -> None:
    """Writes under another name first, so that an interrupted build leaves no half of a file."""
    temporary = target.with_name(f".{os.getpid()}-{target.name}")
    write(str(temporary))
    os.replace(temporary, target)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout
