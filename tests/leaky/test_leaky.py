"""Leaky computes what snntorch 1.0.0's does: bitwise in float32, half types and float64 apart.

tests/emulator/test_leaky_kernels.py compares the kernels with a formula in float64.
"""

import weakref
from itertools import product
from typing import Any

import pytest
import snntorch
import torch
from torch import Tensor

import snnlstm
from snnlstm import surrogate
from tests.conftest import _backends
from tests.shared.cases import IN_SNNTORCH, laid_out
from tests.shared.gradients import KEPT
from tests.shared.helpers import close, described, watched
from tests.shared.leaky import (
    F64,
    LEARN,
    RESETS,
    T,
    by_steps,
    currents,
    eighths,
    foreign,
    leaky_twins,
    outcome,
)

native = pytest.mark.parametrize(
    "backend", [one for one in _backends() if one.native], ids=lambda one: one.name, indirect=True
)


def by_sequence(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns spk and mem of all steps, which are one call."""
    with torch.no_grad():
        spks = layer.sequence(x, False)
    layer.reset_mem()
    spk, mem = layer.sequence(x, True)
    assert torch.equal(spks, spk)
    assert torch.equal(layer.mem, mem[-1])
    assert not layer.mem._is_view()
    return spk, mem


both_ways = pytest.mark.parametrize("run", [by_steps, by_sequence], ids=lambda run: run.__name__)


def alike(
    backend: Any, ours: Any, theirs: Any, x: Tensor, through: str = "both", run: Any = by_steps
) -> None:
    out, grads = outcome(ours, x, through, run)
    expected, exact = outcome(theirs, x, through)
    backend.check(ours.path)
    close(out, expected, atol=0, rtol=0)
    assert out[0].any(), "no neuron has spiked"
    close(grads, exact, atol=1e-4, rtol=1e-4)


CHANNELS, FEATURES = torch.tensor([0.3, 0.6, 0.9])[:, None, None], torch.linspace(0.1, 0.9, 5)
NEURONS = torch.linspace(0.1, 0.9, 120).reshape(2, 3, 4, 5)
SHAPES = [(2, 3, 4, 5), (7,), (3, 5), (2, 3, 5), (1, 1), (33, 67), (2, 3, 40, 50)]


def long(*values: Any) -> list[Any]:
    """Has the emulator take the values at length alone."""
    return [pytest.param(*value, marks=pytest.mark.emulator_long) for value in values]


@native
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize(
    ("shape", "through"),
    [
        *product(SHAPES[:1], ("spk", "mem", "both")),
        *long(*product(SHAPES[1:], ["both"])),
    ],
    ids=described,
)
@both_ways
def test_steps(backend: Any, shape: tuple[int, ...], reset: str, through: str, run: Any) -> None:
    options: dict[str, Any] = {"reset_mechanism": reset, "learn_beta": True, "init_hidden": True}
    options["beta"] = CHANNELS if len(shape) == 4 else 0.8
    alike(backend, *leaky_twins(**options, learn_threshold=True), currents(*shape), through, run)
    alike(backend, *leaky_twins(**options, output=True), currents(*shape, seed=2), through, run)


OPTIONS: list[dict[str, Any]] = [
    {"beta": 1, "threshold": 1}, {"beta": 1.3}, {"beta": -0.2}, {"beta": 0.0}, {"beta": 1.0},
    {"beta": CHANNELS}, {"beta": FEATURES}, {"threshold": CHANNELS},
    {"beta": CHANNELS, "threshold": FEATURES}, {"threshold": FEATURES[None, None]},
    {"beta": torch.tensor([0.7]), "threshold": torch.tensor(0.2, dtype=F64)},
    {"beta": CHANNELS * 3 - 1, "threshold": CHANNELS}, {"graded_spikes_factor": -0.5},
    {"surrogate_disable": True}, {"beta": CHANNELS[:2, None] + 0.2},
    {"beta": NEURONS, "threshold": NEURONS[0]}, {"beta": NEURONS[0], "threshold": NEURONS},
    {"beta": NEURONS[0, :, :, :1], "threshold": NEURONS[0, :, :, :1]},
    *({"spike_grad": getattr(snntorch.surrogate, spike.name)()} for spike in IN_SNNTORCH),
]  # fmt: skip
OF_TENSORS = [options for options in OPTIONS if any(map(torch.is_tensor, options.values()))]


@native
@pytest.mark.parametrize(
    ("options", "layout"),
    [
        *((options, "contiguous") for options in OPTIONS),
        *long(*product(OF_TENSORS, ("channels_last", "transposed", "strided"))),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
@pytest.mark.parametrize("reset", ["subtract", "zero"])
def test_options(backend: Any, options: dict[str, Any], reset: str, layout: str) -> None:
    learn = {f"learn_{name}": torch.is_tensor(options.get(name)) for name in ("beta", "threshold")}
    layers = leaky_twins(**options, **learn, reset_mechanism=reset)
    x = currents(2, 3, 4, 5) / 2  # snnTorch's sigmoid is NaN for very negative inputs
    alike(backend, *layers, laid_out(x, layout))


@native
@both_ways
@pytest.mark.parametrize("dtype", [F64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reset", RESETS)
def test_dtypes(backend: Any, reset: str, dtype: torch.dtype, run: Any) -> None:
    """x of a half type is read as it is, and all is computed in float32."""
    real = F64 if dtype is F64 else torch.float32
    beta, threshold = torch.rand(3, 1, 1, dtype=real), torch.rand(5, dtype=real)
    options = {"spike_grad": surrogate.fast_sigmoid(), "reset_mechanism": reset, **LEARN}
    layer, other = leaky_twins(beta=beta, threshold=threshold, **options)
    x = currents(2, 3, 4, 5, dtype=dtype)
    (outs, grads), (expected, exact) = outcome(layer, x, run=run), outcome(other, x.to(real))
    backend.check(layer.path)
    assert all(out.dtype is real for out in outs)
    close(outs, [out.to(real) for out in expected], atol=1e-14, rtol=0)
    assert grads[0].dtype is dtype
    close(grads[0].to(real), exact[0], atol=1e-5, rtol=1e-5 if dtype is F64 else 1e-2)
    close(grads[1:], exact[1:], atol=1e-3, rtol=1e-3)


# ---- which forward runs --------------------------------------------------------------------------


OTHERS = {
    "reset_delay is False": {"reset_delay": False},
    "inhibition": {"inhibition": True},
    "state_quant": {"state_quant": eighths},
    "the surrogate is not a known one": {"spike_grad": foreign},
    "graded_spikes_factor is learned": {"learn_graded_spikes_factor": True},
    "graded_spikes_factor is learned, or is not": {"graded_spikes_factor": torch.ones(5)},
    "beta is empty, or does not broadcast to x": {"beta": torch.rand(2, 1, 5)},
    "threshold is empty, or does not broadcast to x": {"threshold": torch.rand(2, 1, 3, 5)},
    "beta is of torch.float64": {"beta": torch.rand(5, dtype=F64)},
}


@pytest.mark.parametrize("reason", OTHERS)
def test_plain_torch_runs(reason: str, caplog: Any) -> None:
    layer, other = leaky_twins(**OTHERS[reason])
    x = currents(3, 5)
    close([*map(layer, x)], [*map(other, x)], atol=0)
    assert layer.path.name == "reference"
    assert layer.path.reason.startswith(reason)
    assert [reason in message for message in caplog.messages] == [True]  # once


def test_a_state_function_that_was_set_runs() -> None:
    for chosen in (lambda x: x, torch.nn.Identity()):
        layer = leaky_twins()[0]
        layer.state_function = chosen
        assert layer.state_function is chosen
        assert torch.equal(layer(currents(3, 5)[0])[1], currents(3, 5)[0])
        assert layer.path.reason == "its state_function was replaced"


@pytest.mark.parametrize("name", ["fire", "mem_reset", "_base_sub", "_base_state_function"])
def test_replaced_methods_are_called(name: str, monkeypatch: Any) -> None:
    layer = leaky_twins()[0]
    seen: list[Any] = []
    original = getattr(layer, name)
    setattr(layer, name, lambda x: (seen.append(name), original(x))[1])
    layer(currents(3, 5)[0])
    assert layer.path.reason == f"its {name} was replaced"
    assert bool(seen) != (name == "_base_sub")  # state_function is the class's method
    net = torch.nn.Sequential(leaky_twins()[1])
    setattr(net[0], name, original)
    assert snnlstm.accelerate(net).left == {"0": f"its {name} was replaced"}
    other = leaky_twins()[0]
    monkeypatch.setattr(snntorch.Leaky, name, lambda self, x: x)
    other(currents(3, 5)[0])
    assert other.path.reason == f"its {name} was replaced"


def test_a_call_from_an_empty_mem_copies_nothing_that_the_core_can_read(monkeypatch: Any) -> None:
    kernels = pytest.importorskip("snnlstm.native.leaky")
    layer, x = leaky_twins()[0], currents(3, 5)[0]
    empty, fitting, transposed = torch.zeros(0), torch.zeros(3, 5), torch.zeros(5, 3).t()
    for mem, copies in (empty, False), (fitting, False), (transposed, True):
        layer(x, mem)  # which makes the plan
        copied = watched(monkeypatch, kernels.Plan, "_readable")
        layer(x, mem)
        assert bool(copied) == copies


# ---- the state -----------------------------------------------------------------------------------


def test_mem_may_be_passed() -> None:
    layer, other = leaky_twins()
    x, mem = currents(3, 5)[:2]
    for _ in range(2):
        close(layer(x, mem=mem), other(x, mem), atol=0)
    parameter = torch.nn.Parameter(mem)  # which snnTorch refuses
    layer(x, parameter)[1].sum().backward()
    close(parameter.grad, torch.full((3, 5), 0.8))
    assert set(layer._buffers) == set(other._buffers)
    assert not layer._parameters
    close(layer(x, torch.ones(7)), other(x, torch.ones(7)), atol=0)  # zeros, as in snnTorch


def test_after_an_error_the_state_is_as_before() -> None:
    layer = leaky_twins(init_hidden=True)[0]
    x = currents(3, 5)[0]
    layer(x)
    before = layer.mem
    with pytest.raises(TypeError, match="`mem` should not be passed"):
        layer(x, x)
    with pytest.raises(TypeError, match="input_ must be a tensor, got list"):
        layer([x])
    layer.inhibition = True  # which takes a batch
    with pytest.raises(IndexError):
        layer(x[0])
    layer.inhibition = False
    layer.fire = None  # a replaced method, which snnTorch's own forward calls last
    with pytest.raises(TypeError):
        layer(x)
    assert layer.mem is before


def test_the_graph_of_old_steps_goes_with_the_mem_that_is_returned_and_stored() -> None:
    layer = leaky_twins(learn_beta=True)[0]
    kept = []
    for x_t in currents(3, 5):
        assert layer(x_t)[1] is layer.mem
        kept.append(weakref.ref(layer.mem.grad_fn))
    snnlstm.Leaky.detach_hidden()
    assert [node() for node in kept] == [None] * T
    layer.reset_mem()
    assert not layer.mem.any()


@both_ways
@pytest.mark.parametrize("change", KEPT)
def test_hooks_on_saved_tensors(change: str, run: Any) -> None:
    layer, other = leaky_twins(**LEARN)[0], leaky_twins(**LEARN)[0]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, KEPT[change] or (lambda t: t)):
        _, grads = outcome(layer, currents(3, 5), run=run)
    close(grads, outcome(other, currents(3, 5), run=run)[1])


def test_changes_in_place_are_noticed() -> None:
    for change in ("mem", "beta", "threshold"):
        layer = leaky_twins(learn_beta=True)[0]
        spk, mem = layer(currents(3, 5)[0].requires_grad_())
        with torch.no_grad():
            getattr(layer, change).mul_(0.5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (spk.sum() + mem.sum()).backward()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 4), (0,)], ids=described)
def test_no_samples(shape: tuple[int, ...]) -> None:
    layer = leaky_twins(learn_beta=True)[0]
    x = torch.zeros(T, *shape, requires_grad=True)
    total = sum(mem.sum() for _, mem in map(layer, x)) + layer.sequence(x, True)[1].sum()
    total.backward()
    assert x.grad.shape == x.shape  # type: ignore[union-attr]
    assert layer.beta.grad == 0


def test_a_state_of_inference_mode_serves_in_training() -> None:
    layer = leaky_twins(learn_beta=True, init_hidden=True, reset_mechanism="zero")[0]
    with torch.inference_mode():
        layer(currents(3, 5)[0])
    layer(currents(3, 5)[1]).sum().backward()
    assert layer.beta.grad is not None


def test_nan_and_infinity() -> None:
    x = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.5, -0.5]).repeat(T, 1)
    for reset in RESETS:
        layer, other = leaky_twins(reset_mechanism=reset)
        close([*map(layer, x)], [*map(other, x)], atol=0)


def test_a_stochastic_surrogate_draws_snntorchs_numbers() -> None:
    found = []
    for layer in leaky_twins(spike_grad=snntorch.surrogate.SSO(mean=0.5, variance=0.2)):
        x = currents(4, 5).requires_grad_()
        spk = torch.stack([layer(x_t)[0] for x_t in x])
        torch.manual_seed(0)
        (grad,) = torch.autograd.grad((spk * x.detach()).sum(), x)
        found.append((spk, grad))
        if type(layer) is snnlstm.Leaky:
            assert str(layer.path) == "reference (spike_grad draws random numbers)"
    close(*found)


# ---- sequences -----------------------------------------------------------------------------------


@pytest.mark.parametrize("output", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_stacks(padded: bool, output: bool) -> None:
    """A Sequential calls our layer once, and gives what it gives with snnTorch's layer."""
    nets, found = [], []
    x = currents(3, 5)
    for layer in leaky_twins(init_hidden=True, output=output, learn_threshold=True):
        torch.manual_seed(0)
        net = snnlstm.Sequential(torch.nn.Linear(5, 4), layer)
        with snnlstm.spike_rates(net, show=False) as rates:
            for lengths in [2, 0, T], [0, T, 1]:  # the second call goes on from the stored state
                out = net(x, torch.tensor(lengths) if padded else None)
        (out[0] + out[1] if output else out).square().sum().backward()
        grads = [p.grad for p in net.parameters()]
        # A loop over the steps also counts what padded samples would do.
        counts = () if padded else (rates["1"].spikes, rates["1"].chances, rates["1"].highest)
        found.append((out if output else (out,), net[1].mem.detach(), grads, counts))
        nets.append(net)
    close(*found, atol=1e-5)
    assert [net.report[1].kind for net in nets] == ["sequence", "step"]
    assert "accelerate" in nets[1].report[1].reason
    large = snnlstm.Sequential(leaky_twins()[0])
    large(torch.zeros(T, 2, 1024, 129))
    assert large.report[0].kind == "step"  # in the cache, on the CPU


# ---- in the place of snnTorch's ------------------------------------------------------------------


def test_accelerate(caplog: Any) -> None:
    layer, x = leaky_twins()[1], currents(3, 5)
    layer(x[0])
    assert snnlstm.accelerate(torch.nn.Sequential(layer)).swapped == ("0",)
    assert not hasattr(layer, "reset")  # it would be a stale one
    snnlstm.accelerate(torch.nn.Sequential(torch.nn.MaxPool2d(2)))
    assert not caplog.messages
    snnlstm.accelerate(torch.nn.Sequential(torch.nn.ReLU()))
    assert caplog.messages == ["accelerate found neither SConv2dLSTM nor Leaky in the model"]


def test_a_sequence_with_the_batch_outermost_in_memory_and_as_many_steps() -> None:
    x = torch.rand(4, 4, 5).transpose(0, 1)
    layer = leaky_twins()[0]
    close(snnlstm.unroll(x, layer)[1], snnlstm.unroll(x.contiguous(), leaky_twins()[0])[1], atol=0)
