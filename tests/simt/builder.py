"""Builds kernels for the CPU: g++, csrc/cuda/primitives.cuh and the emulator.

``build(name, sources, variant)`` returns the path of a shared library. Objects and libraries are
kept under ``build/simt`` and rebuilt only where a file that went into them has changed.

Variants:
    plain     fast; primitives are checked, ``p[i]`` is not
    checked   every access is checked: bounds, alignment, races, uninitialised shared memory;
              counters are exact
    faults    as checked, and seeded faults can be switched on at run time
    asan      plain under AddressSanitizer (needs libasan preloaded)
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
# Reports and counters name accesses by their address in the code: no duplicated paths.
INSTRUMENT = [
    "-O1",  # compiles in half the time, and runs hardly slower
    "-fsanitize=thread",
    "-fsanitize=bounds,signed-integer-overflow,shift,integer-divide-by-zero",
    "-fno-sanitize-recover=all",
    "--param=tsan-instrument-func-entry-exit=0",
    "-fno-thread-jumps",
    "-fno-ipa-icf",
    "-fno-threadsafe-statics",
]
VARIANTS = {
    "plain": [],
    "checked": INSTRUMENT,
    "faults": [*INSTRUMENT, "-DSNNLSTM_FAULT_SWITCH"],
    "asan": ["-fsanitize=address", "-fno-omit-frame-pointer"],
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
    defines: tuple[str, ...] = (),
    includes: tuple[Path, ...] = (),
    host_sources: tuple[Path, ...] = (),
) -> Path:
    """Builds ``sources`` (.cu and .cpp) together with the emulator.

    Parameters
    ----------
    name: of the library, without suffix.
    sources: files with kernels and launchers; compiled in parallel.
    variant: a key of VARIANTS.
    defines: such as ``("SNNLSTM_FAULT=3",)``.
    includes: further directories of headers.
    host_sources: further files that hold no kernels: compiled plainly in every variant.

    Raises
    ------
    BuildError: with the compiler's output.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # parallel test workers want the same objects
        return _build(name, sources, variant, defines, includes, host_sources)


def _build(name, sources, variant, defines, includes, host_sources) -> Path:
    ident = compiler_id()
    common = [
        *(f"-D{d}" for d in defines),
        *(f"-I{i}" for i in includes),
        f"-I{ROOT / 'csrc' / 'cuda'}",
        f"-I{ROOT / 'csrc'}",
        f"-I{HERE / 'emulator'}",
    ]
    # The emulator itself is never instrumented; under AddressSanitizer it tells of its fibres.
    plain = VARIANTS["asan"] if variant == "asan" else []
    emulator = ["-O3", f"-I{HERE / 'emulator'}", *plain]
    hooks = variant in ("checked", "faults")
    jobs = [(Path(s), [*VARIANTS[variant], *common]) for s in sources]
    jobs += [(Path(s), ["-O1", *plain, *common]) for s in host_sources]
    jobs += [(s, emulator) for s in EMULATOR if hooks or s.name != "hooks.cpp"]
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 2) as pool:
        objects = list(pool.map(lambda job: _object(job[0], job[1], ident), jobs))

    key = hashlib.sha1("".join(map(str, objects)).encode())
    for o in objects:
        key.update(o.with_suffix(".json").read_bytes())
    library = CACHE / f"{name}-{variant}-{key.hexdigest()[:16]}.so"
    if not library.exists():
        link = ["-fsanitize=address"] if variant == "asan" else []
        _replace(
            library,
            lambda to: _run([compiler(), "-shared", "-o", to, *map(str, objects), *link, "-ldl"]),
        )
    return library


def _object(source: Path, flags: list[str], ident: str) -> Path:
    command = [compiler(), *COMMON, *flags]
    if source.suffix == ".cu":
        command += ["-x", "c++"]
    key = hashlib.sha1("\0".join([ident, str(source), *command]).encode()).hexdigest()[:16]
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
    """Writes under another name first: an interrupted build must not leave half a file."""
    temporary = target.with_name(f".{os.getpid()}-{target.name}")
    write(str(temporary))
    os.replace(temporary, target)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout
