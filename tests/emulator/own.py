"""Runs the emulator's own kernels, and tells what results they should have."""

from __future__ import annotations

import functools

import numpy as np

from tests.emulator.builder import build
from tests.emulator.library import Emulator


@functools.cache
def own_kernels() -> Emulator:
    return Emulator(build("own"))


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Bit patterns of x, rounded to nearest even."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_tf32(x: np.ndarray) -> np.ndarray:
    """x, rounded to nearest, ties away from zero."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((u + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def run_case(emulator: Emulator, name: str, bad: bool = False, given=None, out=None) -> None:
    """Runs a CASE of kernels/, on arrays of 64 or those given. A report raises EmulationError."""
    given = np.arange(64, dtype=np.float32) if given is None else given
    out = np.zeros(64, np.float32) if out is None else out
    with emulator.arrays(**{"in": given, "out": (out, "w")}):
        emulator.call("run_case", name, int(bad), given, out)
