"""The torch.library operators of the kernels pass torch's checks, and compile."""

import dataclasses
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import snnlstm
from snnlstm import surrogate
from snnlstm.calls.spec import CellSpec
from snnlstm.native import operators
from tests.shared import cases, flat
from tests.shared.cases import Case, wanting_gradients
from tests.shared.cpu_kernels import needs_core
from tests.shared.helpers import close, long, steps, twins, watched
from tests.shared.leaky import F64, RESETS
from tests.shared.table import tagged

pytestmark = [
    needs_core,
    pytest.mark.usefixtures("fresh_compiler"),
]

PLAIN = cases.PLAIN.but(in_channels=2, channels=3, height=6, width=8, record=False)
CASES = tagged("operators") | {
    "no bias": PLAIN.but(bias=False, threshold="number"),
    "float64": PLAIN.but(dtype=torch.float64),
    "channels_last": PLAIN.but(layouts=("channels_last",) * 4),
    "no surrogate": PLAIN.but(surrogate=surrogate.NONE),
}


def test_the_text_of_a_spec_has_every_field():
    """The operators get nothing else of it: what the text forgets, torch.compile would drop."""
    assert set(cases.FIELDS) == {field.name for field in dataclasses.fields(CellSpec) if field.init}
    spec = CellSpec((3, 3))
    for name, value in cases.FIELDS.items():
        other = dataclasses.replace(spec, **{name: value})
        assert other.serialized != spec.serialized
        assert CellSpec.from_text(other.serialized) == other != spec


@pytest.fixture
def calls(monkeypatch):
    """Collects the arguments of calls of the two operators."""
    return [
        watched(monkeypatch, operators, f"_{name}_operator") for name in ("forward", "backward")
    ]


FAST = ("test_schema", "test_autograd_registration", "test_faketensor")
ALL = (*FAST, "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name, calls):
    """torch checks schema, registration, fake kernels and their strides, dynamic shapes."""
    case = CASES[name]
    checks = ALL if name in ("one step", "channels_last") else FAST
    inputs = wanting_gradients(case.inputs())
    call = flat.call_of((*inputs, case.options))
    *out, _ = operators.run_operator(call, case.options.spec, "auto")
    used = [o for o in out if o.requires_grad]
    torch.autograd.backward(used, [torch.randn_like(o) for o in used])
    ((forward, _),), ((backward, _),) = calls
    opcheck(torch.ops.snnlstm.forward.default, forward, test_utils=checks)
    arguments = [a.detach() if isinstance(a, Tensor) else a for a in backward]
    opcheck(torch.ops.snnlstm.backward.default, arguments, test_utils=checks)


def test_no_operator_reads_beyond_tensors_that_do_not_fit_each_other(calls):
    def run(*arguments):
        return operators.run_operator(flat.call_of(arguments), arguments[-1].spec, "auto")[:3]

    step(CASES["one step"], run)
    ((forward, _),), ((backward, _),) = calls
    for operator, arguments, places in (
        (torch.ops.snnlstm.forward, forward, range(7)),
        (torch.ops.snnlstm.backward, backward, (*range(7), -4, -3, -2)),
    ):
        for place in places:
            given, tensor = [*arguments], arguments[place]
            given[place] = torch.stack([tensor, tensor]).flatten(0, min(tensor.dim(), 1))
            with pytest.raises(ValueError, match=r"must fit each|must have shape"):
                operator(*given)


def step(case: Case, run: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Returns the outputs of `run` and all gradients."""
    leaves = wanting_gradients(case.inputs())
    out = run(*leaves, case.options)
    loss = sum((o * o.detach().cos()).sum() for o in out)
    return *out, *torch.autograd.grad(loss, [t for t in leaves if t.requires_grad])


# ---- what has no gradient ------------------------------------------------------------------------


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("time", [0, 3], ids=["step", "sequence"])
def test_only_the_threshold_of_a_cell_is_learned(time: int, reset: str) -> None:
    found = []
    for cell in twins(reset_mechanism=reset, learn_threshold=True):
        cell.conv.requires_grad_(False)
        x = torch.rand(max(time, 1), 1, 2, 5, 5)
        if isinstance(cell, snnlstm.SConv2dLSTM):
            out = cell(x if time else x[0])
        else:
            out = [cell(x_t) for x_t in x][-1]
        found.append([o.requires_grad for o in out])
    assert found[0] == found[1] == [True, time > 0 and reset == "subtract", reset == "subtract"]


@pytest.mark.parametrize(
    ("inner", "reset"),
    [
        *product([None], RESETS),
        ("aot_eager", "zero"),
        *(pytest.param("aot_eager", reset, marks=long) for reset in ("none", "subtract")),
        *(pytest.param("inductor", reset, marks=long) for reset in RESETS),
    ],
)
def test_a_cells_constant_results_have_no_graph_in_any_backend(
    inner: str | None, reset: str
) -> None:
    """Only the threshold is learned, so some states depend on nothing that wants a gradient."""
    graphs: list[str] = []
    found, empty = [], torch.zeros(0, dtype=F64)

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph.code)
        return graph if inner is None else torch._dynamo.lookup_backend(inner)(graph, inputs)

    for compiled in (True, False):
        torch.manual_seed(0)
        cell = snnlstm.SConv2dLSTM(
            2, 3, 3, threshold=0.05, learn_threshold=True, reset_mechanism=reset, dtype=F64
        )
        cell.conv.requires_grad_(False)
        cell.conv.bias.data.fill_(0.4)

        def loop(x: Tensor, cell: Any = cell) -> list[Tensor]:
            out = []
            for x_t in x:
                out += cell(x_t)
            return [*out, *cell(x, empty, empty)]

        call = torch.compile(loop, backend=backend, fullgraph=True)
        out = (call if compiled else loop)(steps(3, 2, 2, 6, 6).double())
        sum((o * o.detach().cos()).sum() for o in out if o.requires_grad).backward()
        found.append(([o.requires_grad for o in out], [*out, cell.threshold.grad]))
    assert found[0][0] == found[1][0]
    close(found[0][1], found[1][1], atol=1e-12)
    assert "detach" not in graphs[0]


@pytest.mark.parametrize("name", tagged("operators"))
def test_a_cells_operator_runs_plainly(name: str) -> None:
    """Without torch's dispatcher it gives equal bits, and records the same gradients."""
    case = tagged("operators")[name]
    found = []
    forward = torch.ops.snnlstm.forward.default
    for operator in (forward, operators.IN_GRAPH[forward]()):
        inputs_ = wanting_gradients(case.inputs())
        call = flat.call_of((*inputs_, case.options))
        given = (*call, f"0|{call.x.dtype}|None|{case.options.spec.serialized}", "auto", True)
        spk, syn, mem, *_ = operator(*given)
        out = [o for o in (spk, syn, mem) if o.requires_grad]
        leaves = [t for t in inputs_ if t is not None and t.requires_grad]
        loss = sum((o * o.detach().cos()).sum() for o in out)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        found.append([*out, *grads])
    close(*found, atol=0, rtol=0)
