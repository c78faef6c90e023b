"""What is kept between calls is bounded, belongs to one cell, and never hides a change.

A cell keeps an entry for each kind of call. Like cells share plans by one table of the process.
"""

import copy
import gc
import pickle
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from cpu_kernels import native
from helpers import in_threads, measures_memory, ours, same, states, steps

import snnlstm
from snnlstm import path

pytestmark = pytest.mark.skipif(native is None, reason="the core is not built")

X, START = steps(1, 2, 2, 6, 7)[0], states(2, 3, 6, 7)


@pytest.fixture
def made(monkeypatch):
    """Collects the entries that are made."""
    entries, make = [], path._made_entry
    monkeypatch.setattr(path, "_made_entry", lambda *of: entries.append(make(*of)) or entries[-1])
    return entries


@pytest.fixture
def plans(monkeypatch):
    """Gives a test a table of plans of its own; collects the plans that run forward."""
    seen, forward = [], native.cpu.Plan.forward
    monkeypatch.setattr(
        native.cpu.Plan, "forward", lambda plan, *of: seen.append(plan) or forward(plan, *of)
    )
    monkeypatch.setattr(native, "_plans", {})
    return seen


# ---- bounds ----------------------------------------------------------------------------------


def resident() -> int:
    """Returns the bytes of memory that the process holds."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@measures_memory
@torch.no_grad()
def test_ten_thousand_shapes_take_bounded_memory():
    cell, held = ours(1, 1, 1), []
    for batch in range(1, 101):
        for width in range(1, 101):
            cell(torch.ones(batch, 1, 1, width))
            assert len(cell._entries) <= 64
        assert len(native._plans) <= 1024
        if batch in (20, 100):
            held.append(resident())
    assert held[1] - held[0] < 8 << 20  # 8,000 plans take 60 MiB


@torch.no_grad()
def test_tables_of_the_process_are_bounded(monkeypatch):
    for module, name in ((snnlstm.functional, "_entries"), (path, "_inside"), (native, "_plans")):
        monkeypatch.setattr(module, name, {})
    for module in (path, native):
        monkeypatch.setattr(module, "_MOST", 8)
    weight = ours().conv.weight
    for width in range(3, 40):
        x = torch.ones(1, 2, 5, width)
        snnlstm.functional.sconv2dlstm(x, weight=weight)
        snnlstm.functional.sconv2dlstm(
            x.half(), weight=weight.half()
        )  # in float32, by a call within
        for table in (snnlstm.functional._entries, path._inside, native._plans):
            assert 0 < len(table) <= 8


@torch.no_grad()
def test_the_algorithms_of_a_plan_are_bounded(plans):
    """They are told apart by the density of x in hundredths, and by the gain of the weight."""
    cell = ours(4, 3, 3)
    x = torch.zeros(1, 4, 40, 40)
    for k in range(0, x.numel(), 5):
        x.view(-1)[k] = 1
        cell(x, *cell.reset_mem())
    assert len(set(plans)) == 1
    assert len(plans[0]._cores) <= 101


# ---- calls that are like an earlier one -------------------------------------------------------


CALLS = {
    "a cell": lambda cell, x: cell(x, *START),
    "stored states": lambda cell, x: cell(x),
    "a sequence": lambda cell, x: cell(x[None].expand(3, -1, -1, -1, -1), record=True),
    "lengths": lambda cell, x: cell(x[None], lengths=[1, 0]),
    "the functional form": lambda cell, x: snnlstm.functional.sconv2dlstm(
        x, weight=cell.conv.weight, bias=cell.conv.bias
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_like_one_before_are_looked_up(name, made, monkeypatch):
    monkeypatch.setattr(snnlstm.functional, "_entries", {})
    cell = ours()
    for _ in range(3):  # the states before a cell's first call are (0,), those of others no leaves
        CALLS[name](cell, X)
    assert 1 <= len(made) <= 3
    made.clear()
    monkeypatch.setattr(snnlstm.sconv2dlstm, "checked_call", None)  # the cell checks no more
    for _ in range(3):
        CALLS[name](cell, X)
    assert not made


def test_like_cells_share_plans(plans):
    for cell in (ours(), ours(seed=1)):
        cell(X, *START)
    assert len(native._plans) == 1
    assert plans[0] is plans[1]


# ---- copies and threads -------------------------------------------------------------------------


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda cell: pickle.loads(pickle.dumps(cell)),
    "replica": lambda cell: cell._replicate_for_data_parallel(),
}


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("spiking", [True, False])
def test_a_copy_starts_without_entries_and_computes_the_same(name, spiking):
    cell = ours() if spiking else snnlstm.ConvLSTMCell(2, 3, 3)
    start = START if spiking else (START,)
    expected = cell(X, *start)
    before = dict(cell._entries)
    assert before
    other = COPIES[name](cell)
    assert other._entries == {}
    same(other(X, *start), expected)
    other(X[:1])
    assert other._entries
    assert cell._entries == before


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
def another_thread(_):
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    yield
    torch.set_num_threads(before)


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


# A dtype of the cell, what changes, and what shows the change: the plan, or a result.
F32, BF16 = torch.float32, torch.bfloat16
CHANGES = {
    "algorithm": (F32, lambda _: snnlstm.algorithm("direct"), lambda plan, _: plan.algorithm),
    "threads": (F32, another_thread, lambda plan, _: plan.threads),
    "autocast": (BF16, lambda _: torch.autocast("cpu", BF16), lambda _, out: out.dtype),
    "grad mode": (F32, lambda _: torch.enable_grad(), lambda _, out: out.requires_grad),
    "requires_grad": (F32, trained, lambda _, out: out.requires_grad),
    "dtype": (F32, doubled, lambda _, out: out.dtype),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_after_a_call_is_seen_by_the_next(name, plans):
    """The cell then computes what a cell computes that was not called before."""
    dtype, change, shows = CHANGES[name]
    cell, fresh = (ours(2, 3, 3, bias=False).to(dtype) for _ in range(2))
    tensors = [t.to(dtype) for t in (X, *START)]
    if name == "requires_grad":
        cell.requires_grad_(False)

    def run(cell):
        out = cell(*tensors)
        return out, shows(plans[-1], out[2])

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
    cell = ours(2, 3, 3)
    given = dict(zip(("syn", "mem"), START, strict=True))
    cell(X, **given)
    with pytest.raises(ValueError, match=f"{place} must be on weight's device cpu"):
        cell(X, **{**given, place: given[place].to("meta")})
