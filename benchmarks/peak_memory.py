"""Reads the size of this process's resident set and its high-water mark, as Linux counts them."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path


class Unsupported(Exception):
    """This error says what the system lacks."""


def watch() -> int:
    """Gives freed memory back and resets the high-water mark; returns the bytes now resident.

    Raises Unsupported if there is no Linux /proc, or if it is read-only.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # a C library that is not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
    except OSError as error:
        raise Unsupported(f"peak memory needs Linux's /proc/self/clear_refs ({error})") from None
    return _status("VmRSS")


def high_water() -> int:
    """Returns the largest number of bytes that were resident since `watch`."""
    return _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise Unsupported(f"/proc/self/status has no {field}")
