"""What the user reads and sets on a cell, attributes and states, and how both are saved."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..calls import spec
from ..calls.call import check_threshold, values
from ..calls.entries import NO_ENTRIES
from ..calls.spec import RESETS, CellSpec, Reset
from ..compat.registry import alive, clear_registries, register, untraced
from ..compat.snntorch import Base
from ..compat.torch_private import exporting
from ..dispatch.path import LastPath
from ..surrogate import is_number
from .state import NO_RESET, State


class CellAttributes(Base):
    """The attributes and states of SConv2dLSTM; changes take effect from the next call on."""

    registers_itself = True  # snnTorch's list has no place for it
    _dims: ClassVar[int] = 2
    """Dimensions of an image: 2, height and width, or 1, length."""

    _conv_kind: ClassVar[Any] = nn.Conv2d

    threshold: Tensor
    graded_spikes_factor: Tensor
    reset_mechanism_val: Tensor
    path = LastPath()
    _state: State
    _reset_mechanism: Reset
    _spec: CellSpec | None
    """What the attributes say; None while they contradict each other."""
    _entries: Any = NO_ENTRIES
    """The entries of the last call, and of the last one that had another entry."""
    _initial_threshold: Any
    _layer_name: str = ""
    """The cell's name in the network that was accelerated, for the log."""

    # ---- spec -----------------------------------------------------------------------------

    def _make_spec(self) -> CellSpec:
        """Make the spec of the attributes; an error says which of them contradict each other."""
        options = spec.OPTIONS.values()
        described = {
            option.name: getattr(self, option.name) for option in options if option.describes
        }
        return spec.make_spec(self.kernel_size, dims=self._dims, **described)

    def _remake_spec(self) -> None:
        """Make the spec again, at once, because torch.compile must find it ready."""
        try:
            self._spec = self._make_spec()
        except ValueError:  # two attributes contradict each other until the second one is set
            self._spec = None

    # ---- attributes -----------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        if name == "reset":
            raise AttributeError(NO_RESET)
        # snnTorch's AttributeMonitor calls this method, and nn.Module's finds no properties.
        states = name in ("syn", "mem")
        return object.__getattribute__(self, name) if states else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("syn", "mem"):  # nn.Module would register a Parameter
            object.__setattr__(self, name, value)
        elif name in spec.OPTIONS:
            super().__setattr__(name, spec.OPTIONS[name].check(value, self._dims))
            if "_state" in self.__dict__:  # the constructor has run
                self._remake_spec()
        elif name in ("threshold", "graded_spikes_factor") and is_number(value):
            if name == "threshold":
                check_threshold(value)
            self._set_number(name, float(value))
        elif name == "reset_mechanism_val" and isinstance(value, Tensor):
            reset = spec.reset_of_number(value)
            super().__setattr__(name, value)
            self._follow(reset)
        else:
            super().__setattr__(name, value)

    def _set_number(self, name: str, value: float) -> None:
        """Give all elements of a parameter or buffer one value."""
        tensor = getattr(self, name)
        if isinstance(tensor, nn.Parameter):  # optimizers hold this very object
            with torch.no_grad():
                tensor.fill_(value)
        else:  # a new tensor: the old one may be saved for a backward pass
            super().__setattr__(name, torch.full_like(tensor, value))

    @property
    def reset_mechanism(self) -> str:
        """Name of the reset mechanism: "subtract", "zero" or "none"."""
        return self._reset_mechanism

    @reset_mechanism.setter
    def reset_mechanism(self, value: Reset) -> None:
        self._reset_mechanism = value
        self.reset_mechanism_val = self._reset_index(self.reset_mechanism_val.device)

    def _reset_index(self, device: torch.device) -> Tensor:
        return torch.tensor(RESETS.index(self._reset_mechanism), device=device)

    def _follow(self, reset: Reset | None) -> None:
        """Adopt the buffer's reset mechanism, which is None if the buffer cannot be read."""
        if reset is not None:
            self._reset_mechanism = reset
            if "_state" in self.__dict__:
                self._remake_spec()

    def extra_repr(self) -> str:
        """Arguments that differ from their defaults."""
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"]
        for name, option in spec.OPTIONS.items():
            value = getattr(self, name)
            if option.default is not None and not option.is_default(value):  # no callable
                parts.append(f"{name}={value!r}")
        if self.threshold.numel() == 1 and not self.threshold.is_meta:
            parts.append(f"threshold={self.threshold.item():g}")
        return ", ".join(parts)

    # ---- states ---------------------------------------------------------------------------

    def _states(self) -> State:
        """The stored states; within an export, those of the export."""
        if exporting():
            return self._state.exported()
        if not torch.compiler.is_compiling():  # which would guard on the tensors
            self._state.forget_ended()
        return self._state

    @property
    def spk(self) -> Tensor | None:
        """The last spikes; None before the first call."""
        return self._state.exported().spk if exporting() else self.__dict__.get("spk")

    @spk.setter
    def spk(self, value: Tensor | None) -> None:
        self.__dict__["spk"] = value

    @property
    def syn(self) -> Tensor:
        """Stored synaptic current, (N, C, Ho, Wo), or (0,) before the first call."""
        return self._states().syn

    @syn.setter
    def syn(self, value: Tensor) -> None:
        self._states().write("syn", value)

    @property
    def mem(self) -> Tensor:
        """Stored membrane potential, (N, C, Ho, Wo), or (0,) before the first call."""
        return self._states().mem

    @mem.setter
    def mem(self, value: Tensor) -> None:
        self._states().write("mem", value)

    def reset_mem(self) -> tuple[Tensor, Tensor]:
        """Set the stored states to zero and return them, syn and mem.

        They have the shape of the last call's states and may be passed to the next call with an
        input of any size. To start from other states, pass or assign them. Under torch.compile
        they are empty, (0,), which means zeros, and an in-place change of the returned tensors, or
        of ``syn`` and ``mem`` after a reset, takes effect only if the tensor is passed.
        """
        traced = torch.compiler.is_compiling()
        return self._states().reset(self.graded_spikes_factor if traced else None)

    def init_sconv2dlstm(self) -> tuple[Tensor, Tensor]:
        """Deprecated name of :meth:`reset_mem`."""
        return self.reset_mem()

    init_sconvlstm = init_sconv2dlstm  # snnTorch's older name of that method

    @classmethod
    @untraced
    def reset_hidden(cls) -> None:
        """Set the stored states of all living cells to zero."""
        for cell in alive(CellAttributes):
            cell.reset_mem()

    def _detach(self) -> None:
        self._states().detach()

    @classmethod
    @untraced
    def detach_hidden(cls) -> None:
        """Detach the stored states of all living cells from the graph, in place.

        This serves truncated backpropagation through time: it keeps states and drops their history.
        snnTorch's neurons have their own ``detach_hidden()``. Detach passed states yourself.
        """
        for cell in alive(CellAttributes):
            cell._detach()

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
        """Set the given states to zero, in place; snnTorch documents this, but does not do it."""
        for state in args:
            state.detach().zero_()

    # ---- moving, saving and loading -------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CellAttributes:
        super()._apply(fn, recurse)
        self._state.apply(fn)
        return self

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, *rest: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *rest)
        try:
            self._follow(spec.reset_of_number(self.reset_mechanism_val))
        except ValueError as error:
            error_msgs = rest[-1]
            error_msgs.append(str(error))

    def reset_parameters(self) -> None:
        """Reset parameters and buffers to their initial values, and the states to zero."""
        self.conv.reset_parameters()
        with torch.no_grad():
            self.threshold.copy_(values(self._initial_threshold))
            self.graded_spikes_factor.fill_(1)
            self.reset_mechanism_val.copy_(self._reset_index(self.reset_mechanism_val.device))
        self.reset_mem()

    def _replicate_for_data_parallel(self) -> Any:
        """Return a replica for DataParallel, which shares the attributes but has its own states."""
        replica = super()._replicate_for_data_parallel()
        replica._state = self._state.shared()
        return replica

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_spec"], state["_entries"] = None, NO_ENTRIES
        state["_state"] = copy(self._state)  # State.__getstate__ leaves the graph out
        for name in ("spk", "_path"):  # spk holds the graph of the last call
            state.pop(name, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)
        self._remake_spec()
        register(self)


CELL: Any = CellAttributes if Base is nn.Module else Base
"""The class of all cells, ours and snnTorch's."""
