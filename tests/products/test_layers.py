"""Linear layers and convolutions that use the zeros of spikes: who gets them, what they tell."""

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
from torch.nn.utils.parametrizations import weight_norm

import snnlstm
from snnlstm.dispatch.reasons import Reason
from snnlstm.native import conv2d, linear, operators, products
from snnlstm.networks import torch_layers
from tests.loops.compiled import BACKEND, merges
from tests.products.parts import spikes
from tests.shared.helpers import close, same, watched
from tests.shared.left_to_torch import RECORDS

torch.manual_seed(0)
X = {"Linear": spikes((4, 128, 512), 0.05), "Conv2d": spikes((3, 4, 32, 32, 32), 0.05)}
SIZES = {"Linear": (512, 256), "Conv2d": (32, 48, 3)}
# Tolerances of gradients, and of the results of stacks, beside those of torch's loop.
AS_LOOPS: dict[str, Any] = {"Linear": {"atol": 1e-5}, "Conv2d": {"atol": 1e-4, "rtol": 1e-4}}
AS_STACKS: dict[str, Any] = {"Linear": {}, "Conv2d": {"atol": 1e-5, "rtol": 1e-4}}


@pytest.fixture(params=X)
def name(request: pytest.FixtureRequest) -> str:
    """Runs a test for both classes of layers."""
    return request.param


def layers(name: str, **options: Any) -> tuple[Any, Any]:
    """Returns a layer of ours, and torch's with equal parameters."""
    ours, theirs = (getattr(m, name)(*SIZES[name], **options) for m in (torch_layers, nn))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def lif(**options: Any) -> nn.Module:
    return snntorch.Leaky(beta=0.9, threshold=0.3, init_hidden=True, **options)


def networks(name: str) -> list[nn.Sequential]:
    """Returns two equal networks."""
    if name == "Linear":
        net = nn.Sequential(nn.Linear(512, 256), lif(), nn.Linear(256, 40), lif(output=True))
    else:
        first, last = nn.Conv2d(32, 48, 3, padding=1), nn.Conv2d(48, 8, 3)
        net = nn.Sequential(first, lif(), nn.MaxPool2d(2), last, lif(output=True))
    return [net, copy.deepcopy(net)]


def loop(net: nn.Module, x: Tensor) -> Tensor:
    snnlstm.reset(net)
    return torch.stack([net(x_t)[1] for x_t in x])


def trained(form: Callable[..., Tensor], net: nn.Module, x: Tensor) -> list[Tensor]:
    """Returns the outputs of a pass, and the gradients."""
    net.zero_grad()
    out = form(net, x)
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in net.parameters())]


# ---- accelerate ----------------------------------------------------------------------------------


def test_a_network_trains_alike_and_says_what_ran(name):
    x, (net, theirs) = X[name], networks(name)
    report = snnlstm.accelerate(net)
    assert report.swapped == tuple(map(str, range(len(net))))
    assert "may flip a spike" in str(report)
    pair = net, theirs
    close(*(trained(loop, one, x) for one in pair), **AS_LOOPS[name])
    optimizers = [torch.optim.Adam(one.parameters(), lr=1e-3) for one in pair]
    for _ in range(2):
        for optimizer in optimizers:
            optimizer.step()
        close(*(trained(loop, one, x)[0].square().mean() for one in pair), rtol=1e-4)
    assert str(net[0].path) == f"{name.lower()} by lists of nonzeros (5 % of x is not zero)"
    assert net[0].path.native
    assert list(net.state_dict()) == list(theirs.state_dict())
    net[0](torch.rand_like(x[0]))
    assert str(net[0].path) == "torch (100 % of x is not zero)"
    assert not net[0].path.native


def test_copies_do_not_say_what_ran(name):
    net, _ = networks(name)
    snnlstm.accelerate(net)
    out, file = loop(net, X[name]), io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    loaded = pickle.loads(pickle.dumps(net)), torch.load(file, weights_only=False)
    for one in (copy.deepcopy(net), *loaded):
        assert type(one[0]) is getattr(torch_layers, name)
        assert one[0].path is None
        same(loop(one, X[name]), out)
        assert one[0].path.native


def test_products_false_leaves_torchs_by_bits(name):
    net, theirs = networks(name)
    report = snnlstm.accelerate(net, products=False)
    others = [k for k, one in enumerate(theirs) if type(one) is not type(theirs[0])]
    assert report.swapped == tuple(map(str, others))
    assert "flip" not in str(report)
    same(loop(net, X[name]), loop(theirs, X[name]))
    with pytest.raises(TypeError, match="products must be a bool"):
        snnlstm.accelerate(net, products=None)


def test_a_network_without_neurons_keeps_torchs():
    net = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 4, 3), nn.MaxPool2d(2))
    assert snnlstm.accelerate(net).swapped == ("2",)


def changed(layer: nn.Module, name: str, value: Any) -> nn.Module:
    """Returns the layer with an attribute of its own in the place of a method or a parameter."""
    layer._parameters.pop(name, None)
    setattr(layer, name, value)
    return layer


def test_what_may_compute_something_else_stays():
    identity = lambda x, *_: x  # noqa: E731
    owner = "its owner, TransformerEncoderLayer, may read its weight and not call it"
    left = {
        "own": (type("Own", (nn.Linear,), {})(4, 4), "Own is a subclass"),
        "own2d": (type("Own", (nn.Conv2d,), {})(4, 4, 3), "Own is a subclass"),
        "normed": (weight_norm(nn.Linear(4, 4)), "ParametrizedLinear is a subclass"),
        "normed2d": (weight_norm(nn.Conv2d(4, 4, 3)), "ParametrizedConv2d is a subclass"),
        "plain": (changed(nn.Linear(4, 4), "weight", torch.ones(4, 4)), "weight is no parameter"),
        "replaced": (changed(nn.Linear(4, 4), "forward", identity), Reason.REPLACED),
        "replaced2d": (changed(nn.Conv2d(4, 4, 3), "forward", identity), Reason.REPLACED),
        "within2d": (changed(nn.Conv2d(4, 4, 3), "_conv_forward", identity), Reason.REPLACED),
        "padded2d": (nn.Conv2d(4, 4, 3, padding_mode="reflect"), "padding_mode is 'reflect'"),
        "attention.out_proj": (nn.MultiheadAttention(8, 2), "subclass"),
        "encoder.linear1": (nn.TransformerEncoderLayer(8, 2, 16), owner),
    }
    net = nn.ModuleDict({name.split(".")[0]: layer for name, (layer, _) in left.items()})
    usual = {"lif": lif(), "usual": nn.Linear(8, 8), "usual2d": nn.Conv2d(4, 4, 3)}
    net.update(usual)
    report = snnlstm.accelerate(net)
    assert report.swapped == tuple(usual)
    for name, (_, reason) in left.items():
        assert reason in report.left[name]
    assert owner in report.left["encoder.linear2"]


def test_cells_keep_their_convolution_and_stacks_do_not():
    stack = snnlstm.Sequential(nn.Conv2d(2, 3, 3), nn.Linear(4, 4), lif())
    net = nn.ModuleList([snntorch.SConv2dLSTM(2, 3, 3), stack])
    report = snnlstm.accelerate(net)
    assert report.swapped == ("0", "1.0", "1.1", "1.2")
    assert "0.conv" not in report.left
    assert type(net[0].conv) is nn.Conv2d


# ---- what torch computes -------------------------------------------------------------------------

CIRCULAR = {"padding": 1, "padding_mode": "circular"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "options"), [("Linear", {}), ("Conv2d", {"padding": 1}), ("Conv2d", CIRCULAR)], ids=str
)
@pytest.mark.parametrize("way", RECORDS)
def test_whatever_records_a_layer_finds_torchs_function(way, name, options):
    x, (ours, theirs) = X[name][0], layers(name, **options)
    made, found = RECORDS[way](ours, x)
    close(made(x), theirs(x))
    assert "snnlstm" not in found
    assert any(function in found for function in ("linear", "addmm", "conv"))


@pytest.mark.parametrize("mode", ["circular", "replicate"])
def test_other_paddings_are_torchs(mode):
    ours, theirs = layers("Conv2d", padding=1, padding_mode=mode)
    same(ours(X["Conv2d"][0]), theirs(X["Conv2d"][0]))
    assert mode in ours.path.reason


def test_autocast_and_the_algorithm_reference_are_torchs(name):
    x, (ours, theirs) = X[name][0], layers(name)
    with torch.autocast("cpu", torch.bfloat16):
        same(ours(x), theirs(x))
    assert "autocast" in ours.path.reason
    with snnlstm.algorithm("reference"):
        same(ours(x), theirs(x))
    close(torch.func.vmap(ours)(X[name]), torch.func.vmap(theirs)(X[name]))
    assert "transforms" in ours.path.reason
    ours(x)
    assert ours.path.native
    ours.double()(x.double())
    assert "float32" in ours.path.reason


# ---- stacks and compiled loops -------------------------------------------------------------------


@pytest.fixture
def seen(name, monkeypatch) -> list[Any]:
    """Returns the arguments and results of calls of the class's function."""
    return watched(monkeypatch, {"Linear": linear, "Conv2d": conv2d}[name], "run")


@pytest.mark.parametrize("accelerated", [True, False])
def test_stacks_call_it_once_for_all_steps(name, accelerated, seen):
    net, theirs = networks(name)
    if accelerated:
        snnlstm.accelerate(net)
    stack = snnlstm.Sequential(*net)
    close(stack(X[name])[1], loop(theirs, X[name]), **AS_STACKS[name])
    assert stack.report[0].kind == "fold"
    assert seen[0][1][1] == 5
    assert len(seen) == 2
    assert ("_ran" in net[0].__dict__) == accelerated
    if name == "Linear":  # others take such long sequences step by step
        stack = snnlstm.Sequential(torch_layers.Linear(1024, 8))
        stack(torch.zeros(40, 64, 1024))
        assert stack.report[0].reason is Reason.PRODUCT


@merges
def test_tiles_compute_what_neurons_alone_read(monkeypatch):
    x, seen = spikes(X["Conv2d"].shape, 0.5), watched(monkeypatch, conv2d, "run")
    for behind, algorithm in (
        ([lif()], "Winograd"), ([nn.BatchNorm2d(48), lif()], "Winograd"),
        ([nn.MaxPool2d(2), lif()], None), ([nn.ReLU(), lif()], None), ([], None),
    ):  # fmt: skip
        ours, theirs = layers("Conv2d")
        stack = snnlstm.Sequential(ours, *behind)
        snnlstm.accelerate(stack)
        plain = nn.Sequential(theirs, *copy.deepcopy(behind))
        out = stack(x)
        seen.clear()
        torch.compile(
            lambda x, stack=stack: torch.stack([nn.Sequential.forward(stack, x_t) for x_t in x]),
            backend=BACKEND,
        )(x)
        assert {type(ran) for _, (_, ran) in seen} == {products.ByTiles if algorithm else str}
        assert str(ours.path) == (
            f"conv2d by {algorithm} (49 % of x is not zero)" if algorithm
            else "torch (49 % of x is not zero)"
        )  # fmt: skip
        snnlstm.reset(plain)
        close(out, torch.stack([plain(x_t) for x_t in x]), atol=1e-5)


@merges
def test_compiled_loops_use_the_kernels(name, seen, fresh_compiler):
    assert operators.IN_GRAPH[F.linear]() is linear.linear
    assert operators.IN_GRAPH[F.conv2d]() is conv2d.conv2d
    x, (net, theirs) = X[name], networks(name)
    snnlstm.accelerate(net)
    compiled = torch.compile(loop, backend=BACKEND)
    results = [trained(form, one, x) for form, one in ((compiled, net), (loop, theirs))]
    close(*results, **AS_LOOPS[name])
    with torch.no_grad():
        close(compiled(net, x), loop(theirs, x))
    assert [ran for _, (_, ran) in seen if ran == 5] == [5, 5]
