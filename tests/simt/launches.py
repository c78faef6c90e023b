"""Lists what is launched for the layers of the benchmark suite: `python tests/simt/launches.py`.

Nothing runs: the launchers choose for an H100, and the emulator notes the launches. For each kernel
of a sequence's forward and backward pass the table says how many warps a multiprocessor holds, and
in how many waves the blocks run. If there is nvcc, registers count too.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import gpu_tools  # noqa: E402
import torch  # noqa: E402
from backend import Core, simt_core  # noqa: E402
from builder import ROOT  # noqa: E402
from emulator import Launch  # noqa: E402

from benchmarks.cases import CPU_CASES, GPU_CASES  # noqa: E402
from benchmarks.cases import Case as Layer  # noqa: E402

H100 = {"compute_capability": 90, "multiprocessors": 132, "shared_bytes": 227 * 1024}
LAYERS: dict[str, Layer] = {**CPU_CASES, **GPU_CASES}
# dtype and matrix, by the numbers of csrc/args.h and csrc/cuda/plan.h, and the first template
# argument of kernels.
MODES = {
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
FUSED = 2  # of csrc/cuda/plan.h
ADDRESS = 1 << 20  # of memory that nobody touches
FACTS: dict[str, Any] = {
    "dtype": 0, "T": 1, "N": 1, "Cin": 1, "C": 8, "H": 8, "W": 8, "kernel": (3, 3),
    "stride": (1, 1), "dilation": (1, 1), "pool": 0, "pool_size": (1, 1), "reset": 2,
    "surrogate": 1, "p0": 2.0, "p1": 0.0, "inhibition": False, "num_levels": 0,
}  # fmt: skip


def plan(core: Core, matrix: int = 1, backward: bool = False, **facts: Any) -> Any:
    """The core's plan of a launch for every step."""
    cell, device = core.module.Cell(**FACTS | facts), core.kernels.device(torch.device("cpu"))
    return core.module.CudaPlan(cell, device, matrix, FUSED, backward)


def calls(core: Core, matrix: int = 1, **facts: Any) -> list[Launch]:
    """Launches of a channels-last sequence with its gradients."""
    facts = FACTS | facts
    n, c, h, w = (facts[k] for k in ("N", "C", "H", "W"))

    def images(channels: int) -> tuple[int, tuple[int, ...]]:
        size = channels * h * w
        return ADDRESS, (n * size, size, 1, w * channels, channels)

    state, x = images(c), images(facts["Cin"])
    common = {"x": x, "syn0": state, "mem0": state, "weight": ADDRESS, "threshold": ADDRESS,
              "graded": ADDRESS, "saved_gates": ADDRESS, "saved_syn": ADDRESS,
              "workspace": ADDRESS}  # fmt: skip
    with core.dry() as launches:
        forward, backward = (plan(core, matrix, of, **facts) for of in (False, True))
        for packed in forward, backward:
            packed.pack(ADDRESS, ADDRESS, 0)
        forward.forward(0, record=True, spk=state, syn=state, mem=state, **common)
        backward.backward(0, record=True, grad_spk=state, grad_syn=state, grad_mem=state,
                          grad_x=x, grad_syn0=state, grad_mem0=state, grad_weight=ADDRESS,
                          grad_bias=ADDRESS, grad_threshold=ADDRESS, **common)  # fmt: skip
    return launches


def of_layer(core: Core, layer: Layer, mode: str) -> list[Launch]:
    dtype, matrix, _ = MODES[mode]
    pool, size = (1, layer.max_pool) if layer.max_pool else (2, layer.avg_pool)
    pooling = {"pool": pool, "pool_size": (size, size)} if size else {}
    return calls(core, matrix, dtype=dtype, T=layer.steps, N=layer.batch, Cin=layer.cin,
                 C=layer.cout, H=layer.height, W=layer.width, kernel=layer.kernel,
                 **pooling)  # fmt: skip


def resident_blocks(launch: Launch, registers: int = 0) -> int:
    """Blocks that a multiprocessor of an H100 holds at once."""
    most = min(2048 // launch.threads, 32, 228 * 1024 // (launch.shared_bytes + 1024))
    if registers:
        most = min(most, 65536 // (-(-registers // 8) * 8 * launch.threads))
    return max(most, 1)


def registers_of(launch: Launch, mode: str) -> int:
    """The most registers that an instance of the kernel needs, or 0 if that is not known."""
    if launch.kernel not in KERNELS or gpu_tools.find("nvcc") is None:
        return 0
    kernel, file = KERNELS[launch.kernel]
    _, log = gpu_tools.compile_fatbin(ROOT / "csrc" / "cuda" / f"{file}.cu", (90,))
    pattern = re.compile(rf"{kernel}<({MODES[mode][2]})")
    return max(r.registers for r in gpu_tools.resources_of_log(log) if pattern.search(r.kernel))


def warps(launch: Launch, registers: int = 0) -> int:
    """The warps that a multiprocessor holds."""
    blocks = min(resident_blocks(launch, registers), -(-launch.blocks // H100["multiprocessors"]))
    return blocks * launch.threads // 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", nargs="*", default=list(LAYERS), choices=LAYERS)
    parser.add_argument("--modes", nargs="*", default=["tf32", "bf16"], choices=MODES)
    args = parser.parse_args()
    core = simt_core()
    core.device(**H100)
    print(f"{'':<28}{'launches':>9}{'blocks':>9}{'warps each':>11}{'on an SM':>9}{'waves':>7}")
    for name in args.layers:
        for mode in args.modes:
            c = LAYERS[name]
            print(f"{name}: T={c.steps} N={c.batch} {c.cin}->{c.cout} {c.height}x{c.width}, {mode}")
            found = of_layer(core, c, mode)
            for launch in dict.fromkeys(found):
                registers = registers_of(launch, mode)
                at_once = resident_blocks(launch, registers) * H100["multiprocessors"]
                print(
                    f"  {launch.kernel:<26}{found.count(launch):>9}{launch.blocks:>9}"
                    f"{launch.threads // 32:>11}{warps(launch, registers):>9}"
                    f"{launch.blocks / at_once:>7.2f}"
                )


if __name__ == "__main__":
    main()
