"""Cells of both libraries with the same weights, and what is done with them."""

import re
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import snntorch
import torch
from snntorch import utils
from torch import Tensor, nn

import snnlstm

THRESHOLD = 0.1  # one at which cells spike


def described(value: object) -> str:
    """Returns the text of a value as an id, without addresses, which differ from run to run."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def quietly(make: Any, *args: Any, **kwargs: Any) -> Any:
    """Construct without the warnings about inhibition (snnTorch) and thresholds (ours)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return make(*args, **kwargs)


def ours(*args: Any, seed: int = 0, **kwargs: Any) -> snnlstm.SConv2dLSTM:
    """Makes a cell of 2 -> 3 channels, 3x3, with threshold 0.1, unless `args` say otherwise."""
    torch.manual_seed(seed)
    kwargs.setdefault("threshold", THRESHOLD)
    return quietly(snnlstm.SConv2dLSTM, *(args or (2, 3, 3)), **kwargs)


def theirs(*args: Any, seed: int = 0, **kwargs: Any) -> snntorch.SConv2dLSTM:
    """Makes snnTorch's cell, with the weights of :func:`ours` of the same arguments."""
    torch.manual_seed(seed)
    kwargs.setdefault("threshold", THRESHOLD)
    return quietly(snntorch.SConv2dLSTM, *(args or (2, 3, 3)), **kwargs)


def twins(*args: Any, **kwargs: Any) -> tuple[snnlstm.SConv2dLSTM, snntorch.SConv2dLSTM]:
    """Makes our cell and snnTorch's, equal."""
    return ours(*args, **kwargs), theirs(*args, **kwargs)


def _random(make: Any, seed: int, *shape: int) -> Tensor:
    """Draws the same numbers for every device; they lie on torch's default one, the backend's."""
    generator = torch.Generator("cpu").manual_seed(seed)
    numbers = make(shape, generator=generator, device="cpu")
    return numbers.to(torch.empty(0).device)


def steps(time: int, *shape: int, seed: int = 1, density: float = 0.3) -> Tensor:
    """Returns spikes, (T, N, Cin, H, W)."""
    return (_random(torch.rand, seed, time, *shape) < density).float()


def states(*shape: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    """Returns syn and mem as a running cell has them: mem within (-1, 1)."""
    syn, mem = _random(torch.randn, seed, 2, *shape)
    return syn, torch.tanh(mem / 3)


def close(actual: Any, expected: Any, atol: float = 2e-6, rtol: float = 1e-5) -> None:
    """Assert that tensors, or tuples or dicts of them, agree; NaN equals NaN."""
    if isinstance(actual, Tensor):
        torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol, equal_nan=True)
        return
    if isinstance(actual, dict):
        assert list(actual) == list(expected)
        actual, expected = actual.values(), expected.values()
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        close(one, other, atol, rtol)


def same(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    """Assert that tensors are equal bit for bit."""
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def in_threads(work: Callable[[int], Any], count: int = 4) -> None:
    """Call `work` with a number in each of several threads, and raise what one of them raised."""
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(work, range(count)))


def same_gradients(one: nn.Module, other: nn.Module, atol: float = 2e-5) -> None:
    """Assert that all parameters of two modules have the same gradients."""
    pairs = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        expected = pairs[name].grad
        assert expected is not None
        close(parameter.grad, expected, atol=atol, rtol=1e-4)


class Net(nn.Module):
    """The network of snnTorch's documentation, a little smaller."""

    def __init__(self, cell, **kwargs):
        super().__init__()
        self.first = cell(2, 3, 3, threshold=THRESHOLD, max_pool=2, **kwargs)
        self.second = cell(3, 2, 3, threshold=THRESHOLD, avg_pool=3, **kwargs)
        self.head = nn.Linear(2, 4)
        self.leaky = snntorch.Leaky(beta=0.5, init_hidden=True, output=True)

    def forward(self, x):
        spk = self.second(self.first(x)[0])[0]
        return self.leaky(self.head(spk.flatten(1)))


def net(cell: Any, **kwargs: Any) -> Net:
    """Makes a :class:`Net` of cells of either library, always with the same weights."""
    torch.manual_seed(0)
    return Net(cell, **kwargs)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    """Makes an optimizer step for each step of x, each from zero states."""
    for x_t in x:
        optimizer.zero_grad()
        utils.reset(model)
        spk, mem = model(x_t)
        (spk.sum() + mem.square().sum()).backward()
        optimizer.step()
