"""Builds the core for one GPU in a folder of its own, and goes on where an earlier build stopped.

    python -m benchmarks.gpu_build FOLDER --arch 75 (or: --core PATH, a core built elsewhere)

CMake compiles csrc for this GPU, and of the CPU kernels the baseline alone: of the time that a
release takes, a tenth. Neither the checkout nor this Python's packages change. `FOLDER/tree` gets a
copy of the sources with the compiled core; programs that start there import that copy. --emulator
builds the emulator of GPUs, too, for a rehearsal.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks import gpu_needs

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("benchmarks", "csrc", "docs", "snnlstm", "tests", "tools")


def copy_sources(tree: Path) -> None:
    """Copies the sources of the checkout to `tree`, with their times, but for compiled cores."""
    shutil.rmtree(tree, ignore_errors=True)
    unneeded = shutil.ignore_patterns("__pycache__", "*.so")
    for part in PARTS:
        shutil.copytree(ROOT / part, tree / part, ignore=unneeded)
    for file in ROOT.iterdir():
        if file.is_file() and not file.name.startswith("."):
            shutil.copy2(file, tree / file.name)


def configure(tree: Path, build: Path, arch: int | None) -> list[str]:
    """Returns CMake's command; without `arch` the CPU kernels are built alone."""
    import pybind11

    command = [
        gpu_needs.find("cmake") or "cmake", "-S", str(tree / "csrc"), "-B", str(build),
        "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={gpu_needs.find('ninja')}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        "-DSNNLSTM_BASELINE_ALONE=ON",
        "-DSNNLSTM_TESTING=ON",
        f"-DSNNLSTM_CUDA={'ON' if arch else 'OFF'}",
        f"-DSNNLSTM_CUDA_WHY={'for the GPU found here' if arch else 'a rehearsal without nvcc'}",
    ]  # fmt: skip
    if arch:
        command.append(f"-DCMAKE_CUDA_COMPILER={gpu_needs.nvcc()}")
        command.append(f"-DSNNLSTM_CUDA_ARCHS={arch}")
    return command


def build_core(folder: Path, arch: int | None) -> Path:
    """Builds the core, and returns the core's path in the copy of the sources.

    Raises subprocess.CalledProcessError if CMake or a compiler fails.
    """
    tree = folder / "tree"
    name = f"{sys.implementation.cache_tag}-{f'sm_{arch}' if arch else 'cpu'}"
    build = folder / "build" / name
    copy_sources(tree)
    if (build / "CMakeCache.txt").exists():
        print(f"going on with the build in {build}", flush=True)
    build.mkdir(parents=True, exist_ok=True)
    subprocess.run(configure(tree, build, arch), check=True)
    jobs = str(os.cpu_count() or 1)
    cmake = gpu_needs.find("cmake") or "cmake"
    subprocess.run([cmake, "--build", str(build), "-j", jobs], check=True)
    (core,) = build.glob("_C*.so")
    return Path(shutil.copy2(core, tree / "snnlstm" / core.name))


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_build", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arch", type=int, help="as 75; without it, the CPU kernels alone")
    parser.add_argument("--core", type=Path, metavar="PATH", help="take this one, and build none")
    parser.add_argument("--emulator", action="store_true", help="build tests/simt, too")
    options = parser.parse_args(arguments)
    folder = options.folder.resolve()
    try:
        if options.core:
            copy_sources(folder / "tree")
            print(f"copied {shutil.copy2(options.core, folder / 'tree' / 'snnlstm')}")
        else:
            print(f"built {build_core(folder, options.arch)}")
        if options.emulator:
            tree = folder / "tree"
            code = "from benchmarks.devices import emulator; print('built', emulator().path)"
            environment = os.environ | {"PYTHONPATH": gpu_needs.before("PYTHONPATH", tree)}
            subprocess.run([sys.executable, "-c", code], cwd=tree, check=True, env=environment)
    except subprocess.CalledProcessError as error:
        print(f"failed: {error}; the cause is above", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
