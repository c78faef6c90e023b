"""In silent and half-silent layers the gradients are as near to exact ones as snnTorch's are.

Nearly all windows of max_pool then hold equal pixels. Whoever chooses another pixel than exact sums
would brings the gradient of x, and with it all layers before, to another place.
"""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import snntorch
import torch
from torch import Tensor

import snnlstm
import snnlstm.path
from tests.shared.cpu_kernels import ISAS, Kernels, use

STACKS = {  # arguments of the cells, and the shape of an input
    "28x28": ([(1, 8, 3, 2), (8, 16, 3, 2)], (4, 1, 28, 28)),
    "5x5": ([(2, 16, 5, 2), (16, 32, 5, 2)], (2, 2, 32, 32)),
    "electrodes": ([(1, 8, (19, 3), (1, 2)), (8, 8, 3, (1, 2))], (4, 1, 19, 64)),
    "three": ([(2, 8, 3, 2)] + 2 * [(8, 8, 3, 2)], (2, 2, 32, 32)),
    "large windows": ([(1, 16, 3, 4), (16, 8, 3, 4)], (4, 1, 48, 48)),
}
# The name of the stack, the threshold, the density of the input and its seed. With few seeds two
# states of a window lie as near as rounding errors, so that chance decides between them.
NETWORKS = {
    "28x28, silent": ("28x28", 0.99, 0.1, 0),
    "28x28, half": ("28x28", 0.05, 0.05, 0),
    "28x28, more than half": ("28x28", 0.05, 0.3, 0),
    "5x5, silent": ("5x5", 0.99, 0.1, 0),
    "5x5, half": ("5x5", 0.05, 0.05, 0),
    "5x5, more than half": ("5x5", 0.05, 0.3, 0),
    "electrodes, silent": ("electrodes", 0.99, 0.1, 0),
    "electrodes, half": ("electrodes", 0.05, 0.05, 0),
    "electrodes, more than half": ("electrodes", 0.05, 0.3, 1),
    "three, silent": ("three", 0.99, 0.3, 0),
    "three, half": ("three", 0.05, 0.05, 0),
    "three, more than half": ("three", 0.05, 0.3, 0),
    "large windows, silent": ("large windows", 0.99, 0.1, 0),
    "large windows, half": ("large windows", 0.05, 0.05, 0),
}
ALGORITHMS = ("auto", "direct", "winograd")


class Problem:
    """A stack with one input; `errors` of gradients count against plain torch in float64."""

    def __init__(self, name: str, steps: int = 8, batch: int | None = None) -> None:
        stack, self.threshold, density, seed = NETWORKS[name]
        self.cells, (samples, *image) = STACKS[stack]
        self.random = torch.Generator().manual_seed(seed)
        shape = steps, batch or samples, *image
        self.x = (torch.rand(shape, generator=self.random) < density).float()
        self.factors = None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(snnlstm.path, "_native", None)
            self.exact = self.gradient(snnlstm.SConv2dLSTM, torch.float64)
        self.theirs = self.error(self.gradient(snntorch.SConv2dLSTM, torch.float32))

    def gradient(self, make: Callable[..., Any], dtype: torch.dtype) -> Tensor:
        """Returns the gradient of the first cell's weight, of a loop over the steps."""
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            cells = [
                make(i, c, kernel, threshold=self.threshold, max_pool=pool, init_hidden=True)
                for i, c, kernel, pool in self.cells
            ]
        net = torch.nn.Sequential(*cells).to(dtype)
        out = torch.stack([net(x) for x in self.x.to(dtype)])
        if self.factors is None:
            self.factors = torch.randn(out.shape, generator=self.random, dtype=torch.float64)
        (out * self.factors.to(dtype)).sum().backward()
        return cells[0].conv.weight.grad.double()

    def error(self, gradient: Tensor) -> float:
        return float((gradient - self.exact).norm() / self.exact.norm())


def compare(problem: Problem) -> None:
    error = problem.error(problem.gradient(snnlstm.SConv2dLSTM, torch.float32))
    assert error <= max(3 * problem.theirs, 1e-4), problem.theirs


@pytest.fixture(scope="module", params=NETWORKS)
def problem(request: pytest.FixtureRequest) -> Problem:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    return Problem(request.param)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("isa", ISAS)
def test_gradients_are_as_exact_as_those_of_snntorch(problem, isa, algorithm):
    for _ in use(Kernels(isa, algorithm)):
        compare(problem)


SHORT = ("28x28, silent", "three, silent", "three, half")


@pytest.mark.parametrize(
    "network",
    [pytest.param(n, marks=() if n in SHORT else pytest.mark.simt_long) for n in NETWORKS],
)
def test_gradients_of_emulated_kernels_are_as_exact(backend, network):
    if backend.name != "simt":
        pytest.skip("the test above has the other kernels")
    compare(Problem(network, steps=2, batch=1))
