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
from tests.shared.cpu_kernels import native, needs_core
from tests.shared.helpers import close, same

if native is not None:
    from snnlstm.native import linear, operators

T, N, K, OUT = 4, 128, 512, 256
X = torch.rand(T, N, K, generator=torch.Generator().manual_seed(0)).lt(0.05).float()


def lif(**options: Any) -> nn.Module:
    return snntorch.Leaky(beta=0.9, threshold=0.3, init_hidden=True, **options)


def networks() -> list[nn.Sequential]:
    """Returns two equal networks."""
    net = nn.Sequential(nn.Linear(K, OUT), lif(), nn.Linear(OUT, 40), lif(output=True))
    return [net, copy.deepcopy(net)]


def loop(net: nn.Module) -> Tensor:
    snnlstm.reset(net)
    return torch.stack([net(x_t)[1] for x_t in X])


def trained(form: Callable[[], Tensor], net: nn.Module) -> list[Tensor]:
    """Returns the outputs of a pass, and the gradients."""
    net.zero_grad()
    out = form()
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in net.parameters())]


@pytest.fixture
def ran(monkeypatch) -> list[Any]:
    """Returns what ran the calls of a test."""
    found: list[Any] = []
    run = linear.run
    monkeypatch.setattr(linear, "run", lambda *args: [out := run(*args), found.append(out[1])][0])
    return found


# ---- accelerate ----------------------------------------------------------------------------------


@needs_core
def test_a_network_trains_alike_and_says_what_ran():
    net, theirs = networks()
    report = snnlstm.accelerate(net)
    assert report.swapped == ("0", "1", "2", "3")
    assert "may flip a spike" in str(report)
    close(*(trained(lambda one=one: loop(one), one) for one in (net, theirs)), atol=1e-5)
    assert str(net[0].path) == "linear by lists of nonzeros (5 % of x is not zero)"
    assert net[0].path.native
    assert list(net.state_dict()) == list(theirs.state_dict())
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    loaded = pickle.loads(pickle.dumps(net)), torch.load(file, weights_only=False)
    for one in (copy.deepcopy(net), *loaded):
        assert type(one[0]) is Linear
        assert one[0].path is None
        assert torch.equal(loop(one), loop(net))
        assert one[0].path.native
    net(torch.rand(N, K))
    assert str(net[0].path) == "torch (100 % of x is not zero)"
    assert not net[0].path.native


def test_products_false_leaves_torchs_by_bits():
    net, theirs = networks()
    report = snnlstm.accelerate(net, products=False)
    assert report.swapped == ("1", "3")
    assert "flip" not in str(report)
    same([loop(net)], [loop(theirs)])
    with pytest.raises(TypeError, match="products must be a bool"):
        snnlstm.accelerate(net, products=None)
    alone = nn.Sequential(nn.Linear(K, OUT), nn.MaxPool2d(2))  # without a neuron
    assert snnlstm.accelerate(alone).swapped == ("1",)


def test_what_may_compute_something_else_stays():
    replaced, plain = nn.Linear(4, 4), nn.Linear(4, 4)
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    del plain.weight
    plain.weight = torch.ones(4, 4)
    owner = "its owner, TransformerEncoderLayer, may read its weight and not call it"
    net = nn.ModuleDict({
        "own": type("Own", (nn.Linear,), {})(4, 4), "plain": plain, "replaced": replaced,
        "normed": parametrizations.weight_norm(nn.Linear(4, 4)), "lif": lif(),
        "attention": nn.MultiheadAttention(8, 2), "layer": nn.TransformerEncoderLayer(8, 2, 16),
        "usual": nn.Linear(8, 8),
    })  # fmt: skip
    report = snnlstm.accelerate(net)
    assert report.swapped == ("lif", "usual")
    for name, reason in {
        "own": "Own is a subclass", "plain": "its weight is no parameter",
        "replaced": Reason.REPLACED, "normed": "ParametrizedLinear is a subclass",
        "attention.out_proj": "subclass", "layer.linear1": owner, "layer.linear2": owner,
    }.items():  # fmt: skip
        assert reason in report.left[name]


RECORDED: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "script": lambda layer, x: torch.jit.script(layer)(x),
    "trace": lambda layer, x: torch.jit.trace(layer, x)(x),
    "export": lambda layer, x: torch.export.export(layer, (x,)).module()(x),
    "compile": lambda layer, x: torch.compile(layer, backend="aot_eager", fullgraph=True)(x),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("way", RECORDED)
def test_whatever_records_a_layer_finds_torchs_function(way):
    layer = Linear(K, OUT)
    close(RECORDED[way](layer, X[0]), F.linear(X[0], layer.weight, layer.bias))


# ---- stacks and compiled loops -------------------------------------------------------------------


@needs_core
@pytest.mark.parametrize("accelerated", [True, False])
def test_stacks_call_it_once_for_all_steps(accelerated, ran):
    net, theirs = networks()
    if accelerated:
        snnlstm.accelerate(net)
    one = snnlstm.Sequential(*net)
    close(one(X)[1], loop(theirs))
    assert one.report[0].reason is Reason.PRODUCT
    assert ran[0] == 5
    assert len(ran) == 2
    assert ("_ran" in net[0].__dict__) == accelerated
    # Other layers would take such long sequences step by step.
    one = snnlstm.Sequential(Linear(1024, 8))
    one(torch.zeros(40, 64, 1024))
    assert one.report[0].kind == "fold"


@merges
@needs_core
def test_compiled_loops_use_the_kernels(ran):
    assert operators.IN_GRAPH[F.linear]() is linear.linear
    net, theirs = networks()
    snnlstm.accelerate(net)
    compiled = torch.compile(lambda: loop(net), backend=BACKEND)
    close(trained(compiled, net), trained(lambda: loop(theirs), theirs), atol=1e-5)
    with torch.no_grad():
        close(compiled(), loop(theirs))
    assert [out for out in ran if out == 5] == [5, 5]
