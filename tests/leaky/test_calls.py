"""What a Leaky recognises, what changes between its calls, and how it is built."""

import copy
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import snntorch
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import snnlstm
from snnlstm import surrogate
from snnlstm.compat import snntorch as compat
from tests.shared.helpers import close, ours
from tests.shared.leaky import F64, LEARN, currents, eighths, leaky_twins

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
    """A surrogate of another release is tried."""
    monkeypatch.setattr(compat, "_agreeing", set())
    monkeypatch.setitem(compat._follow, snntorch.surrogate, False)
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
        patched.setattr(compat, "_agreeing", set())
        patched.setitem(compat._follow, snntorch.surrogate, False)
        layer = leaky_twins()[0]
        layer(x)
        assert layer.path.reason == "the surrogate is not a known one"
    layer(x)
    assert layer.path.native
    torch.compile(layer, backend="eager", fullgraph=True)(x)
    assert layer.path.name == "compiled"


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
    if compiled and change == "its number":
        pytest.skip("dynamo does not guard on it")
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
