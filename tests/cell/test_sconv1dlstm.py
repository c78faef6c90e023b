"""The cell on signals is the cell on images of height 1, with shapes of its own."""

import pytest
import torch
from torch import Tensor, nn

import snnlstm
from tests.shared.helpers import close, same, steps

WITH_STRIDE = {"stride": 2, "dilation": 2, "avg_pool": 2, "bias": False}
LEARNED = {"threshold": torch.tensor([[0.02], [0.05], [0.08]]), "learn_threshold": True}
OPTIONS = ({}, {"max_pool": 2, "reset_mechanism": "subtract", **LEARNED}, WITH_STRIDE)


def signal_cell(*args: object, **kwargs: object) -> snnlstm.SConv1dLSTM:
    """Makes a cell of 2 -> 3 channels with five taps, which spikes."""
    return snnlstm.SConv1dLSTM(*(args or (2, 3, 5)), **{"threshold": 0.05} | kwargs)


def as_images(cell: snnlstm.SConv1dLSTM, **kwargs: object) -> snnlstm.SConv2dLSTM:
    """Makes the cell on images of height 1 that has the same numbers."""
    wide = {name: (1, value) if "pool" in name else value for name, value in kwargs.items()}
    wide |= {name: (1, kwargs[name]) for name in ("stride", "dilation") if name in kwargs}
    wide |= {"threshold": cell.threshold.detach().unsqueeze(-1) if cell.threshold.dim() else 0.05}
    twin = snnlstm.SConv2dLSTM(2, 3, (1, 5), **wide)
    found = cell.state_dict()
    widened = {"conv.weight": found["conv.weight"].unsqueeze(2), "threshold": wide["threshold"]}
    twin.load_state_dict(found | {k: torch.as_tensor(v) for k, v in widened.items()})
    return twin


@pytest.mark.emulator_long
@pytest.mark.parametrize("kwargs", OPTIONS, ids=lambda kwargs: "-".join(kwargs) or "plain")
@pytest.mark.parametrize("batch_first", [False, True], ids=["time-first", "batch-first"])
def test_every_option_does_what_it_does_on_images(backend, kwargs, batch_first):
    cell = signal_cell(**kwargs, batch_first=batch_first)
    twin = as_images(cell, **kwargs, batch_first=batch_first)
    x = steps(3, 2, 2, 13)
    x = x.transpose(0, 1) if batch_first else x
    for record in (False, True):
        found = cell(x, record=record)
        backend.check(cell.path)
        same(found, (t.squeeze(-2) for t in twin(x.unsqueeze(-2), record=record)))
        states_of_twin = (t.squeeze(-2) for t in (twin.syn, twin.mem))
        same((cell.spk, cell.syn, cell.mem), (found[0], *states_of_twin))
    grads = []
    for one, given in ((cell, x), (twin, x.unsqueeze(-2))):
        leaves = [given.requires_grad_(), *one.parameters()]
        loss = sum(out.square().sum() for out in one(given))
        grads.append([grad.flatten() for grad in torch.autograd.grad(loss, leaves)])
    close(*grads, atol=1e-5)
    for state in (cell.syn, cell.mem):
        state.detach_()  # as snnTorch does, which views refuse
    for _ in range(2):
        same(cell(x[0][:, :, :9]), (t.squeeze(-2) for t in twin(x[0][:, :, None, :9])))
        assert torch.equal(cell.mem_reset(cell.mem), twin.mem_reset(twin.mem).squeeze(-2))


class Own(snnlstm.SConv1dLSTM):
    """Foreign code sees signals, as a call does."""

    def fire(self, mem: Tensor) -> Tensor:
        assert mem.dim() == 3
        return super().fire(mem)

    def mem_reset(self, mem: Tensor) -> Tensor:
        assert mem.dim() == 3
        return super().mem_reset(mem)


def test_foreign_methods_and_a_foreign_conv_get_signals():
    torch.manual_seed(0)
    cell, x = Own(2, 3, 5, threshold=0.05, max_pool=2, reset_mechanism="zero"), steps(3, 2, 2, 9)
    torch.manual_seed(0)
    plain_one = signal_cell(max_pool=2, reset_mechanism="zero")
    close(cell(x), plain_one(x))
    close(cell(x[0]), plain_one(x[0]))
    assert cell.path.reason == "fire or mem_reset is overridden"
    plain_one.reset_mem()
    expected = plain_one(x)
    plain_one.reset_mem()
    plain_one.conv = nn.Sequential(plain_one.conv)
    close(plain_one(x), expected)
    assert plain_one.path.reason == "conv is a Sequential, not a plain nn.Conv1d"
