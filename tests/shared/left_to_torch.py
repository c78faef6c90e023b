"""Calls that torch's functions must run, and what records a network."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import snnlstm
from tests.shared.helpers import close

# ---- calls ---------------------------------------------------------------------------------------

Call = Callable[..., Any]  # takes a function and its tensors, x first, and calls the function
Tagged = type("Tagged", (Tensor,), {})


def with_x(change: Callable[[Tensor], Any]) -> Call:
    return lambda f, x, *rest: f(change(x), *rest)


def with_all(change: Callable[[Tensor], Tensor]) -> Call:
    return lambda f, *tensors: f(*map(change, tensors))


def within(context: Callable[[], AbstractContextManager[Any]]) -> Call:
    def call(f: Any, *tensors: Tensor) -> Any:
        with context():
            return f(*tensors)

    return call


def faked(f: Any, *tensors: Tensor) -> Any:
    plain = [t.detach() for t in tensors]
    with FakeTensorMode() as mode:
        return f(*map(mode.from_tensor, plain)).shape


def nested(f: Any, x: Tensor, *rest: Tensor, layout: torch.layout) -> Tensor:
    return f(torch.nested.nested_tensor([x, x], layout=layout), *rest).to_padded_tensor(0.0)


def dual(f: Any, x: Tensor, *rest: Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()), *rest))


def traced(f: Any, x: Tensor, *rest: Tensor) -> str:
    constants = [t.detach() for t in rest]
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)  # a decision looked at sizes
        return kinds(torch.jit.trace(lambda x: f(x, *constants), x, check_trace=False))


class Seen(TorchFunctionMode):
    """Notes the names of torch's functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        self.names.append(function.__name__)
        return function(*args, **kwargs or {})


def last_seen(f: Any, *tensors: Tensor) -> str:
    with Seen() as mode:
        f(*tensors)
    return mode.names[-1]


CALLS: dict[str, Call] = {
    "float16": with_all(Tensor.half),
    "bfloat16": with_all(Tensor.bfloat16),
    "a subclass": with_x(lambda x: x.as_subclass(Tagged)),
    "every other column": with_x(lambda x: x.repeat_interleave(2, -1)[..., ::2]),
    "transposed": with_x(lambda x: x.mT),
    "expanded": with_x(lambda x: x[:1].expand_as(x)),
    "negated": with_x(torch._neg_view),
    "zeros without memory": with_x(lambda x: torch._efficientzerotensor(x.shape)),
    "no sample": with_x(lambda x: x[:0]),
    "nested": partial(nested, layout=torch.strided),
    "jagged": partial(nested, layout=torch.jagged),
    "meta": lambda f, *tensors: f(*(t.to("meta") for t in tensors)).shape,
    "FakeTensorMode": faked,
    "a function mode": last_seen,
    "reference": within(partial(snnlstm.algorithm, "reference")),
    "vmap": lambda f, x, *rest: torch.func.vmap(lambda x: f(x, *rest))(x[None]),
    "grad": lambda f, x, *rest: torch.func.grad(lambda x: f(x, *rest).sum())(x),
    "jvp": lambda f, x, *rest: torch.func.jvp(lambda x: f(x, *rest), (x,), (x.cos(),)),
    "dual": dual,
    "trace": traced,
    # Errors.
    "a number": with_x(Tensor.sum),
    "integers": with_x(Tensor.long),
    "no tensor": with_x(lambda x: [1.0]),
}


def result_of(call: Call, *arguments: Any) -> Any:
    """Returns what a call returns, or the type of the error that it raises, and its text."""
    try:
        return call(*arguments)
    except TypeError as error:  # its text tells how the argument was given
        return type(error)
    except Exception as error:
        return type(error), str(error)


def assert_torchs(call: Call, ours: Any, theirs: Any, *tensors: Tensor) -> None:
    """Asserts that a call has equal bits with both functions, or raises equal errors."""
    actual, expected = (result_of(call, f, *tensors) for f in (ours, theirs))
    assert type(actual) is type(expected)
    if any(isinstance(leaf, Tensor) for leaf in tree_leaves(actual)):
        close(actual, expected, atol=0, rtol=0)
    else:
        assert actual == expected


# ---- records -------------------------------------------------------------------------------------


def names(graph: Any) -> str:
    return " ".join(str(getattr(n.target, "__name__", n.target)) for n in graph.graph.nodes)


def kinds(script: Any) -> str:
    return " ".join(node.kind() for node in script.inlined_graph.nodes())


def compiled(net: nn.Module, x: Tensor) -> Any:
    graphs: list[Any] = []
    torch._dynamo.reset()
    backend = lambda graph, _: graphs.append(graph) or graph.forward  # noqa: E731
    made = torch.compile(net, backend=backend, fullgraph=True)
    made(x)
    return made, names(graphs[0])


# Each returns what takes the network's place, and the names of the functions in it.
RECORDS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "fx": lambda net, x: ((made := torch.fx.symbolic_trace(net)), names(made)),
    "make_fx": lambda net, x: ((made := make_fx(net)(x)), names(made)),
    "export": lambda net, x: ((made := torch.export.export(net, (x,)).module()), names(made)),
    "compile": compiled,
    "jit.script": lambda net, x: ((made := torch.jit.script(net)), kinds(made)),
    "jit.trace": lambda net, x: ((made := torch.jit.trace(net, x)), kinds(made)),
}
