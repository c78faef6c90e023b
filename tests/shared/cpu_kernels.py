"""The fixture `kernels` runs a test in every way in which the core can run on this processor."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import snnlstm
import snnlstm.dispatch.reasons
from tests.shared import flat

native = snnlstm.dispatch.reasons.backends
needs_core = pytest.mark.skipif(native is None, reason="the core is not built")
ISAS: list[str] = snnlstm._C.isa_names() if native else []


@dataclass(frozen=True)
class Kernels:
    """Names an instruction set and a setting of :func:`snnlstm.set_algorithm`."""

    isa: str
    algorithm: str

    def state_error(self, dtype: torch.dtype) -> float:
        """Returns the largest absolute error that a step may add to syn and mem.

        The bound holds for sums of some hundred products of order 1 with weights at their default
        init. Cancellation in Winograd's transforms costs about one decimal digit.
        """
        if dtype == torch.float64:
            return 1e-13 if self.algorithm == "direct" else 1e-12
        return 2e-6 if self.algorithm == "direct" else 2e-5

    def gradient_error(self, dtype: torch.dtype) -> float:
        """Returns the largest error of a gradient, relative to its largest element."""
        if dtype == torch.float64:
            return 1e-11
        return 2e-5 if self.algorithm == "direct" else 2e-4

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Returns the dtypes for which the algorithm has kernels; Winograd has float32 alone."""
        both = (torch.float32, torch.float64)
        return both[:1] if self.algorithm == "winograd" else both

    def run(self, *arguments) -> tuple[Tensor, Tensor, Tensor]:
        """Returns spk, syn and mem; see :func:`flat.run`."""
        return flat.run(*arguments, self.algorithm)


@contextmanager
def one_thread() -> Iterator[None]:
    """Within the block torch has one thread: on small tensors threads cost more than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def use(kernels: Kernels) -> Iterator[Kernels]:
    """Selects these kernels until the generator is resumed."""
    before = native.cpu.isa
    native.cpu.set_isa(kernels.isa)
    try:
        with snnlstm.algorithm(kernels.algorithm):
            yield kernels
    finally:
        native.cpu.set_isa(before)


# Each instruction set, and each algorithm. All pairs are part of `make test-all`: the instruction
# sets differ in the vectors that the same code is compiled for.
PAIRS = [
    Kernels(isa, algorithm)
    for isa in ISAS
    for algorithm in native.cpu.ALGORITHMS
    if os.environ.get("SNNLSTM_LONG") or isa == ISAS[-1] or algorithm == "auto"
]


@pytest.fixture(
    params=PAIRS,
    ids=lambda kernels: f"{kernels.isa}-{kernels.algorithm}",
)
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    """Runs a test once for each instruction set and algorithm; without the core pytest skips it."""
    yield from use(request.param)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once for each instruction set, with the algorithm "auto"."""
    for _ in use(Kernels(request.param, "auto")):
        yield request.param
