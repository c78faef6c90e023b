"""The machine code holds the instructions that were meant: tensor core multiply-adds (HMMA),
asynchronous copies (LDGSTS), fragment loads (LDSM) and 128-bit accesses to global memory."""

import re

import gpu_tools
import pytest
from builder import KERNELS, ROOT
from test_compiles import TUNED, compiled, installed_module, needs_cuobjdump, needs_nvcc

pytestmark = needs_cuobjdump

CUDA = ROOT / "csrc" / "cuda"

HALF = ("HMMA.16816.F32", "LDGSTS.E.BYPASS.128", "LDSM.16.M88.4")
TF32 = ("HMMA.1688.F32.TF32", "LDGSTS.E.BYPASS.128", "LDSM.16.M88.4")

BOTH_HALVES = ("HMMA.16816.F32.BF16", "HMMA.16816.F32 ", "LDGSTS.E.BYPASS.128")
VECTORS = ("LDG.E.128", "STG.E.128")

# By file of csrc/cuda: patterns of kernel names, and how instructions of theirs must begin (a space
# ends the name). A kernel of 16-bit types holds code for both of them.
EXPECTED = {
    "forward_mma": {
        r"forward_mma<float, \d>": (*TF32, "LDG.E.128"),
        r"forward_mma<unsigned short, \d>": (*BOTH_HALVES, "LDSM.16.M88.4", "LDG.E.128"),
        r"forward_mma<.*, 2>": VECTORS,
    },
    "resident_forward": {
        r"resident_forward_mma<float, \d>": TF32,
        r"resident_forward_mma<unsigned short, \d>": (*BOTH_HALVES, "LDSM.16.M88.4"),
        r"resident_forward_mma<.*, 2>": VECTORS,
    },
    "resident_backward": {
        r"resident_backward_mma<float>": (*TF32, *VECTORS),
        r"resident_backward_mma<unsigned short>": (*BOTH_HALVES, "LDSM.16.M88.4", *VECTORS),
    },
    "backward_mma": {
        r"backward_mma<float, \d>": (*TF32, *VECTORS),
        r"backward_mma<unsigned short, \d>": (*BOTH_HALVES, "LDSM.16.M88.4", *VECTORS),
    },
    "weight_grad_mma": {
        r"weight_grad_mma<float>": ("HMMA.1688.F32.TF32", "LDGSTS.E.BYPASS.128"),
        r"weight_grad_mma<unsigned short>": (*BOTH_HALVES, "LDSM.16.MT88.4"),
    },
    "pointwise": {r"pointwise_(forward|backward)<": VECTORS},
}
KERNEL_PATTERNS = [(file, p) for file, patterns in EXPECTED.items() for p in patterns]


def missing(code: list[str], expected: tuple[str, ...]) -> list[str]:
    return [e for e in expected if not any(f"{i} ".startswith(e) for i in code)]


def check(binary, arch: int, file: str, pattern: str) -> None:
    code = gpu_tools.disassemble(binary, arch)
    found = {name: c for name, c in code.items() if re.search(pattern, name)}
    assert found, f"no kernel matches {pattern}"
    for name, instructions in found.items():
        assert missing(instructions, EXPECTED[file][pattern]) == [], name


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
@pytest.mark.parametrize(("file", "pattern"), KERNEL_PATTERNS)
def test_installed_kernels(file, pattern, arch):
    module = installed_module()
    if arch not in gpu_tools.architectures_of_binary(module):
        pytest.skip(f"the installed module has no code for sm_{arch}")
    check(module, arch, file, pattern)


@needs_nvcc
@pytest.mark.parametrize("arch", TUNED)
@pytest.mark.parametrize(("file", "pattern"), KERNEL_PATTERNS)
def test_kernels_compiled_anew(file, pattern, arch):
    binary, _ = compiled()[CUDA / f"{file}.cu"]
    check(binary, arch, file, pattern)
