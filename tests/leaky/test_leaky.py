"""Which forward of a Leaky runs, and what becomes of its state, also in stacks.

test_ways.py compares its results and gradients with snnTorch's layer.
"""

import itertools
import math
import weakref
from typing import Any

import pytest
import snntorch
import torch

import snnlstm
from tests.shared.cases import laid_out
from tests.shared.cpu_kernels import needs_core
from tests.shared.gradients import KEPT
from tests.shared.helpers import close
from tests.shared.leaky import (
    LEARN,
    T,
    by_steps,
    currents,
    leaky_twins,
    outcome,
)

# ---- which forward runs --------------------------------------------------------------------------


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


# ---- the state -----------------------------------------------------------------------------------


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


@pytest.mark.parametrize("whole", [False, True], ids=["steps", "sequence"])
@pytest.mark.parametrize("change", KEPT)
def test_hooks_on_saved_tensors(change: str, whole: bool) -> None:
    run = (lambda layer, x: layer.sequence(x, True)) if whole else by_steps
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


def test_a_state_of_inference_mode_serves_in_training() -> None:
    layer = leaky_twins(learn_beta=True, init_hidden=True, reset_mechanism="zero")[0]
    with torch.inference_mode():
        layer(currents(3, 5)[0])
    layer(currents(3, 5)[1]).sum().backward()
    assert layer.beta.grad is not None


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


# These are layouts of x and of beta; 5 and 9 neurons that follow each other do not fill a vector.
SEVERAL_TASKS = {
    "a value for each": ((70_003,), (70_003,), "contiguous"),
    "one for 9 pixels": ((60, 13, 3, 3), (13, 1, 1), "contiguous"),
    "5 channels last": ((11, 5, 21, 13), (5, 1, 1), "channels_last"),
}


@needs_core
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", SEVERAL_TASKS)
def test_neurons_of_several_tasks(name: str, threads: int) -> None:
    """A thread takes at most 32768 neurons at once, or 2048 where a parameter has short runs."""
    shape, values, layout = SEVERAL_TASKS[name]
    torch.set_num_threads(threads)
    x, runs = laid_out(currents(*shape), layout), (lambda net, x: snnlstm.unroll(x, net), by_steps)
    beta = torch.linspace(0.1, 0.9, math.prod(values)).reshape(values)
    layers = leaky_twins(learn_beta=True, learn_threshold=True, beta=beta)
    found = [outcome(layer, x, run=run) for layer, run in zip(layers, runs, strict=True)]
    assert layers[0].path.native
    close(*found, atol=1e-5)


@needs_core
@pytest.mark.parametrize("values", [(2, 1, 3), (2, 1, 1), (3,), ()], ids=str)
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
@pytest.mark.parametrize("run", [by_steps, lambda net, x: snnlstm.unroll(x, net)])
def test_a_layer_of_no_neurons(run: Any, order: tuple[int, ...], values: tuple[int, ...]) -> None:
    """Memory in any order lays out x of (2, 0, 3), whose results and gradients are empty or 0."""
    shape = [(2, 0, 3)[dim] for dim in order]
    x = torch.rand(T, *shape).permute(0, *(1 + order.index(dim) for dim in range(3)))
    learned = {"learn_beta": True, "learn_threshold": True, "beta": torch.full(values, 0.5)}
    layers = leaky_twins(**learned, threshold=torch.full(values, 0.1))
    runs = run, by_steps
    found = [outcome(layer, x, run=one) for layer, one in zip(layers, runs, strict=True)]
    assert layers[0].path.native
    close(*found, atol=0)
