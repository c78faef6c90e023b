"""Large blocks of memory are used again, are kept up to a limit, and are safe between threads."""

import gc
import threading
from collections.abc import Iterator

import pytest
import torch
from helpers import HANG, in_threads

import snnlstm
from snnlstm.native import pool as blocks

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _no_free_blocks() -> Iterator[None]:
    snnlstm.empty_cache()
    yield
    snnlstm.empty_cache()


def megabytes(count: int) -> torch.Tensor:
    return blocks.empty((count, MIB // 4), torch.float32)


def test_what_it_returns():
    with torch.device("meta"):  # the function ignores torch's default device
        assert blocks.empty((3,), torch.float32).device.type == "cpu"
        tensor = blocks.empty((3, 5, 2 * MIB), torch.float64)
    assert tensor.device.type == "cpu"
    assert tensor.shape == (3, 5, 2 * MIB)
    assert tensor.dtype == torch.float64
    assert tensor.is_contiguous()
    assert tensor.data_ptr() % blocks.CACHE_LINE == 0
    assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert blocks.empty((0,), torch.int64).shape == (0,)


def test_strided_tensors_are_views_of_nothing():
    for mode in (False, True):
        with torch.inference_mode(mode):
            made = blocks.empty_strided((2, 3, 4 * MIB), (3 * MIB * 4, 1, 3), torch.float32)
            assert made.stride() == (3 * MIB * 4, 1, 3)
            assert not made._is_view()
            assert made.is_inference() == mode
            made.fill_(7)  # all of it is there
    made = blocks.empty_strided((2, 3), (1, 2), torch.float32).requires_grad_()
    made.mul(2).sum().backward()
    assert made.grad.eq(2).all()


@pytest.mark.parametrize("time_within", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_large_results_lie_in_blocks_and_are_what_small_ones_are(
    monkeypatch, channels_last, time_within
):
    cell = snnlstm.SConv2dLSTM(2, 3, 3, threshold=0.1)
    x = torch.rand(4, 3, 2, 200, 300).gt(0.7).float()
    if channels_last:
        x = x.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, (4, 3))
    x = x.transpose(0, 1).contiguous().transpose(0, 1) if time_within else x
    found = []
    for mapped in (1 << 40, blocks.SMALLEST):
        monkeypatch.setattr(blocks, "MAPPED", mapped)
        cell.reset_mem()
        cell.zero_grad()
        spk, syn, mem = cell(x)
        (spk.sum() + mem.square().sum()).backward()
        found.append((spk, syn, mem, cell.conv.weight.grad.clone()))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()
        assert not other._is_view()
    cell.reset_mem()
    address = found[1][0].untyped_storage().data_ptr()
    del found, spk, syn, mem, one, other
    cell.spk = None
    gc.collect()
    with torch.no_grad():
        assert cell(x)[0].data_ptr() == address


def test_a_block_that_nothing_refers_to_is_used_again():
    first = megabytes(8)
    address, view = first.data_ptr(), first[3:].view(-1)
    del first
    assert megabytes(8).data_ptr() != address, "a view was still there"
    snnlstm.empty_cache()
    del view
    assert megabytes(7).data_ptr() == address


def test_two_tensors_never_share_a_block():
    held = [megabytes(5) for _ in range(4)]
    del held[1:3]
    held += [megabytes(5) for _ in range(3)]
    assert len({tensor.data_ptr() for tensor in held}) == len(held)


def test_small_tensors_are_torch_s_own():
    blocks.empty((blocks.SMALLEST - 1,), torch.uint8)
    assert blocks.free_bytes() == 0


def test_blocks_that_nobody_uses_make_room_for_one_of_another_size(monkeypatch):
    held = [megabytes(8), megabytes(8), megabytes(8)]
    del held
    before = blocks.free_bytes()
    assert before >= 24 * MIB
    monkeypatch.setattr(blocks, "IDLE", float("inf"))
    large = megabytes(16)
    assert blocks.free_bytes() == before, "blocks that were used a moment ago were given back"
    monkeypatch.setattr(blocks, "IDLE", 0.0)
    larger = megabytes(32)
    assert blocks.free_bytes() == 0
    assert large.data_ptr() != larger.data_ptr()


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr(blocks, "KEPT", 20 * MIB)
    held = [megabytes(8) for _ in range(4)]
    del held
    assert 0 < blocks.free_bytes() <= 20 * MIB


def test_threads():
    def work(_: int) -> None:
        for k in range(200):
            tensors = [megabytes(4 + k % 3) for _ in range(3)]
            for number, tensor in enumerate(tensors):
                tensor[0, :8] = number
            assert all(bool((t[0, :8] == n).all()) for n, t in enumerate(tensors))

    in_threads(work)


def test_a_block_may_come_back_in_the_middle_of_a_call():
    """Garbage collection may free a tensor at any point, also while its thread holds the lock."""
    tensor = megabytes(8)
    with blocks._lock:
        del tensor
        assert blocks.free_bytes() == 0, "the list changed while a call held its lock"
    other = megabytes(4)
    assert blocks.free_bytes() >= 8 * MIB
    del other


def test_nobody_waits_for_the_lock():
    """A signal handler may run a cell in the thread that holds the lock."""
    other = threading.Thread(target=megabytes, args=(4,), daemon=True)
    with blocks._lock:
        other.start()
        other.join(HANG)
        assert not other.is_alive()


def test_the_cache_may_be_emptied_in_the_middle_of_a_call():
    """A signal handler may call empty_cache() in the thread that holds the lock."""
    held, kept = megabytes(8), megabytes(4)
    del held
    with blocks._lock:
        snnlstm.empty_cache()
        assert blocks.free_bytes() >= 8 * MIB
    other = megabytes(4)
    assert blocks.free_bytes() == 0
    assert kept.data_ptr() != other.data_ptr()


def test_the_cache_may_be_emptied_while_another_thread_takes_its_workspace(monkeypatch):
    class Emptied(blocks._Workspace):
        """This workspace is empty after each look at it, as if another thread emptied it."""

        @property
        def memory(self) -> torch.Tensor:
            found, self._memory = self._memory, blocks._NOTHING
            return found

        @memory.setter
        def memory(self, value: torch.Tensor) -> None:
            self._memory = value

    monkeypatch.setattr(blocks, "_thread", threading.local())
    blocks._thread.workspace = Emptied()
    for size in (0, 500, 2000):
        blocks._thread.workspace.memory = torch.empty(size, dtype=torch.uint8)
        assert blocks.workspace(1000).numel() >= 1000


def test_training_hands_its_blocks_back():
    cell = snnlstm.SConv2dLSTM(2, 32, 3, threshold=0.1)
    if snnlstm.path._native is None:
        pytest.skip("the core is not built")
    x = torch.rand(12, 4, 2, 32, 32)
    addresses = set()
    for _ in range(4):
        cell.reset_mem()
        spk = cell(x)[0]
        saved = [tensor for tensor in spk.grad_fn.saved_tensors if tensor is not None]
        addresses.add(max(saved, key=lambda tensor: tensor.nbytes).data_ptr())
        del saved
        spk.sum().backward()
        cell.reset_mem()
        del spk
        gc.collect()
    assert len(addresses) == 1
