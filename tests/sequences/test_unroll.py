"""snnlstm.unroll and batch_first compute what Sequential does, and folded layers run in chunks."""

import copy

import pytest
import torch
from helpers import close, ours, same_gradients
from snntorch import utils
from test_sequential import NETS, N, T, X, equals_the_loop, hidden, leaky, total
from torch import nn

import snnlstm


@pytest.mark.parametrize("limit", [1, 2000, 20000])
@pytest.mark.parametrize(
    "name", ["a classifier", "pools and shapes", "norms", "nested", "in place"]
)
def test_folded_layers_run_in_chunks_of_steps(name, limit, monkeypatch):
    make, ways = NETS[name]
    monkeypatch.setattr(snnlstm.sequential, "FOLD", limit)
    torch.manual_seed(0)
    net = nn.Sequential(*make())
    equals_the_loop(net, X, ways, atol=1e-5)


def test_a_chunk_holds_as_many_steps_as_its_largest_tensor_allows(monkeypatch):
    sizes = []

    def watched(self, x):
        sizes.append(x.shape[0] // N)
        return torch.cat([x, x], 1)

    layer = nn.ReLU()
    monkeypatch.setattr(nn.ReLU, "forward", watched)
    step = X[0].nbytes * 2  # the bytes of a step of the layer's result
    for limit, expected in (
        (2 * step, [1, 2, 1]),
        (step - 1, [1] * 4),
        (9 * step, [1, 3]),
        (99 * step, [T]),
    ):
        monkeypatch.setattr(snnlstm.sequential, "FOLD", limit)
        sizes.clear()
        close(snnlstm.unroll(X, layer), torch.cat([X, X], 2), atol=0)
        assert sizes == expected


@pytest.mark.parametrize("name", NETS)
def test_unroll_is_sequential_without_a_module_and_batch_first_exchanges_dimensions(name):
    torch.manual_seed(0)
    net = nn.Sequential(*NETS[name][0]())
    one, other = copy.deepcopy(net), snnlstm.Sequential(*copy.deepcopy(net))
    first = snnlstm.Sequential(*net, batch_first=True)
    results = []
    for call in (lambda x: snnlstm.unroll(x, *one), other, lambda x: first(x.transpose(0, 1))):
        torch.manual_seed(5)
        out = call(X)
        results.append(out if isinstance(out, tuple) else (out,))
    close(*results[:2], atol=0, rtol=0)
    exchanged = tuple(item.transpose(0, 1) for item in results[2])
    close(exchanged, results[1], atol=1e-5)
    if any(True for _ in net.parameters()):
        total(exchanged).backward()
        total(results[1]).backward()
        same_gradients(first, other)


def test_batch_first_is_kept_and_shown():
    net = snnlstm.Sequential(hidden(), hidden(3, 2, 3), nn.Flatten(), batch_first=True)
    assert net[:2].batch_first
    assert isinstance(net[0], snnlstm.SConv2dLSTM)
    assert not snnlstm.Sequential(*net)[:2].batch_first
    assert "batch_first=True" in repr(net)
    assert copy.deepcopy(net).batch_first
    assert snnlstm.Sequential.of(nn.Sequential(*net), batch_first=True).batch_first
    x, other = X.transpose(0, 1), copy.deepcopy(net)
    close(net(x), snnlstm.unroll(x, *other, batch_first=True), atol=1e-5)
    with pytest.raises(ValueError, match=r"\(N, T, ...\) with at least one step, got \(3, 0"):
        net(x[:, :0])


class KeepsItsNames(nn.Module):
    """A module has a hand-written forward, and its cells keep states with init_hidden=False."""

    def __init__(self):
        super().__init__()
        self.lstm1, self.lstm2 = ours(max_pool=2), ours(3, 2, 3, seed=1)
        self.lif = leaky()

    def forward(self, x):
        self.lstm1.reset_mem()
        self.lstm2.reset_mem()
        self.lif.reset_mem()
        return snnlstm.unroll(x, self.lstm1, self.lstm2, nn.Flatten(), self.lif)


def test_unroll_in_a_forward_registers_nothing():
    net = KeepsItsNames()
    keys = list(net.state_dict())
    spk, mem = net(X)
    assert list(net.state_dict()) == keys
    assert [name.partition(".")[0] for name, _ in net.named_children()] == ["lstm1", "lstm2", "lif"]
    utils.reset(net)
    one, two, three = net.lstm1, net.lstm2, net.lif
    records = [three(two(one(x)[0])[0].flatten(1)) for x in X]
    close((spk, mem), tuple(map(torch.stack, zip(*records, strict=True))))
