"""Methods that a user overrides in a cell, a surrogate or a quantiser take effect.

The kernels do not call such methods: the cell has to run the reference path.
"""

from types import MethodType

import pytest
import snntorch
import torch

import snnlstm
from snnlstm.quant import StateQuant
from snnlstm.surrogate import Surrogate
from tests.shared.helpers import close, described, ours, steps, theirs, train_alike, twins

X = steps(4, 2, 2, 6, 7)


def louder(base):
    return type("Louder", (base,), {"fire": lambda self, mem: base.fire(self, mem) * 3})


def resets_half(base):
    return type("Half", (base,), {"mem_reset": lambda self, mem: base.mem_reset(self, mem) / 2})


def compare(one, other):
    train_alike(one, other, X)
    assert one.path.name == "reference"


def made(base, **options):
    torch.manual_seed(0)
    return base(2, 3, 3, threshold=0.05, **options)


@pytest.mark.parametrize("override", [louder, resets_half], ids=lambda f: f.__name__)
@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
@pytest.mark.parametrize("pool", [0, 2])
def test_methods_that_a_subclass_overrides(override, reset, pool):
    options = {"reset_mechanism": reset, "max_pool": pool}
    one = made(override(snnlstm.SConv2dLSTM), **options)
    compare(one, made(override(snntorch.SConv2dLSTM), **options))
    assert "fire or mem_reset is overridden" in one.path.reason


@pytest.mark.parametrize("in_class", [False, True])
def test_methods_that_are_replaced_after_the_first_call(in_class, monkeypatch):
    actual, expected = twins(reset_mechanism="subtract")
    for cell in (actual, expected):
        cell(X[0])
        for name, change in (("fire", lambda spk: 2 * spk), ("mem_reset", lambda reset: reset / 2)):
            before = getattr(type(cell), name)

            def method(self, mem, before=before, change=change):
                return change(before(self, mem))

            if in_class:
                monkeypatch.setattr(type(cell), name, method)
            else:
                setattr(cell, name, MethodType(method, cell))
    compare(actual, expected)


def test_overrides_take_effect_in_every_step_of_a_sequence():
    kind = resets_half(louder(snnlstm.SConv2dLSTM))
    by_sequence, by_steps = (made(kind, reset_mechanism="subtract") for _ in range(2))
    spk, syn, mem = by_sequence(X, record=True)
    for t, x in enumerate(X):
        close((spk[t], syn[t], mem[t]), by_steps(x))


class Doubled(Surrogate):
    def __call__(self, x):
        return super().__call__(x) * 2


class Hundredths(StateQuant):
    def __call__(self, x):
        return x + ((x * 100).round() / 100 - x).detach()


@pytest.mark.parametrize(
    "options",
    [
        {"spike_grad": Doubled(1, 2.0)},
        {"state_quant": Hundredths(torch.tensor([-0.5, 0.0, 0.25]))},
    ],
    ids=described,
)
def test_subclasses_of_our_surrogate_and_quantiser_with_calls_of_their_own(options):
    # A cell with the plain class runs first: its cached plan must not serve the subclass, which
    # compares equal.
    plain = {
        "spike_grad": {"spike_grad": Surrogate(1, 2.0)},
        "state_quant": {"state_quant": StateQuant(torch.tensor([-0.5, 0.0, 0.25]))},
    }[next(iter(options))]
    ours(reset_mechanism="subtract", **plain)(X[0])
    one = ours(reset_mechanism="subtract", **options)
    compare(one, theirs(reset_mechanism="subtract", **options))
    spk, _, mem = snnlstm.functional.sconv2dlstm(
        X, weight=one.conv.weight, bias=one.conv.bias, threshold=0.1, reset_mechanism="subtract",
        **options,
    )  # fmt: skip
    close((spk[-1], mem), (one.spk, one.mem))
