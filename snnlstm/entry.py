"""What is known of a call, and running it.

All that is static of a call is its key. Behind it stands an :class:`Entry`, which has the plan of
the native kernels, or the reason for :mod:`snnlstm.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import reference
from .call import PLAIN, Call, as_saved, autocast_dtype, key_of, saved_lengths
from .path import (
    NATIVE_PATHS,
    Path,
    chosen_reference,
    dynamic_reason,
    get_algorithm,
    kernels,
    native_path,
    static_reason,
    stronger,
)
from .reference import Overrides
from .spec import HALF_TYPES, CellSpec, are_ours
from .torch_private import ENDED, any_autocast, guard_of, level_of, transforms_are_active

__all__ = ["Entries", "Entry", "entry_of", "known_entry", "run", "run_checked", "run_traced"]


class Entry:
    """What follows from all that is static of a call, each static check passed.

    Attributes
    ----------
    spec : CellSpec
    fallback : Path or None
        Why the reference path must run.
    training : bool
        Whether a result may require a gradient.
    in_float32 : bool
        Whether each step of a half type runs in float32, as a call of its own.
    plan : Plan or None
        Of the native kernels, once they have run.
    """

    __slots__ = ("_guard", "_others", "fallback", "in_float32", "plan", "spec", "training")

    def __init__(self, call: Call, spec: CellSpec) -> None:
        self.spec, self.fallback = spec, static_reason(call, spec, False)
        self.training = torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in call[:6]
        )
        self.in_float32 = False
        self.plan: Any = None
        self._guard: Any = None
        if self.fallback is None:
            assert kernels is not None
            backend = _settings(call.x)[0]
            self.in_float32 = call.x.dtype in HALF_TYPES and not backend.half_types
            # The reference path must run where planning fails.
            if not self.in_float32 and chosen_reference() is None:
                reason = backend.reason_against(kernels.Sizes(call, spec, _operands(call)))
                self.fallback = reason and Path("reference", reason, slow=True)

    def guard(self, call: Call) -> None:
        """Let :meth:`serves` know calls like this one."""
        if call.lengths is None and not any_autocast():
            tensors = _present(call)
            self._others = call.record, torch.is_grad_enabled(), _settings(call.x), len(tensors)
            self._guard = guard_of(tensors)

    def serves(self, call: Call) -> bool:
        """Whether all that is static of a call is as in the one that was guarded."""
        if self._guard is None or call.lengths is not None:
            return False
        tensors = _present(call)
        others = call.record, torch.is_grad_enabled(), _settings(call.x), len(tensors)
        return others == self._others and self._guard.check(*tensors)


def _present(call: Call) -> Sequence[Tensor]:
    """The tensors that a call has, without lengths."""
    if call.bias is not None and call.threshold is not None:
        return call[:7]  # type: ignore[return-value]
    return [tensor for tensor in call[:7] if tensor is not None]


class Entries(dict[Any, Entry]):
    """The calls that a cell has checked, by all that is static of them."""

    last: Entry | None = None
    """The entry of the last call."""


_MOST = 64  # entries are kept; one more, and all are forgotten


def _key(call: Call, spec: CellSpec | None) -> Any:
    """The key of a call, with the settings last; None if it has none.

    Tensors of subclasses have none, because their sizes may be symbols, sparse ones, which have no
    strides, and those of transforms that have ended, which have no memory. A cell's entries are
    those of one spec, which their keys need not name: None.
    """
    if not PLAIN.issuperset(map(type, call[:7])):
        return None
    try:
        if any(t is not None and level_of(t) == ENDED for t in call[:7]):
            return None
        return spec, key_of(call), _settings(call.x)
    except (AttributeError, RuntimeError):  # one is no tensor, or sparse
        return None


def _settings(x: Tensor) -> Any:
    """The settings of the process that a plan depends on; None without kernels for the device."""
    backend = None if kernels is None else kernels.BACKENDS.get(x.device.type)
    return None if backend is None else backend.settings(get_algorithm())


def _operands(call: Call) -> torch.dtype | None:
    assert kernels is not None
    return kernels.operands_of(call, autocast_dtype(call.x.device.type))


def known_entry(entries: Entries, call: Call, spec: CellSpec | None = None) -> Entry | None:
    """The entry of a call whose tensors need not be checked, because a call like it was."""
    last = entries.last
    if last is not None and (spec is None or last.spec is spec) and last.serves(call):
        return last
    entry = entries.get(_key(call, spec))
    if entry is not None:
        entries.last = entry
    return entry


def entry_of(
    entries: Entries,
    call: Call,
    spec: CellSpec,
    overrides: Overrides | None = None,
    of_many: CellSpec | None = None,
) -> Entry:
    """The entry of a call that was checked, looked up or made.

    `of_many` is the spec again where the entries are those of many.
    """
    if overrides is not None:  # it is like no other: a foreign conv has any weight, or none
        return Entry(call if overrides.conv is None else call._replace(weight=call.x), spec)
    # A spec with foreign callables has no text, and a table of the process would keep it alive.
    entry = known_entry(entries, call, of_many) if spec.text else None
    if entry is None:
        entry = Entry(call, spec)
        key = _key(call, of_many) if spec.text else None
        if key is not None:
            if len(entries) >= _MOST:
                entries.clear()
            entry.guard(call)
            entries[key] = entries.last = entry
    return entry


# ---- running ------------------------------------------------------------------------------------


Results = tuple[Tensor, Tensor, Tensor, Path]
"""spk, syn and mem, and what ran."""

_inside = Entries()
"""Entries of calls within calls: of the segments of a checkpoint, and of steps in float32."""


def run_checked(
    entries: Entries,
    call: Call,
    spec: CellSpec,
    overrides: Overrides | None = None,
    of_many: CellSpec | None = None,
) -> Results:
    """Run a call that was checked, traced by torch.compile or not; see :func:`entry_of`."""
    if torch.compiler.is_compiling():
        return run_traced(call, spec, overrides)
    return run(call, entry_of(entries, call, spec, overrides, of_many), overrides)


def run(call: Call, entry: Entry, overrides: Overrides | None = None) -> Results:
    """Choose an implementation for a call, and run it."""
    path, dynamic = entry.fallback, dynamic_reason(call, overrides, False)
    if path is not None or dynamic is not None:
        path = stronger(path, dynamic)
    if entry.spec.checkpoint and (entry.training or overrides) and _may_checkpoint():
        return _in_segments(call, entry.spec, overrides, path, False)
    return _run_by(path, call, entry, overrides)


def _run_by(
    fallback: Path | None, call: Call, entry: Entry, overrides: Overrides | None
) -> Results:
    """Run a call by the implementation that was chosen."""
    if fallback is not None:
        return (*reference.run(call, entry.spec, overrides), fallback)
    assert kernels is not None
    if entry.in_float32:
        spec = entry.spec

        def step(call: Call) -> Results:
            return _run_by(None, call, entry_of(_inside, call, spec, of_many=spec), None)

        return kernels.in_float32(call, step)
    plan = entry.plan
    if plan is None:  # not made with the entry, which a transform of torch.func may have asked for
        spec = replace(entry.spec, checkpoint=False)
        plan = entry.plan = kernels.plan_of(call, spec, _operands(call), _settings(call.x))
    spk, syn, mem, name = kernels.run(plan, call, entry.training)
    return spk, syn, mem, native_path(name)


def run_traced(call: Call, spec: CellSpec, overrides: Overrides | None = None) -> Results:
    """The same, while torch.compile traces.

    The name of a native path says what kind of kernels run; which of them is known afterwards.
    """
    dynamic = dynamic_reason(call, overrides, True)
    path = stronger(static_reason(call, spec, True), dynamic)
    if spec.checkpoint and _may_checkpoint():
        return _in_segments(call, spec, overrides, path, True)
    results = _run_traced_by(path, call, spec, overrides)
    return (*results, path or NATIVE_PATHS[call.x.device.type])


def _run_traced_by(
    fallback: Path | None, call: Call, spec: CellSpec, overrides: Overrides | None
) -> tuple[Tensor, Tensor, Tensor]:
    if fallback is not None:
        return reference.run(call, spec, overrides)
    assert kernels is not None
    return kernels.run_operator(call, spec, get_algorithm())[:3]


def _may_checkpoint() -> bool:
    # torch's checkpoint refuses to run under the transforms of torch.func.
    return torch.is_grad_enabled() and not transforms_are_active()


def _in_segments(
    call: Call,
    spec: CellSpec,
    overrides: Overrides | None,
    fallback: Path | None,
    traced: bool,
) -> Results:
    """The cell with ``checkpoint=True``: less memory for the backward pass, one more forward pass.

    A sequence is cut into segments of some sqrt(T) steps. Saved for the backward pass are the
    states between the segments only; the gates of one segment at a time are computed again, just
    before their gradients (Chen et al. 2016, "Training deep nets with sublinear memory cost"), by
    the implementation that ran before.
    """
    inner = replace(spec, checkpoint=False)
    paths = [fallback or NATIVE_PATHS[call.x.device.type]]

    def segment(time: int, *tensors: Any) -> Any:
        part = Call._make((*tensors, call.record))
        if traced:
            return _run_traced_by(fallback, part, inner, overrides)
        part = _as_it_was(part, call, time)
        entry = entry_of(_inside, part, inner, of_many=inner)
        *results, paths[0] = _run_by(fallback, part, entry, overrides)
        return tuple(results)

    # Foreign code may draw random numbers: in both passes the same ones.
    foreign = overrides is not None or not are_ours(spec.surrogate, spec.quant)
    weight, bias, threshold, graded, lengths = call[3:8]
    if threshold is not None:  # it may be written to before the backward pass
        threshold = threshold.clone()
    # In state-sized tensors a step takes 5, and a boundary 2: the sum is least for these segments.
    steps = max(1, round((0.4 * call.x.shape[0]) ** 0.5)) if call.sequence else 1
    pieces = call.x.split(steps) if call.sequence and call.x.shape[0] else (call.x,)
    syn, mem, results = call.syn, call.mem, []
    for k, x in enumerate(pieces):
        left = None if lengths is None else (lengths - k * steps).clamp(0, x.shape[0])
        # All tensors are arguments, so that torch notices if one is written to meanwhile.
        out = checkpoint(
            segment, x.shape[0], x, syn, mem, weight, bias, threshold, graded, left,
            use_reentrant=False, preserve_rng_state=foreign,
        )  # fmt: skip
        results.append(out)
        syn, mem = (s[-1] for s in out[1:]) if call.record and x.shape[0] else out[1:]
    if len(results) == 1:
        return (*results[0], paths[0])
    spks, syns, mems = zip(*results, strict=True)
    if call.record:
        syn, mem = torch.cat(syns), torch.cat(mems)
    return torch.cat(spks), syn, mem, paths[0]


def _as_it_was(part: Call, call: Call, time: int) -> Call:
    """The tensors of a segment of a call, whatever hooks on saved tensors have brought back."""
    shapes: list[Any] = [None if t is None else t.shape for t in call[:7]]
    if call.sequence:
        shapes[0] = torch.Size((time, *call.x.shape[1:]))
    device = call.x.device
    tensors: list[Any] = [
        t if t is None else as_saved(t, shape, of.dtype, device)
        for t, shape, of in zip(part[:7], shapes, call[:7], strict=True)
    ]
    lengths = part.lengths
    if lengths is not None:
        lengths = saved_lengths(lengths, call.x.shape[1], device)
    return Call._make((*tensors, lengths, call.record))
