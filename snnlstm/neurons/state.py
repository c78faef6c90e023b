"""The states of a cell: an object that owns syn and mem, and the rules by which they are kept.

The states are plain attributes: DistributedDataParallel would overwrite all ranks' buffers with the
first one's, and a state that is an nn.Parameter would be registered and trained.

A cell also remembers that it was reset and not called since. torch.compile then need not read the
stored states, so one compiled graph starts every sequence, whatever states the last one left.

An exported program begins without states. Those that its steps hand on belong to the export, so the
cell keeps its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..calls.call import check_dense, state_tensor
from ..compat.torch_private import (
    NO_LEVEL,
    at_end_of_backward,
    backward_pass,
    has_ended,
    kept_by_export,
    level_of,
)

NO_RESET = "no reset signal is kept: mem_reset(mem) computes it from the mem before the step"
"""The error of the attribute ``reset`` of a cell and of a Leaky."""


def note_pass(last: int, *states: dict[str, Any]) -> int:
    """Let a layer's `states` change in a backward pass, and be as before when the pass ends.

    torch.utils.checkpoint calls layers again in a backward pass, the last steps first, and stops
    with the last tensor that was saved, before the last call returns. `last` is the pass in which
    the states changed last. The result is the one that is running, or -1.
    """
    now = backward_pass()
    if now not in (-1, last):
        for kept in states:
            at_end_of_backward(partial(kept.update, kept.copy()))
    return now


def warn_of_stored(kind: str) -> None:
    """Warn that an exported program does not continue from the state that a layer has stored."""
    warnings.warn(
        f"a {kind} has a stored state, but the exported program starts from zeros: call "
        "reset_mem() before the export or at the start of the forward, or pass the states",
        stacklevel=2,
    )


# torch.compile calls such a function while it traces, instead of tracing it.
warn_of_stored._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Exportable:
    """The stored states of a layer, in whose place an export has empty ones of its own.

    Attributes
    ----------
    restarted : bool
        Whether the states are the zeros of a reset.
    ignored : str
        Of an export's states: what has stored others, which nobody was warned of yet.
    """

    restarted: bool
    ignored: str
    _empty: Callable[[], Any]
    """Makes the states with which an export begins."""
    _exported: Any = None

    def exported(self) -> Any:
        """Return the states of the export that is running."""
        if not torch.compiler.is_dynamo_compiling():
            return kept_by_export(self, self._empty)
        if self._exported is None:  # the compiler forgets what an export has set
            self._exported = self._empty()
        return self._exported

    def warn_if_ignored(self) -> None:
        """Warn if a call of an export would continue from a stored state."""
        if self.ignored:
            warn_of_stored(self.ignored)
            self.ignored = ""


class BufferedState(Exportable):
    """mem of one Leaky, which lies in the layer's buffers.

    torch.compile takes the sizes of a module's buffers for constants, and would compile anew for
    each batch size. Code that it traces reads the same dictionary as an attribute of this object,
    so that the sizes may vary.

    Attributes
    ----------
    buffers : dict
        The layer's buffers; in an export mem alone.
    """

    def __init__(self, buffers: dict[str, Any], restarted: bool, ignored: str = "") -> None:
        self.buffers, self.restarted, self.ignored = buffers, restarted, ignored

    def _empty(self) -> BufferedState:
        mem = self.buffers["mem"]
        ignored = "" if self.restarted or mem.shape == (0,) else "Leaky"
        return BufferedState({"mem": mem.detach().new_zeros(0)}, True, ignored)

    def empty(self, like: Tensor) -> Tensor:
        """Return an empty mem, which means zeros, for a traced call after a restart."""
        self.warn_if_ignored()
        return like.detach().new_zeros(0)

    def store(self, mem: Tensor, restarted: bool = False) -> None:
        """Keep mem that the user has set, or that a reset has made."""
        self.buffers["mem"], self.restarted, self.ignored = mem, restarted, ""


class State(Exportable):
    """syn and mem of one cell, (N, C, Ho, Wo), or (0,) before the first call.

    Attributes
    ----------
    spk : Tensor or None
        The last spikes of an export's cell; other cells keep them themselves.
    stored_in : int
        The backward pass in which the states were stored; -1 outside of one.
    """

    spk: Tensor | None = None
    stored_in = -1

    def __init__(self, like: Tensor) -> None:
        """Start without a state, on the device and in the dtype of `like`."""
        empty = like.detach().new_zeros(0)
        self._restart(empty, empty.clone())

    def _empty(self) -> State:
        states = State(self.mem)
        states.ignored = "" if self.restarted or self.mem.shape == (0,) else "cell"
        return states

    def _restart(self, syn: Tensor, mem: Tensor) -> None:
        self._note_pass()
        self.syn, self.mem, self.restarted, self.ignored = syn, mem, True, ""

    def _note_pass(self) -> None:
        if not torch.compiler.is_compiling():  # which would guard on the number
            self.stored_in = note_pass(self.stored_in, self.__dict__)

    def shared(self) -> State:
        """Return a replica with the same tensors; it stores later states for itself."""
        replica = State.__new__(State)
        replica.__dict__.update(self.__dict__)
        return replica

    def write(self, name: str, value: Any) -> None:
        """Take a state that the user has set."""
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {value!r}")
        self._note_pass()
        setattr(self, name, value)
        self.restarted = False

    def reset(self, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Set both to zero, and return them; with `like` both become empty, in its dtype.

        torch.compile passes `like`: if it looked at the old states, it would compile anew for each
        shape of theirs, and where they require a gradient.
        """
        if like is None:
            self._restart(zeros_like(self.syn), zeros_like(self.mem))
        else:
            self._restart(like.detach().new_zeros(0), like.detach().new_zeros(0))
        return self.syn, self.mem

    def detach(self) -> None:
        """Detach both from the graph, in place where torch allows that."""
        for name in ("syn", "mem"):
            state = getattr(self, name)
            if state.is_leaf or state._is_view():  # detach_ harms a leaf, and a view refuses
                setattr(self, name, state.detach())
            else:
                state.detach_()

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply to both what ``nn.Module._apply`` applies to parameters."""
        self.forget_ended()
        for name in ("syn", "mem"):
            old = getattr(self, name)
            new = function(old)
            # A tensor that leaves the meta device has uninitialised memory.
            setattr(self, name, torch.zeros_like(new) if old.is_meta else new)

    def __getstate__(self) -> dict[str, Any]:
        """Return the states without the graph, which can be neither copied nor pickled."""
        self.forget_ended()
        return vars(self) | {"syn": self.syn.detach(), "mem": self.mem.detach()}

    def forget_ended(self) -> None:
        """Empty the states if they belong to a transform of torch.func that has ended."""
        if has_ended(self.syn) or has_ended(self.mem):
            self._restart(empty_like(self.mem), empty_like(self.mem))

    def store(self, syn: Tensor, mem: Tensor, traced: bool) -> None:
        """Keep the states after a call."""
        if not traced and backward_pass() != self.stored_in:
            self._note_pass()
        self.syn, self.mem, self.restarted = syn, mem, False

    def before(
        self,
        name: str,
        passed: Any,
        shape: tuple[int, ...],
        x: Tensor,
        weight: Tensor,
        traced: bool,
    ) -> Tensor:
        """Return the state that a call starts from: the one that was passed, or the stored one.

        The states that reset_mem returned have the shape of the last input. They mean zeros for an
        input of any shape, and so do their copies.
        """
        if passed is None:
            return self._stored(name, shape, x, traced)
        if isinstance(passed, Tensor):
            check_dense(name, passed)  # the shape of a nested tensor cannot be compared
        fits = isinstance(passed, Tensor) and passed.shape == shape
        # The order matters: torch.compile compiles again when the result of a check changes.
        if not fits and self.restarted and passed is getattr(self, name):
            return x.new_zeros(shape)
        if not fits and not traced and _as_of_a_reset(passed, shape):
            return x.new_zeros(shape)
        return state_tensor(name, passed, shape, x, weight)

    def _stored(self, name: str, shape: tuple[int, ...], x: Tensor, traced: bool) -> Tensor:
        """Return the stored state if it fits `shape`, else zeros; in x's dtype, on its device."""
        if traced:
            if self.restarted:
                self.warn_if_ignored()
                return x.new_zeros(shape)
        elif backward_pass() not in (-1, self.stored_in):
            raise RuntimeError(
                "a backward pass, such as torch.utils.checkpoint's, calls the cell again, but the "
                "stored state has changed since the forward pass: pass syn and mem, or call "
                "reset_mem() inside the checkpointed function"
            )
        stored = getattr(self, name)
        if stored.shape != shape:
            self.warn_if_ignored()
            return x.new_zeros(shape)
        if stored.dtype == x.dtype and stored.device == x.device:
            return stored
        return stored.to(x.device, x.dtype)


def _as_of_a_reset(state: Any, shape: tuple[int, ...]) -> bool:
    """Whether a passed state is zeros of another batch or image size, without history."""
    if not isinstance(state, Tensor) or state.requires_grad or state.is_meta:
        return False
    if state.dim() != len(shape) or state.shape[1] != shape[1]:
        return False
    try:
        return not state.any()
    except RuntimeError:  # a torch.func transform hides the values
        return False


def empty_like(state: Tensor) -> Tensor:
    """An empty state, which means zeros, in the place of one that no operator may read."""
    return torch.zeros(0, dtype=state.dtype, device=state.device)


def zeros_like(state: Tensor) -> Tensor:
    """The state after a reset."""
    # A trace accepts no tensor whose history began before it, nor a transform one of another.
    if torch.jit.is_tracing() or level_of(state) != NO_LEVEL:
        return empty_like(state)
    return torch.zeros_like(state)
