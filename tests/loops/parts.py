"""Makes networks from one set of layers, and compares their compiled loops with eager ones."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

import snnlstm
from tests.loops.compiled import BACKEND, Calls, as_eager, dyadic_, numbers
from tests.loops.networks import exact_leaky

T, N = 4, 3
MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])


class Parts(nn.Module):
    """Has the layers that the loops below call; x is (T, N, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.back = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.lif1, self.lif2, self.hidden = (
            exact_leaky(), exact_leaky(threshold=0.375), exact_leaky(init_hidden=True),
        )  # fmt: skip
        self.drop = nn.Dropout(0.5)
        self.bn = nn.BatchNorm1d(6)


def looped(
    forward: Callable[..., Any], prepare: Callable[[Any], object] = lambda net: None
) -> Callable[[], nn.Module]:
    """Returns a function that makes a network of Parts with this forward."""

    def make() -> nn.Module:
        net = type("Net", (Parts,), {"forward": forward})()
        snnlstm.accelerate(dyadic_(net))
        prepare(net)
        return net

    return make


def check(
    forward: Callable[..., Any], training: bool = True, prepare: Any = lambda net: None, **options
) -> Calls:
    """Compares a loop over (T, N, 6) with eager's, and returns its calls."""
    return as_eager(looped(forward, prepare), numbers(T, N, 6), training=training, **options)


def expect(calls: Calls, **expected: int) -> None:
    """Asserts the numbers of calls, if our backend made them."""
    if BACKEND == "snnlstm":
        assert {name: calls[name] for name in expected} == expected


def loop_test(*modes: str, **calls: int) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Returns a decorator that makes a test of a forward (net, x) of Parts, see :func:`looped`.

    In each of the `modes`, "training" (the default) and "inference", the compiled loop leaves what
    the eager one does, in so many `calls`.
    """

    def decorated(forward: Callable[..., Any]) -> Callable[..., None]:
        @pytest.mark.parametrize("mode", modes or ["training"])
        def test(mode: str) -> None:
            expect(check(forward, training=mode == "training"), **calls)

        return test

    return decorated
