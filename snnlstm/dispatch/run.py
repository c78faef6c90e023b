"""Finds the entry of a call, and runs the call: by the native kernels, or by plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from .. import reference
from ..calls import algorithms
from ..calls.call import Call, LeakyCall, check_transforms
from ..calls.entries import Entry, autocast_of, entry_of
from ..calls.spec import HALF_TYPES, CellSpec, LeakySpec, are_ours
from ..native.plan import Settings
from ..native.tensors import check_memory
from ..reference import Overrides
from .checkpoint import in_segments, may_checkpoint
from .path import Path, native_path
from .reasons import NATIVE_PATHS, backends, function, leaky, operators, static_reason

NO_ENTRIES: tuple[Entry | None, ...] = (None, None)
"""The last entries of a layer that was not called."""


def find_entry(
    last: Sequence[Entry | None],
    call: Any,
    spec: Any,
    overrides: Overrides | None = None,
    checked: bool = True,
) -> Any:
    """The entry of a call: one of `last`, the caller's last ones, or the one of its key.

    If the call was not `checked`, None stands for a key that is not in the table. A call with the
    user's code in it shares no entry.
    """
    x = call.x
    algorithm, autocast = algorithms.current, autocast_of(x)
    backend: Any = None
    if backends is None:
        settings = Settings(algorithm)
    else:
        backend, settings = backends.backend_of(x.device.type, algorithm)
    if overrides is not None:
        return _asked(Entry(spec, backend, settings, autocast), call, overrides)
    for entry in last:
        known = entry is not None and entry.spec is spec
        if known and entry.serves(call, backend, settings, autocast):  # type: ignore[union-attr]
            return entry
    entry = entry_of(call, spec, backend, settings, autocast, checked)
    return entry if entry is None or entry.asked else _asked(entry, call)


def _asked(entry: Entry, call: Any, overrides: Overrides | None = None) -> Entry:
    """An entry that knows why plain torch runs its calls, or that the kernels do."""
    entry.reason = static_reason(call, entry.spec, entry.settings.algorithm, overrides)
    half_type = entry.reason is None and call.x.dtype in HALF_TYPES
    entry.in_float32 = half_type and not entry.backend.half_types
    entry.asked = True
    return entry


def kept_entries(last: Sequence[Entry | None], entry: Entry) -> Sequence[Entry | None]:
    """A layer's last entries after a call by `entry`: this one, and the one before that differs."""
    return last if entry is last[0] else (entry, last[0])


# ---- running ------------------------------------------------------------------------------------


Results = tuple[Tensor, Tensor, Tensor, Path]
"""spk, syn and mem, and the path that ran."""


def run_call(
    entry: Entry, call: Call, now: Path | None, overrides: Overrides | None = None
) -> Results:
    """Run a call by its entry; `now` is from :func:`reasons.recorded_now`."""
    path = now or entry.reason
    try:
        if entry.spec.checkpoint and (entry.needs_grad or overrides) and may_checkpoint():
            return _run_in_segments(path, call, entry, overrides)
        return _run_by(path, call, entry, overrides)
    except RuntimeError:
        check_transforms(call.x, syn=call.syn, mem=call.mem)
        raise


def run_leaky(
    last: Sequence[Entry | None], call: LeakyCall, spec: LeakySpec, now: Path | None
) -> tuple[Any, Any, Path, Sequence[Entry | None]]:
    """Run a call of a Leaky; returns spk, mem, the path, and the next `last` (:func:`find_entry`).

    spk and mem are None if plain torch must run the call.
    """
    if spec.against is not None:  # a look-up would take longer than to ask
        against: Any = now or static_reason(call, spec, algorithms.current, None)
        return None, None, against, last
    entry = find_entry(last, call, spec)
    last = kept_entries(last, entry)
    path = now or entry.reason
    if path is not None:
        return None, None, path, last
    plan = entry.plan or entry.planned(leaky.Plan, call)
    spk, mem = leaky.run_plan(plan, call, entry.needs_grad)
    return spk, mem, native_path(plan.name), last


def run_traced(
    call: Call,
    spec: CellSpec,
    now: Path | None,
    overrides: Overrides | None = None,
    usual: bool = False,
) -> Results:
    """Run a call that torch.compile traces; `usual` is from :func:`reasons.is_usual_step`.

    A native path's name says which kind of kernels run; the exact ones are known afterwards.
    """
    algorithm = algorithms.current
    if usual:
        out = operators.run_tensors(call[:8], False, None, spec.serialized, algorithm)
        return (*out, NATIVE_PATHS[call.x.device.type])
    path = now or static_reason(call, spec, algorithm, overrides, True)

    def traced(part: Call) -> tuple[Tensor, Tensor, Tensor]:
        if path is not None:
            return reference.run(part, spec, overrides)
        return operators.run_operator(part, spec, algorithm)[:3]

    segmented = spec.checkpoint and may_checkpoint()
    foreign = _is_foreign(spec, overrides)
    out = in_segments(call, traced, foreign, True) if segmented else traced(call)
    return (*out, path or NATIVE_PATHS[call.x.device.type])


def _run_in_segments(
    path: Path | None, call: Call, entry: Entry, overrides: Overrides | None
) -> Results:
    """Run a call of a cell that checkpoints."""
    inner, ran = replace(entry.spec, checkpoint=False), path

    def segment(part: Call) -> tuple[Tensor, Tensor, Tensor]:
        nonlocal ran
        of_segment = entry if path is not None else _similar(entry, part, inner)
        spk, syn, mem, ran = _run_by(path, part, of_segment, overrides)
        return spk, syn, mem

    out = in_segments(call, segment, _is_foreign(entry.spec, overrides), False)
    return (*out, ran or NATIVE_PATHS[call.x.device.type])


def _similar(entry: Entry, part: Call, spec: CellSpec) -> Entry:
    """The entry of a part of a call, in the settings of the whole one."""
    found = entry_of(part, spec, entry.backend, entry.settings, entry.autocast)
    return found if found.asked else _asked(found, part)


def _is_foreign(spec: CellSpec, overrides: Overrides | None) -> bool:
    """Whether the user's code takes part in a call."""
    return overrides is not None or not are_ours(spec.surrogate, spec.quant)


def _run_by(path: Path | None, call: Call, entry: Entry, overrides: Overrides | None) -> Results:
    """Run a call by the implementation that was chosen: by plain torch for the reason of `path`."""
    if path is not None:
        return (*reference.run(call, entry.spec, overrides), path)
    if entry.in_float32:
        check_memory(call)  # torch reads the tensors first
        return function.in_float32(
            call, lambda step: _run_by(None, step, _similar(entry, step, entry.spec), None)
        )
    plan = entry.plan or entry.planned(function.Plan, call)
    if plan.reason is not None:
        entry.reason = Path("reference", plan.reason, slow=True)
        return _run_by(entry.reason, call, entry, overrides)
    spk, syn, mem, name = function.run_plan(plan, call, entry.needs_grad)
    return spk, syn, mem, native_path(name)
