"""Convolutions that use the zeros of spikes: who gets them, and what they tell."""

import copy
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
from snnlstm.networks.torch_layers import Conv2d
from tests.loops.compiled import BACKEND, merges
from tests.shared.cpu_kernels import needs_core
from tests.shared.helpers import close

T, N, CIN, COUT, SIDE = 3, 4, 32, 48, 32


def spikes(*shape: int, density: float = 0.05) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)).lt(density).float()


X = spikes(T, N, CIN, SIDE, SIDE)


def lif(**options: Any) -> nn.Module:
    return snntorch.Leaky(beta=0.9, threshold=0.3, init_hidden=True, **options)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(CIN, COUT, 3, padding=1), lif(), nn.MaxPool2d(2), nn.Conv2d(COUT, 8, 3),
        lif(output=True),
    )  # fmt: skip


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
    assert report.swapped == ("0", "1", "2", "3", "4")
    assert "may flip a spike" in str(report)
    optimizers = [torch.optim.Adam(one.parameters(), lr=1e-3) for one in (net, theirs)]
    for _ in range(3):
        losses = []
        for one, optimizer in zip((net, theirs), optimizers, strict=True):
            losses.append(loop(one).square().mean())
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        close(*losses, rtol=1e-4)
        assert of_kernels(net[0])
    assert str(net[0].path) == "conv2d by lists of nonzeros (5 % of x is not zero)"
    assert list(net.state_dict()) == list(theirs.state_dict())
    with torch.no_grad():
        net[0](torch.rand(N, CIN, SIDE, SIDE))
    assert str(net[0].path) == "torch (100 % of x is not zero)"


def test_products_false_leaves_torchs_by_bits():
    net, theirs = network(), network()
    report = snnlstm.accelerate(net, products=False)
    assert report.swapped == ("1", "2", "4")
    assert "flip" not in str(report)
    assert type(net[0]) is nn.Conv2d
    assert torch.equal(loop(net), loop(theirs))


def test_a_network_without_neurons_keeps_torchs():
    net = nn.Sequential(nn.Conv2d(CIN, COUT, 3), nn.ReLU(), nn.MaxPool2d(2))
    assert snnlstm.accelerate(net).swapped == ("2",)


class Own(nn.Conv2d):
    pass


def replaced(name: str) -> nn.Module:
    layer = nn.Conv2d(4, 4, 3)
    setattr(layer, name, lambda x, *_: x)
    return layer


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a subclass": (lambda: Own(4, 4, 3), "Own is a subclass"),
    "a parametrized one": (
        lambda: parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), "ParametrizedConv2d is a subclass"
    ),
    "a forward of its own": (lambda: replaced("forward"), Reason.REPLACED),
    "a convolution of its own": (lambda: replaced("_conv_forward"), Reason.REPLACED),
    "another padding": (
        lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "padding_mode is 'reflect'"
    ),
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


def test_cells_keep_their_convolution_and_stacks_do_not():
    net = nn.ModuleList([
        snntorch.SConv2dLSTM(2, 3, 3), snnlstm.Sequential(nn.Conv2d(2, 3, 3), lif()),
    ])  # fmt: skip
    report = snnlstm.accelerate(net)
    assert report.swapped == ("0", "1.0", "1.1")
    assert "0.conv" not in report.left
    assert type(net[0].conv) is nn.Conv2d


# ---- the layer -----------------------------------------------------------------------------------


@needs_core
def test_copies_do_not_say_what_ran():
    net = network()
    snnlstm.accelerate(net)
    loop(net)
    for one in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert type(one[0]) is Conv2d
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
@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("way", RECORDED)
def test_whatever_records_a_layer_finds_torchs_function(way, mode):
    layer, theirs = (kind(CIN, 8, 3, 1, 1, padding_mode=mode) for kind in (Conv2d, nn.Conv2d))
    theirs.load_state_dict(layer.state_dict())
    x = X if way == "vmap" else X[0]
    close(RECORDED[way](layer, x), theirs(x.flatten(0, -4)).view(*x.shape[:-3], 8, SIDE, SIDE))


@needs_core
@pytest.mark.parametrize("mode", ["circular", "replicate"])
def test_other_paddings_are_torchs(mode):
    layer, theirs = (kind(CIN, COUT, 3, 1, 1, padding_mode=mode) for kind in (Conv2d, nn.Conv2d))
    theirs.load_state_dict(layer.state_dict())
    close(layer(X[0]), theirs(X[0]), atol=0, rtol=0)


@needs_core
def test_autocast_and_the_algorithm_reference_are_torchs():
    layer, theirs = Conv2d(CIN, COUT, 3), nn.Conv2d(CIN, COUT, 3)
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
def test_stacks_use_the_kernels(accelerated, monkeypatch):
    net, theirs = network(), network()
    if accelerated:
        snnlstm.accelerate(net)
    from snnlstm.native import conv2d

    run, ran = conv2d.run, []
    monkeypatch.setattr(conv2d, "run", lambda *args: [out := run(*args), ran.append(out[1])][0])
    snnlstm.reset(net)
    close(snnlstm.unroll(X, *net)[1], loop(theirs), rtol=1e-4, atol=1e-5)
    assert ran[0] == 5
    assert "_ran" not in theirs[0].__dict__


@merges
@needs_core
@pytest.mark.parametrize("training", [True, False])
def test_compiled_loops_use_the_kernels(training, monkeypatch):
    from snnlstm.native import conv2d, operators

    ran, run = [], conv2d.run
    monkeypatch.setattr(conv2d, "run", lambda *args: [out := run(*args), ran.append(out[1])][0])
    assert operators.IN_GRAPH[F.conv2d]() is conv2d.conv2d
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
    close(*results, atol=1e-3, rtol=1e-3)
    assert ran[0] == 5
