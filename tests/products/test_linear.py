"""Linear layers by lists of nonzeros equal torch's to rounding."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from snnlstm import _C
from snnlstm.native import linear as layers
from snnlstm.native.linear import linear
from tests.products.parts import LINEAR, assert_exact, gradients, parameters, spikes
from tests.shared.helpers import close
from tests.shared.poison import NAN, poisoned

pytestmark = pytest.mark.usefixtures("calls")


# ---- results -------------------------------------------------------------------------------------


def compare(x: Tensor, outputs: int) -> None:
    """Asserts that y and the gradients are as exact as torch's."""
    weight, bias = parameters(x.shape[-1], outputs)
    grad = torch.randn(*x.shape[:-1], outputs)
    y, *_, of_weight, _ = assert_exact(LINEAR, x, weight, bias, grad=grad)
    assert not of_weight[:, (x == 0).reshape(-1, x.shape[-1]).all(0)].any()
    with torch.no_grad():
        assert torch.equal(linear(x, weight) + bias, y)


SIZES = [
    ((7,), 1, 5), ((3, 3), 2, 33), ((31,), 7, 1), ((33,), 8, 128), ((2, 4, 5), 9, 129),
    ((64,), 17, 64), ((5,), 31, 263), ((130,), 33, 7), ((), 64, 90), ((257,), 65, 40),
    ((33,), 100, 200), ((129,), 255, 17), ((1, 40), 784, 111), ((1030,), 129, 21),
    ((70,), 1000, 10), ((21,), 5000, 35),
]  # fmt: skip


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_products_are_as_exact_as_torchs(isa, sizes, calls):
    lead, inputs, outputs = sizes
    for density in (0.0, 0.01, 0.1, 0.3, 1.0):
        for kind in ("ones", "numbers", "clustered"):
            compare(spikes((*lead, inputs), density, kind), outputs)
    assert calls.count("lists") == 4 * 15
    assert calls.count("weight") == 2 * 15


def test_rows_of_x_may_lie_apart(calls):
    rows = spikes((40, 90), 0.2, "numbers").requires_grad_()
    compare(rows[:, 30:60], 50)
    assert calls.count("weight") == 2


def test_zeros_of_x_meet_no_weight(isa):
    """Other products have infinities and NaN where they should."""
    x, (weight, bias) = spikes((40, 70), 0.2, "numbers"), parameters(70, 50)
    special = torch.tensor([torch.inf, -torch.inf, torch.nan])
    x[:, 0] = weight.data[:, 1] = x[3:, 2] = 0
    weight.data[:, 0] = special[torch.randint(3, (50,))]
    weight.data[7, 5], x[9, 4], x[2, 11] = torch.inf, torch.nan, torch.inf
    grad = torch.randn(40, 50)
    grad[6, 8] = torch.inf
    y, of_weight, _ = gradients(linear, x, weight, bias, grad=grad)
    met = (x != 0)[:, None]
    expected = torch.where(met, x[:, None] * weight, 0.0).double().sum(2) + bias
    of = torch.where(met, grad[:, :, None] * x[:, None], 0.0).double().sum(0)
    for actual, right in ((y, expected), (of_weight, of)):
        assert right.isnan().any()
        close(actual.double(), right, atol=1e-5)


def test_no_hook_can_make_the_kernel_leave_its_memory():
    """The bits beyond the columns of x count as zeros."""

    def hooked(change: Callable[[Tensor], Tensor]) -> Tensor:
        with saved_tensors_hooks(lambda t: t, lambda t: change(t) if t.dtype == torch.uint8 else t):
            return linear(*LINEAR.tensors)

    x, weight, _ = LINEAR.tensors
    with poisoned(NAN):
        ones = hooked(lambda t: t | 255)
        (of_weight,) = torch.autograd.grad(ones, weight, torch.ones(40, 50))
    assert of_weight.eq(40).all()
    for shape in ((40, 3), (39, 4), (160,)):
        y = hooked(lambda t, shape=shape: t.new_zeros(shape))
        with pytest.raises(RuntimeError, match="must keep its shape"):
            y.sum().backward()


# ---- which calls the kernels take ----------------------------------------------------------------


def test_the_rule_takes_what_pays(monkeypatch):
    monkeypatch.undo()
    ones = torch.ones(128, 784)
    weight, bias = parameters(784, 1000)
    for x, ran in (
        (spikes((128, 784), 0.1), 10), (torch.arange(784) % 2 * ones, "50 % of x is not zero"),
        (ones, "100 % of x is not zero"), (ones[:4] * 0, layers.products.SMALL),
        (ones * 0, 0), (ones[0], layers.products.SMALL),
    ):  # fmt: skip
        for tensors in ((x, weight, bias), (x, weight.detach(), None)):
            assert layers.run(*tensors)[1] == ran or abs(layers.run(*tensors)[1] - ran) <= 1
    # A gradient needs fewer nonzeros, or more rows.
    x = spikes((128, 784), 0.24).requires_grad_()
    assert layers._layer_of(x, weight, bias).lists_gradient is False
    assert layers._layer_of(x, weight[:100], bias[:100]) == "24 % of x is not zero"


def test_what_the_look_misses_is_torchs(monkeypatch, calls):
    monkeypatch.setattr(layers, "MOST_NONZERO", 0.4)
    monkeypatch.setattr(_C, "linear_look", lambda fields: 0.0)
    x, (_, *rest) = spikes((40, 30), 0.6), LINEAR.tensors
    assert layers.run(x, *rest)[1] == layers.products.MISSED
    x.requires_grad_()
    close(*(gradients(f, x, *rest, grad=LINEAR.grad) for f in (linear, F.linear)), atol=1e-5)
    assert "weight" not in calls


# ---- the core ------------------------------------------------------------------------------------

AT = 1 << 20  # of memory that nobody touches
SIZES_REFUSED = (0, 0), (0, 1 << 50), (1, 0), (1, 65_536), (2, 0), (2, 1 << 46), (3, 29), (6, 0)
REFUSED: dict[str, tuple[tuple[int, ...], list[tuple[int, int]]]] = {
    "forward": ((AT, AT, AT, 100, AT, AT, AT), [(4, 0), (7, -1), (8, 0), (10, 0)]),
    "backward": ((AT, AT, AT, AT, AT, AT), [(5, 0), (7, 0), (8, 0)]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_core_refuses_what_would_reach_other_memory(name):
    last, needed = REFUSED[name]
    run, fields = getattr(_C, f"linear_{name}"), (4, 30, 50, 30, *last)
    for place, value in (*SIZES_REFUSED, *needed):
        with pytest.raises((TypeError, ValueError, OverflowError)):
            run((*fields[:place], value, *fields[place + 1 :]))
    with pytest.raises(ValueError, match=f"takes {len(fields)} fields"):
        run((*fields, 0))
    for sizes in ((0, 5), (65_536, 5), (30, 0), (30, 1 << 47)):
        for function, rest in ((_C.linear_bytes, ()), (_C.linear_pack, (AT, AT))):
            with pytest.raises(ValueError):
                function(*sizes, *rest)
    for addresses in ((0, AT), (AT, 0)):
        with pytest.raises(ValueError):
            _C.linear_pack(30, 50, *addresses)
    with pytest.raises(ValueError, match="x must be given"):
        _C.linear_look((4, 30, 50, 30, 0, 0, 0))
