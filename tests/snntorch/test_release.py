"""snnTorch's closures and objects are recognised by what they hold, its release by its source.

The recognition disturbs nobody: no random numbers, no threads that are left.
"""

import inspect
from typing import Any

import pytest
import snntorch
import torch
from torch import Tensor

import snnlstm
from snnlstm import surrogate
from snnlstm.compat import snntorch as compat
from tests.cell.test_surrogate import stand_in
from tests.shared.helpers import close, python, theirs
from tests.shared.leaky import currents

# ---- random numbers and threads ------------------------------------------------------------------


class Drawing:
    """A surrogate that draws when it is called, as another thread might at that time."""

    def __init__(self) -> None:
        self.inside, self.drawn = surrogate.atan(), 0

    def __call__(self, x: Tensor) -> Tensor:
        self.drawn += torch.rand(1).numel()
        return self.inside(x)


def test_numbers_that_others_draw_meanwhile_are_not_drawn_again() -> None:
    spike = Drawing()
    made = stand_in("ATanSurrogate", surrogate.atan(), alpha=2.0)
    type(made).__call__ = lambda _, x: spike(x)
    torch.manual_seed(0)
    numbers = torch.rand(8).tolist()
    torch.manual_seed(0)
    assert compat.recognise_surrogate(made) == surrogate.atan()
    assert spike.drawn
    assert torch.rand(1).item() == numbers[spike.drawn]


@pytest.mark.parametrize("released", [True, False])
def test_recognition_and_swaps_draw_no_random_numbers(released: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(compat, "_agreeing", set())
    monkeypatch.setitem(compat._follow, snntorch.surrogate, released)
    net = torch.nn.Sequential(theirs())
    before = torch.get_rng_state()
    for kind in surrogate.KINDS[1:]:
        made = getattr(snntorch.surrogate, kind.name)()
        layer = snnlstm.Leaky(0.5, spike_grad=made)
        assert layer._described().surrogate == getattr(surrogate, kind.name)()
        with torch.no_grad():
            layer(currents(3, 5)[0])
    assert snnlstm.accelerate(net).swapped == ("0",)
    assert torch.equal(torch.get_rng_state(), before)


LATE = """
import atexit, threading, torch, snntorch, snnlstm

snnlstm.compat.snntorch._follow[snntorch.surrogate] = False

def first_call():
    layer = snnlstm.Leaky(0.5, spike_grad=snntorch.surrogate.fast_sigmoid())
    layer(torch.rand(3))
    print(layer.path.native)

def after_main():
    threading.main_thread().join()
    first_call()

atexit.register(first_call)
threading.Thread(target=after_main).start()
"""


def test_a_first_call_may_come_after_the_main_thread_s_end() -> None:
    out = python("-c", LATE)
    assert out.stdout.split() == ["True", "True"], out.stderr


# ---- surrogates that change ----------------------------------------------------------------------


class Slope:
    """A surrogate with a number that may change, as in snnTorch after 1.0.0."""

    def __init__(self) -> None:
        self.slope = 5.0

    def __call__(self, x: Tensor) -> Tensor:
        return snntorch.surrogate.FastSigmoid.apply(x, self.slope)


Slope.__module__, Slope.__qualname__ = "snntorch.surrogate", "FastSigmoidSurrogate"


def test_numbers_of_a_surrogate_may_change() -> None:
    """tests/leaky/test_calls.py changes the number of a closure."""
    spike = Slope()
    layers = [library.Leaky(0.8, spike_grad=spike) for library in (snnlstm, snntorch)]
    for slope in (5.0, 20.0, 1.0):
        spike.slope = slope
        found = []
        for layer in layers:
            x = currents(3, 5)[0].requires_grad_()
            found.append(torch.autograd.grad(layer(x, torch.zeros(3, 5))[0].sum(), x))
        close(*found)
        assert layers[0].path.native
    assert found[0][0].any()


# ---- other releases ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Leaky", "SConv2dLSTM"])
def test_the_release_is_known_by_its_source_or_else_by_its_version(name: str, monkeypatch: Any):
    """tests/snntorch/test_swap.py changes the installed source."""
    kind = getattr(snntorch, name)
    assert compat.source_of(kind) == compat._SOURCES[name]
    forward, methods = compat._RELEASED[kind]
    for changed in methods:
        other = methods | {changed: test_numbers_of_a_surrogate_may_change}
        monkeypatch.setitem(compat._RELEASED, kind, (forward, other))
        assert compat.source_of(kind) != compat._SOURCES[name]
    monkeypatch.setattr(inspect, "getsource", lambda _: (_ for _ in ()).throw(OSError))
    for version, follows in (("0.9.4", True), ("1.0.0", True), ("1.1.0", False)):
        monkeypatch.setattr(compat, "_follow", {})
        monkeypatch.setattr(snntorch, "__version__", version)
        assert compat._follows(kind) is follows
