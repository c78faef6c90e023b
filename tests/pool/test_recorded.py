"""What records a network finds torch's functions in the pools that are ours."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import snnlstm

X = torch.randn(2, 3, 40, 44)


def compiled(net: nn.Module) -> Any:
    graphs: list[Any] = []
    torch._dynamo.reset()
    torch.compile(net, backend=lambda graph, _: graphs.append(graph) or graph.forward)(X)
    return lambda x: graphs[0](x)[0], names(graphs[0])


def names(graph: Any) -> str:
    return " ".join(str(getattr(n.target, "__name__", n.target)) for n in graph.graph.nodes)


def kinds(script: Any) -> str:
    return " ".join(node.kind() for node in script.inlined_graph.nodes())


# Each returns what takes the network's place, and the names of the functions in it.
WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "fx": lambda net: ((made := torch.fx.symbolic_trace(net)), names(made)),
    "make_fx": lambda net: ((made := make_fx(net)(X)), names(made)),
    "export": lambda net: ((made := torch.export.export(net, (X,)).module()), names(made)),
    "compile": compiled,
    "jit.script": lambda net: ((made := torch.jit.script(net)), kinds(made)),
    "jit.trace": lambda net: ((made := torch.jit.trace(net, X)), kinds(made)),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("way", WAYS)
def test_whatever_records_a_pool_finds_torchs_function(way):
    net = nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.ReLU(), nn.AvgPool2d(2, ceil_mode=True))
    expected = net(X)
    snnlstm.accelerate(net)
    made, found = WAYS[way](net)
    assert torch.equal(made(X), expected)
    assert "max_pool2d" in found
    assert "avg_pool2d" in found
    assert "snnlstm" not in found
