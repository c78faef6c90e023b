"""The attributes that describe what a cell computes: checked when set, and turned to options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import arguments
from .call import RESETS, CellOptions, Reset
from .state import StatefulCell
from .surrogate import NONE, is_number

__all__ = ["DescribedCell"]

# The check of each attribute, which returns what is set.
_CHECKS: dict[str, Callable[[Any], Any]] = {
    "spike_grad": lambda value: arguments.surrogate(value),
    "state_quant": lambda value: arguments.quantiser(value) or False,
    "checkpoint": lambda value: arguments.checkpoint_way(value),
    "max_pool": lambda value: arguments.pooling(value, 0) and value,
    "avg_pool": lambda value: arguments.pooling(0, value) and value,
    "stride": lambda value: arguments.pair("stride", value),
    "dilation": lambda value: arguments.pair("dilation", value),
}
for _name in ("surrogate_disable", "inhibition", "init_hidden", "output", "batch_first"):
    _CHECKS[_name] = partial(arguments.flag, _name)


class DescribedCell(StatefulCell):
    """What SConv2dLSTM inherits so that its attributes may be set at any time.

    What runs is what the attributes say, from the next call on.
    """

    threshold: Tensor
    graded_spikes_factor: Tensor
    reset_mechanism_val: Tensor
    _reset_mechanism: Reset
    _options: dict[tuple[bool, bool], CellOptions]
    _adopted: dict[str, Any] | None = None
    """The callables of the snnTorch cell that this one stands in for, by their names."""
    _layer_name: str = ""
    """The cell's name in the network that was accelerated, for the log."""

    def _describe(self, sequence: bool = False, record: bool = False) -> CellOptions:
        """Return the options of a call, from a cache that setting an attribute empties."""
        options = self._options.get((sequence, record))
        if options is not None:
            return options
        quant = self.state_quant
        made = arguments.make_options(
            self.kernel_size,
            stride=self.stride,
            dilation=self.dilation,
            reset=self._reset_mechanism,
            max_pool=self.max_pool,
            avg_pool=self.avg_pool,
            surrogate=NONE if self.surrogate_disable else self.spike_grad,
            quant=None if quant is False else quant,
            inhibition=self.inhibition,
            checkpoint=self.checkpoint,
        )
        # All three are made at once: torch.compile compiles again when an entry that it saw missing
        # appears.
        every = {
            (sequence, record): replace(made, sequence=sequence, record=record)
            for sequence, record in ((False, False), (True, False), (True, True))
        }
        if not torch.compiler.is_compiling():
            self._options = every
        return every[sequence, record]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _CHECKS:
            super().__setattr__(name, _CHECKS[name](value))
            self._options = {}
        elif name in ("threshold", "graded_spikes_factor") and is_number(value):
            self._set_number(name, float(value))
        elif name == "reset_mechanism_val" and isinstance(value, Tensor):
            reset = arguments.reset_mechanism_val(value)
            super().__setattr__(name, value)
            self._follow_reset_mechanism(reset)
        else:
            super().__setattr__(name, value)

    def _set_number(self, name: str, value: float) -> None:
        """Give all elements of a parameter or buffer one value."""
        tensor = getattr(self, name)
        if isinstance(tensor, nn.Parameter):  # optimizers know this object
            with torch.no_grad():
                tensor.fill_(value)
        else:  # a new tensor: the old one may be saved for a backward pass
            super().__setattr__(name, torch.full_like(tensor, value))

    @property
    def reset_mechanism(self) -> str:
        """Name of the reset mechanism: "subtract", "zero" or "none"."""
        return self._reset_mechanism

    @reset_mechanism.setter
    def reset_mechanism(self, value: str) -> None:
        self._reset_mechanism = arguments.reset_mechanism(value)
        self.reset_mechanism_val = self._reset_index(self.reset_mechanism_val.device)
        self._options = {}

    def _reset_index(self, device: torch.device) -> Tensor:
        return torch.tensor(RESETS.index(self._reset_mechanism), device=device)

    def _follow_reset_mechanism(self, reset: Reset | None) -> None:
        """Let what runs agree with the buffer; `reset` is None where the buffer cannot be read."""
        if reset is not None:
            self._reset_mechanism = reset
            self._options = {}

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, *rest: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *rest)
        try:
            self._follow_reset_mechanism(arguments.reset_mechanism_val(self.reset_mechanism_val))
        except ValueError as error:
            error_msgs = rest[-1]
            error_msgs.append(str(error))

    def _drop_caches(self) -> None:
        """Forget what hangs on the last call or is made from attributes."""
        self._options = {}
        self._reset_source = None

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state["_options"], state["_reset_source"], state["_logged"] = {}, None, set()
        state.pop("spk", None)  # spk hangs on the graph of the last call
        if self._adopted is not None:
            state["_adopted"] = {}  # snnTorch's closures cannot be pickled
        return state
