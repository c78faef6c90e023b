"""Leaky in calls of all kinds: what runs them, dtypes, and what hangs on the graph."""

import copy
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import snntorch
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import snnlstm
from snnlstm import surrogate
from snnlstm.compat import snntorch as compat
from snnlstm.dispatch import entry
from tests.shared.helpers import close, long, ours
from tests.shared.helpers import twins as cells
from tests.shared.leaky import F64, LEARN, PLAIN, RESETS, currents, eighths, leaky_twins, outcome

# ---- the surrogate is recognised -----------------------------------------------------------------


@pytest.mark.parametrize("learn", [LEARN, {}], ids=["learned", "fixed"])
def test_a_first_call_inside_a_checkpoint(learn: dict[str, Any]) -> None:
    found = []
    for layer in leaky_twins(**learn):
        x = currents(3, 5)[0].requires_grad_()
        out = checkpoint(layer, x, torch.ones(3, 5), use_reentrant=False)
        sum(o.square().sum() for o in out).backward()
        found.append((x.grad, *(p.grad for p in layer.parameters())))
        assert not isinstance(layer, snnlstm.Leaky) or layer.path.native, layer.path
    close(*found)


AROUND: dict[str, Any] = {
    "hooks that narrow": lambda: saved_tensors_hooks(lambda t: t.half(), lambda t: t.float()),
    "hooks that fail": lambda: saved_tensors_hooks(lambda t: t, lambda t: 1 / 0),
    "autocast": lambda: torch.autocast("cpu"),
    "a dispatch mode": lambda: FlopCounterMode(display=False),
    "a device": lambda: torch.device("meta"),
    "fake tensors": FakeTensorMode,
    "inference": torch.inference_mode,
    "anomalies": torch.autograd.detect_anomaly,
}


@pytest.mark.filterwarnings("ignore:Anomaly")
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", ["atan", "sigmoid", "SSO", "LSO"])
def test_what_is_around_its_recognition_hides_no_surrogate(
    name: str, around: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(compat, "_released", set())
    layer = snnlstm.Leaky(0.5)
    with AROUND[around]():
        layer.spike_grad = getattr(snntorch.surrogate, name)()
        assert layer._described().surrogate == getattr(surrogate, name)()


def test_recognition_that_failed_is_tried_again(monkeypatch: Any) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("out of memory")

    x = currents(3, 5)[0]
    with monkeypatch.context() as patched:
        patched.setattr(torch.autograd, "grad", fails)
        patched.setattr(compat, "_released", set())
        layer = leaky_twins()[0]
        layer(x)
        assert layer.path.reason == "the surrogate is not a known one"
    layer(x)
    assert layer.path.native
    torch.compile(layer, backend="eager", fullgraph=True)(x)
    assert layer.path.name == "compiled"


# ---- parameters ----------------------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("beta", {"beta": torch.linspace(0.1, 0.4, 5), "learn_beta": True}),
        ("threshold", {"threshold": torch.linspace(0.1, 0.4, 5), "learn_threshold": True}),
        ("graded_spikes_factor", {"graded_spikes_factor": torch.tensor([0.5])}),
        ("beta", {"beta": torch.rand(3, 5), "learn_beta": True}),
    ],
)
def test_parametrized_vectors(name: str, options: dict[str, Any]) -> None:
    found, layers = [], leaky_twins(**options)
    for layer in layers:
        register_parametrization(layer, name, Doubled())
        found.append(outcome(layer, currents(3, 5)))
    close(*found, atol=1e-5)
    assert layers[0].path.native


# ---- gradients -----------------------------------------------------------------------------------


PASSED: dict[str, Any] = {
    "as x": (lambda x: x, lambda mem: mem),
    "another layout": (lambda x: x, lambda mem: mem.transpose(1, 3).contiguous().transpose(1, 3)),
    "channels-last x": (lambda x: x.contiguous(memory_format=torch.channels_last), lambda mem: mem),
    "half mem": (lambda x: x.float(), lambda mem: mem.half()),
    "half x": (lambda x: x.half(), lambda mem: mem.float()),
}


@pytest.mark.parametrize("stored", [False, True], ids=["passed", "stored"])
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("kind", PASSED)
def test_second_derivatives_reach_mem(kind: str, reset: str, stored: bool) -> None:
    found = []
    change_x, change_mem = PASSED[kind]
    for layer in leaky_twins(**LEARN, reset_mechanism=reset):
        numbers = currents(2, 3, 4, 5, dtype=F64)
        x = change_x(numbers[0].clone()).requires_grad_()
        mem = change_mem(numbers[1].half().double()).requires_grad_()
        ours_ = isinstance(layer, snnlstm.Leaky)
        given = mem if ours_ else mem.to(torch.promote_types(x.dtype, torch.float32))
        if stored:
            layer.mem = given
        spk, after = layer(x) if stored else layer(x, given)
        leaves = [x, mem, layer.beta, layer.threshold]
        total = spk.sum() + after.square().sum()
        first = torch.autograd.grad(total, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        found.append([g.double() for g in (*first, *second)])
        assert not ours_ or layer.path.native, layer.path
    half = "half" in kind
    close(*found, atol=1e-2 if half else 1e-5, rtol=1e-2 if half else 1e-4)


@pytest.mark.parametrize("whole", [False, True], ids=["steps", "sequence"])
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("disable", [False, True])
def test_only_the_threshold_is_learned(reset: str, disable: bool, whole: bool) -> None:
    """What does not depend on it has no graph, so states may be carried over backward passes."""
    options = {"reset_mechanism": reset, "learn_threshold": True, "surrogate_disable": disable}
    layer, other = leaky_twins(**options)
    x = currents(3, 5)
    for _ in range(2):
        out = layer.sequence(x, True) if whole else layer(x[0])
        expected = [map(torch.stack, zip(*map(other, x), strict=True)), other(x[0])][not whole]
        assert layer.path.native
        graphs = [o.requires_grad for o in out]
        assert graphs == [o.requires_grad for o in expected] == [not disable, reset == "subtract"]
        if any(graphs):
            sum(o.sum() for o in out).backward(retain_graph=reset == "subtract")


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("time", [0, 3], ids=["step", "sequence"])
def test_only_the_threshold_of_a_cell_is_learned(time: int, reset: str) -> None:
    """tests/leaky/test_operators.py compares compiled cells with these."""
    found = []
    for cell in cells(reset_mechanism=reset, learn_threshold=True):
        cell.conv.requires_grad_(False)
        x = torch.rand(max(time, 1), 1, 2, 5, 5)
        if isinstance(cell, snnlstm.SConv2dLSTM):
            out = cell(x if time else x[0])
        else:
            out = [cell(x_t) for x_t in x][-1]
        found.append([o.requires_grad for o in out])
    assert found[0] == found[1] == [True, time > 0 and reset == "subtract", reset == "subtract"]


# ---- dtypes --------------------------------------------------------------------------------------


def outcomes(layers: Any, call: Any, x: Tensor) -> list[list[Tensor]]:
    """Runs all steps; returns spk, mem, and the gradients of x and of all parameters, by layer.

    A call gets a step's x for each layer.
    """
    inside, found = [x.clone().requires_grad_() for _ in layers], []
    outs = zip(*map(call, zip(*inside, strict=True)), strict=True)
    for layer, x_of_layer, steps in zip(layers, inside, outs, strict=True):
        spk, mem = map(torch.stack, zip(*steps, strict=True))
        loss = (spk * currents(*x.shape[1:], seed=1)).sum() + mem.square().sum()
        grads = torch.autograd.grad(loss, [x_of_layer, *layer.parameters()], allow_unused=True)
        found.append([spk, mem, *(g for g in grads if g is not None)])
    return found


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(F64, marks=long)], ids=str)
def test_compiled_layers_compute_what_snntorch_does(dtype: torch.dtype) -> None:
    """One graph has them all, and not each kind with each mechanism, because tracing takes long."""
    rows = [(k, reset) for k in PLAIN for reset in RESETS if k == "known" or reset == "zero"]
    threshold = torch.tensor(0.1, dtype=dtype)  # float32 does not hold that of float64
    pairs = (leaky_twins(dtype, **PLAIN[kind], reset_mechanism=reset, threshold=threshold)
             for kind, reset in rows)  # fmt: skip
    ours_, others = zip(*pairs, strict=True)

    def each(layers: Any) -> Any:
        return lambda step: [layer(x) for layer, x in zip(layers, step, strict=True)]

    x, compiled = currents(3, 5, dtype=dtype), torch.compile(backend="eager", fullgraph=True)
    found, expected = outcomes(ours_, compiled(each(ours_)), x), outcomes(others, each(others), x)
    outs, grads = ({"atol": 1e-12, "rtol": 1e-12},) * 2 if dtype is F64 else (
        {"atol": 0, "rtol": 0}, {"atol": 1e-5}
    )  # fmt: skip
    for row, actual, exact in zip(rows, found, expected, strict=True):
        assert actual[0].any(), row
        close(actual[:2], exact[:2], **outs)
        close(actual[2:], exact[2:], **grads)
    assert not any(layer.path.native for layer in ours_)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_surrogate_that_holds_a_tensor_compiles() -> None:
    layer, other = leaky_twins(spike_grad=snntorch.surrogate.atan(alpha=torch.tensor(2.0)))
    x = currents(3, 5)[0]
    close(torch.compile(layer, backend="eager", fullgraph=True)(x), other(x), atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("stored", [False, True], ids=["passed", "stored"])
@pytest.mark.parametrize("reset", RESETS)
def test_a_mem_of_float64_stays_one(reset: str, stored: bool, dtype: torch.dtype) -> None:
    layer, other = leaky_twins(**LEARN, reset_mechanism=reset)
    x, mem = currents(3, 5, dtype=dtype), currents(3, 5, dtype=F64, seed=3)[0]
    for neuron in (layer, other):
        neuron.mem = mem if stored else neuron.mem
    for x_t in x:
        given = () if stored else (mem,)
        out, expected = layer(x_t, *given), other(x_t.float(), *given)
        assert [o.dtype for o in out] == [o.dtype for o in expected] == [torch.float32, F64]
        close(out, expected, atol=0)
        mem = out[1]
    close(layer(x[0], torch.zeros(7, dtype=F64)), other(x[0].float(), torch.zeros(7)))
    assert layer.mem.dtype is torch.float32  # a mem of another shape is zeros


def test_numbers_of_float64() -> None:
    """Beside an x without dimensions the dtype of a number counts."""
    options = {"beta": torch.tensor(0.8, dtype=F64), "threshold": torch.tensor(0.3, dtype=F64)}
    for layer in leaky_twins(**options):
        spk, mem = layer(torch.tensor(0.7))
        assert (spk.dtype, mem.dtype) == (torch.float32, F64)
        spk, mem = layer(torch.tensor([0.7]))
        assert (spk.dtype, mem.dtype) == (torch.float32,) * 2
    layer = leaky_twins(**options)[0]
    assert not layer.takes(torch.rand(4))
    assert layer.takes(torch.rand(4, 1))


# ---- what changes between calls ------------------------------------------------------------------


def parameter(name: str, value: Tensor) -> Any:
    def change(layer: Any) -> None:
        layer._buffers[name] = value

    return change


CHANGED: dict[str, Any] = {
    "reset_delay": lambda layer: setattr(layer, "reset_delay", False),
    "inhibition": lambda layer: setattr(layer, "inhibition", True),
    "state_quant": lambda layer: setattr(layer, "state_quant", eighths),
    "spike_grad": lambda layer: setattr(layer, "spike_grad", snntorch.surrogate.triangular()),
    "foreign": lambda layer: setattr(layer, "spike_grad", lambda u: (u > 0.1).float() + 0 * u),
    "unseen": lambda layer: vars(layer).update(inhibition=True),
    "its number": lambda layer: setattr(layer.spike_grad.__closure__[0], "cell_contents", 5.0),
    "state_function": lambda layer: setattr(layer, "state_function", layer._base_zero),
    "reset_mechanism": lambda layer: setattr(layer, "reset_mechanism", "zero"),  # changes no call
    "a function": lambda layer: setattr(layer, "state_function", lambda x: 2 * x),
    "fire": lambda layer: setattr(layer, "fire", lambda mem: mem - 1),
    "mem_reset": lambda layer: setattr(layer, "mem_reset", lambda mem: 0 * mem),
    "beta": parameter("beta", torch.tensor(0.2)),
    "betas": parameter("beta", torch.linspace(0.1, 0.5, 5)),
    "beta of float64": parameter("beta", torch.linspace(0.1, 0.5, 5, dtype=F64)),
    "threshold": parameter("threshold", torch.linspace(0.1, 0.5, 5)),
    "graded": parameter("graded_spikes_factor", torch.tensor(-2.0)),
    "mem": lambda layer: setattr(layer, "mem", layer.mem.t().contiguous().t()),
    "mem of float64": lambda layer: setattr(layer, "mem", layer.mem.double()),
    "init_hidden": lambda layer: setattr(layer, "init_hidden", True),
}


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("change", CHANGED)
def test_what_changes_after_a_call_takes_effect(change: str, compiled: bool) -> None:
    """Also in a call that is compiled already."""
    if compiled and change in ("unseen", "its number"):
        pytest.skip("dynamo guards on neither")
    found, x = [], currents(3, 5)
    for layer in leaky_twins(graded_spikes_factor=torch.tensor(0.5), output=True):
        call = layer
        if compiled and isinstance(layer, snnlstm.Leaky):
            call = torch.compile(layer, backend="eager", fullgraph=True)
        for x_t in x[:2]:
            call(x_t)
        CHANGED[change](layer)
        x_t = x[2].clone().requires_grad_()
        spk, mem = call(x_t)
        (grad,) = torch.autograd.grad(spk.sum() + mem.square().sum(), x_t)
        found.append((spk, mem, grad.to(mem.dtype)))
    close(*found, atol=1e-6)


ACTIVE: dict[str, tuple[Any, bool]] = {
    "reference": (lambda: snnlstm.algorithm("reference"), False),
    "forward mode": (torch.autograd.forward_ad.dual_level, False),
    "autocast": (lambda: torch.autocast("cpu"), True),
    "inference": (torch.inference_mode, True),
    "no gradients": (torch.no_grad, True),
    "a dispatch mode": (lambda: FlopCounterMode(display=False), True),
}


@pytest.mark.parametrize("mode", ["vmap", "evaluation", "gradients", *ACTIVE])
def test_what_is_active_after_a_call_takes_effect(mode: str) -> None:
    layer, x = leaky_twins(learn_beta=True)[0], currents(3, 5)
    expected = leaky_twins()[1](x[0], torch.zeros(3, 5))
    for _ in range(2):
        with torch.set_grad_enabled(mode != "gradients"):
            layer(x[0], torch.zeros(3, 5))
    around, is_native = ACTIVE.get(mode, (nullcontext, mode != "vmap"))
    layer.train(mode != "evaluation")
    with around():
        if mode == "vmap":
            out = torch.func.vmap(lambda one: layer(one, torch.zeros(5)))(x[0])
        else:
            out = layer(x[0], torch.zeros(3, 5))
    close([o.detach() for o in out], expected, atol=0)
    assert layer.path.native == is_native, layer.path
    assert out[1].requires_grad == (mode not in ("inference", "no gradients"))


def test_equal_calls_of_equal_layers_need_no_key(monkeypatch: Any) -> None:
    """Also those of a stack, which asks the layer first whether the kernels cover a sequence."""
    layers, x, mem = [leaky_twins()[0] for _ in range(2)], currents(3, 5), torch.zeros(3, 5)
    outer = [leaky_twins()[0] for _ in range(2)]

    def calls() -> None:
        for layer, other in zip(layers, outer, strict=True):
            layer(x[0], mem)
            snnlstm.unroll(x, other)
            assert layer.path.native
            assert other.path.native

    calls()
    calls()  # which goes on from a mem
    monkeypatch.setattr(entry, "key_of", None)
    calls()


# ---- no signal of the last step stays ------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [lambda: leaky_twins(spike_grad=surrogate.atan())[0], ours], ids=["Leaky", "cell"]
)
def test_reset_is_not_kept(make: Any) -> None:
    layer = make()
    x = currents(3, 5)[0] if isinstance(layer, snnlstm.Leaky) else torch.rand(1, 2, 5, 5)
    for _ in range(2):
        with pytest.raises(AttributeError, match=r"mem_reset\(mem\).* before the step"):
            _ = layer.reset
        assert not hasattr(layer, "reset")
        with pytest.raises(AttributeError, match="has no attribute 'resets'"):
            _ = layer.resets
        before = layer(x)[-1]
    layer.reset = x  # as snnTorch's own code does
    assert layer.reset is x
    layer(x)
    assert "reset" not in vars(layer)
    assert torch.equal(layer.mem_reset(before), (before > layer.threshold).float())
    with torch.inference_mode():
        layer(x)
    for duplicate in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert not hasattr(duplicate, "reset")


def test_snntorch_s_own_forward_keeps_reset_until_the_next_call() -> None:
    layer, other = leaky_twins()
    x = currents(3, 5)
    layer.fire = type(layer).fire.__get__(layer)  # a replaced method
    for x_t in x:
        close(layer(x_t), other(x_t), atol=0)
    assert torch.equal(layer.reset, other.reset)
    del layer.fire
    with snnlstm.algorithm("reference"):
        layer(x[0])
    assert not hasattr(layer, "reset")


# ---- building it ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, LEARN, {"reset_mechanism": "zero"}], ids=str)
def test_a_layer_is_built_on_the_device_meta_and_loaded(options: dict[str, Any]) -> None:
    """Large networks are built without memory, which to_empty gives them for a checkpoint."""
    trained, x = snnlstm.Leaky(0.75, threshold=0.5, **options), currents(3, 5)
    with torch.device("meta"):
        built = snnlstm.Leaky(0.9, **options)
    assert {t.device.type for t in (*built.parameters(), *built.buffers())} == {"meta"}
    assert built.state_function.__name__ == trained.state_function.__name__
    layer = built.to_empty(device="cpu")
    layer.load_state_dict(trained.state_dict())
    layer.reset_mem()
    close([layer(x_t) for x_t in x], [trained(x_t) for x_t in x], atol=0, rtol=0)
    assert layer.path == trained.path


REFUSED: dict[str, Any] = {
    "beta": {TypeError: (None, "0.5", torch.tensor(True))},
    "threshold": {TypeError: (None, 1j), ValueError: (torch.zeros(0),)},
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_constructor_names_what_it_refuses(name: str) -> None:
    for error, values in REFUSED[name].items():
        for value in values:
            with pytest.raises(error, match=rf"{name} must .*got"):
                snnlstm.Leaky(**{"beta": 0.5, name: value})
    with pytest.raises(TypeError, match="beta must"):
        snnlstm.Leaky(None)
