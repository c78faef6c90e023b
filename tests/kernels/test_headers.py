"""Headers of the CPU kernels, each alone, compute what plain loops in double do: headers.cpp."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from cpu_kernels import ISAS
from sanitizers.run import CSRC
from sanitizers.run import ISAS as FLAGS

pytestmark = pytest.mark.skipif(not CSRC.exists(), reason="not in a source tree")


@pytest.mark.parametrize("isa", ISAS)
def test_conv_winograd_tiles_and_sparse(isa, tmp_path):
    """The program says in which header, and for which sizes, a number differs first."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or pytest.skip("no C++ compiler")
    program = tmp_path / "headers"
    source = Path(__file__).with_name("headers.cpp")
    command = [compiler, "-std=gnu++17", "-O1", "-ffp-contract=fast", "-fno-math-errno",
               "-Wno-psabi", *FLAGS[isa], f"-DSNNLSTM_ISA={isa}", f"-I{CSRC}"]  # fmt: skip
    sources = [str(source), str(CSRC / "platform.cpp")]
    subprocess.run([*command, *sources, "-ldl", "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout or done.returncode
    assert int(done.stdout.split()[0]) > 300_000
