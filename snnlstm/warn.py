"""Warnings that name the line outside of this package, once for each place of the user's code."""

from __future__ import annotations

import sys
import warnings
from types import CodeType
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from .surrogate import is_number

__all__ = ["DOCUMENTATION", "never_spikes", "warn_of_threshold"]

DOCUMENTATION = "https://OWNER.github.io/snnlstm/"

_warned: WeakKeyDictionary[CodeType, list[Any]] = WeakKeyDictionary()
"""Functions and modules that made a cell which never spikes, and Python's filters at that time."""


def warn_of_threshold(threshold: Any) -> None:
    """Warn of a cell that cannot spike; of several that one function makes, at the first.

    Where the filters of warnings have changed since, or begin with "always" or "error", the
    warning comes again.
    """
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and frame.f_globals.get("__package__") == __package__:
        level, frame = level + 1, frame.f_back
    filters = list(warnings.filters)
    each = bool(filters) and filters[0][0] in ("always", "error")
    if not each and _warned.get(frame.f_code) == filters:
        return
    _warned[frame.f_code] = filters
    warnings.warn(
        f"threshold={threshold} is never exceeded: mem = o * tanh(syn) is at most 1, so this cell "
        "never spikes. Use a lower threshold (0.1 and below are usual) or learn_threshold=True. "
        "snnlstm.spike_rates(net) shows what spikes; see "
        f"{DOCUMENTATION}quickstart.html#does-it-spike-at-all",
        UserWarning,
        stacklevel=level,
    )


def never_spikes(threshold: Any) -> bool:
    """Whether no mem can exceed the threshold: mem = o * tanh(syn) is at most 1."""
    if isinstance(threshold, Tensor):
        return not threshold.is_meta and bool((threshold.detach() >= 1).all())
    return is_number(threshold) and bool(threshold >= 1)
