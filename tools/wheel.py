"""Installs a wheel in a fresh environment, far from the checkout, and runs the tests against it.

    python tools/wheel.py dist/snnlstm-*.whl [-- arguments for pytest]

The script first checks that the wheel is small enough for an index, fits a manylinux tag, and
imports without loading an NVIDIA driver.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LARGEST = 20e6  # bytes

# This program imports the wheel. `torch` alone may have loaded an NVIDIA driver.
IMPORT = """
import pathlib, sys
import torch
def driver():
    maps = pathlib.Path("/proc/self/maps")
    return "/libcuda.so" in (maps.read_text() if maps.exists() else "")
before = driver()
import snnlstm
from snnlstm import _C
place = pathlib.Path(snnlstm.__file__).resolve()
assert place.is_relative_to(pathlib.Path(sys.prefix).resolve()), f"imported from {place}"
assert driver() == before, "importing snnlstm loads the NVIDIA driver"
print(f"imported {snnlstm.__version__}; CUDA backend {_C.build_info()['cuda']}")
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python tools/wheel.py", description=(__doc__ or "").splitlines()[0]
    )
    p.add_argument("wheel", type=Path, help="the wheel, for this Python")
    p.add_argument("pytest", nargs="*", metavar="-- ...", help="arguments for pytest")
    return p


def check_size(wheel: Path) -> None:
    size = wheel.stat().st_size
    print(f"{wheel.name}: {size / 1e6:.2f} MB", flush=True)
    if size > LARGEST:
        raise SystemExit(f"{wheel.name} has more than {LARGEST / 1e6:.0f} MB")


def check_tag(wheel: Path, python: Path) -> None:
    """Checks that the wheel needs no library beyond manylinux's list, and prints its tag."""
    run(python, "-m", "pip", "install", "auditwheel")
    said = run(python, "-m", "auditwheel", "show", wheel)
    found = re.search(r'platform\s+tag:\s+"(manylinux\w+)"', said)
    if not found:
        raise SystemExit(f"{wheel.name} fits no manylinux tag:\n{said}")
    print(f"auditwheel: {found[1]}", flush=True)


def run(*command: str | Path, **options) -> str:
    done = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        check=False, **options,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{command} failed:\n{done.stdout}")
    return done.stdout


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    wheel = options.wheel.resolve()
    if not wheel.is_file():
        parser().error(f"{options.wheel} is not there: make wheel builds one")
    check_size(wheel)
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "VIRTUAL_ENV")
    }
    with tempfile.TemporaryDirectory(prefix="snnlstm-wheel-") as folder:
        python = Path(folder) / "venv/bin/python"
        venv.create(python.parents[1], with_pip=True)
        print("installing it, torch and what the tests need ...", flush=True)
        check_tag(wheel, python)
        run(python, "-m", "pip", "install", f"snnlstm[test] @ {wheel.as_uri()}", env=environment)
        # The folder has the tests, and neither snnlstm nor csrc.
        tests = Path(folder) / "tests-only"
        unneeded = shutil.ignore_patterns("__pycache__", "simt")
        for name in ("tests", "tools", "benchmarks"):
            shutil.copytree(ROOT / name, tests / name, ignore=unneeded)
        shutil.copy2(ROOT / "pyproject.toml", tests)
        print(run(python, "-c", IMPORT, cwd=tests, env=environment), flush=True)
        return subprocess.run(
            [python, "-m", "pytest", *options.pytest], cwd=tests, env=environment, check=False
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
