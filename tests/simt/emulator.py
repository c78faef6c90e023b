"""A library of emulated kernels, seen from Python.

emulator = Emulator(build("kernels", [...], "checked"))
emulator.schedule("ahead", seed=3)
with emulator.arrays(a=a, out=(out, "w")):
    emulator.call("run_gemm", a, out, 64, 64, 64)
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

SCHEDULES = {"in_order": 0, "shuffled": 1, "ahead": 2}


class EmulationError(RuntimeError):
    """A kernel did what it must not do; the text says which thread, where in the source."""


class Spot(NamedTuple):
    """One line of a kernel: its requests to a memory, their cost, and the fewest possible.

    In wavefronts of shared memory, or sectors of 32 bytes of global memory.
    """

    kernel: str
    place: str
    space: str
    requests: int
    cost: int
    fewest: int


class Launch(NamedTuple):
    kernel: str
    blocks: int
    threads: int
    shared_bytes: int


class Emulator:
    """Settings hold until they are changed; each test asks for what it needs."""

    def __init__(self, library: Path):
        self.path = library
        self.lib = ctypes.CDLL(str(library))
        self.lib.simt_register.restype = ctypes.c_char_p
        self.lib.simt_counters.restype = ctypes.c_char_p
        self.lib.simt_spots.restype = ctypes.c_char_p
        self.lib.simt_launches.restype = ctypes.c_char_p
        self.instrumented = bool(self.lib.simt_instrumented())
        self.reset()

    def reset(self) -> None:
        """The default settings: threads in order, all checks, no counters, no fault, sm_80."""
        self.schedule("in_order")
        self.checks()
        self.fault(0)
        self.compute_capability(80)
        self.truncate(False)
        self.lib.simt_dry(0)
        self.lib.simt_reset_counters()

    def schedule(self, policy: str, seed: int = 0) -> None:
        self.lib.simt_schedule(SCHEDULES[policy], ctypes.c_uint64(seed))

    def checks(self, bounds: bool = True, races: bool = True, counters: bool = False) -> None:
        self.lib.simt_checks(int(bounds), int(races), int(counters))

    def fault(self, number: int, place: int = 0) -> None:
        """Switches one seeded fault on (variant "faults"); 0: none."""
        self.lib.simt_fault(number, place)

    def compute_capability(self, number: int) -> None:
        self.lib.simt_compute_capability(number)

    def truncate(self, on: bool = True) -> None:
        """Sums of ``mma`` round towards zero, as those of tensor cores are reported to."""
        self.lib.simt_truncate(int(on))

    @contextlib.contextmanager
    def dry(self) -> Iterator[list[Launch]]:
        """Within the block nothing runs; after it the list holds what would have been launched."""
        found: list[Launch] = []
        self.lib.simt_dry(1)
        self.lib.simt_launches()
        try:
            yield found
        finally:
            self.lib.simt_dry(0)
            found += [Launch(*row) for row in json.loads(self.lib.simt_launches().decode())]

    def counters(self) -> dict[str, dict[str, int]]:
        """Totals since the last reset, by kernel name (see emulator/count.cpp)."""
        found = json.loads(self.lib.simt_counters().decode())
        return {kernel: Counter(numbers) for kernel, numbers in found.items()}

    def spots(self) -> list[Spot]:
        """The same by line of the source, the most wasteful first."""
        joint: dict[tuple[str, str, str], list[int]] = {}
        for kernel, place, space, *numbers in json.loads(self.lib.simt_spots().decode()):
            sums = joint.setdefault((kernel, symbolise(place), space), [0, 0, 0])
            sums[:] = [a + b for a, b in zip(sums, numbers, strict=True)]
        found = [Spot(*key, *sums) for key, sums in joint.items()]
        return sorted(found, key=lambda s: s.fewest - s.cost)

    def reset_counters(self) -> None:
        self.lib.simt_reset_counters()

    def register(self, address: int, nbytes: int, name: str, writable: bool = True) -> None:
        problem = self.lib.simt_register(
            ctypes.c_void_p(address), ctypes.c_size_t(nbytes), name.encode(), int(writable)
        )
        if problem:
            raise ValueError(problem.decode())

    def unregister(self, address: int) -> None:
        self.lib.simt_unregister(ctypes.c_void_p(address))

    @contextlib.contextmanager
    def arrays(self, **arrays: np.ndarray | tuple[np.ndarray, str]) -> Iterator[None]:
        """Kernels may read these arrays and, of those given as ``(array, "w")``, write them."""
        known = []
        try:
            for name, given in arrays.items():
                array, writable = (given[0], True) if isinstance(given, tuple) else (given, False)
                self.register(array.ctypes.data, array.nbytes, name, writable)
                known.append(array.ctypes.data)
            yield
        finally:
            for address in known:
                self.unregister(address)

    def call(self, name: str, *args: np.ndarray | int | float) -> None:
        """Calls ``const char* name(...)``, which returns null or what went wrong."""
        function = getattr(self.lib, name)
        function.restype = ctypes.c_char_p
        problem = function(*map(_argument, args))
        if problem:
            raise EmulationError(symbolise(problem.decode()))


def _argument(value):
    if isinstance(value, np.ndarray):
        return ctypes.c_void_p(value.ctypes.data)
    return ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int(value)


def symbolise(text: str) -> str:
    """Replaces ``<library+0x12>`` by the source line, where addr2line is at hand."""

    def place(match: re.Match) -> str:
        command = ["addr2line", "-Cfie", match[1], match[2]]
        try:
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return match[0]
        lines = out.splitlines()
        # Innermost first: the wrappers of the primitives say nothing about the kernel.
        for function, where in zip(lines[::2], lines[1::2], strict=False):
            if not re.search(r"(simt\.h|primitives\.cuh|launch\.cuh|half\.cuh):", where):
                name = function.replace("(anonymous namespace)::", "").split("(")[0]
                return f"{where.split(' (')[0]} ({name})"
        return match[0]

    return re.sub(r"<([^<>]+)\+(0x[0-9a-f]+)>", place, text)
