"""Each item of a call's key, and of its guard, tells calls apart that must not share an entry.

A test takes one item away. A call that differs from the one before in this item alone then runs by
the wrong entry, and has another result, path or error than in a cell that was not called before.
"""

from typing import Any

import pytest
import torch

import snnlstm
import snnlstm.dispatch.entry
from snnlstm.calls.keys import BoundedDict
from snnlstm.compat import torch_private
from tests.shared.cpu_kernels import native, needs_core
from tests.shared.helpers import ours, states, steps

pytestmark = needs_core

SYN, MEM = states(2, 3, 6, 7)
GIVEN: dict[str, Any] = {
    "x": steps(3, 2, 2, 6, 7), "syn": SYN, "mem": MEM, "weight": ours().conv.weight.detach(),
    "bias": torch.linspace(-0.5, 0.5, 12), "threshold": torch.tensor([0.1, 0, 0.2]).view(3, 1, 1),
    "graded": torch.tensor(2.0), "lengths": None, "record": False, "grad mode": True,
    "autocast": False, "algorithm": "winograd", "spec": "subtract",
}  # fmt: skip

# The items of a key in their order, by what they are of.
IMAGES = ("shape", "stride", "dtype", "device", "is_neg", "requires_grad")
NUMBERS = ("shape", "dtype", "device", "contiguous", "is_neg", "requires_grad")
ITEMS: dict[str, tuple[str, ...]] = {
    "x": IMAGES, "syn": IMAGES, "mem": IMAGES,
    "weight": ("shape", "dtype", "device", "is_neg", "requires_grad"),
    "bias": NUMBERS, "threshold": NUMBERS, "graded": NUMBERS,
}  # fmt: skip
OTHERS = {
    "record": True, "lengths": torch.tensor([1, 3]), "grad mode": False, "autocast": True,
    "spec": "zero", "algorithm": "direct",
}  # fmt: skip
FLAT = [f"{t}.{item}" for t in ("x", "syn", "mem", "weight") for item in ITEMS[t]]
PLACES = [*FLAT, "bias", "threshold", "graded", "record", "lengths", "grad mode", "autocast"]

# How a tensor becomes one that differs in an item, and has at least the memory of the first one.
CHANGES = {
    "shape": lambda t: t[:1] if t.dim() else torch.stack([t, t, t])[:, None, None],
    "stride": lambda t: t.mT.contiguous().mT,
    "contiguous": lambda t: torch.stack([t, t + 1], -1)[..., 0],
    "dtype": torch.Tensor.double,
    "device": lambda t: t.to("meta"),
    "is_neg": torch._neg_view,
    "requires_grad": lambda t: t.clone().requires_grad_(),
}

# What tells nothing that the rest of a key does not tell.
NEEDLESS = {
    "x.device": "the settings name the backend; two GPUs would be needed to see the number",
    "graded.contiguous": "a single number is contiguous, and others take the reference path",
    "lengths": "the CPU's plans serve calls with and without them; CUDA's do not",
}


def pair(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the arguments of two calls that differ in an item."""
    tensor, _, item = name.partition(".")
    first = GIVEN
    if name in ("grad mode", "autocast"):  # which matter in training
        first = GIVEN | {"weight": GIVEN["weight"].clone().requires_grad_(), "algorithm": "auto"}
    second = first | {tensor: CHANGES[item](GIVEN[tensor]) if item else OTHERS[tensor]}
    # A call that makes no graph although another one could is right; the reverse is not.
    return (second, first) if name == "grad mode" else (first, second)


def outcome(cell: Any, given: dict[str, Any]) -> Any:
    """Returns all that a call of these arguments has, or what it raises."""
    cell.conv._parameters.update(weight=given["weight"], bias=given["bias"])
    cell._buffers.update(threshold=given["threshold"], graded_spikes_factor=given["graded"])
    if cell.reset_mechanism != given["spec"]:
        cell.reset_mechanism = given["spec"]
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=given["autocast"])
    by, keywords = (
        snnlstm.algorithm(given["algorithm"]),
        {k: given[k] for k in ("record", "lengths")},
    )
    try:
        with torch.set_grad_enabled(given["grad mode"]), autocast, by:
            out = cell(*(given[name] for name in ("x", "syn", "mem")), **keywords)
        leaves = [t for t in given.values() if isinstance(t, torch.Tensor) and t.requires_grad]
        grads = torch.autograd.grad(sum(o.sum() for o in out), leaves) if leaves else []
    except Exception as error:
        return str(error)
    facts = [(o.dtype, o.stride(), o.requires_grad) for o in out]
    return cell.path, facts, [t.tolist() for t in (*out, *grads)]


def without(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Takes an item out of the keys of calls; no guard then knows a call."""
    tensor, _, item = name.partition(".")
    key_of, key = snnlstm.dispatch.entry.key_of, snnlstm.dispatch.entry._key

    def less(call: Any) -> Any:
        items = [*key_of(call)]
        if name in PLACES:
            items[PLACES.index(name)] = None
        elif item:  # one of a tensor whose items are a tuple of their own
            at = PLACES.index(tensor)
            items[at] = [
                None if number == item else i for number, i in zip(NUMBERS, items[at], strict=True)
            ]
            items[at] = tuple(items[at])
        assert len(items) == len(PLACES)
        return tuple(items)

    def key_less(*args: Any) -> Any:
        spec, tensors, backend, settings = key(*args)
        spec, settings = None if name == "spec" else spec, None if name == "algorithm" else settings
        return spec, tensors, backend, settings

    monkeypatch.setattr(snnlstm.dispatch.entry, "guard_of", lambda _: None)
    monkeypatch.setattr(snnlstm.dispatch.entry, "key_of", less)
    monkeypatch.setattr(snnlstm.dispatch.entry, "_key", key_less)


def after(first: dict[str, Any], second: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns the outcome of a call after another one, in a table that knows nothing else."""
    monkeypatch.setattr(snnlstm.dispatch.entry, "_entries", BoundedDict())
    cell = ours()
    outcome(cell, first)
    return outcome(cell, second)


@pytest.mark.parametrize("name", [*(f"{t}.{i}" for t in ITEMS for i in ITEMS[t]), *OTHERS])
def test_each_item_of_a_key_is_needed(name, monkeypatch):
    # Autocast changes the path on processors that multiply bfloat16.
    monkeypatch.setattr(torch_private, "multiplies_bfloat16", True)
    monkeypatch.setattr(snnlstm.dispatch.reasons, "_AMX_CHANNELS", 2)
    first, second = pair(name)
    monkeypatch.setattr(snnlstm.dispatch.entry, "_entries", BoundedDict())
    expected = outcome(ours(), second)
    assert after(first, second, monkeypatch) == expected
    without(monkeypatch, name)
    assert (after(first, second, monkeypatch) == expected) == (name in NEEDLESS)


def test_two_backends_of_equal_settings_share_nothing(monkeypatch):
    """Two emulated GPUs have equal settings."""
    cell = ours()
    outcome(cell, GIVEN)
    entry, other = cell._entries[0], type(native.BACKENDS["cpu"])()
    monkeypatch.setitem(native.BACKENDS, "cpu", other)
    outcome(cell, GIVEN)
    assert cell._entries[0] is not entry
    assert cell._entries[0].plan.backend is other


# The items of what a guard knows beside the tensors, and what differs in them.
GUARDED = {"record": "record", "grad mode": "grad mode", "settings": "algorithm", "tensors": ""}
ITEMS = "record", "grad mode", "backend", "settings", "tensors", "autocast"


@pytest.mark.parametrize("name", GUARDED)
def test_each_item_of_a_guard_is_needed(name, monkeypatch):
    first, second = pair(GUARDED[name]) if name != "tensors" else (GIVEN, GIVEN | {"bias": None})
    expected = outcome(ours(), second)
    assert after(first, second, monkeypatch) == expected
    guarded, place = snnlstm.dispatch.entry._guarded, ITEMS.index(name)

    def less(*args: Any) -> tuple[Any, ...]:
        tensors, items = guarded(*args)
        return tensors, (*items[:place], *items[place + 1 :])

    monkeypatch.setattr(snnlstm.dispatch.entry, "_guarded", less)
    assert after(first, second, monkeypatch) != expected
