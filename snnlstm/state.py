"""The states of a cell: where they are stored, moved, reset, copied and pickled.

syn and mem are plain attributes. DistributedDataParallel would overwrite buffers of all ranks with
the first one's, and parameters, which nn.Module makes of an nn.Parameter, would be trained.

A cell also remembers that it was reset and not called since. torch.compile then need not look at
the stored states, so that one compiled graph starts every sequence, whatever the last one left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch as functorch

from . import arguments
from .call import Call, version
from .reference import reset_signal
from .run import Path, exporting, log_fallback
from .snntorch import Base, alive, clear_registries, register

__all__ = ["LastReset", "ResetSource", "StatefulCell", "backward_pass"]

_NO_LEVEL = -1  # the level of a tensor that no transform has wrapped

backward_pass: Callable[[], int] = torch._C._current_graph_task_id
"""Number of the backward pass that is running in this thread; -1 outside of one."""


def _stored_state(name: str, what: str) -> Any:
    """A property for a stored state; :meth:`StatefulCell.__setattr__` sets it."""

    def state(cell: StatefulCell) -> Tensor:
        cell._restarted = False  # it may be edited in place from now on
        cell._settle()
        return getattr(cell, name)

    return property(state, doc=f"Stored {what}, (N, C, Ho, Wo), or (0,) before the first call.")


class StatefulCell(Base):
    """What SConv2dLSTM inherits to keep its states."""

    _syn: Tensor
    _mem: Tensor
    _restarted: bool  # the stored states are the zeros of a reset, which nobody has touched
    _stored_in: int  # the backward pass in which they were stored
    _reset_source: ResetSource | None
    _logged: set[str]  # holds the reason of the slow path that was logged, if one was
    batch_first: bool
    spk: Tensor | None = None
    path: Path | None = None

    def _init_state(self, like: Tensor) -> None:
        """Start without a state, on the device and in the dtype of `like`; enter the registry."""
        self._restart(like.detach().new_zeros(0), like.detach().new_zeros(0))
        register(self)

    def _restart(self, syn: Tensor, mem: Tensor) -> None:
        self._syn, self._mem, self._restarted = syn, mem, True
        if not torch.compiler.is_compiling():
            self._stored_in = backward_pass()

    syn: Tensor = _stored_state("_syn", "synaptic current")
    mem: Tensor = _stored_state("_mem", "membrane potential")

    def __getattr__(self, name: str) -> Any:
        # snnTorch's AttributeMonitor calls this method, and nn.Module's finds no properties.
        states = name in ("syn", "mem")
        return object.__getattribute__(self, name) if states else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("syn", "mem"):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, got {value!r}")
            object.__setattr__(self, f"_{name}", value)  # nn.Module would register a Parameter
            self._restarted = False
        else:
            super().__setattr__(name, value)

    def _stored(self, name: str, shape: tuple[int, ...], x: Tensor) -> Tensor:
        """Return the stored state if it fits `shape`, else zeros; in x's dtype, on its device."""
        if torch.compiler.is_compiling():
            if self._restarted:
                return x.new_zeros(shape)
        elif backward_pass() not in (-1, self._stored_in):
            raise RuntimeError(
                "the cell is called in a backward pass, as torch.utils.checkpoint does, and its "
                "stored state is a later one than in the forward pass: pass syn and mem, call "
                "reset_mem() inside of the function that is checkpointed, or make the cell with "
                "checkpoint=True instead"
            )
        self._settle()
        stored = getattr(self, f"_{name}")
        if stored.shape != shape:
            return x.new_zeros(shape)
        if stored.dtype == x.dtype and stored.device == x.device:
            return stored
        return stored.to(x.device, x.dtype)

    def _state(
        self, name: str, state: Any, shape: tuple[int, ...], x: Tensor, weight: Tensor
    ) -> Tensor:
        """Return the state that a call starts from: what the caller gave, checked, or the stored.

        What reset_mem returned has the shape of the last input, and means zeros for any input, also
        when it was read, copied or used before.
        """
        if state is None:
            return self._stored(name, shape, x)
        fits = isinstance(state, Tensor) and state.shape == shape
        # The order matters: torch.compile compiles again when the answer to a question changes.
        if not fits and self._restarted and state is getattr(self, f"_{name}"):
            return x.new_zeros(shape)
        if not fits and not torch.compiler.is_compiling() and _as_of_a_reset(state, shape[1]):
            return x.new_zeros(shape)
        return arguments.state_tensor(name, state, shape, x, weight)

    def _store(self, call: Call, spk: Tensor, syn: Tensor, mem: Tensor, path: Path) -> None:
        """Keep the results of a call that succeeded."""
        if exporting():  # tracers must not outlive the export in the cell
            return
        if path.slow:
            log_fallback(path, self._logged, self)
        options = call.options
        kept: dict[str, Any] = {"path": path, "spk": spk}
        if options.sequence and self.batch_first:
            kept["spk"] = spk.transpose(0, 1)
        # A recorded sequence of no steps has no last states: those before it stay.
        if not options.record or syn.shape[0] > 0:
            if options.record:
                # The states are copies: snnTorch detaches states in place, which views refuse.
                syn, mem = syn[-1].clone(), mem[-1].clone()
            kept["_syn"], kept["_mem"], kept["_restarted"] = syn, mem, False
        compiling = call.signature is None
        before = None if compiling else self._reset_source
        kept["_reset_source"] = None if options.sequence else ResetSource(call, before)
        if compiling:  # dynamo follows attributes, not dictionaries
            for name, value in kept.items():
                setattr(self, name, value)
            return
        if not path.native and torch._C._are_functorch_transforms_active():
            kept["_options"] = {}  # the next call checks its stored states closely
        # The dictionary is quicker than setattr, with which nn.Module searches for parameters.
        self.__dict__.update(kept, _stored_in=backward_pass())

    def _settle(self) -> None:
        """Replace stored states that have outlived the torch.func transform which made them."""
        if not torch.compiler.is_compiling():
            for name in ("_syn", "_mem"):
                object.__setattr__(self, name, _settled(getattr(self, name)))

    @property
    def reset(self) -> Tensor | None:
        """Reset signal of the last step call, 1 where mem before it spiked; (N, C, Ho, Wo).

        Computed when it is read. None before the first call and after a sequence.

        Raises
        ------
        RuntimeError
            If the mem that was passed to the last call has been modified in place since.
        """
        return None if self._reset_source is None else self._reset_source.signal()

    def reset_mem(self) -> tuple[Tensor, Tensor]:
        """Set the stored states to zero and return them, syn and mem.

        They have the shape of the last call's and may be passed to the next call with an input
        of any size. To start from something else pass it or assign it: under torch.compile
        an edit in place of what was returned here is seen only where it is passed.
        """
        self._settle()
        self._restart(_zeros_like(self._syn), _zeros_like(self._mem))
        return self._syn, self._mem

    def init_sconv2dlstm(self) -> tuple[Tensor, Tensor]:
        """Deprecated name of :meth:`reset_mem`."""
        return self.reset_mem()

    @classmethod
    def reset_hidden(cls) -> None:
        """Set the stored states of all living cells to zero."""
        for cell in alive(StatefulCell):
            cell.reset_mem()

    @classmethod
    def detach_hidden(cls) -> None:
        """Detach the stored states of all living cells from the graph, in place.

        For truncated backpropagation through time: the states stay, and their history goes.
        Neurons of snnTorch have a ``detach_hidden()`` of their own class. States that are passed
        by hand are detached by hand.
        """
        for cell in alive(StatefulCell):
            cell._settle()
            for name in ("_syn", "_mem"):
                state = getattr(cell, name)
                if state.is_leaf or state._is_view():  # detach_ harms a leaf, and a view refuses
                    object.__setattr__(cell, name, state.detach())
                else:
                    state.detach_()

    @classmethod
    def init(cls) -> None:
        """Forget all cells: reset_hidden and detach_hidden no longer reach them."""
        clear_registries()

    @staticmethod
    def detach(*args: Tensor) -> None:
        """Detach the given states from the graph, in place."""
        for state in args:
            state.detach_()

    @staticmethod
    def zeros(*args: Tensor) -> None:
        """Set the given states to zero, in place (what snnTorch's documents, but does not do)."""
        for state in args:
            state.detach().zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StatefulCell:
        super()._apply(fn, recurse)
        self._settle()
        for name in ("_syn", "_mem"):
            old = getattr(self, name)
            new = fn(old)
            # A tensor that leaves the meta device comes in memory that nobody has written.
            object.__setattr__(self, name, torch.zeros_like(new) if old.is_meta else new)
        self._drop_caches()
        return self

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        state = self.__dict__.copy()
        # The graph that hangs on a state can be neither copied nor pickled.
        for name in ("_syn", "_mem"):
            state[name] = state[name].detach()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)
        self._drop_caches()
        register(self)


def _as_of_a_reset(state: Any, channels: int) -> bool:
    """Whether a passed state is zeros of another batch or image size, without history."""
    if not isinstance(state, Tensor) or state.requires_grad or state.is_meta:
        return False
    if state.dim() != 4 or state.shape[1] != channels:
        return False
    try:
        return not state.any()
    except RuntimeError:  # a torch.func transform hides the values
        return False


def _zeros_like(state: Tensor) -> Tensor:
    if torch.jit.is_tracing():  # a trace takes in no tensor that has a history from before it
        return torch.zeros(0, dtype=state.dtype, device=state.device)
    return torch.zeros_like(state)


def _settled(state: Tensor) -> Tensor:
    """What a stored state is outside of the torch.func transform that computed it.

    After derivatives the state keeps its values. After vmap, where it belonged to one of many
    samples, an empty state remains.
    """
    if functorch.maybe_get_level(state) == _NO_LEVEL or torch._C._are_functorch_transforms_active():
        return state
    # The wrappers come off one by one: an operator would ask for the transforms that are gone.
    while functorch.maybe_get_level(state) != _NO_LEVEL:
        if functorch.is_batchedtensor(state):
            return torch.zeros(0, dtype=state.dtype, device=state.device)
        state = functorch.get_unwrapped(state)
    return state.detach()


class LastReset:
    """A mem_reset that a subclass overrides, and what it returned last."""

    def __init__(self, mem_reset: Callable[[Tensor], Tensor]) -> None:
        self._mem_reset = mem_reset
        self.reset: Tensor | None = None

    def __call__(self, mem: Tensor) -> Tensor:
        self.reset = self._mem_reset(mem)
        return self.reset


class ResetSource:
    """The reset signal of a step's call, computed when somebody asks for it, which is rare.

    Dynamo cannot watch for modifications in place, so under torch.compile the signal is computed at
    once. While the threshold does not change, the copy of the step `before` serves.
    """

    __slots__ = ("copy", "mem", "reset", "surrogate", "threshold", "threshold_version", "version")

    def __init__(self, call: Call, before: ResetSource | None = None) -> None:
        mem, threshold, surrogate = call.mem, call.threshold, call.options.surrogate
        self.reset: Tensor | None = None
        self.copy: Tensor | None = None
        if isinstance(call.mem_reset, LastReset):
            self.reset = call.mem_reset.reset
            return
        if call.signature is None:
            self.reset = reset_signal(mem, threshold, surrogate)
            return
        self.mem, self.version, self.surrogate = mem, version(mem), surrogate
        # Optimizers, and users, write to a threshold in place.
        self.threshold, self.threshold_version = threshold, version(threshold)
        if (
            before is not None
            and before.copy is not None
            and before.threshold is threshold
            and before.threshold_version == self.threshold_version
        ):
            self.copy = before.copy
        else:
            self.copy = threshold.detach().clone()

    def signal(self) -> Tensor:
        """Return the reset signal, of mem's shape; see :attr:`SConv2dLSTM.reset`."""
        if self.reset is not None:
            return self.reset
        if version(self.mem) != self.version:
            raise RuntimeError(
                "reset can no longer be computed: the mem that was passed to the last call was "
                "modified in place; read reset before that"
            )
        assert self.copy is not None
        same = version(self.threshold) == self.threshold_version
        if same and not torch.allclose(self.threshold, self.copy, 0, 0, equal_nan=True):
            raise RuntimeError(
                "reset can no longer be computed: the threshold was modified through .data, and "
                "whether before or after the last call cannot be told"
            )
        with torch.no_grad():
            return reset_signal(self.mem, self.copy, self.surrogate)
