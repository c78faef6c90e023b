"""Plans of the core, and the launches of a call of which nothing runs: the emulator notes them."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.cases import CPU_CASES, GPU_CASES
from benchmarks.cases import Case as Layer
from tests.emulator.backend import Core
from tests.emulator.library import Launch
from tests.shared.cases import FACTS

LAYERS: dict[str, Layer] = {**CPU_CASES, **GPU_CASES}
# dtype and matrix, by the numbers of csrc/args.h and csrc/cuda/pass.h.
MODES = {"float32": (0, 0), "tf32": (0, 1)}
FUSED = 1  # of csrc/cuda/pass.h
ADDRESS = 1 << 20  # of memory that nobody touches


def plan(
    core: Core, matrix: int = 1, backward: bool = False, lengths: bool = False, **facts: Any
) -> Any:
    """The core's plan of a launch for every step."""
    cell, device = core.module.Cell(**FACTS | facts), core.kernels.device(torch.device("cpu"))
    return core.module.CudaPass(cell, device, matrix, FUSED, backward, lengths=lengths)


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
        ADDRESS, ADDRESS, 0, 0, 0, 0, x, state, state, ADDRESS, 0, ADDRESS, 0, True,
        ADDRESS, ADDRESS, ADDRESS,
    )  # fmt: skip
    with core.dry() as launches:
        forward, backward = (plan(core, matrix, a_pass, **facts) for a_pass in (False, True))
        forward.pack(ADDRESS, ADDRESS, 0)
        forward.run(0, (*common, 0, None, None, *(state,) * 3))
        backward.pack(ADDRESS, ADDRESS, 0)
        gradients = *(state,) * 3, x, state, state, *(ADDRESS,) * 3
        backward.run(0, (*common, *gradients, 0, 0))
    return launches


def launches_of(core: Core, layer: Layer, mode: str) -> list[Launch]:
    """Launches of a layer of the suite."""
    dtype, matrix = MODES[mode]
    pool, size = (1, layer.max_pool) if layer.max_pool else (2, layer.avg_pool)
    pooling = {"pool": pool, "pool_size": (size, size)} if size else {}
    return calls(
        core, matrix, **pooling, dtype=dtype, T=layer.steps, N=layer.batch, Cin=layer.cin,
        C=layer.cout, H=layer.height, W=layer.width, kernel=layer.kernel,
    )  # fmt: skip
