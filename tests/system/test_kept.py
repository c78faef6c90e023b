"""What is kept between calls is bounded, belongs to one cell, and never hides a change.

A cell keeps an entry for each kind of call, like cells share plans, and blocks of memory are used
again.
"""

import gc
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

import snnlstm
from snnlstm.native import pool
from tests.shared.cpu_kernels import native
from tests.shared.helpers import in_threads, measures_memory, ours, same, states, steps

pytestmark = pytest.mark.skipif(native is None, reason="the core is not built")

X, START = steps(1, 2, 2, 6, 7)[0], states(2, 3, 6, 7)
MIB = 1 << 20


def resident_bytes() -> int:
    """Returns the bytes of memory that the process holds."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


CALLS = {
    "a cell": lambda cell, x: cell(x),
    "the functional form": lambda cell, x: snnlstm.functional.sconv2dlstm(
        x, weight=cell.conv.weight, threshold=0.1
    ),
}


@measures_memory
@torch.no_grad()
@pytest.mark.parametrize("name", CALLS)
def test_thousands_of_shapes_take_bounded_memory(name):
    cell, held = ours(1, 1, 1), []
    for batch in range(1, 41):
        for width in range(1, 101):
            CALLS[name](cell, torch.ones(batch, 1, 1, width))
        if batch in (8, 40):
            held.append(resident_bytes())
    assert held[1] - held[0] < 8 * MIB  # 3,200 plans take 24 MiB


def test_eight_threads_that_share_a_cell():
    """They have more shapes than entries are kept."""
    cell, calls = ours(reset_mechanism="subtract"), []
    for k in range(96):
        shape = 1 + k % 2, 3 + k // 2
        x, state = steps(1, shape[0], 2, 5, shape[1])[0], states(shape[0], 3, 5, shape[1])
        calls.append((x, state, ours(reset_mechanism="subtract")(x, *state)))

    def work(thread: int) -> None:
        for _ in range(5):
            for x, state, expected in calls[thread::8]:
                same(cell(x, *state), expected)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        in_threads(work, 8)
    finally:
        sys.setswitchinterval(interval)


# ---- changes between calls ----------------------------------------------------------------------


@contextmanager
def trained(cell):
    cell.requires_grad_(True)
    yield
    cell.requires_grad_(False)


@contextmanager
def doubled(cell):
    """Gives each tensor other memory, and keeps the parameters."""
    for tensor in cell.state_dict(keep_vars=True).values():
        tensor.data = tensor.data.double()
    yield
    for tensor in cell.state_dict(keep_vars=True).values():
        tensor.data = tensor.data.float()


# A dtype of the cell, what changes, and what shows the change.
F32, BF16 = torch.float32, torch.bfloat16
CHANGES = {
    "algorithm": (F32, lambda _: snnlstm.algorithm("winograd"), lambda cell, _: cell.path.name),
    "autocast": (BF16, lambda _: torch.autocast("cpu", BF16), lambda _, mem: mem.dtype),
    "grad mode": (F32, lambda _: torch.enable_grad(), lambda _, mem: mem.requires_grad),
    "requires_grad": (F32, trained, lambda _, mem: mem.requires_grad),
    "dtype": (F32, doubled, lambda _, mem: mem.dtype),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_after_a_call_is_seen_by_the_next(name):
    """The cell then computes what a cell computes that was not called before."""
    dtype, change, shows = CHANGES[name]
    cell, fresh = (ours(2, 3, 3, bias=False).to(dtype) for _ in range(2))
    tensors = [t.to(dtype) for t in (X, *START)]
    if name == "requires_grad":
        cell.requires_grad_(False)

    def run(cell):
        out = cell(*tensors)
        return out, shows(cell, out[2])

    with torch.set_grad_enabled(name != "grad mode"):
        before, shown = run(cell)
        with change(cell), change(fresh):
            out, changed = run(cell)
            same(out, run(fresh)[0])
        assert changed != shown
        out, again = run(cell)
        same(out, before)
        assert again == shown


@pytest.mark.parametrize("which", range(3))
def test_a_tensor_of_another_dtype_is_converted_after_like_ones_were_not(which):
    cell, tensors = ours(), [t.bfloat16().float() for t in (X, *START)]
    expected = cell(*tensors)
    tensors[which] = tensors[which].bfloat16()
    same(cell(*tensors), expected)


def test_a_flag_that_equals_a_bool_is_checked_after_like_ones():
    cell = ours()
    expected = cell(X[None], *START, record=True)
    for flag in (np.True_, 1):
        same(cell(X[None], *START, record=flag), expected)
    with pytest.raises(TypeError, match="record must be a bool"):
        cell(X[None], *START, record=1.0)


@pytest.mark.parametrize("name", ["weight", "bias", "threshold", "graded_spikes_factor", "conv"])
def test_what_is_set_past_nn_module_is_used_also_after_a_like_call(name):
    """Python finds such an attribute before nn.Module finds the parameter of its name."""
    cell, other = ours(), ours(seed=3, threshold=0.05)
    other.graded_spikes_factor.fill_(2)
    cell(X, *START)
    for one, source in ((cell, other), (cell, cell)):
        holder, of = (one.conv, source.conv) if name in ("weight", "bias") else (one, source)
        value = getattr(of, name)
        object.__setattr__(holder, name, value if name == "conv" else value.detach().clone())
        fresh = ours()
        if name in ("weight", "bias"):
            setattr(fresh.conv, name, torch.nn.Parameter(getattr(holder, name)))
        else:
            setattr(fresh, name, getattr(holder, name))
        for _ in range(2):
            same(cell(X, *START), fresh(X, *START))


def test_a_weight_that_gets_another_shape_is_seen():
    cell = ours()
    before = cell(X, *START)
    weight = cell.conv.weight.data
    cell.conv.weight.data = weight[..., :1, :1].clone()
    with pytest.raises(RuntimeError, match="must match the size"):
        cell(X, *START)
    cell.conv.weight.data = weight
    same(cell(X, *START), before)


@torch.no_grad()
@pytest.mark.parametrize("place", ["syn", "mem"])
def test_a_tensor_on_another_device_is_refused_also_after_a_like_call(place):
    cell, given = ours(2, 3, 3), dict(zip(("syn", "mem"), START, strict=True))
    cell(X, **given)
    with pytest.raises(ValueError, match=f"{place} must be on weight's device cpu"):
        cell(X, **given | {place: given[place].to("meta")})


# ---- blocks of memory ---------------------------------------------------------------------------


@pytest.mark.parametrize("time_within", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_large_results_are_what_small_ones_are(monkeypatch, channels_last, time_within):
    """Large ones lie in blocks; they are no views, which autograd treats otherwise."""
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


def megabytes(count: int) -> torch.Tensor:
    return pool.empty((count, MIB // 4), torch.float32)


def test_a_block_is_used_again_when_nothing_refers_to_it():
    snnlstm.empty_cache()
    block = megabytes(8)
    address, view = block.data_ptr(), block[3:].view(-1)
    del block
    assert megabytes(8).data_ptr() != address, "a view was still there"
    snnlstm.empty_cache()
    del view
    assert pool.free_bytes() == 8 * MIB
    assert megabytes(8).data_ptr() == address
