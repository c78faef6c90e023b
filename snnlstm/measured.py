"""Choices that were measured, kept for the process, and in a file if one is given.

:func:`snnlstm.set_algorithm` says when there are any; :mod:`snnlstm.native.ways` makes them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from pathlib import Path

__all__ = ["Choices", "choices"]

logger = logging.getLogger("snnlstm")


class Choices:
    """Names of what was fastest, by a text that says of what.

    There is no lock, which a fork could leave locked: of two threads that measure the same thing,
    the first to keep its choice decides.
    """

    def __init__(self) -> None:
        self._found: dict[str, str] = {}
        self.file: Path | None = None

    def keep_in(self, file: Path | None) -> None:
        """Take over what a file holds, if it exists, and write further choices to it.

        Raises
        ------
        ValueError
            If the file holds something else.
        """
        if file is not None:
            for key, name in _read(file).items():
                self._found.setdefault(key, name)
        self.file = file

    def clear(self) -> None:
        """Forget all choices; a file keeps its own."""
        self._found.clear()

    def find(self, key: str) -> str | None:
        """The name that was kept, or None."""
        return self._found.get(key)

    def keep(self, key: str, name: str) -> str:
        """Keep a choice, unless there is one; returns that which is kept."""
        name = self._found.setdefault(key, name)
        if self.file is not None:
            try:
                _write(self.file, key, name)
            except (OSError, ValueError) as error:
                logger.warning("%s gets no further measured choices: %s", self.file, error)
                self.file = None
        return name


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
    """Add a choice to what other processes may have written, in one piece."""
    held = _read(file) | {key: name}
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(held, indent=1, sort_keys=True) + "\n")
        beside.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


choices = Choices()
