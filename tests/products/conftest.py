"""Runs tests for both products, and notes the core's passes."""

from collections.abc import Callable
from typing import Any

import pytest

from snnlstm import _C
from snnlstm.calls.entries import BoundedDict
from snnlstm.native import conv2d, linear
from tests.products.parts import CONV2D, LINEAR, Product


@pytest.fixture(params=[LINEAR, CONV2D], ids=str)
def product(request: pytest.FixtureRequest) -> Product:
    """Runs a test for linear layers, and for convolutions."""
    return request.param


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns the passes that a test has run, and "pack" for each packed weight; every pass pays.

    The passes "lists" and "tiles" compute y; "x" and "weight" compute their gradients.
    """
    called: list[str] = []
    convolution = _C.Convolution

    def noted(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: called.append(name) or run(*args)

    class Noting:
        """This object takes the place of a convolution's pass."""

        def __init__(self, number: int, *sizes: Any) -> None:
            self._pass = convolution(number, *sizes)
            self.run = noted(("lists", "tiles", "x", "weight")[number], self._pass.run)
            self.pack = noted("pack", self._pass.pack)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._pass, name)

    monkeypatch.setattr(_C, "Convolution", Noting)
    for function, name in ("forward", "lists"), ("backward", "weight"), ("pack", "pack"):
        run = getattr(_C, f"linear_{function}")
        monkeypatch.setattr(_C, f"linear_{function}", noted(name, run))
    for name in ("IN_FORWARD", "IN_GRADIENT", "OF_VALUE", "OF_WEIGHT"):
        monkeypatch.setattr(linear, name, 0)
    for name in ("LEAST", "MOST_NONZERO"):
        monkeypatch.setattr(linear, name, 1)
    for name in ("OF_PACKED", "OF_GRADIENT", "LEAST", "LEAST_IN_TRAINING"):
        monkeypatch.setattr(conv2d, name, 0)
    for name, value in {"FEWEST": 1, "MOST_TIME": 1e9, "_layers": BoundedDict()}.items():
        monkeypatch.setattr(conv2d, name, value)
    return called
