"""Plans of the core, and the launches of a call of which nothing runs: the emulator notes them."""

from __future__ import annotations

from typing import Any

import torch

from tests.emulator.backend import Core
from tests.emulator.library import Launch
from tests.shared.cases import FACTS

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
        forward.run(0, (*common, 0, None, *(state,) * 3))
        backward.pack(ADDRESS, ADDRESS, 0)
        gradients = *(state,) * 3, x, state, state, *(ADDRESS,) * 3
        backward.run(0, (*common, *gradients, 0, 0))
    return launches
