"""Entries: what calls with the same static properties share, and how a call finds its entry.

The *guard* of an entry recognises a call like the last one. The *key* of a call finds its entry in
the process's table. An entry has the *reason* for which plain torch runs its calls, or the plan by
which the kernels run them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..compat.torch_private import any_autocast, guard_of, matches
from . import algorithms
from .call import LeakyCall, autocast_dtype, may_require_grad

K = TypeVar("K")
V = TypeVar("V")

TORCH_TYPES = {Tensor, nn.Parameter, type(None)}
"""The types of a call's arguments, unless a tensor is of a subclass."""


class BoundedDict(dict[K, V]):
    """A dictionary that drops all of its entries before it exceeds `max_entries`.

    It has no lock, because a fork or a signal handler could find it taken. Threads that race for a
    key may each make a value, but all of them use the first one.
    """

    def __init__(self, max_entries: int = 1024) -> None:
        super().__init__()
        self.max_entries = max_entries

    def keep(self, key: K, value: V) -> V:
        """Store a value if the key has none yet, and return the stored one."""
        if len(self) >= self.max_entries:
            self.clear()
        return self.setdefault(key, value)


BACKENDS: dict[str, Any] = {}
"""The backends of this installation, by device type; :mod:`snnlstm.native.backends` adds them."""


class Settings(NamedTuple):
    """The settings of the process on which plans depend."""

    algorithm: str
    threads: int = 0
    """On the CPU."""
    isa: str = ""
    """The instruction set, on the CPU."""
    tf32: bool = False
    """Whether torch's convolutions may use TF32, on CUDA."""


_settings = lru_cache(maxsize=64)(Settings)  # a look-up takes half the time


def backend_of(x: Tensor, algorithm: str) -> tuple[Any, Settings]:
    """The backend of x's device, or None, and the process's settings with this algorithm."""
    backend = BACKENDS.get(x.device.type)
    if backend is None:
        return None, _settings(algorithm)
    return backend, _settings(algorithm, backend.threads(), backend.isa, backend.tf32)


class Entry:
    """What calls with the same static properties share.

    Attributes
    ----------
    spec : CellSpec, LeakySpec or tuple
        What a cell or a Leaky computes, or the options of a pool.
    backend : CommonBackend or None
        The kernels of x's device.
    settings : Settings
        The settings of the process on which plans depend.
    autocast : torch.dtype or None
        The dtype of autocast around a call of a cell.
    needs_grad : bool
        Whether a result may require a gradient.
    knows_reason : bool
        Whether `reason` is known: operators and pools do not ask for it.
    reason : Path or None
        Why plain torch runs the calls.
    in_float32 : bool
        Whether each step of a cell in a half type runs in float32, as a call of its own.
    plan : Plan or None
        The kernels' plan, from the first call that they run.
    """

    knows_reason = in_float32 = False
    reason: Any = None
    plan: Any = None
    _guard: Any = None

    def __init__(
        self, spec: Any, backend: Any, settings: Any, autocast: Any = None, needs_grad: bool = False
    ) -> None:
        self.spec, self.backend, self.settings = spec, backend, settings
        self.autocast, self.needs_grad = autocast, needs_grad

    def planned(self, kind: Any, call: Any) -> Any:
        """The plan, which its class makes at the first call."""
        if self.plan is None:
            self.plan = kind(self, call)
        return self.plan

    def guard(self, call: Any) -> None:
        """Make :meth:`serves` recognise calls like this one."""
        tensors, self._facts = _guarded(call)
        self._guard = guard_of(tensors)

    def serves(self, call: Any, spec: Any, backend: Any, settings: Any, autocast: Any) -> bool:
        """Whether a call of tensors, none of them nested, has the guarded one's static properties.

        torch's check would ask a nested tensor for strides, which ends the process.
        """
        if self._guard is None or not (spec is self.spec or spec == self.spec):
            return False
        if backend is not self.backend or autocast is not self.autocast:
            return False
        tensors, facts = _guarded(call)
        same = facts == self._facts and settings == self.settings
        return same and matches(self._guard, tensors)


table: BoundedDict[Any, Entry] = BoundedDict()
"""The entries of the process, by their keys."""


def _guarded(call: Any) -> tuple[Sequence[Tensor], Any]:
    """The tensors that a call has, and its other static properties."""
    if isinstance(call, LeakyCall):
        return call[:5], (torch.is_grad_enabled(),)
    tensors: Any
    if call.lengths is None and call.bias is not None and call.threshold is not None:
        tensors = call[:7]
    else:
        tensors = [tensor for tensor in call[:8] if tensor is not None]
    return tensors, (torch.is_grad_enabled(), call.record, len(tensors))


NO_ENTRIES: tuple[Entry | None, ...] = (None, None)
"""The last entries of a layer that was not called."""


def find_entry(
    last: Sequence[Entry | None], call: Any, spec: Any, checked: bool = True, shared: bool = True
) -> Any:
    """The entry of a call: one of `last`, the layer's last ones, or the one of its key.

    If the call was not `checked`, None stands for a key that is not in the table. A call with the
    user's code in it shares no entry.
    """
    backend, settings = backend_of(call.x, algorithms.current)
    autocast = autocast_dtype(call.x.device.type) if any_autocast() else None
    if not shared:
        return Entry(spec, backend, settings, autocast)
    try:
        known = not (call[0].is_nested or call[1].is_nested or call[2].is_nested)
    except AttributeError:  # an unchecked argument is no tensor
        known = False
    for entry in last if known else ():
        if entry is not None and entry.serves(call, spec, backend, settings, autocast):
            return entry
    return entry_of(call, spec, backend, settings, autocast, checked)


def kept_entries(last: Sequence[Entry | None], entry: Entry) -> Sequence[Entry | None]:
    """A layer's last entries after a call by `entry`: this one, and the one before that differs."""
    return last if entry is last[0] else (entry, last[0])


def entry_of(
    call: Any, spec: Any, backend: Any, settings: Any, autocast: Any, make: bool = True
) -> Any:
    """Look up the entry of a call by its key, or `make` it; None if there is none.

    A spec with the user's callables has no key, because the table would keep them alive.
    """
    key = key_of(call) if spec.serialized else None
    if key is not None:
        key = spec, key, backend, settings, autocast
    entry = table.get(key)
    if entry is None and make:
        entry = Entry(spec, backend, settings, autocast, may_require_grad(_guarded(call)[0]))
        if key is not None:
            entry.guard(call)
            entry = table.keep(key, entry)
    return entry


def key_of(call: Any) -> tuple[Any, ...] | None:
    """The static properties of a call's tensors; None if the call has no key.

    Calls with tensors of subclasses have none, because sizes may be symbols, and neither have those
    with sparse tensors, which have no strides. The key omits values, addresses, the weight's
    strides, because its values are packed, and lengths, except whether there are any.
    """
    is_leaky = isinstance(call, LeakyCall)
    tensors: Any = call[: 5 if is_leaky else 7]
    if not TORCH_TYPES.issuperset(map(type, tensors)):
        return None
    try:
        # The guard tells apart what inference mode has made.
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        kinds = modes + tuple(t.is_inference() for t in tensors[:3])
        if is_leaky:
            states = (
                (t.shape, t.stride(), t.dtype, t.device, t.is_neg(), t.requires_grad)
                for t in tensors
            )
            return *states, kinds
        x, syn, mem, weight, bias, threshold, graded, lengths, record = call
        return (
            x.shape, x.stride(), x.dtype, x.device, x.is_neg(), x.requires_grad,
            syn.shape, syn.stride(), syn.dtype, syn.device, syn.is_neg(), syn.requires_grad,
            mem.shape, mem.stride(), mem.dtype, mem.device, mem.is_neg(), mem.requires_grad,
            weight.shape, weight.dtype, weight.device, weight.is_neg(),
            weight.requires_grad,
            None if bias is None else _key_of_numbers(bias),
            None if threshold is None else _key_of_numbers(threshold),
            None if graded is None else _key_of_numbers(graded),
            record, lengths is None, kinds,
        )  # fmt: skip
    except (AttributeError, RuntimeError):  # an argument is no tensor, or a sparse one
        return None


def _key_of_numbers(tensor: Tensor) -> Any:
    """The static properties of a tensor that the kernels read as contiguous numbers."""
    contiguous, negated = tensor.is_contiguous(), tensor.is_neg()
    return tensor.shape, tensor.dtype, tensor.device, contiguous, negated, tensor.requires_grad
