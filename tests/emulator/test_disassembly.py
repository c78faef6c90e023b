"""The machine code holds the instructions that were meant: tensor core multiply-adds (HMMA),
asynchronous copies (LDGSTS), fragment loads (LDSM) and 128-bit accesses to global memory."""

import re

import pytest

from tests.emulator import gpu_tools, machine_code
from tests.emulator.builder import ROOT
from tests.emulator.test_compiles import compiled, needs_nvcc

pytestmark = [
    needs_nvcc,
    pytest.mark.skipif(
        None in (gpu_tools.find("cuobjdump"), gpu_tools.find("nvdisasm")),
        reason="pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm",
    ),
    pytest.mark.emulator_long,
]

CUDA = ROOT / "csrc" / "cuda" / "kernels"

ASYNCHRONOUS = (80, 90)

TF32 = ("HMMA.1688.F32.TF32", "LDGSTS.E.BYPASS.128", "LDGDEPBAR", "LDSM.16.M88.4")
FP16, BF16 = ("HMMA.16816.F32 ", *TF32[1:]), ("HMMA.16816.F32.BF16", *TF32[1:])
VECTORS = ("LDG.E.128", "STG.E.128")

# Kernels for tensor cores of sm_75, which have no asynchronous copies.
SM75 = "fp16_sm75"

# By file of csrc/cuda: patterns of kernel names, and beginnings of instructions that the kernels
# must have (a space ends the name).
EXPECTED = {
    "forward": {
        r"forward_mma<float, \d": (*TF32, "LDG.E.128"),
        r"forward_mma<.*fp16, \d": (*FP16, "LDG.E.128"),
        r"forward_mma<.*bf16, \d": (*BF16, "LDG.E.128"),
        r"forward_mma<(?!.*fp16_sm75).*, 2, ": VECTORS,
    },
    "backward": {
        r"backward_mma<float, ": (*TF32, *VECTORS),
        r"backward_mma<.*fp16, ": (*FP16, *VECTORS),
        r"backward_mma<.*bf16, ": (*BF16, *VECTORS),
    },
    "weight_gradient": {
        r"weight_gradient_mma<(float|.*x3)>": TF32[:2],
        r"weight_gradient_mma<.*fp16>": (*FP16[:2], "LDSM.16.MT88.4"),
        r"weight_gradient_mma<.*bf16>": (*BF16[:2], "LDSM.16.MT88.4"),
    },
    "neurons": {r"neurons_(forward|backward)<": VECTORS},
}
KERNEL_PATTERNS = [(file, p) for file, patterns in EXPECTED.items() for p in patterns]


@pytest.mark.parametrize("arch", ASYNCHRONOUS)
@pytest.mark.parametrize(("file", "pattern"), KERNEL_PATTERNS)
def test_kernels_have_the_instructions_that_were_meant(file, pattern, arch):
    binary, _ = compiled()[CUDA / f"{file}.cu"]
    code = gpu_tools.disassemble(binary, arch)
    found = {name: c for name, c in code.items() if re.search(pattern, name)}
    assert found, f"no kernel matches {pattern}"
    for name, instructions in found.items():
        for expected in EXPECTED[file][pattern]:
            assert any(f"{i[2]} ".startswith(expected) for i in instructions), name


# The most instructions per HMMA in inner loops. In parts (3xTF32) three HMMA count as one.
MOST = {"half": 8, "tf32": 10, "parts": 14}
# Loops that are above for now, with their bounds, by file, kind and HMMA of the loop. In the
# narrow data gradient a warp has only 4 products in a k-step, and tests in each whether the
# convolution has a stride.
ABOVE = {("backward", "parts", 12): 14.5}
# On sm_75 a product takes two HMMA, and threads carry what is copied elsewhere.
MOST_ON_SM75 = 8
MOST_BARRIERS = 21  # backward: six for each of three widths, of which one runs, and three behind


def kind_of(kernel: str) -> str:
    if "tf32x3" in kernel:
        return "parts"
    return "tf32" if "<float" in kernel else "half"


@pytest.mark.parametrize("arch", [75, 90])
@pytest.mark.parametrize("file", ["forward", "backward", "weight_gradient"])
def test_inner_loops_do_little_beside_multiplying(file, arch):
    binary, _ = compiled()[CUDA / f"{file}.cu"]
    code = gpu_tools.disassemble(binary, arch)
    for kernel, instructions in code.items():
        barriers = sum(name.startswith("BAR.") for _, _, name, _ in instructions)
        assert barriers <= MOST_BARRIERS, kernel
    found = {kernel: machine_code.loops(instructions) for kernel, instructions in code.items()}
    found = {kernel: loops for kernel, loops in found.items() if loops}
    assert any(re.search(SM75, kernel) for kernel in found) if arch == 75 else found
    for kernel, loops in found.items():
        kind = kind_of(kernel)
        for loop in loops:
            assert arch == 75 or loop.slow() == [], kernel
            per_hmma = loop.per_hmma * (3 if kind == "parts" else 1)
            most = MOST_ON_SM75 if arch == 75 else ABOVE.get((file, kind, loop.hmma), MOST[kind])
            assert per_hmma <= most, kernel
