"""Looks up the entry of a call, and runs the call.

The key of a call holds its static properties. The :class:`Entry` of a key has the plan of the
native kernels, or the reason for :mod:`snnlstm.reference`. The process has one table of entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..calls import algorithms
from ..calls.call import Call, LeakyCall, autocast_dtype, check_transforms, may_require_grad
from ..calls.keys import BoundedDict, key_of
from ..calls.spec import HALF_TYPES, CellSpec, LeakySpec, are_ours
from ..compat.torch_private import any_autocast, guard_of
from ..native.plan import Settings
from ..native.tensors import check_memory
from ..reference import Overrides
from .checkpoint import in_segments, may_checkpoint
from .path import Path, native_path
from .reasons import NATIVE_PATHS, backends, function, leaky, operators, static_reason


class Entry:
    """What follows from the static properties of a call that has passed all static checks.

    Attributes
    ----------
    spec : CellSpec or LeakySpec
    backend : CommonBackend or None
    settings : Settings
    fallback : Path or None
        Why the reference path must run.
    training : bool
        Whether a result may require a gradient.
    in_float32 : bool
        Whether each step of a cell in a half type runs in float32, as a call of its own.
    plan : Plan or None
        The native kernels' plan, from the first call that they run.
    """

    def __init__(
        self,
        call: Any,
        spec: Any,
        backend: Any,
        settings: Settings,
        overrides: Overrides | None = None,
    ) -> None:
        self.spec, self.backend, self.settings = spec, backend, settings
        self.training = may_require_grad(_guarded(call, backend, settings)[0])
        self.in_float32 = False
        self.plan: Any = None
        self._guard: Any = None
        self.fallback = static_reason(call, spec, settings.algorithm, overrides)
        if self.fallback is None:
            self.in_float32 = call.x.dtype in HALF_TYPES and not backend.half_types

    def guard(self, call: Any) -> None:
        """Make :meth:`serves` recognise calls like this one."""
        tensors, self._guarded = _guarded(call, self.backend, self.settings)
        self._guard = guard_of(tensors)

    def serves(self, call: Any, backend: Any, settings: Settings) -> bool:
        """Whether a call has the static properties of the guarded one."""
        if self._guard is None:
            return False
        try:
            nested = call[0].is_nested or call[1].is_nested or call[2].is_nested
        except AttributeError:  # an unchecked argument is no tensor
            return False
        tensors, static = _guarded(call, backend, settings)
        # torch's check would ask a nested tensor for strides, which ends the process.
        return not nested and static == self._guarded and self._guard.check(*tensors)


NO_ENTRIES: tuple[Entry | None, ...] = (None, None)
"""The last entries of a layer that was not called."""

_entries: BoundedDict[Any, Entry] = BoundedDict()


def _guarded(call: Any, backend: Any, settings: Settings) -> tuple[Sequence[Tensor], Any]:
    """The tensors that a call has, and its other static properties."""
    if isinstance(call, LeakyCall):
        return call[:5], (torch.is_grad_enabled(), backend, settings)
    tensors: Any
    if call.lengths is None and call.bias is not None and call.threshold is not None:
        tensors = call[:7]
    else:
        tensors = [tensor for tensor in call[:8] if tensor is not None]
    autocast = autocast_dtype(call.x.device.type) if any_autocast() else None
    grad_mode = torch.is_grad_enabled()
    return tensors, (call.record, grad_mode, backend, settings, len(tensors), autocast)


def _key(call: Any, spec: Any, backend: Any, settings: Settings) -> Any:
    """The key of a call, with backend and settings last; None if it has none.

    A spec with the user's callables has none, because the table would keep them alive.
    """
    tensors = key_of(call) if spec.serialized else None
    return None if tensors is None else (spec, tensors, backend, settings)


def _backend_of(x: Tensor) -> tuple[Any, Settings]:
    """The backend of x's device, or None, and the process's settings; read once a look-up."""
    algorithm = algorithms.current
    backend = None if backends is None else backends.BACKENDS.get(x.device.type)
    return backend, Settings(algorithm) if backend is None else backend.settings(algorithm)


def entry_of(call: Any, spec: Any, backend: Any, settings: Settings, checked: bool = True) -> Any:
    """Look up the entry of a call, or make it if the call was `checked`; else return None."""
    key = _key(call, spec, backend, settings)
    entry = _entries.get(key)
    if entry is None and checked:
        entry = Entry(call, spec, backend, settings)
        if key is not None:
            entry.guard(call)
            entry = _entries.keep(key, entry)
    return entry


def find_entry(
    last: Sequence[Entry | None],
    call: Any,
    spec: Any,
    overrides: Overrides | None = None,
    checked: bool = True,
) -> Any:
    """The entry of a call: one of `last`, the caller's last ones, or as :func:`entry_of`.

    A call with the user's code in it shares no entry.
    """
    backend, settings = _backend_of(call.x)
    if overrides is not None:
        return Entry(call, spec, backend, settings, overrides)
    for entry in last:
        if entry is not None and entry.spec is spec and entry.serves(call, backend, settings):
            return entry
    return entry_of(call, spec, backend, settings, checked)


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
    path = now or entry.fallback
    try:
        if entry.spec.checkpoint and (entry.training or overrides) and may_checkpoint():
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
    path = now or entry.fallback
    if path is not None:
        return None, None, path, last
    plan = entry.plan
    if plan is None:
        plan = entry.plan = leaky.plan_of(call, spec)
    spk, mem, name = leaky.run_plan(plan, call, entry.training)
    return spk, mem, native_path(name), last


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
    spec = entry.spec
    inner, ran = replace(spec, checkpoint=False), path

    def segment(part: Call) -> tuple[Tensor, Tensor, Tensor]:
        nonlocal ran
        segment_entry = entry
        if path is None:
            segment_entry = entry_of(part, inner, entry.backend, entry.settings)
        spk, syn, mem, ran = _run_by(path, part, segment_entry, overrides)
        return spk, syn, mem

    out = in_segments(call, segment, _is_foreign(spec, overrides), False)
    return (*out, ran or NATIVE_PATHS[call.x.device.type])


def _is_foreign(spec: CellSpec, overrides: Overrides | None) -> bool:
    """Whether the user's code takes part in a call."""
    return overrides is not None or not are_ours(spec.surrogate, spec.quant)


def _run_by(
    fallback: Path | None, call: Call, entry: Entry, overrides: Overrides | None
) -> Results:
    """Run a call by the implementation that was chosen."""
    if fallback is not None:
        return (*reference.run(call, entry.spec, overrides), fallback)
    if entry.in_float32:
        check_memory(call)  # torch reads the tensors first
        shared = entry.spec, entry.backend, entry.settings
        return function.in_float32(
            call, lambda step: _run_by(None, step, entry_of(step, *shared), None)
        )
    plan = entry.plan
    if plan is None:
        spec = replace(entry.spec, checkpoint=False)
        operands = backends.operands_of(call, autocast_dtype(call.x.device.type))
        plan = backends.plan_of(call, spec, operands, entry.backend, entry.settings)
        reason = plan.passes.reason_against(entry.training)
        if reason is not None:
            entry.fallback = Path("reference", reason, slow=True)
            return _run_by(entry.fallback, call, entry, overrides)
        entry.plan = plan
    spk, syn, mem, name = function.run_plan(plan, call, entry.training)
    return spk, syn, mem, native_path(name)
