"""Leaky and snnTorch's over all options, also those that no kernel takes, by random layers."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import snnlstm
from snnlstm import surrogate
from tests.shared.helpers import close
from tests.shared.leaky import F64, PLAIN, RESETS, currents, eighths, foreign, leaky_twins, outcome

INF = float("inf")


def layers_of(draw: random.Random, dtype: torch.dtype) -> tuple[list[Any], tuple[int, ...]]:
    """Draws the options of a layer; returns ours, snnTorch's, and the shape of a step.

    float32 does not hold the numbers of float64.
    """
    shape = (2, 3, 4)
    broadcast: list[Any] = [(), (4,), (3, 1), (3, 4), shape, (2, 1, 1)]
    inhibition = draw.random() < 0.2
    if inhibition:  # snnTorch's takes (N, C) alone
        shape, broadcast = (3, 4), broadcast[:4]
    options: dict[str, Any] = {
        "beta": torch.rand(draw.choice(broadcast), dtype=dtype) * draw.choice([1, 1, 2]) - 0.1,
        "threshold": torch.rand(draw.choice(broadcast), dtype=dtype) * 0.6 + 0.1,
        "reset_mechanism": draw.choice(RESETS),
        "reset_delay": draw.random() < 0.6,
        "inhibition": inhibition,
        "state_quant": draw.choice([False, False, False, eighths]),
        "spike_grad": draw.choice([None, surrogate.fast_sigmoid(5), foreign]),
        "surrogate_disable": draw.random() < 0.1,
        "graded_spikes_factor": draw.choice([1.0, 0.5, -2.0, 0.0, torch.tensor(0.1, dtype=F64)]),
        "learn_graded_spikes_factor": draw.random() < 0.2,
        "learn_beta": draw.random() < 0.4,
        "learn_threshold": draw.random() < 0.4,
        "init_hidden": draw.random() < 0.5,
        "output": draw.random() < 0.5,
    }
    if draw.random() < 0.5 and not inhibition:  # what the kernels take
        options |= {"reset_delay": True, "state_quant": False}
    return leaky_twins(dtype, **options), shape


@pytest.mark.parametrize("seed", range(200))
def test_random_layers(seed: int) -> None:
    draw, dtype = random.Random(seed), torch.float32 if seed % 3 else F64
    torch.manual_seed(seed)
    (layers, shape), through = layers_of(draw, dtype), draw.choice(["spk", "mem", "both"])
    x, chosen = currents(*shape, dtype=dtype, seed=seed), draw.choice(["auto", "auto", "reference"])
    with snnlstm.algorithm(chosen):
        (out, grads), (expected, exact) = (outcome(layer, x, through) for layer in layers)
    assert chosen == "auto" or not layers[0].path.native
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


TRACED = (
    "known", "foreign", "both", "reset_delay, graded", "reset_delay, foreign", "surrogate_disable",
)  # fmt: skip


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


# ---- what snnTorch computes as NaN ---------------------------------------------------------------


@pytest.mark.parametrize("spike", [None, foreign], ids=["known", "foreign"])
@pytest.mark.parametrize("delay", [True, False])
@pytest.mark.parametrize("threshold", [INF, -INF, torch.tensor([INF, 0.3, 0.3, -INF])], ids=str)
def test_an_infinite_threshold_makes_no_nan(threshold: Any, delay: bool, spike: Any) -> None:
    layer = snnlstm.Leaky(
        0.5, threshold, spike_grad=spike, reset_delay=delay, learn_threshold=True, learn_beta=True
    )
    x = torch.full((3, 4), 0.5, requires_grad=True)
    spk, mem = layer(x, torch.zeros(3, 4))
    above = torch.as_tensor(threshold).expand(4) == -INF
    assert torch.equal(spk.bool(), (torch.as_tensor(threshold) < 0.5).expand(3, 4))
    assert (mem[:, ~above].detach() <= 0.5).all()
    assert (mem[:, above] == INF).all()  # a reset adds infinity
    spk.sum().backward()
    assert x.grad.isfinite().all()  # type: ignore[union-attr]
    assert layer.threshold.grad.isfinite().all()


@pytest.mark.parametrize("compiled", [False, True])
def test_without_a_reset_the_graded_factor_may_be_0(compiled: bool) -> None:
    found = []
    for layer in leaky_twins(graded_spikes_factor=0.0, reset_mechanism="none", reset_delay=False):
        ours = isinstance(layer, snnlstm.Leaky)
        call = torch.compile(layer, backend="eager") if compiled and ours else layer
        x = currents(3, 5)[0].requires_grad_()
        spk, mem = call(x)
        found.append((mem, *torch.autograd.grad(spk.sum() + mem.sum(), x)))
    close(*found, atol=0)


# ---- dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("reset", RESETS)
def test_integers_count_as_numbers_beside_parameters(reset: str, dtype: torch.dtype) -> None:
    """snnTorch's surrogates return float32, so its threshold is a number that float32 holds."""
    x = (currents(3, 5) > 0).to(dtype)
    for real in (torch.float32, F64):
        found = []
        for layer in leaky_twins(beta=0.3, threshold=0.625, reset_mechanism=reset):
            layer.to(real)
            ours = isinstance(layer, snnlstm.Leaky)
            outs = [layer(x_t if ours else x_t.to(real)) for x_t in x]
            assert all(out.dtype is real for out in (outs[0] if ours else outs[0][1:]))
            found.append([(spk.to(real), mem) for spk, mem in outs])
        close(*found, atol=0, rtol=0)
