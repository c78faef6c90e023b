"""The machine code holds the instructions that were meant: tensor core multiply-adds (HMMA),
asynchronous copies (LDGSTS) and fragment loads (LDSM)."""

import re

import pytest

from tests.emulator import gpu_tools
from tests.emulator.builder import ROOT
from tests.emulator.test_compiles import compiled, needs_nvcc

COPIES = "LDGSTS.E.BYPASS.128", "LDGDEPBAR"
HMMA = {"float": "HMMA.1688.F32.TF32", "fp16": "HMMA.16816.F32 ", "bf16": "HMMA.16816.F32.BF16"}
# Kernels by file of csrc/cuda, and beginnings of instructions that they must have besides HMMA, for
# floats and for half types (a space ends the name).
EXPECTED = {
    ("forward", "forward_mma"): ("LDSM.16.M88.4", "LDSM.16.M88.4"),
    ("backward", "backward_mma"): ("LDSM.16.M88.4", "LDSM.16.M88.4"),
    ("backward", "data_gradient_mma"): ("LDSM.16.M88.4", "LDSM.16.M88.4"),
    ("weight_gradient", "weight_gradient_mma"): ("LDS.128", "LDSM.16.MT88.4"),
}


@needs_nvcc
@pytest.mark.skipif(
    None in (gpu_tools.find("cuobjdump"), gpu_tools.find("nvdisasm")),
    reason="pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm",
)
@pytest.mark.emulator_long
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("file", "kernel"), EXPECTED)
def test_kernels_have_the_instructions_that_were_meant(file, kernel, arch):
    binary, _ = compiled()[ROOT / "csrc" / "cuda" / "kernels" / f"{file}.cu"]
    code = gpu_tools.disassemble(binary, arch)
    for number, hmma in HMMA.items():
        found = [c for name, c in code.items() if re.search(rf"{kernel}<(\w+::)*{number}\b", name)]
        assert found
        loads = EXPECTED[file, kernel][number != "float"]
        for instructions in found:
            for expected in (hmma, loads, *COPIES):
                assert any(f"{one} ".startswith(expected) for one in instructions), (
                    number,
                    expected,
                )
