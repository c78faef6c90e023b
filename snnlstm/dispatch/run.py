"""Runs a call by its entry: by the native kernels, or by plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import reference
from ..calls import algorithms
from ..calls.call import Call, LeakyCall, check_transforms
from ..calls.entries import Entry, entry_of, find_entry, kept_entries
from ..calls.spec import HALF_TYPES, CellSpec, LeakySpec
from ..native import lender
from ..native.tensors import check_memory
from ..reference import Overrides
from .path import Path, native_path
from .reasons import NATIVE_PATHS, function, leaky, operators, static_reason

Results = tuple[Tensor, Tensor, Tensor, Path]
"""spk, syn and mem, and the path that ran."""


def _find_reason(entry: Entry, call: Any, overrides: Overrides | None = None) -> None:
    """Let an entry know why plain torch runs its calls, or that the kernels do."""
    entry.reason = static_reason(call, entry.spec, entry.settings.algorithm, overrides)
    half_type = entry.reason is None and call.x.dtype in HALF_TYPES
    entry.in_float32 = half_type and not entry.backend.half_types
    entry.knows_reason = True


def run_call(
    entry: Entry, call: Call, recording: Path | None, overrides: Overrides | None = None
) -> Results:
    """Run a call by its entry; `recording` is from :func:`reasons.recorded_now`."""
    if not entry.knows_reason:
        _find_reason(entry, call, overrides)
    path = recording or entry.reason
    try:
        return _run_by(path, call, entry, overrides)
    except (MemoryError, RuntimeError) as error:
        check_transforms(call.x, syn=call.syn, mem=call.mem)
        if not lender.may_fit(error):
            raise
    lender.empty_cache()  # after the error, whose traceback holds what the call allocated
    return _run_by(path, call, entry, overrides)


def run_leaky(
    last: Sequence[Entry | None], call: LeakyCall, spec: LeakySpec, recording: Path | None
) -> tuple[Any, Any, Path, Sequence[Entry | None]]:
    """Run a call of a Leaky; returns spk, mem, the path, and the next `last` (:func:`find_entry`).

    spk and mem are None if plain torch must run the call.
    """
    if spec.against is not None:  # a look-up would take longer than to ask
        against: Any = recording or static_reason(call, spec, algorithms.current, None)
        return None, None, against, last
    entry = find_entry(last, call, spec)
    if not entry.knows_reason:
        _find_reason(entry, call)
    if entry is not last[0]:
        last = kept_entries(last, entry)
    path = recording or entry.reason
    if path is not None:
        return None, None, path, last
    plan = entry.plan or entry.planned(leaky.Plan, call)
    spk, mem = leaky.run_plan(plan, call, entry.needs_grad)
    return spk, mem, native_path(plan.name), last


def run_traced(
    call: Call,
    spec: CellSpec,
    recording: Path | None,
    overrides: Overrides | None = None,
) -> Results:
    """Run a call that torch.compile traces.

    A native path's name says which kind of kernels run; the exact ones are known afterwards.
    """
    algorithm = algorithms.current
    path = recording or static_reason(call, spec, algorithm, overrides, True)
    if path is not None:
        return (*reference.run(call, spec, overrides), path)
    out = operators.run_operator(call, spec, algorithm)[:3]
    return (*out, NATIVE_PATHS[call.x.device.type])


def run_usual(given: tuple[Any, ...], spec: CellSpec) -> tuple[Any, Path]:
    """Run a call that torch.compile traces, if :func:`reasons.is_usual_step` says so."""
    out = operators.run_tensors(given[:8], False, None, spec.serialized, algorithms.current)
    return out, NATIVE_PATHS[given[0].device.type]


def _run_by(path: Path | None, call: Call, entry: Entry, overrides: Overrides | None) -> Results:
    """Run a call by the implementation that was chosen: by plain torch for the reason of `path`."""
    if path is not None:
        return (*reference.run(call, entry.spec, overrides), path)
    if entry.in_float32:
        check_memory(call)  # torch reads the tensors first
        settings = entry.spec, entry.backend, entry.settings, entry.autocast
        return function.in_float32(
            call, lambda step: _run_by(None, step, entry_of(step, *settings), None)
        )
    plan = entry.plan or entry.planned(function.Plan, call)
    if plan.reason is not None:
        entry.reason = Path("reference", plan.reason, slow=True)
        return _run_by(entry.reason, call, entry, overrides)
    spk, syn, mem, name = function.run_plan(plan, call, entry.needs_grad)
    return spk, syn, mem, native_path(name)
