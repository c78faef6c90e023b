"""The torch.library operators of the kernels pass torch's checks, and compile."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from snnlstm import surrogate
from snnlstm.calls.spec import CellSpec
from snnlstm.native import operators
from tests.shared import cases, flat
from tests.shared.cases import Case, wanting_gradients
from tests.shared.cpu_kernels import needs_core
from tests.shared.helpers import watched
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
