"""Cells work with forks, signals, workers of a DataLoader, and memory that runs out."""

import signal
import sys

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import snnlstm
from tests.shared.cpu_kernels import needs_core
from tests.shared.helpers import beside, forked, in_a_process, long, more_memory, ours

pytestmark = [
    needs_core,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux"),
]


def made() -> tuple[snnlstm.SConv2dLSTM, torch.Tensor, torch.Tensor]:
    """Makes a cell, x, and an x whose states lie in blocks, and not in malloc's memory."""
    return ours(2, 8, 3, threshold=0.05), torch.rand(3, 2, 2, 20, 20), torch.rand(2, 2, 2, 96, 96)


def train(cell, x) -> float:
    syn = mem = torch.zeros(0)
    total = 0
    for step in x:
        spk, syn, mem = cell(step, syn, mem)
        total = total + spk.sum() + mem.square().sum()
    total.backward()
    return total.item()


@in_a_process
def test_a_fork_while_another_thread_runs_a_cell():
    """A lock that the other thread held at the fork would never be released in the child."""
    (cell, x, big), (busy, *_) = made(), made()
    expected = train(cell, x)

    def work():
        train(busy, big)
        busy.conv.weight.data.mul_(0.999)  # so that the weight is packed anew

    def child():
        return train(cell, x) == expected and train(busy, big) is not None

    with beside(work):
        found = [forked(child) for _ in range(8)]
    assert found == [0] * 8, found


@in_a_process
def test_a_signal_handler_that_calls_the_cell_which_is_running():
    cell, _, big = made()
    expected, seen = train(cell, big), []

    def handler(number, frame):
        with torch.enable_grad():  # it is off where the handler interrupts a forward pass
            seen.append(train(cell, big))
        snnlstm.set_algorithm("auto")
        if len(seen) % 5 == 0:
            snnlstm.empty_cache()
        signal.setitimer(signal.ITIMER_REAL, 0.0007 * (1 + len(seen) % 40))

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.001)
    while len(seen) < 40:
        assert train(cell, big) == expected
        if len(seen) % 3 == 0:
            cell.conv.weight.data.mul_(1.0)
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    assert set(seen) == {expected}, seen


class Encoded(Dataset):
    def __init__(self):
        self.cell = made()[0]

    def __len__(self):
        return 12

    def __getitem__(self, k):
        self.cell.reset_mem()
        with torch.no_grad():
            return self.cell(torch.full((4, 1, 2, 9, 9), 1.0 + k))[2]


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=long)])
@in_a_process
def test_cells_in_the_workers_of_a_data_loader(start):
    """A forked worker has no threads of its own, and torch sets one thread for it."""
    data = Encoded()
    train(data.cell, made()[1])
    expected = torch.stack([data[k] for k in range(12)])
    loader = DataLoader(data, 4, num_workers=1, multiprocessing_context=start)
    assert torch.equal(torch.cat(list(loader)), expected)


@in_a_process
def test_memory_that_runs_out_leaves_state_and_weights_as_they_were():
    cell = ours(2, 16, 3, threshold=0.05)
    cell(torch.rand(2, 2, 2, 64, 64))[0].sum().backward()
    kept = [*cell.parameters(), cell.syn, cell.mem]
    copies = [t.detach().clone() for t in kept]
    long = torch.rand(400, 2, 2, 64, 64)
    snnlstm.empty_cache()
    with more_memory(100 << 20), pytest.raises((MemoryError, RuntimeError)):
        cell(long)
    assert cell.syn is kept[-2]
    assert cell.mem is kept[-1]
    assert all(map(torch.equal, kept, copies))
    cell.reset_mem()
    cell.zero_grad()
    cell(torch.rand(5, 2, 2, 64, 64))[0].sum().backward()
    assert cell.conv.weight.grad.isfinite().all()


@long
@in_a_process
def test_a_pass_under_compiled_autograd():
    """In a fresh process nothing is known of the kernels yet, and sizes change."""
    from torch._dynamo import compiled_autograd

    cell, x, _ = made()
    compiled = torch.compile(backend="eager", dynamic=True)
    for side in (20, 9):
        grads = []
        for enabled in (True, False):
            cell.zero_grad()
            loss = sum(out.sum() for out in cell(x[0, ..., :side, :]))
            with compiled_autograd._enable(compiled) if enabled else torch.enable_grad():
                loss.backward()
            grads.append(cell.conv.weight.grad.clone())
            cell.reset_mem()
        torch.testing.assert_close(*grads)
