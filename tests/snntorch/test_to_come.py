"""The cell on signals that is proposed to snnTorch is swapped; a stub has its interface."""

import pytest
import snntorch
import torch
from snntorch import utils
from torch import nn

import snnlstm
from snnlstm import swap
from tests.shared.helpers import close, steps


class Proposed(snntorch.SpikingNeuron):
    """A cell of one dimension with the names of the one that is proposed."""

    gates = "ifog"

    def __init__(self, in_channels, out_channels, kernel_size, bias=True, max_pool=0, avg_pool=0,
                 threshold=1.0, *args, **kwargs):  # fmt: skip
        super().__init__(threshold, *args, **kwargs)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.bias = kernel_size, bias
        self.max_pool, self.avg_pool, self.padding = max_pool, avg_pool, kernel_size // 2
        self.conv = nn.Conv1d(in_channels + out_channels, 4 * out_channels, kernel_size,
                              padding=self.padding, bias=bias)  # fmt: skip
        self.reset_mem()

    def reset_mem(self):
        for name in ("syn", "mem"):
            self.register_buffer(name, torch.zeros(0), persistent=False)
        return self.syn, self.mem

    def forward(self, input_, syn=None, mem=None):
        shape = len(input_), self.out_channels, input_.shape[-1]
        for name, given in (("syn", syn), ("mem", mem)):
            old = getattr(self, name) if given is None else given
            setattr(self, name, old if old.shape == shape else torch.zeros(shape))
        self.reset = self.mem_reset(self.mem)
        gates = self.conv(torch.cat([input_, self.mem], 1)).chunk(4, 1)
        i, f, o, g = (gates[self.gates.index(name)] for name in "ifog")
        self.syn = f.sigmoid() * self.syn + i.sigmoid() * g.tanh()
        self.mem = o.sigmoid() * self.syn.tanh()
        if self.reset_mechanism == "subtract":
            self.mem = self.mem - self.reset * self.threshold
        pooled = nn.functional.max_pool1d(self.mem, self.max_pool) if self.max_pool else self.mem
        self.spk = self.fire(pooled)
        return (self.spk, self.syn, self.mem) if self.output else self.spk


class InAnotherOrder(Proposed):
    gates = "fiog"


class Fails(Proposed):
    def forward(self, input_, syn, mem):
        return super().forward(input_, syn, mem)


def signal_net(kind):
    torch.manual_seed(3)
    common = {"threshold": 0.05, "init_hidden": True}
    return nn.Sequential(
        kind(2, 3, 5, max_pool=2, **common),
        kind(3, 4, 3, reset_mechanism="subtract", learn_threshold=True, output=True, **common),
    )


def test_their_cell_on_signals_is_swapped_both_ways_once_it_exists(monkeypatch):
    monkeypatch.setitem(swap.OURS, Proposed, snnlstm.SConv1dLSTM)
    model, expected = signal_net(Proposed), signal_net(Proposed)
    random, parameters = torch.get_rng_state(), list(model.parameters())
    assert snnlstm.accelerate(model).swapped == ("0", "1")
    assert torch.equal(torch.get_rng_state(), random)
    for net in (model, expected):
        utils.reset(net)
    for step in steps(4, 3, 2, 12):
        outs = model(step), expected(step)
        close(*outs)
        assert outs[1][0].any()
    assert all(type(cell) is snnlstm.SConv1dLSTM and cell.path.native for cell in model)
    pairs = zip(outs, (model, expected), strict=True)
    close(*(torch.autograd.grad(out[0].sum(), list(net.parameters())) for out, net in pairs),
          atol=2e-5)  # fmt: skip
    assert snnlstm.restore(model).swapped == ("0", "1")
    assert all(type(cell) is Proposed for cell in model)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    close(model(steps(1, 3, 2, 12)[0]), expected(steps(1, 3, 2, 12)[0]))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (InAnotherOrder, "it computes other results than our cell"),
        (Fails, "a call raises TypeError: "),
    ],
)
def test_no_cell_on_signals_is_taken_that_computes_something_else(monkeypatch, kind, reason):
    monkeypatch.setitem(swap.OURS, kind, snnlstm.SConv1dLSTM)
    left = snnlstm.accelerate(signal_net(kind)).left
    assert all(said.startswith(reason) for said in left.values())
    assert len(left) == 2
