"""Choices that were measured, kept for the process, and in a file if one is given.

:func:`snnlstm.set_algorithm` says when there are any; :mod:`snnlstm.native.ways` makes them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections import OrderedDict
from pathlib import Path

__all__ = ["Choices", "choices"]

logger = logging.getLogger("snnlstm")

_MOST = 4096  # choices that are kept, of some 300 bytes each


class Choices:
    """Names of what was fastest, by a text that says of what; the least recently used go first.

    There is no lock, which a fork could leave locked: of two threads that measure the same thing,
    the first to keep its choice decides.
    """

    def __init__(self) -> None:
        self._found: OrderedDict[str, str] = OrderedDict()
        self.file: Path | None = None

    def keep_in(self, file: Path | None) -> None:
        """Take over what a file holds, if it exists, and write further choices to it.

        A file that holds something else is a ValueError.
        """
        if file is not None:
            for key, name in _read(file).items():
                self._found.setdefault(key, name)
            self._drop_oldest()
        self.file = file

    def clear(self) -> None:
        """Forget all choices; a file keeps its own."""
        self._found.clear()

    def find(self, key: str) -> str | None:
        """The name that was kept, or None."""
        name = self._found.get(key)
        with contextlib.suppress(KeyError):  # another thread may have dropped it just now
            self._found.move_to_end(key)
        return name

    def keep(self, key: str, name: str) -> str:
        """Keep a choice, unless there is one; returns that which is kept."""
        name = self._found.setdefault(key, name)
        self._drop_oldest()
        if self.file is not None:
            try:
                _write(self.file, key, name)
            except (OSError, ValueError) as error:
                logger.warning("%s gets no further measured choices: %s", self.file, error)
                self.file = None
        return name

    def _drop_oldest(self) -> None:
        while len(self._found) > _MOST:
            self._found.popitem(last=False)


def _read(file: Path) -> dict[str, str]:
    try:
        text = file.read_text()
    except FileNotFoundError:
        return {}
    try:
        held = json.loads(text)
    except ValueError:
        held = None
    if not isinstance(held, dict) or not all(isinstance(name, str) for name in held.values()):
        raise ValueError(f"file must hold choices that snnlstm has written, got {file}")
    return held


def _write(file: Path, key: str, name: str) -> None:
    """Add a choice to what other processes may have written, in one piece; the latest stay."""
    held = _read(file)
    held.pop(key, None)
    held = dict([*held.items(), (key, name)][-_MOST:])
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(held, indent=1) + "\n")
        beside.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


choices = Choices()
