"""Times providers in interleaved rounds: each round runs every provider once, in a new order.

A disturbance of the machine (another program, a change of clock) then slows all providers alike.
The ratio of their medians stays true, where two separate runs would differ.
"""

from __future__ import annotations

import contextlib
import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.providers.base import Runner

WARM_UP = 4
"""The number of runs before timing: torch.compile needs three to settle, caches and pages one."""


@dataclass(frozen=True)
class Budget:
    """Bounds the seconds and rounds of one case in one mode, for all providers together."""

    seconds: float = 12.0
    fewest: int = 5
    most: int = 400


@dataclass(frozen=True)
class Quantiles:
    """Holds the 20th, 50th and 80th percentile of the timed seconds, and the number of rounds."""

    p20: float
    p50: float
    p80: float
    rounds: int

    @classmethod
    def of(cls, samples: list[float]) -> Quantiles:
        """Returns the quantiles of at least one sample, interpolated linearly."""
        p20, p50, p80 = np.percentile(samples, (20, 50, 80)).tolist()
        return cls(p20, p50, p80, len(samples))


def clock(run: Callable[[], object], device: str) -> float:
    """Times one call in seconds, on CUDA by two events on the current stream."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        result = run()
        end.record()
        end.synchronize()
        del result
        return start.elapsed_time(end) / 1000
    begin = time.perf_counter()
    result = run()
    elapsed = time.perf_counter() - begin
    del result  # freeing is not timed: in a network the next layer still holds the result
    return elapsed


def warm_up(runner: Runner, device: str, budget: Budget) -> None:
    """Runs a provider until it has settled; slow providers get fewer runs."""
    setup, run = runner
    spent = 0.0
    for done in range(WARM_UP):
        setup()
        spent += clock(run, device)
        if done and spent > budget.seconds / 2:
            break


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Collects garbage before the block, and not within it."""
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def time_interleaved(
    runners: Mapping[str, Runner],
    device: str,
    budget: Budget,
    tick: Callable[[float], None] = lambda share: None,
    seed: int = 0,
) -> dict[str, Quantiles]:
    """Times warmed-up runners against each other.

    tick is called after every round with the share of the work (0..1) that is done.
    """
    names = list(runners)
    samples: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(seed)
    begin = time.perf_counter()
    with no_collection():
        for done in range(1, budget.most + 1):
            order.shuffle(names)
            for name in names:
                setup, run = runners[name]
                setup()
                samples[name].append(clock(run, device))
            spent = time.perf_counter() - begin
            if done >= budget.fewest and spent >= budget.seconds:
                break
            tick(min(1.0, spent / max(budget.seconds, 1e-9), done / budget.fewest))
    tick(1.0)
    return {name: Quantiles.of(times) for name, times in samples.items()}
