"""The implementation that ran a call, and the log of those that are slow.

A module shows its last :class:`Path` as ``cell.path``. The log names the first slow path of a cell.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

logger = logging.getLogger("snnlstm")


@dataclass(frozen=True)
class Path:
    """The implementation that ran a call.

    Parameters
    ----------
    name : str
        ``"reference"``, or the name of the native kernels, such as ``"cpu-avx2-direct"``.
        ``"compiled"`` if a backend of torch.compile runs a Leaky as plain operators. ``"torch"``
        if torch's function ran a layer of torch's.
    reason : str
        Why, in plain words.
    slow : bool, default False
        Whether the call fell back to the reference path although the caller could expect the native
        kernels. A cell's first such path is logged.
    general : bool, default False
        Whether the reason lies in the installation, the machine, or hooks that tools set on all
        modules. Each such reason is logged once per process.
    """

    name: str
    reason: str
    slow: bool = False
    general: bool = False

    @property
    def native(self) -> bool:
        """Whether the native kernels ran, and not plain torch, compiled or not."""
        return self.name not in ("reference", "compiled", "torch")

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


@dataclass
class PathInGraph:
    """What the layers of a graph hold in the place of a path, which its compiler chooses later."""

    path: Path


class LastPath:
    """The attribute ``path`` of a module, which tells what ran its last call.

    It has no setter: a `path` that the user sets on a module, even a submodule or a tensor, stays,
    and then only the log names slow paths.
    """

    def __get__(self, module: nn.Module | None, owner: type | None = None) -> Path | None:
        """Return the path of the last call, None before the first."""
        if module is None:
            return None
        attributes = module.__dict__
        for kind in ("_modules", "_parameters", "_buffers"):
            if "path" in attributes.get(kind, ()):
                return attributes[kind]["path"]
        path = attributes.get("_path")
        return path.path if isinstance(path, PathInGraph) else path


@lru_cache(maxsize=64)
def native_path(name: str) -> Path:
    """The path of a call that the native kernels `name` ran."""
    return Path(name, "the native kernels cover this call")


# ---- the log ------------------------------------------------------------------------------------


_logged: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()
"""The topics that were logged of a module, or of this package, as which :class:`Path` serves."""


def log_once(module: nn.Module | None, topic: str, text: str, *args: Any) -> None:
    """Log a warning once per topic and module, or once per process if `module` is None."""
    logged = _logged.setdefault(Path if module is None else module, set())
    if topic not in logged:
        logged.add(topic)
        logger.warning(text, *args)


def log_fallback(path: Path, cell: nn.Module) -> None:
    """Log the first slow path of a cell.

    A general reason says nothing about the cell and is logged once per process. Hooks that tools
    set on every module, to count operations or to print summaries, are such a reason.
    """
    who, text = type(cell).__name__, "%s takes the reference path, which is slower: %s"
    if path.general:
        log_once(None, path.reason, text, who, path.reason)
    elif "path" not in _logged.get(cell, ()):
        who = f"{who}({cell.extra_repr()})"
        if name := getattr(cell, "_layer_name", ""):
            who = f"layer {name}, {who},"
        log_once(cell, "path", text, who, path.reason)
