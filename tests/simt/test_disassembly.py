"""The machine code holds the instructions that were meant: tensor core multiply-adds (HMMA),
asynchronous copies (LDGSTS), fragment loads (LDSM) and 128-bit accesses to global memory."""

import re

import gpu_tools
import pytest
from builder import KERNELS
from test_compiles import installed_module, needs_cuobjdump, needs_nvcc

pytestmark = needs_cuobjdump

HALF = ("HMMA.16816.F32", "LDGSTS.E.BYPASS.128", "LDSM.16.M88.4")
TF32 = ("HMMA.1688.F32.TF32", "LDGSTS.E.BYPASS.128", "LDSM.16.M88.4")

# Patterns of kernel names in csrc/cuda, and how their instructions must begin.
EXPECTED: dict[str, tuple[str, ...]] = {}


def missing(code: list[str], expected: tuple[str, ...]) -> list[str]:
    return [e for e in expected if not any(i.startswith(e) for i in code)]


@needs_nvcc
@pytest.mark.parametrize("arch", [80, 90])
def test_primitives_become_the_instructions_that_were_meant(arch):
    binary, _ = gpu_tools.compile_fatbin(KERNELS / "gemm.cu", gpu_tools.known_architectures())
    code = gpu_tools.disassemble(binary, arch)
    half = [c for name, c in code.items() if "half_gemm" in name]
    tf32 = [c for name, c in code.items() if "tf32_gemm" in name]
    assert len(half) == len(tf32) == 2
    for instructions in half:
        assert missing(instructions, (*HALF, "LDSM.16.MT88.4", "STG.E.128", "LDGDEPBAR")) == []
    for instructions in tf32:
        assert missing(instructions, TF32) == []


@needs_nvcc
def test_sm_75_has_neither_and_does_without():
    binary, _ = gpu_tools.compile_fatbin(KERNELS / "gemm.cu", gpu_tools.known_architectures())
    for instructions in gpu_tools.disassemble(binary, 75).values():
        assert not any(i.startswith(("HMMA", "LDGSTS")) for i in instructions)
        assert any(i.startswith("LDG") for i in instructions)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("pattern", EXPECTED)
def test_installed_kernels(pattern, arch):
    code = gpu_tools.disassemble(installed_module(), arch)
    found = {name: c for name, c in code.items() if re.search(pattern, name)}
    assert found, f"no kernel matches {pattern}"
    for name, instructions in found.items():
        assert missing(instructions, EXPECTED[pattern]) == [], name
