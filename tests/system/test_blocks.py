"""Large blocks of memory are used again, are bounded, and are safe between threads."""

import gc
import mmap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import in_threads, measures_memory, ours

import snnlstm
from benchmarks import peak_memory
from snnlstm.native import pool

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _no_free_blocks() -> Iterator[None]:
    snnlstm.empty_cache()
    yield
    snnlstm.empty_cache()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def megabytes(count: int) -> torch.Tensor:
    return pool.empty((count, MIB // 4), torch.float32)


def test_what_it_returns():
    with torch.device("meta"):  # the function ignores torch's default device
        assert pool.empty((3,), torch.float32).device.type == "cpu"
        tensor = pool.empty((3, 5, 2 * MIB), torch.float64)
    assert (tensor.device.type, tensor.dtype) == ("cpu", torch.float64)
    assert tensor.shape == (3, 5, 2 * MIB)
    assert tensor.is_contiguous()
    assert tensor.data_ptr() % 64 == 0  # a cache line
    assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert pool.empty((0,), torch.int64).shape == (0,)


@pytest.mark.parametrize("inference", [False, True])
def test_strided_tensors_are_views_of_nothing(inference):
    with torch.inference_mode(inference):
        tensor = pool.empty_strided((2, 3, 4 * MIB), (3 * MIB * 4, 1, 3), torch.float32)
        assert tensor.stride() == (3 * MIB * 4, 1, 3)
        assert not tensor._is_view()
        assert tensor.is_inference() == inference
        tensor.fill_(7)  # all of it is there


@pytest.mark.parametrize("time_within", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_large_results_are_what_small_ones_are(monkeypatch, channels_last, time_within):
    cell = ours()
    x = torch.rand(4, 3, 2, 200, 300).gt(0.7).float()
    if channels_last:
        x = x.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, (4, 3))
    x = x.transpose(0, 1).contiguous().transpose(0, 1) if time_within else x
    results = []
    for mapped in (1 << 40, pool.SMALLEST):
        monkeypatch.setattr(pool, "MAPPED", mapped)
        cell.reset_mem()
        cell.zero_grad()
        spk, syn, mem = cell(x)
        (spk.sum() + mem.square().sum()).backward()
        results.append((spk, syn, mem, cell.conv.weight.grad.clone()))
    for small, large in zip(*results, strict=True):
        assert torch.equal(small, large)
        assert small.stride() == large.stride()
        assert not large._is_view()


def test_a_block_that_nothing_refers_to_is_used_again():
    first = megabytes(8)
    address, view = first.data_ptr(), first[3:].view(-1)
    del first
    assert megabytes(8).data_ptr() != address, "a view was still there"
    snnlstm.empty_cache()
    del view
    assert pool.free_bytes() == 8 * MIB
    assert megabytes(7).data_ptr() != address
    assert pool.empty((15 * MIB // 2,), torch.uint8).data_ptr() == address


@pytest.mark.filterwarnings("error")
def test_what_is_free_is_bounded_and_the_newest_stays(monkeypatch):
    monkeypatch.setattr(pool, "LIMIT", 20 * MIB)
    blocks = [megabytes(12), megabytes(8), megabytes(8), megabytes(8), megabytes(300)]
    addresses = [block.data_ptr() for block in blocks]
    while blocks:
        del blocks[0]
    assert pool.free_bytes() == 16 * MIB
    newest = megabytes(8)
    assert newest.data_ptr() == addresses[3]
    assert megabytes(8).data_ptr() == addresses[2]
    for workspace in [pool.workspace(2 * MIB) for _ in range(4)]:
        pool.let_go(workspace)
    assert pool.free_bytes() == 16 * MIB
    del newest
    assert pool.free_bytes() == 16 * MIB
    for workspace in [pool.workspace(6 * MIB) for _ in range(4)]:
        pool.let_go(workspace)
    assert pool.free_bytes() == 18 * MIB


def test_calls_one_after_the_other_share_the_largest_workspace(monkeypatch):
    first, at_the_same_time = pool.workspace(500), pool.workspace(500)
    address = first.data_ptr()
    assert address != at_the_same_time.data_ptr()
    pool.let_go(first)
    larger = pool.workspace(5000)
    assert larger.numel() >= 5000
    address = larger.data_ptr()
    pool.let_go(larger)
    assert pool.workspace(500).data_ptr() == address
    pool.let_go(larger)
    monkeypatch.setattr(pool, "LARGEST_WORKSPACE", MIB)
    largest = pool.workspace(MIB + 1)
    assert largest.numel() == MIB + 1
    pool.let_go(largest)
    assert pool.workspace(500).data_ptr() == address, "a large workspace took its place"


def test_threads(monkeypatch):
    monkeypatch.setattr(pool, "LIMIT", 8 * MIB)  # so that all threads drop blocks, too

    def work(number: int) -> None:
        for k in range(200):
            workspace = pool.workspace(20000 * k + 8)
            tensors = [workspace, *(megabytes(1 + k % 3).view(-1) for _ in range(3))]
            for value, tensor in enumerate(tensors, 4 * number):
                tensor[:8] = value
            assert all(bool((t[:8] == v).all()) for v, t in enumerate(tensors, 4 * number))
            pool.let_go(workspace)

    in_threads(work)
    assert 0 < pool.free_bytes() <= 8 * MIB


@measures_memory
@pytest.mark.parametrize("training", [False, True])
def test_threads_that_called_leave_nothing_behind(training):
    cells, x = [ours(2, 32, 3) for _ in range(24)], torch.rand(5, 8, 2, 32, 32)
    called, done = threading.Semaphore(0), threading.Event()

    def call(cell: torch.nn.Module) -> None:
        with torch.set_grad_enabled(training):
            spk, _, mem = cell(x)
        if training:
            (spk.sum() + mem.sum()).backward()
        cell.reset_mem()
        cell.spk = None
        del spk, mem
        called.release()
        done.wait()

    peak_memory.watch()  # gives back what other tests left
    before = resident_bytes()
    threads = [threading.Thread(target=call, args=(cell,), daemon=True) for cell in cells]
    for thread in threads:
        thread.start()
    for _ in threads:
        called.acquire()
    free = pool.free_bytes()
    snnlstm.empty_cache()
    left = resident_bytes() - before
    done.set()
    assert 50 * MIB < free <= pool.LIMIT
    assert pool.free_bytes() == 0
    assert left < 128 * MIB  # torch's small tensors, in malloc's memory of each thread


@pytest.mark.skipif(snnlstm.path._native is None, reason="the core is not built")
def test_calls_hand_their_blocks_on():
    """Training has its gates, and inference its spikes, where the call before had them."""
    cell, x = ours(2, 32, 3), torch.rand(12, 4, 2, 32, 32)
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
    spikes = set()
    for _ in range(4):
        with torch.no_grad():
            spikes.add(cell(x)[0].data_ptr())
        cell.spk = None
    assert len(spikes) == 1
