"""Leaky and snnTorch's over all options, also those that no kernel takes, by drawn actions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import snnlstm
from snnlstm import surrogate
from tests.shared.cases import drawing
from tests.shared.helpers import close
from tests.shared.leaky import (
    F64,
    PLAIN,
    RESETS,
    T,
    currents,
    eighths,
    foreign,
    leaky_twins,
    outcome,
)


@st.composite
def programs(draw: Any) -> dict[str, Any]:
    """Draws the options of a layer, the shape of a step, and the actions of T steps."""

    def one_of(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    shape, broadcast = (2, 3, 4), ((), (4,), (3, 1), (3, 4), (2, 3, 4), (2, 1, 1))
    inhibition = one_of(False, False, False, False, True)
    if inhibition:  # snnTorch's takes (N, C) alone
        shape, broadcast = (3, 4), broadcast[:4]
    options = {
        "beta": one_of(*broadcast), "threshold": one_of(*broadcast),  # their shapes
        "reset_mechanism": one_of(*RESETS), "inhibition": inhibition,
        "reset_delay": one_of(True, True, False),
        "state_quant": one_of(False, False, False, eighths),
        "spike_grad": one_of(None, surrogate.fast_sigmoid(5), foreign),
        "surrogate_disable": one_of(*[False] * 9, True),
        "graded_spikes_factor": one_of(1.0, 0.5, -2.0, 0.0, torch.tensor(0.1, dtype=F64)),
        "learn_graded_spikes_factor": one_of(False, False, False, False, True),
        "learn_beta": one_of(False, True), "learn_threshold": one_of(False, True),
        "init_hidden": one_of(False, True), "output": one_of(False, True),
    }  # fmt: skip
    dtype = one_of(torch.float32, torch.float32, F64)
    if dtype is F64 or (not inhibition and one_of(False, True)):  # what snnTorch does not run
        options |= {"reset_delay": True, "state_quant": False, "inhibition": False}
    return {
        "options": options, "shape": shape, "dtype": dtype,
        "actions": [one_of(*ACTIONS) for _ in range(T)],
        "through": one_of("spk", "mem", "both"), "largest": one_of(1, 1, 2),
        "seed": draw(st.integers(0, 99)),
    }  # fmt: skip


def passed(layer: Any, x: Tensor) -> Any:
    """Calls a layer with another mem than the stored one."""
    return layer(x) if layer.init_hidden else layer(x, currents(*x.shape, dtype=x.dtype, seed=9)[0])


def after(change: Callable[[Any], object]) -> Callable[..., Any]:
    return lambda layer, x: (change(layer), layer(x))[1]


def within(around: Callable[[], Any]) -> Callable[..., Any]:
    def act(layer: Any, x: Tensor) -> Any:
        with around():
            return layer(x)

    return act


ACTIONS: dict[str, Callable[..., Any]] = {
    "a step": lambda layer, x: layer(x),
    "passed": passed,
    "halved": after(lambda layer: setattr(layer, "mem", layer.mem * 0.5)),
    "detached": after(lambda layer: setattr(layer, "mem", layer.mem.detach())),
    "restarted": after(lambda layer: layer.reset_mem()),
    "zero": after(lambda layer: setattr(layer, "state_function", layer._base_zero)),
    "without gradients": within(torch.no_grad),
    "by reference": within(lambda: snnlstm.algorithm("reference")),
}


@pytest.mark.drawn
@drawing(120)
@given(programs())
def test_any_actions_give_what_snntorch_gives(program: dict[str, Any]) -> None:
    torch.manual_seed(program["seed"])
    dtype, options = program["dtype"], dict(program["options"])
    options["beta"] = torch.rand(options["beta"], dtype=dtype) * program["largest"] - 0.1
    options["threshold"] = torch.rand(options["threshold"], dtype=dtype) * 0.6 + 0.1
    x = currents(*program["shape"], dtype=dtype, seed=program["seed"])

    def run(layer: Any, x: Tensor) -> tuple[Tensor, ...]:
        outs = []
        for action, x_t in zip(program["actions"], x, strict=True):
            out = ACTIONS[action](layer, x_t)
            outs.append((out[0] if isinstance(out, tuple) else out, layer.mem))
        return tuple(map(torch.stack, zip(*outs, strict=True)))

    layers = leaky_twins(dtype, **options)
    (out, grads), (expected, exact) = (
        outcome(layer, x, program["through"], run) for layer in layers
    )
    close(out, expected, atol=1e-13 if dtype is F64 else 0, rtol=0)
    error = 1e-12 if dtype is F64 else 1e-4
    close(grads, exact, atol=error, rtol=error)


# ---- how much plain torch has to do --------------------------------------------------------------


class Counting(TorchDispatchMode):
    """Counts the operators that compute something."""

    FREE = "detach", "alias", "view", "expand", "select", "promote_types", "_local_scalar_dense"

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ not in self.FREE
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("name", PLAIN)
def test_plain_torch_runs_no_more_operators_than_snntorch(
    name: str, reset: str, device: str
) -> None:
    if device == "meta" and (name == "learned" or not PLAIN[name].get("reset_delay", True)):
        pytest.skip("one of the two reads a number of the layer")
    counts, x = [], currents(3, 5).to(device)
    for layer in leaky_twins(**PLAIN[name], reset_mechanism=reset):
        layer.to(device)
        layer(x[0])  # which recognises the surrogate
        with Counting() as counting, snnlstm.algorithm("reference"):
            spk, mem = layer(x[1].requires_grad_())
            (spk.sum() + mem.sum()).backward()
        counts.append(counting.count)
    assert counts[0] <= counts[1]


TRACED = "known", "foreign", "state_quant", "inhibition", "reset_delay"


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("reset", RESETS)
def test_a_traced_step_runs_no_more_operators_than_an_eager_one(reset: str) -> None:
    """Also a step whose operator a backend takes apart. One graph has all layers."""
    counts = []
    for traced in True, False:
        layers = [leaky_twins(**PLAIN[name], reset_mechanism=reset)[0] for name in TRACED]
        counting, x = Counting(), currents(3, 5)[0].requires_grad_()

        def step(x: Tensor, layers: Any = layers) -> list[Tensor]:
            return [out for layer in layers for out in layer(x, torch.ones(3, 5))]

        def backend(graph: Any, _: Any, counting: Any = counting) -> Any:
            def run(*arguments: Any) -> Any:
                with counting:
                    return graph(*arguments)

            return run

        if traced:
            outs = torch.compile(step, backend=backend, fullgraph=True)(x)
        else:
            with counting, snnlstm.algorithm("reference"):
                outs = step(x)
        with counting:
            torch.autograd.grad(sum(out.sum() for out in outs), x)
        counts.append(counting.count)
        assert {layer.path.name for layer in layers} <= {"reference", "compiled"}
    assert counts[0] <= counts[1]
