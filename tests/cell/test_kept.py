"""What is kept between calls is found again, and bounded; large results are what small ones are.

test_next_call.py proves that it hides no change.
"""

from typing import Any

import pytest
import torch

import snnlstm
from benchmarks import peak_memory
from snnlstm.calls import entries
from snnlstm.calls.entries import Entry
from snnlstm.compat import torch_private
from snnlstm.native import lender, plan
from tests.loops.compiled import merges
from tests.shared.cpu_kernels import needs_core
from tests.shared.helpers import measures_memory, ours, states, steps

pytestmark = needs_core

START = states(2, 3, 6, 7)


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
        for width in range(1, 61):
            CALLS[name](cell, torch.ones(batch, 1, 1, width))
        if batch in (13, 40):
            held.append(peak_memory.watch())
    assert held[1] - held[0] < 6 << 20  # 1,620 plans take 12 MiB


# ---- what a guard recognises -----------------------------------------------------------------


def counted(monkeypatch: Any) -> dict[str, int]:
    """The calls that a guard recognises from now on, those that need a key, and backward passes."""
    counts = {"recognised": 0, "by key": 0, "backward": 0, "backward, by key": 0}
    serves, key_of, matches = Entry.serves, entries.key_of, plan.matches

    def count(entry: Entry, *call: Any) -> bool:
        served = serves(entry, *call)
        counts["recognised"] += served
        return served

    def count_key(call: Any) -> Any:
        counts["by key"] += 1
        return key_of(call)

    def count_backward(guard: Any, tensors: Any) -> bool:
        found = matches(guard, tensors)
        counts["backward" if found else "backward, by key"] += 1
        return found

    monkeypatch.setattr(Entry, "serves", count)
    monkeypatch.setattr(entries, "key_of", count_key)
    monkeypatch.setattr(plan, "matches", count_backward)
    return counts


SAME = torch.zeros(2, 3, 6, 7), torch.tensor(0.1)
LAYERS: dict[str, Any] = {
    "cell": (lambda: ours(init_hidden=True), lambda cell, x: cell(x)),
    "cell, states in one tensor": (ours, lambda cell, x: cell(x, SAME[0], SAME[0])[0]),
    "Leaky": (lambda: snnlstm.Leaky(0.1, init_hidden=True), lambda lif, x: lif(x)),
    "Leaky, beta is threshold": (
        lambda: snnlstm.Leaky(SAME[1], SAME[1], init_hidden=True),
        lambda lif, x: lif(x),
    ),
    "Leaky, x is mem": (lambda: snnlstm.Leaky(0.1), lambda lif, x: lif(x, x)[0]),
}
MODES = {"training": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


@pytest.mark.skipif(torch_private.guard_of([SAME[1]]) is None, reason="torch has no such guards")
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=merges)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LAYERS)
def test_the_guard_recognises_equal_calls(name, mode, compiled, monkeypatch):
    """The loop begins with a reset, of whose zeros the compiled one makes one tensor."""
    make, call = LAYERS[name]
    entries.table.clear()
    for other in MODES.values():  # whose entries a call of this mode must not find
        with other():
            call(make(), steps(1, 2, 2, 6, 7)[0])
    layer, x = make(), steps(3, 2, 2, 6, 7).requires_grad_(mode == "training")

    def loop(x):
        layer.reset_mem()
        return torch.stack([call(layer, x_t) for x_t in x])

    torch.compiler.reset()
    run = torch.compile(loop, backend="snnlstm") if compiled else loop
    for time in range(4):
        counts = counted(monkeypatch) if time == 3 else {}
        with MODES[mode]():
            out = run(x)
        if mode == "training":
            out.sum().backward()
    merged = compiled and name in ("cell", "Leaky", "Leaky, beta is threshold")
    calls, is_cell = 1 if merged else 3, name.startswith("cell")
    backward = calls if is_cell and mode == "training" else 0
    expected = {"recognised": calls, "by key": 0, "backward": backward, "backward, by key": 0}
    assert counts == expected


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
    for mapped in (1 << 40, lender.SMALLEST):
        monkeypatch.setattr(lender, "MAPPED", mapped)
        cell.reset_mem()
        cell.zero_grad()
        spk, syn, mem = cell(x)
        (spk.sum() + mem.square().sum()).backward()
        results.append((spk, syn, mem, cell.conv.weight.grad.clone()))
    for small, large in zip(*results, strict=True):
        assert torch.equal(small, large)
        assert small.stride() == large.stride()
        assert not large._is_view()
