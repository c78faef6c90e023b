"""A call after others gives what it gives in a new process that has run no other call.

A cell or Leaky keeps how its last two kinds of calls run, and the process keeps more kinds. A test
has pairs of calls that differ in one property which is no number: if that were forgotten, one would
run as the other one does, with another result, path or error. Each expectation is a process's own.
"""

import gc
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch._dynamo  # some calls import it, which takes seconds in each process
from torch import Tensor

import snnlstm
from snnlstm.compat import torch_private
from tests.shared.cpu_kernels import ISAS, Kernels, needs_core, use
from tests.shared.helpers import in_a_process, ours, same, states, steps
from tests.shared.leaky import currents

pytestmark = [
    needs_core,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks"),
]


class Tagged(Tensor):
    """Has nothing of its own."""


# How a tensor becomes one that differs in a property, and has at least the memory of the first one.
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "shape": lambda t: t[:1] if t.dim() else torch.stack([t, t, t])[:, None, None],
    "strides": lambda t: (
        torch.stack([t, t + 1], -1)[..., 0] if t.dim() < 4 else t.mT.contiguous().mT
    ),
    "dtype": Tensor.double,
    "device": lambda t: t.to("meta"),
    "sign": torch._neg_view,
    "gradient": lambda t: t.clone().requires_grad_(),
    "subclass": lambda t: t.as_subclass(Tagged),
}
SETTINGS: dict[str, Any] = {
    "grad mode": True, "autocast": False, "algorithm": "winograd", "threads": 1, "isa": ISAS[-1:],
    "reset": "subtract",
}  # fmt: skip
OTHER_SETTINGS: dict[str, Any] = {
    "grad mode": False, "autocast": True, "algorithm": "direct", "threads": 2, "isa": ISAS[:1],
    "reset": "zero",
}  # fmt: skip


class Subject(NamedTuple):
    """This makes layers that are called, with these arguments and tensors of the layer."""

    make: Callable[[], Any]
    call: Callable[[Any, dict[str, Any]], Any]
    given: dict[str, Any]
    others: dict[str, Any]  # changes of single arguments that are no tensors


# ---- a cell --------------------------------------------------------------------------------------


def call_cell(cell: Any, given: dict[str, Any]) -> Any:
    cell.conv._parameters.update(weight=given["weight"], bias=given["bias"])
    cell._buffers.update(threshold=given["threshold"], graded_spikes_factor=given["graded"])
    if cell.reset_mechanism != given["reset"]:
        cell.reset_mechanism = given["reset"]
    return cell(
        given["x"], given["syn"], given["mem"], record=given["record"], lengths=given["lengths"]
    )


def of_cell(x: Tensor, **others: Any) -> Subject:
    syn, mem = states(2, 3, 6, 7)
    weight = ours(x.shape[-3], 3, 3).conv.weight.detach()
    given = {
        "x": x, "syn": syn, "mem": mem, "weight": weight, "bias": torch.linspace(-0.5, 0.5, 12),
        "threshold": torch.tensor([0.1, 0, 0.2]).view(3, 1, 1), "graded": torch.tensor(2.0),
        "lengths": None, "record": False,
    }  # fmt: skip
    return Subject(
        lambda: ours(x.shape[-3], 3, 3), call_cell, given | SETTINGS, {"bias": None} | others
    )


# ---- a Leaky -------------------------------------------------------------------------------------


def call_leaky(leaky: Any, given: dict[str, Any]) -> Any:
    names = "beta", "threshold", "graded_spikes_factor"
    leaky._buffers.update({name: given[name] for name in names})
    if leaky.reset_mechanism != given["reset"]:
        leaky.reset_mechanism = given["reset"]
    if given["whole"]:
        leaky.mem = given["mem"]
        return snnlstm.unroll(given["x"], leaky)
    return leaky(given["x"][0], given["mem"])


def of_leaky(whole: bool) -> Subject:
    given = {
        "x": currents(2, 3, 6, 7), "mem": currents(2, 3, 6, 7)[1], "whole": whole,
        "beta": torch.tensor([0.3, 0.6, 0.9]).view(3, 1, 1),
        "threshold": torch.tensor([0.1, 0, 0.2]).view(3, 1, 1),
        "graded_spikes_factor": torch.tensor(2.0),
    }  # fmt: skip
    return Subject(
        lambda: snnlstm.Leaky(0.8, threshold=0.3),
        call_leaky,
        given | SETTINGS,
        {"whole": not whole},
    )


X = steps(3, 2, 2, 6, 7)
RECORDS = {"record": True, "lengths": torch.tensor([1, 3])}
SUBJECTS = {
    "step of 32 channels": of_cell(steps(1, 2, 32, 6, 7)[0], record=True),  # autocast matters
    "sequence": of_cell(X, **RECORDS),
    "Leaky": of_leaky(False),
    "sequence of Leaky": of_leaky(True),
}


# ---- calls ---------------------------------------------------------------------------------------


def outcome(subject: Subject, layer: Any, given: dict[str, Any]) -> Any:
    """Returns all that a call of these arguments has, or what it raises."""
    torch.set_num_threads(given["threads"])
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=given["autocast"])
    try:
        for _ in use(Kernels(*given["isa"], given["algorithm"])):
            with torch.set_grad_enabled(given["grad mode"]), autocast:
                out = subject.call(layer, given)
        leaves = [t for t in given.values() if isinstance(t, Tensor) and t.requires_grad]
        wanted = sum(o.sum() for o in out)
        grads = torch.autograd.grad(wanted, leaves, allow_unused=True) if leaves else []
    except Exception as error:
        return str(error)
    facts = [(o.dtype, o.stride(), o.requires_grad, type(o).__name__) for o in out]
    return str(layer.path), facts, [bits(t) for t in (*out, *grads)]


def bits(tensor: Tensor | None) -> bytes | None:
    if tensor is None:
        return None
    return tensor.detach().as_subclass(Tensor).resolve_neg().numpy().tobytes()


def apart(work: Callable[[], Any]) -> Any:
    """Calls a function in a forked process, and returns what it returns."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(work()))
    process.start()
    sender.close()
    found = receiver.recv()
    process.join()
    return found


def pairs(subject: Subject) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yields the names of properties, and two calls that differ in each."""
    given, weight = subject.given, "weight" if "weight" in subject.given else "beta"
    learning = given | {weight: given[weight].clone().requires_grad_(), "algorithm": "auto"}
    for name, tensor in given.items():
        for change in CHANGES if isinstance(tensor, Tensor) else ():
            yield f"{name}'s {change}", given, given | {name: CHANGES[change](tensor)}
    for name, value in (OTHER_SETTINGS | subject.others).items():
        first = learning if name in ("grad mode", "autocast") else given
        yield name, first, first | {name: value}


def alone(subject: Subject, place: int, part: str) -> dict[str, Any]:
    """Returns the outcomes of the second calls of the pairs whose name has this part at a place."""
    return {
        name: outcome(subject, subject.make(), call)
        for name, _, call in pairs(subject)
        if name.partition("'s ")[place] == part
    }


def by_turns(subject: Subject) -> dict[str, tuple[list[Any], list[Any]]]:
    """Returns the outcomes of both calls of each pair, of layers that have run the other one."""
    found = {}
    for name, first, second in pairs(subject):
        third = first | {"x": first["x"][..., :5]}
        found[name] = told = [], []
        for calls in (first, second, first), (second, third, first, second):
            layer = subject.make()
            for call in calls:
                out = outcome(subject, layer, call)
                if call is not third:
                    told[call is second].append(out)
    return found


@in_a_process
def test_a_call_that_differs_in_one_property_runs_as_in_a_new_process() -> None:
    """The process of an expectation runs no call that differs from it in one property alone.

    Some properties change no result, and may be forgotten. So a call runs in two processes, beside
    calls in which other properties of the tensor differ, or this property of other tensors.
    """
    torch_private.multiplies_bfloat16 = True  # type: ignore[assignment]  # so autocast counts
    gc.freeze()  # a collection would copy all pages that a fork shares
    wrong, told = set(), set()
    for subject_name, subject in SUBJECTS.items():
        every, found = [*pairs(subject)], apart(partial(by_turns, subject))
        firsts = {id(first): first for _, first, _ in every}
        of_firsts = {
            key: apart(partial(outcome, subject, subject.make(), first))
            for key, first in firsts.items()
        }
        parts = dict.fromkeys((k, name.partition("'s ")[k]) for k in (0, 2) for name, *_ in every)
        expected = [apart(partial(alone, subject, *part)) for part in parts]
        for name, first, _ in every:
            seconds = [of_part[name] for of_part in expected if name in of_part]
            before, after = found[name]
            outcomes = [(out, of_firsts[id(first)]) for out in before]
            outcomes += [(out, second) for out in after for second in seconds]
            wrong |= {f"{subject_name}: {name}" for actual, wanted in outcomes if actual != wanted}
            told.add(str(seconds[0]))
    assert not wrong, wrong
    assert len(told) > 100, "most of the calls have an outcome of their own"


def test_what_is_converted_after_a_call_gives_the_same() -> None:
    """1.0 equals True, and is no bool."""
    syn, mem = (state.bfloat16().float() for state in states(2, 3, 6, 7))
    cell, given = ours(), {"x": X, "syn": syn, "mem": mem, "record": True}
    expected = cell(**given)
    narrow = [{name: given[name].bfloat16()} for name in ("x", "syn", "mem")]
    for change in (*narrow, {"record": 1}, {"record": np.bool_(True)}):
        same(cell(**given | change), expected)
    with pytest.raises(TypeError, match="record must be"):
        cell(**given | {"record": 1.0})
