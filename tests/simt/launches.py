"""Counts on paper what a GPU does for the layers of the suite: `python -m tests.simt.launches`.

    python -m tests.simt.launches [--gpu t4] [--layers mid big] [--modes tf32] [--kernels]

Nothing runs: the launchers choose for a card of benchmarks/devices.py, and the emulator notes the
launches. For each kernel of a sequence's forward and backward pass the table says how many warps a
multiprocessor holds, in how many rounds the blocks run, and which part of the last round's
multiprocessors has work. If there is nvcc, registers count too. --kernels lists each kernel, as
nvcc compiles it for the card: registers, bytes that it spills, barriers, and instructions per mma
in the inner loops of its PTX.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import devices
from benchmarks.cases import CPU_CASES, GPU_CASES
from benchmarks.cases import Case as Layer
from tests.simt import gpu_tools
from tests.simt.backend import Core, simt_core
from tests.simt.builder import ROOT
from tests.simt.emulator import Launch

# The fields of the core's Cell, which is a small layer.
FACTS: dict[str, Any] = {
    "dtype": 0, "T": 1, "N": 1, "Cin": 1, "C": 8, "H": 8, "W": 8, "kernel": (3, 3),
    "stride": (1, 1), "dilation": (1, 1), "pool": 0, "pool_size": (1, 1), "reset": 2,
    "surrogate": 1, "p0": 2.0, "p1": 0.0, "inhibition": False, "num_levels": 0,
}  # fmt: skip
H100 = {"compute_capability": 90, "multiprocessors": 132, "shared_bytes": 227 * 1024}
# Threads and blocks that a multiprocessor holds at most, by compute capability: table "Technical
# Specifications per Compute Capability" of NVIDIA's CUDA C++ Programming Guide.
HELD = {
    75: (1024, 16), 80: (2048, 32), 86: (1536, 16), 89: (1536, 24), 90: (2048, 32),
    100: (2048, 32), 120: (1536, 24),
}  # fmt: skip
LAYERS: dict[str, Layer] = {**CPU_CASES, **GPU_CASES}
# dtype and matrix, by the numbers of csrc/args.h and csrc/cuda/plan.h, and the first template
# argument of kernels.
MODES = {
    "float32": (0, 0, "float"),
    "fp16": (2, 0, "unsigned short|snnlstm::cuda::fp16_sm75|\\(snnlstm::cuda::Multiply\\)[15]"),
    "tf32": (0, 1, "float|\\(snnlstm::cuda::Multiply\\)3"),
    "3xtf32": (0, 2, "snnlstm::cuda::mma_gemm::Parts|\\(snnlstm::cuda::Multiply\\)4"),
    "bf16": (3, 0, "unsigned short|\\(snnlstm::cuda::Multiply\\)2"),
}
# Kernel and file, by the name of the launch.
KERNELS = {
    "forward step (mma)": ("forward_mma", "forward"),
    "backward step (mma)": ("backward_mma", "backward"),
    "weight gradient (mma)": ("weight_gradient_mma", "weight_gradient"),
}
FUSED = 1  # of csrc/cuda/plan.h
ADDRESS = 1 << 20  # of memory that nobody touches


def facts_of(layer: Layer, dtype: int = 0) -> dict[str, Any]:
    """The fields of the core's Cell for a layer of the suite."""
    pool, size = (1, layer.max_pool) if layer.max_pool else (2, layer.avg_pool)
    pooling = {"pool": pool, "pool_size": (size, size)} if size else {}
    return FACTS | pooling | {
        "dtype": dtype, "T": layer.steps, "N": layer.batch, "Cin": layer.cin, "C": layer.cout,
        "H": layer.height, "W": layer.width, "kernel": layer.kernel,
    }  # fmt: skip


def plan(
    core: Core, matrix: int = 1, backward: bool = False, lengths: bool = False, **facts: Any
) -> Any:
    """The core's plan of a launch for every step."""
    cell, device = core.module.Cell(**FACTS | facts), core.kernels.device(torch.device("cpu"))
    return core.module.CudaPlan(cell, device, matrix, FUSED, backward, lengths=lengths)


def calls(core: Core, matrix: int = 1, **facts: Any) -> list[Launch]:
    """Launches of a channels-last sequence with its gradients."""
    facts = FACTS | facts
    n, c, h, w = (facts[k] for k in ("N", "C", "H", "W"))

    def images(channels: int) -> tuple[int, tuple[int, ...]]:
        size = channels * h * w
        return ADDRESS, (n * size, size, 1, w * channels, channels)

    state, x = images(c), images(facts["Cin"])
    # In the order of PassArgs (csrc/args.h).
    common = (
        x, state, state, ADDRESS, 0, 0, ADDRESS, 0, ADDRESS, 0, True,
        ADDRESS, ADDRESS, 0, ADDRESS, 0, 0, ADDRESS,
    )  # fmt: skip
    with core.dry() as launches:
        forward, backward = (plan(core, matrix, of, **facts) for of in (False, True))
        for packed in forward, backward:
            packed.pack(ADDRESS, ADDRESS, 0)
        forward.forward(0, (*common, 0, None, *(state,) * 3))
        gradients = *(state,) * 3, x, state, state, *(ADDRESS,) * 3
        backward.backward(0, (*common, None, *gradients, 0, 0))
    return launches


def of_layer(core: Core, layer: Layer, mode: str) -> list[Launch]:
    dtype, matrix, _ = MODES[mode]
    return calls(core, matrix, **facts_of(layer, dtype))


def resident_blocks(launch: Launch, registers: int = 0, device: Mapping[str, int] = H100) -> int:
    """Blocks that a multiprocessor of a card holds at once."""
    threads, blocks = HELD[device["compute_capability"]]
    shared = device["shared_bytes"] + (1024 if device["compute_capability"] >= 80 else 0)
    own = launch.shared_bytes + (1024 if device["compute_capability"] >= 80 else 0)
    most = min(threads // launch.threads, blocks, shared // max(own, 1))
    if registers:
        most = min(most, 65536 // (-(-registers // 8) * 8 * launch.threads))
    return max(most, 1)


def registers_of(launch: Launch, mode: str, arch: int = 90) -> int:
    """The most registers that an instance of the kernel needs, or 0 if that is not known."""
    name = launch.kernel.replace(", plain", "")
    if name not in KERNELS or gpu_tools.find("nvcc") is None:
        return 0
    kernel, file = KERNELS[name]
    _, log = gpu_tools.compile_fatbin(ROOT / "csrc" / "cuda" / f"{file}.cu", (arch,))
    pattern = re.compile(rf"{kernel}<({MODES[mode][2]})")
    resources = gpu_tools.resources_of_log(log)
    return max((r.registers for r in resources if pattern.search(r.kernel)), default=0)


def warps(launch: Launch, registers: int = 0, device: Mapping[str, int] = H100) -> int:
    """The warps that a multiprocessor holds."""
    each = -(-launch.blocks // device["multiprocessors"])
    return min(resident_blocks(launch, registers, device), each) * launch.threads // 32


def balance(launch: Launch, device: Mapping[str, int] = H100) -> float:
    """Blocks of a launch over those that it would have if each multiprocessor had as many as the
    one with the most."""
    each = -(-launch.blocks // device["multiprocessors"])
    return launch.blocks / (each * device["multiprocessors"])


class Compiled(NamedTuple):
    """What nvcc makes of one kernel; per_mma: of its inner loops, the most instructions."""

    registers: int
    spilled: int
    barriers: int
    per_mma: float


def compiled(source: Path, arch: int) -> dict[str, Compiled]:
    """The kernels of a source by name, as they are compiled for an architecture."""
    from tools import machine_code

    _, log = gpu_tools.compile_fatbin(source, (arch,))
    resources = {r.kernel: r for r in gpu_tools.resources_of_log(log) if r.arch == arch}
    code = gpu_tools.code_of_ptx(source, gpu_tools.ptx_of(arch))
    found = {}
    for name, instructions in zip(gpu_tools.demangle(list(code)), code.values(), strict=True):
        loops = machine_code.loops(machine_code.parse(instructions)) if instructions else []
        of = resources[name]
        barriers = sum(i[2].startswith(("bar.", "barrier.")) for i in instructions)
        per_mma = max((loop.per_hmma for loop in loops), default=0.0)
        found[name] = Compiled(of.registers, of.spilled, barriers, per_mma)
    return found


def card_of(name: str) -> dict[str, int]:
    """What the launchers are told of a card."""
    names = ("compute_capability", "multiprocessors", "shared_bytes")
    return dict(zip(names, devices.EMULATED[name], strict=True))


def print_launches(core: Core, device: dict[str, int], layers: list[str], modes: list[str]) -> None:
    header = ("launches", "blocks", "warps each", "on an SM", "rounds", "balance")
    print(f"{'':<28}" + "".join(f"{name:>11}" for name in header))
    for name in layers:
        for mode in modes:
            c = LAYERS[name]
            print(f"{name}: T={c.steps} N={c.batch} {c.cin}->{c.cout} {c.height}x{c.width}, {mode}")
            found = of_layer(core, c, mode)
            for launch in dict.fromkeys(found):
                registers = registers_of(launch, mode, device["compute_capability"])
                held = resident_blocks(launch, registers, device) * device["multiprocessors"]
                row = (found.count(launch), launch.blocks, launch.threads // 32,
                       warps(launch, registers, device), -(-launch.blocks // held),
                       f"{balance(launch, device):.0%}")  # fmt: skip
                print(f"  {launch.kernel:<26}" + "".join(f"{value:>11}" for value in row))


def print_kernels(arch: int) -> None:
    print(f"{'':<64}{'registers':>10}{'spilled':>9}{'barriers':>9}{'per mma':>9}")
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        for name, of in compiled(source, arch).items():
            short = name.split("(")[0].replace("snnlstm::cuda::", "").removeprefix("void ")
            per_mma = f"{of.per_mma:.1f}" if of.per_mma else ""
            print(f"{short:<64.64}{of.registers:>10}{of.spilled:>9}{of.barriers:>9}{per_mma:>9}")


def main() -> None:
    core = simt_core()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", default="h100", choices=devices.EMULATED)
    parser.add_argument("--layers", nargs="*", default=list(LAYERS), choices=LAYERS)
    parser.add_argument("--modes", nargs="*", choices=MODES)
    parser.add_argument("--kernels", action="store_true")
    args = parser.parse_args()
    device = card_of(args.gpu)
    core.device(**device)
    new = device["compute_capability"] >= 80
    modes = args.modes or (["tf32", "bf16"] if new else ["float32", "fp16"])
    print_launches(core, device, args.layers, modes)
    if args.kernels and gpu_tools.find("nvcc"):
        print_kernels(device["compute_capability"])


if __name__ == "__main__":
    main()
