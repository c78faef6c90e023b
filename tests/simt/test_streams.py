"""What a backward pass reads is ordered between streams, by autograd's edges alone."""

import pytest
import torch

import snnlstm
from snnlstm.native import cuda
from tests.simt.modes import MODES
from tests.simt.streams import Streams

ALGORITHMS = ["direct", "hybrid", "pointwise"]
TIME = 3


def train(core, algorithm: str, chains: int) -> tuple[Streams, torch.Tensor]:
    """Trains on micro-batches, each a chain of steps. Chain k has its steps on stream k + 1; the
    steps of an only chain are on two streams by turns."""
    cell = snnlstm.SConv2dLSTM(2, 5, 3, threshold=0.1, reset_mechanism="subtract")
    x = torch.rand(chains, TIME, 1, 2, 6, 5)
    streams, losses = Streams(core), []
    with MODES["float32"].running(core), snnlstm.algorithm(algorithm), streams:
        for chain, steps in enumerate(x):
            syn, mem = cell.reset_mem()
            for t, step in enumerate(steps):
                stream = chain + 1 if chains > 1 else t % 2 + 1
                if chains == 1:
                    streams.wait(stream, 3 - stream)  # as a user must, for the states
                with streams.on(stream):
                    spk, syn, mem = cell(step, syn, mem)
                    streams.follow(spk.grad_fn)
                losses.append(spk.sum() + mem.square().sum())
        sum(losses).backward()
    return streams, cell.conv.weight.grad


@pytest.mark.parametrize("chains", [1, 2])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_autograds_edges_order_all_that_is_read(core, algorithm, chains):
    streams, _ = train(core, algorithm, chains)
    assert streams.races == []
    assert streams.backward == {1, 2}


def test_a_state_of_another_stream_is_seen(core, monkeypatch):
    monkeypatch.setattr(Streams, "wait", lambda *_: None)
    streams, _ = train(core, "direct", 1)
    assert any("a kernel on stream 2 reads what stream 1 writes" in race for race in streams.races)


def test_memory_that_is_kept_beside_the_allocator_is_seen(core, monkeypatch):
    """A workspace that all calls share is written to while another stream's kernels read it."""
    kept: dict[int, torch.Tensor] = {}

    def shared(size, device):
        return kept.setdefault(size, torch.empty(size, dtype=torch.uint8, device=device))

    monkeypatch.setattr(cuda, "empty_bytes", shared)
    streams, _ = train(core, "direct", 2)
    assert any(
        "a kernel on stream 2 writes to memory of stream 1" in race for race in streams.races
    )


def test_what_is_handed_over_beside_autograd_is_seen(core, monkeypatch):
    """The last step's backward pass sums the weight gradients that the others have left."""
    torch.manual_seed(0)
    _, expected = train(core, "direct", 2)
    left, backward = [], cuda.Plan.backward

    def beside(*arguments):
        found = backward(*arguments)
        left.append(found.weight)
        last = len(left) == 2 * TIME
        return found._replace(weight=torch.stack(left).sum(0) if last else None)

    monkeypatch.setattr(cuda.Plan, "backward", beside)
    torch.manual_seed(0)
    streams, found = train(core, "direct", 2)
    torch.testing.assert_close(found, expected)  # in one order of several
    assert any("stack on stream" in race for race in streams.races)
