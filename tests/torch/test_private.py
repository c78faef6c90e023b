"""Private functions of torch may change or go: then a cell is slower, and computes the same."""

from typing import Any

import torch

from snnlstm.compat import torch_private
from tests.shared.fresh import fresh
from tests.shared.helpers import ours, same, steps

# What a guard looks at. It reads memory as the first tensor's, so it must look at all of it.
LOOKS = {
    "shape": lambda t: t.shape,
    "strides": lambda t: t.stride(),
    "dtype": lambda t: t.dtype,
    "device": lambda t: t.device,
    "gradient": lambda t: t.requires_grad,
    "subclass": type,
}


def guards(*ignored: str) -> Any:
    """Makes a class like TensorGuards that does not look at everything."""

    class Guards:
        def __init__(self, *tensors: torch.Tensor, **_: Any) -> None:
            self.facts = self.look(tensors)

        def look(self, tensors: Any) -> Any:
            return [[f(t) for name, f in LOOKS.items() if name not in ignored] for t in tensors]

        def check(self, *tensors: torch.Tensor) -> bool:
            return self.look(tensors) == self.facts

    return Guards


def test_torchs_guards_are_used():
    assert torch_private.tells_apart(torch._C._dynamo.guards.TensorGuards)
    assert type(torch_private.guard_of([torch.zeros(2)])).__name__ == "TensorGuards"


def test_guards_that_overlook_a_difference_are_not_used(monkeypatch):
    assert torch_private.tells_apart(guards())
    for name in LOOKS:
        assert not torch_private.tells_apart(guards(name)), name
    for gone in (None, object, lambda *tensors: None):
        assert not torch_private.tells_apart(gone)
    expected, x = ours(), steps(3, 2, 2, 6, 7)
    monkeypatch.setattr(torch_private, "_guards", None)
    assert torch_private.guard_of([x]) is None
    cell = ours()
    for x_t in x:
        same(cell(x_t), expected(x_t))


PROGRAM = """
import functools, sys
import torch

found = functools.reduce
def gone(function, names, *start):
    if HIDDEN and start and start[0] is torch:
        raise AttributeError(names)
    return found(function, names, *start)
functools.reduce = gone
import snnlstm
functools.reduce = found
assert "torch._dynamo" not in sys.modules  # whose import takes seconds

torch.manual_seed(0)
cell = snnlstm.SConv2dLSTM(2, 3, 3, threshold=0.1)
net = snnlstm.Sequential(cell)
x = torch.rand(3, 2, 2, 6, 7)
with snnlstm.spike_rates(net, show=False):
    net(x)[0].sum().backward()
for x_t in x:
    cell(x_t)
cell.detach_hidden()
print(cell.path.native, cell.mem.double().sum().item(), cell.conv.bias.grad.double().sum().item())
"""


def test_a_torch_without_any_of_them_computes_the_same():
    outs = [fresh(f"HIDDEN = {hidden}\n{PROGRAM}") for hidden in (True, False)]
    assert outs[1].stdout, outs[1].stderr
    assert outs[0].stdout == outs[1].stdout
    assert "has no torch._C._current_graph_task_id: a cell does not notice" in outs[0].stderr
    assert not outs[1].stderr
