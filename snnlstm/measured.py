"""Choices that were measured, kept for the process.

:func:`snnlstm.set_algorithm` says when there are any; :mod:`snnlstm.native.ways` makes them.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict

__all__ = ["Choices", "choices"]

_MOST = 4096  # choices that are kept, of some 300 bytes each


class Choices:
    """Names of what was fastest, by a text that says of what; the least recently used go first.

    There is no lock, which a fork could leave locked: of two threads that measure the same thing,
    the first to keep its choice decides.
    """

    def __init__(self) -> None:
        self._found: OrderedDict[str, str] = OrderedDict()

    def clear(self) -> None:
        """Forget all choices."""
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
        while len(self._found) > _MOST:
            self._found.popitem(last=False)
        return name


choices = Choices()
