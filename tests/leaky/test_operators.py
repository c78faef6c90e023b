"""Leaky's operators pass torch's checks, and traces keep them.

test_ways.py compares their results and gradients with snnTorch's layer.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck

import snnlstm
from snnlstm.native import operators
from tests.shared.cases import laid_out
from tests.shared.cpu_kernels import needs_core
from tests.shared.helpers import close, long
from tests.shared.leaky import F64, currents

pytestmark = [needs_core, pytest.mark.usefixtures("fresh_compiler")]

COMPOSITE = torch.ops.snnlstm.leaky.default
IN_GRAPH = operators.IN_GRAPH[COMPOSITE]()
SHAPE = 2, 3, 4, 5
# The shapes of beta and threshold; the last threshold varies in another order than an x does.
PARAMETERS = {
    "numbers": ((), ()), "vectors": ((5,), (3, 1, 1)), "other order": ((2, 3, 4, 5), (2, 1, 4, 1)),
}  # fmt: skip


def arguments(
    *,
    parameters: str = "numbers",
    reset: str = "subtract",
    dtype: torch.dtype = F64,
    sequence: bool = False,
    record: bool = False,
    layout: str = "contiguous",
    mem: tuple[int, ...] = SHAPE,
) -> list[Any]:
    """Makes the arguments of an operator; the first four require a gradient."""
    generator = torch.Generator().manual_seed(0)
    real = F64 if dtype is F64 else torch.float32
    x_shape = (3, *SHAPE) if sequence else SHAPE
    shapes = [x_shape, mem, *PARAMETERS[parameters]]
    tensors = [torch.rand(shape, generator=generator, dtype=F64).to(real) for shape in shapes]
    tensors[0] = laid_out(tensors[0], layout).to(dtype)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    return [*leaves, torch.tensor(0.5, dtype=real), f"{reset} (1, 2.0, 0.0)", sequence, record]


def outcome(operator: Callable[..., Any], given: list[Any]) -> list[Any]:
    """Returns spk, mem and four gradients."""
    out = operator(*given)
    loss = sum((o * o.detach().cos()).sum() for o in out)
    return [*out, *torch.autograd.grad(loss, given[:4])]


FAST = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize(("sequence", "record"), [(False, False), (True, False), (True, True)])
def test_opcheck(sequence: bool, record: bool) -> None:
    for changes in (
        {}, {"mem": (0,)}, {"dtype": torch.float16}, {"layout": "channels_last", "reset": "zero"},
        {"layout": "expanded", "parameters": "vectors"}, {"parameters": "other order"},
    ):  # fmt: skip
        given = arguments(sequence=sequence, record=record, **changes)
        checks = {} if not changes else {"test_utils": FAST}
        opcheck(COMPOSITE, given, **checks)


def test_what_the_kernels_cannot_run_runs_plainly() -> None:
    learned, wider = arguments(), arguments()
    learned[4].requires_grad_()
    wider[0] = torch.rand(SHAPE)  # mem stays float64
    for given in (learned, wider):
        close(IN_GRAPH(*given), COMPOSITE(*given), atol=0)
    on_meta, empty = arguments(), arguments()
    on_meta[:5] = [tensor.detach().to("meta") for tensor in on_meta[:5]]
    assert IN_GRAPH(*on_meta)[0].is_meta
    empty[:2] = (tensor[:0] for tensor in empty[:2])
    close(IN_GRAPH(*empty), COMPOSITE(*empty))


# ---- traces --------------------------------------------------------------------------------------


class Loop(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)
        self.leaky = snnlstm.Leaky(0.8, threshold=0.3, **options)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mem, spks = self.leaky.reset_mem(), []
        for x_t in x:
            spk, mem = self.leaky(self.linear(x_t), mem)
            spks.append(spk)
        return torch.stack(spks), mem


def keeping(graphs: list[list[Any]], inner: Any = None) -> Callable[..., Any]:
    """Returns a backend that notes the nodes of its graphs, and hands these to `inner`."""

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append([*graph.graph.nodes])
        return graph if inner is None else torch._dynamo.lookup_backend(inner)(graph, inputs)

    return backend


def targets(nodes: Any) -> list[Any]:
    return [node.target for node in nodes]


def test_aot_autograd_takes_the_operator_apart() -> None:
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    called: list[Any] = []

    def note(graph: Any, _: Any) -> Any:
        called.extend(targets(graph.graph.nodes))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=note, bw_compiler=note)
    compiled = torch.compile(COMPOSITE, backend=backend, fullgraph=True)
    found = outcome(compiled, arguments(sequence=True))
    close(found, outcome(COMPOSITE, arguments(sequence=True)), atol=1e-12)
    assert called
    assert not any("snnlstm" in str(target) for target in called)


@long
@pytest.mark.parametrize("sequence", [False, True])
def test_inductor_computes_the_same(sequence: bool) -> None:
    compiled = torch.compile(COMPOSITE, backend="inductor", fullgraph=True)
    given = [arguments(sequence=sequence, reset="zero") for _ in range(2)]
    close(outcome(compiled, given[0]), outcome(COMPOSITE, given[1]), atol=1e-12)


NUMBERS: dict[str, Callable[[Any], Any]] = {
    "": lambda layer: None,
    "infinite": lambda layer: setattr(layer, "threshold", torch.tensor(torch.inf)),
    "loaded": lambda layer: layer.load_state_dict(snnlstm.Leaky(0.8, threshold=0.3).state_dict()),
    "loaded, infinite": lambda layer: layer.load_state_dict(
        snnlstm.Leaky(0.8, threshold=torch.inf, reset_mechanism="zero").state_dict()
    ),
    "finite": lambda layer: setattr(layer, "threshold", torch.tensor(0.3)),
    "another reset": lambda layer: setattr(layer, "reset_mechanism", "none"),
}


@pytest.mark.parametrize("delay", [True, False])
def test_numbers_that_a_trace_cannot_read_are_followed(delay: bool) -> None:
    layers = [snnlstm.Leaky(0.8, threshold=0.3, reset_delay=delay) for _ in range(2)]
    compiled, x = torch.compile(layers[0], backend="eager", fullgraph=True), currents(3, 5)[0]
    for name, change in NUMBERS.items():
        found = []
        for layer, call in zip(layers, (compiled, layers[1]), strict=True):
            change(layer)
            found.append(call(x, torch.ones(3, 5)))
            assert not (delay and found[-1][1].isnan().any()), name
        close(*found, atol=1e-6)


def test_the_users_choice_of_plain_torch_is_followed() -> None:
    layer, x, graphs = snnlstm.Leaky(0.8), currents(3, 5)[0], []
    compiled = torch.compile(layer, backend=keeping(graphs), fullgraph=True)
    for name, path in (("auto", "compiled"), ("reference", "reference"), ("auto", "compiled")):
        layer.reset_mem()
        with snnlstm.algorithm(name):
            compiled(x)
        assert layer.path.name == path
    assert [COMPOSITE in targets(graph) for graph in graphs[:2]] == [True, False]


def test_the_path_names_what_ran() -> None:
    """Also where compiled functions of several backends take turns, and none compiles again."""
    net, x = Loop(), currents(3, 5)
    backends = {"snnlstm": "snnlstm", "others": "eager", "a user's": keeping([], "snnlstm")}
    calls = {name: torch.compile(net, backend=backend) for name, backend in backends.items()}
    for name, call in 2 * [*calls.items()]:
        call(x)
        assert net.leaky.path.native == (name != "others")
        reason = "takes the operator apart" if name == "others" else "the native kernels cover"
        assert reason in net.leaky.path.reason
    net.leaky.reset_delay = False
    calls["snnlstm"](x)
    assert net.leaky.path.name == "reference"
