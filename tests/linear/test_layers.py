"""Linear layers that use the zeros of spikes: who gets them, and what they tell."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import snntorch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import snnlstm
from snnlstm.dispatch.reasons import Reason
from snnlstm.networks.torch_layers import Linear
from tests.loops.compiled import BACKEND, merges
from tests.shared.cpu_kernels import needs_core
from tests.shared.helpers import close

T, N, K, OUT = 4, 128, 512, 256


def spikes(*shape: int, density: float = 0.05) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)).lt(density).float()


X = spikes(T, N, K)


def lif(**options: Any) -> nn.Module:
    return snntorch.Leaky(beta=0.9, threshold=0.3, init_hidden=True, **options)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(K, OUT), lif(), nn.Linear(OUT, 40), lif(output=True))


def loop(net: nn.Module, x: Tensor = X) -> Tensor:
    snnlstm.reset(net)
    return torch.stack([net(x_t)[1] for x_t in x])


def of_kernels(layer: Any) -> bool:
    return "nonzeros" in str(layer.path)


# ---- accelerate ----------------------------------------------------------------------------------


@needs_core
def test_a_network_trains_alike_and_says_what_ran():
    net, theirs = network(), network()
    report = snnlstm.accelerate(net)
    assert report.swapped == ("0", "1", "2", "3")
    assert "may flip a spike" in str(report)
    optimizers = [torch.optim.Adam(one.parameters(), lr=1e-3) for one in (net, theirs)]
    for _ in range(3):
        losses = []
        for one, optimizer in zip((net, theirs), optimizers, strict=True):
            losses.append(loop(one).square().mean())
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        close(*losses)
        assert of_kernels(net[0])
        assert net[0].path.native
        assert str(net[0].path) == "linear by lists of nonzeros (5 % of x is not zero)"
    assert list(net.state_dict()) == list(theirs.state_dict())
    net(torch.rand(N, K))
    assert str(net[0].path) == "torch (100 % of x is not zero)"
    assert not net[0].path.native


def test_products_false_leaves_torchs_by_bits():
    net, theirs = network(), network()
    report = snnlstm.accelerate(net, products=False)
    assert report.swapped == ("1", "3")
    assert "flip" not in str(report)
    assert [type(layer) for layer in (net[0], net[2])] == [nn.Linear] * 2
    ours = net[1], net[3]
    assert all(isinstance(layer, snnlstm.Leaky) for layer in ours)
    assert torch.equal(loop(net), loop(theirs))
    with pytest.raises(TypeError, match="products must be a bool"):
        snnlstm.accelerate(net, products=None)


def test_a_network_without_neurons_keeps_torchs():
    net = nn.Sequential(nn.Linear(K, OUT), nn.ReLU(), nn.MaxPool2d(2))
    assert snnlstm.accelerate(net).swapped == ("2",)


class Own(nn.Linear):
    pass


def replaced() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


def plain_weight() -> nn.Module:
    layer = nn.Linear(4, 4)
    del layer.weight
    layer.weight = torch.ones(4, 4)
    return layer


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a subclass": (lambda: Own(4, 4), "Own is a subclass"),
    "a parametrized one": (
        lambda: parametrizations.weight_norm(nn.Linear(4, 4)), "ParametrizedLinear is a subclass"
    ),
    "a plain weight": (plain_weight, "its weight is no parameter"),
    "a forward of its own": (replaced, Reason.REPLACED),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_may_compute_something_else_stays(name):
    make, reason = LEFT[name]
    net = nn.Sequential(make(), lif())
    kind = type(net[0])
    report = snnlstm.accelerate(net)
    assert report.swapped == ("1",)
    assert reason in report.left["0"]
    assert type(net[0]) is kind


def test_layers_within_torchs_own_stay():
    net = nn.ModuleList(
        [nn.MultiheadAttention(8, 2), nn.TransformerEncoderLayer(8, 2, 16), lif(), nn.Linear(8, 8)]
    )
    report = snnlstm.accelerate(net)
    assert report.swapped == ("2", "3")
    owner = "its owner, TransformerEncoderLayer, may read its weight and not call it"
    assert report.left["1.linear1"] == report.left["1.linear2"] == owner
    assert "subclass" in report.left["0.out_proj"]


# ---- the layer -----------------------------------------------------------------------------------


@needs_core
def test_copies_do_not_say_what_ran():
    net = network()
    snnlstm.accelerate(net)
    loop(net)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    loaded = pickle.loads(pickle.dumps(net)), torch.load(file, weights_only=False)
    for one in (copy.deepcopy(net), *loaded):
        assert type(one[0]) is Linear
        assert one[0].path is None
        close(loop(one), loop(net), atol=0, rtol=0)
        assert of_kernels(one[0])


RECORDED: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "script": lambda layer, x: torch.jit.script(layer)(x),
    "trace": lambda layer, x: torch.jit.trace(layer, x)(x),
    "export": lambda layer, x: torch.export.export(layer, (x,)).module()(x),
    "compile": lambda layer, x: torch.compile(layer, backend="aot_eager", fullgraph=True)(x),
    "vmap": lambda layer, x: torch.func.vmap(layer)(x),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("way", RECORDED)
def test_whatever_records_a_layer_finds_torchs_function(way):
    layer = Linear(K, OUT)
    close(RECORDED[way](layer, X[0]), F.linear(X[0], layer.weight, layer.bias))


@needs_core
def test_autocast_and_the_algorithm_reference_are_torchs():
    layer, theirs = Linear(K, OUT), nn.Linear(K, OUT)
    theirs.load_state_dict(layer.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(X[0]), theirs(X[0]))
    assert "autocast" in layer.path.reason
    with snnlstm.algorithm("reference"):
        assert torch.equal(layer(X[0]), theirs(X[0]))
    layer(X[0])
    assert of_kernels(layer)
    layer.double()(X[0].double())
    assert "float32" in layer.path.reason


# ---- stacks and compiled loops -------------------------------------------------------------------


@needs_core
@pytest.mark.parametrize("accelerated", [True, False])
def test_stacks_call_it_once_for_all_steps(accelerated, monkeypatch):
    net, theirs = network(), network()
    if accelerated:
        snnlstm.accelerate(net)
    one, calls = snnlstm.Sequential(*net), []
    from snnlstm.native import linear

    run = linear.run
    monkeypatch.setattr(linear, "run", lambda x, *rest: calls.append(x.shape) or run(x, *rest))
    snnlstm.reset(net)
    close(one(X)[1], loop(theirs))
    assert one.report[0].reason is Reason.PRODUCT
    assert calls[0] == (T * N, K)
    assert "_ran" not in theirs[0].__dict__


@needs_core
def test_long_sequences_of_our_layer_take_one_call():
    """Steps of 256 KiB and 10 MiB at all steps: other layers would run step by step."""
    layer = Linear(1024, 8)
    one = snnlstm.Sequential(layer)
    one(torch.zeros(40, 64, 1024))
    assert one.report[0].kind == "fold"


@merges
@needs_core
@pytest.mark.parametrize("training", [True, False])
def test_compiled_loops_use_the_kernels(training, monkeypatch):
    from snnlstm.native import linear, operators

    ran, run = [], linear.run
    monkeypatch.setattr(linear, "run", lambda *args: [out := run(*args), ran.append(out[1])][0])
    assert operators.IN_GRAPH[F.linear]() is linear.linear
    net, theirs = network(), network()
    snnlstm.accelerate(net)
    compiled = torch.compile(lambda x: loop(net, x), backend=BACKEND)
    results = []
    for form, one in (compiled, net), (lambda x: loop(theirs, x), theirs):
        with torch.set_grad_enabled(training):
            out = form(X)
        results.append([out.detach()])
        if training:
            out.square().sum().backward()
            results[-1] += [p.grad for p in one.parameters()]
    close(*results, atol=1e-5)
    assert ran[0] == 5
