"""Tests launch() on a CUDA runtime that runs nothing: limits of shared memory, errors, threads."""

import os
import subprocess

from tests.emulator.builder import HERE, ROOT


def test_launches(tmp_path):
    program = tmp_path / "launches"
    folders = [HERE / "runtime", ROOT / "csrc" / "cuda"]
    subprocess.run(
        [os.environ.get("CXX", "g++"), "-std=c++17", "-O1", "-g", "-D__CUDACC__", "-pthread"]
        + [f"-I{folder}" for folder in folders]
        + [str(HERE / "runtime" / "launches.cpp"), "-o", str(program)],
        check=True,
    )
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
