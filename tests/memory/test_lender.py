"""Blocks of memory are used again, within a bound that holds whatever threads and processes do."""

import gc
import random
import re
import signal
import sys
from contextlib import suppress
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import snnlstm
from snnlstm.native import lender
from snnlstm.networks.layers import stack
from tests.shared.cpu_kernels import needs_core
from tests.shared.helpers import (
    beside,
    forked,
    in_a_process,
    in_threads,
    more_memory,
    ours,
    same,
)

pytestmark = needs_core
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _without_blocks():
    gc.collect()  # blocks of other tests
    snnlstm.empty_cache()
    yield
    snnlstm.empty_cache()


def mebibytes(count: int) -> Tensor:
    return lender.empty((count, MIB), torch.uint8)


def used_bytes() -> int:
    lender._take_back()
    return lender._used_bytes()


# ---- the bound -----------------------------------------------------------------------------------


def test_free_blocks_and_those_in_use_stay_within_the_most_that_were_in_use(monkeypatch):
    monkeypatch.setattr(lender, "SPARE", 8 * MIB)
    before = used_bytes()
    blocks = [mebibytes(8) for _ in range(4)]
    assert lender.free_bytes() == 0
    del blocks
    assert (used_bytes() - before, lender.free_bytes()) == (0, 32 * MIB)
    others = [mebibytes(6)]
    assert lender.free_bytes() == 32 * MIB, "8 MiB may be there beside the most that were in use"
    for count in range(2, 6):
        others.append(mebibytes(6))
        assert used_bytes() - before == count * 6 * MIB
        assert lender.free_bytes() <= (40 - 6 * count) * MIB
    assert lender.free_bytes() == 8 * MIB
    del others
    assert lender.free_bytes() == 38 * MIB


def test_blocks_take_at_most_half_of_the_memory(monkeypatch):
    half = used_bytes() + 20 * MIB
    monkeypatch.setattr(lender, "_memory", lambda: 2 * half)
    blocks = [mebibytes(8) for _ in range(4)]
    assert lender.free_bytes() == 0
    blocks.pop()
    assert lender.free_bytes() == 0, "more than half is in use"
    blocks.clear()
    assert lender.free_bytes() == 16 * MIB


def test_a_block_is_used_again_when_nothing_refers_to_it():
    block = mebibytes(8)
    address, view = block.data_ptr(), block[3:].view(-1)
    del block
    assert mebibytes(8).data_ptr() != address, "a view was still there"
    snnlstm.empty_cache()
    del view
    assert lender.free_bytes() == 8 * MIB
    assert mebibytes(8).data_ptr() == address
    both = [mebibytes(8) for _ in range(2)]
    assert both[0].data_ptr() == address != both[1].data_ptr(), "the block was still in use"


GROUPS = {
    "version 2": ("0::/a/b\n", {"v2/a/b/memory.max": "max", "v2/a/memory.max": "5242880"}),
    "a container": ("0::/../c\n", {"v2/memory.max": "5242880\n"}),
    "version 1": (
        "9:name=systemd:/\n4:memory:/a/b\n3:cpu:/d\n0::/\n",
        {
            "v1/a/b/memory.limit_in_bytes": "5242880",
            "v1/memory.limit_in_bytes": "9223372036854771712",
            "v1/d/memory.limit_in_bytes": "4096",  # another group's
        },
    ),
    "no limit": ("0::/a\n", {"v2/a/memory.max": "max\n"}),
    "no memory there": ("0::/\n", {}),
    "no such line": ("none\n", {}),
}


@pytest.mark.parametrize("name", GROUPS)
def test_the_limit_of_a_control_group_counts(name, tmp_path, monkeypatch):
    text, files = GROUPS[name]
    (tmp_path / "groups").write_text(text)
    for file, limit in files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(limit)
    limits = {
        "": f"{tmp_path}/v2{{}}/memory.max",
        "memory": f"{tmp_path}/v1{{}}/memory.limit_in_bytes",
    }
    monkeypatch.setattr(lender, "LIMITS", {})
    machine = lender._memory.__wrapped__()
    monkeypatch.setattr(lender, "LIMITS", limits)
    monkeypatch.setattr(lender, "GROUPS", tmp_path / "groups")
    limited = "5242880" in "".join(files.values())
    assert lender._memory.__wrapped__() == (5 * MIB if limited else machine)
    monkeypatch.setattr(lender, "GROUPS", tmp_path / "missing")
    assert lender._memory.__wrapped__() == machine


def fresh_lender(monkeypatch: pytest.MonkeyPatch, cache: str) -> ModuleType:
    """Loads the module as a process with this setting does."""
    monkeypatch.setenv("SNNLSTM_CACHE", cache)
    assert lender.__spec__ is not None
    spec = spec_from_file_location("fresh_lender", lender.__spec__.origin)
    assert spec is not None
    spec.loader.exec_module(made := module_from_spec(spec))
    return made


@pytest.mark.parametrize(("cache", "kept"), [("", 6), ("5", 4), ("0", 0)])
def test_the_environment_bounds_what_is_kept(cache, kept, monkeypatch):
    fresh = fresh_lender(monkeypatch, cache)
    blocks = [fresh.empty((2 << 20,), torch.uint8) for _ in range(3)]
    fresh.small.append(fresh.workspace(100))
    del blocks
    assert fresh.free_bytes() == kept * MIB
    assert len(fresh.small) == bool(kept)


@pytest.mark.parametrize("cache", ["much", "-1", "1.5"])
def test_the_environment_must_have_a_number(cache, monkeypatch):
    text = f"SNNLSTM_CACHE must be a whole number of MiB, got '{cache}'"
    with pytest.raises(ValueError, match=text):
        fresh_lender(monkeypatch, cache)


# ---- counting without locks ----------------------------------------------------------------------


def lend_at_random(seed: int, count: int = 300) -> None:
    draw, held = random.Random(seed), []
    for _ in range(count):
        held.append(lender.empty((draw.randrange(256 << 10, 2 << 20),), torch.uint8))
        if len(held) > draw.randrange(1, 9):
            del held[draw.randrange(len(held)) :]


def test_threads_lose_no_count(monkeypatch):
    """At most 8 blocks of 2 MiB are in use in each thread, and all of them come back."""
    before = used_bytes()
    sys.setswitchinterval(1e-6)
    monkeypatch.setattr(lender, "SPARE", 0)
    in_threads(lend_at_random)
    assert used_bytes() == before
    assert lender._most_used <= before + 4 * 9 * 2 * MIB
    lend_at_random(0, 1)  # the last checks of the threads may have been each other's
    assert 0 < lender.free_bytes() <= lender._most_used - before


def test_garbage_collection_while_a_block_comes_back(monkeypatch):
    monkeypatch.setattr(lender, "SPARE", 2 * MIB)
    before, threshold, cycles = used_bytes(), gc.get_threshold(), 0
    gc.set_threshold(1)
    try:
        for cycles in range(200):
            cycle = [mebibytes(1 + cycles % 3)]
            cycle.append(cycle)
            del cycle
            mebibytes(2)
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    assert used_bytes() == before
    assert lender.free_bytes() <= lender._most_used - before + 2 * MIB
    assert lender._most_used <= before + 200 * MIB


@linux
@in_a_process
def test_a_fork_while_other_threads_lend_blocks():
    """What the threads hold at the fork stays in use in the child, and the count does not grow."""

    def counts() -> bool:
        before = used_bytes()
        for seed in range(3):
            lend_at_random(seed, 50)
        return (
            used_bytes() == before <= 3 * 9 * 2 * MIB
            and lender._most_used <= before + 4 * 9 * 2 * MIB
        )

    with beside(lambda: lend_at_random(1, 20), 3):
        found = [forked(counts) for _ in range(8)]
    assert found == [0] * 8, found


class Interrupted(Exception):
    """Comes from the handler of a signal."""


@linux
@in_a_process
def test_errors_of_signal_handlers_are_raised_and_lose_no_block():
    """Python drops what is raised in the callback of a weak reference, so no Python runs there."""
    before, raised, dropped = used_bytes(), [], []
    sys.unraisablehook = dropped.append

    def handler(number, frame):
        raised.append(number)
        raise Interrupted

    signal.signal(signal.SIGALRM, handler)
    for count in range(400):
        with suppress(Interrupted):
            signal.setitimer(signal.ITIMER_REAL, 1e-5 * (1 + count % 60))
            while len(raised) <= count:
                block = mebibytes(1 + count % 3)
                del block
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    assert len(raised) == 400
    assert not dropped
    block = None
    gc.collect()
    assert used_bytes() == before


# ---- what lies in blocks -------------------------------------------------------------------------


TRAINED = {
    "a step": lambda cell, x: cell(x)[-1].sum(),
    "a sequence": lambda cell, x: cell(x)[0].sum(),
    "Leaky": lambda cell, x: snnlstm.Leaky(0.9, threshold=0.2).sequence(x, True, None)[1].sum(),
    "operator": lambda cell, x: torch.compile(cell, fullgraph=True, backend="eager")(x)[0].sum(),
}


@pytest.mark.parametrize("name", TRAINED)
def test_large_gradients_lie_in_blocks(name):
    """They are no views, may be kept, and come back when nothing refers to them."""
    shape = (2, 2, 512, 520) if name == "a step" else (1, 2, 2, 512, 520)  # 4.06 MiB
    x = torch.rand(shape, requires_grad=True)
    TRAINED[name](ours(), x).backward()
    gc.collect()
    grad, x.grad = x.grad, None
    assert grad.isfinite().all()
    assert not grad._is_view()
    assert grad.stride() == x.stride()
    free = lender.free_bytes()
    gc.collect()
    assert lender.free_bytes() == free, "the gradient is still there"
    del grad
    assert lender.free_bytes() - free == 5 * MIB


LAST, FIRST = torch.channels_last, torch.contiguous_format


@pytest.mark.parametrize("layout", [FIRST, LAST])
def test_stacking_in_a_block_equals_torchs_stack(layout):
    torch.manual_seed(0)
    steps = [
        torch.rand(2, 3, 512, 512).to(memory_format=layout).requires_grad_(k < 2) for k in range(3)
    ]
    expected = torch.stack(steps)
    free = lender.free_bytes()
    actual = stack(steps)
    assert type(actual.grad_fn).__name__ == "_StackBackward"
    same([actual], [expected])
    assert actual.stride() == expected.stride()
    assert not actual._is_view()
    weights = torch.rand_like(expected)
    grads = [
        torch.autograd.grad((out.square() * weights).sum(), steps[:2], create_graph=True)
        for out in (actual, expected)
    ]
    same(*grads)
    second = [torch.autograd.grad(one[0].square().sum(), steps[0])[0] for one in grads]
    same(second[:1], second[1:])
    del actual, grads, second
    assert lender.free_bytes() > free
    with torch.no_grad():
        assert not stack(steps).requires_grad


def test_other_stacks_are_left_to_torch():
    """Nothing but numbers is lost: tangents, batches, dtypes, subclasses, and what records."""
    steps = [torch.rand(2, 512, 1024) for _ in range(2)]
    _, tangent = torch.func.jvp(lambda *both: stack(both), tuple(steps), tuple(steps))
    same([tangent], [torch.stack(steps)])
    batched = torch.func.vmap(lambda a, b: stack((a, b)), out_dims=1)(*steps)
    same([batched], [torch.stack(steps)])
    assert stack([steps[0], steps[1].double()]).dtype is torch.float64
    assert stack([steps[0].transpose(1, 2), steps[1].transpose(1, 2)]).is_contiguous()
    assert type(stack([step.as_subclass(Named) for step in steps])) is Named
    traced = torch.jit.trace(lambda a, b: stack((a, b)), tuple(steps), check_trace=False)
    same([traced(steps[1], steps[0])], [torch.stack(steps[::-1])])
    from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual

    with dual_level():
        out = stack([make_dual(step, step) for step in steps])
        same([unpack_dual(out).tangent], [torch.stack(steps)])


class Named(Tensor):
    """Has nothing of its own."""


def test_unroll_stacks_steps_in_a_block():
    net = snnlstm.Sequential(nn.BatchNorm2d(2), nn.Identity())
    x = torch.rand(2, 2, 2, 512, 520)
    out = net(x)
    assert {report.kind for report in net.report} == {"step"}
    torch.testing.assert_close(out, torch.stack([nn.BatchNorm2d(2)(step) for step in x]))
    free = lender.free_bytes()
    del out
    assert lender.free_bytes() - free == 10 * MIB


# ---- memory that runs out ------------------------------------------------------------------------


@linux
@in_a_process
def test_torch_gets_the_memory_of_free_blocks_before_it_fails():
    """Hooks keep x in float64, and torch converts it before the backward pass runs."""
    cell = ours(8, 8, 3, threshold=0.05)
    x = torch.rand(4, 2, 8, 96, 96)
    cell(x)[0].sum().backward()
    cell.reset_mem()
    with saved_tensors_hooks(lambda t: t.double() if t.shape == x.shape else t, lambda t: t):
        loss = cell(x)[0].sum()
    mebibytes(512)
    assert lender.free_bytes() > 500 * MIB
    with more_memory(0):
        loss.backward()
    assert lender.free_bytes() < 500 * MIB
    assert cell.conv.weight.grad.isfinite().all()


def test_errors_of_other_kinds_and_second_ones_are_raised():
    mebibytes(2)
    calls = []

    def failing(error: Exception) -> None:
        calls.append(error)
        raise error

    lacking = RuntimeError("DefaultCPUAllocator: can't allocate memory")
    with pytest.raises(RuntimeError, match="shapes"):
        lender.where_it_fits(failing)(RuntimeError("shapes"))
    assert len(calls) == 1
    assert lender.free_bytes()
    for error in (lacking, MemoryError()):
        mebibytes(2)
        calls.clear()
        with pytest.raises(type(error)):
            lender.where_it_fits(failing)(error)
        assert (len(calls), lender.free_bytes()) == (2, 0)
        with pytest.raises(type(error)):
            lender.where_it_fits(failing)(error)
        assert len(calls) == 3, "nothing was free"


def pages_to_take() -> int:
    """Returns the bytes that the system may take from this process if it must."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"LazyFree: +(\d+)", text)[1]) << 10


@linux
def test_the_system_may_take_the_pages_of_a_free_block():
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("the system does not tell what it may take")
    block, before = mebibytes(8).fill_(1), pages_to_take()
    del block
    assert lender.free_bytes() == 8 * MIB
    assert pages_to_take() - before == 8 * MIB
