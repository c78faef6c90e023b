"""A library of emulated kernels, for Python.

emulator = Emulator(build("own"))
emulator.settings.seed = 3
with emulator.arrays(a=a, out=(out, "w")):
    emulator.call("run", a, out, 64)
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.emulator.builder import ROOT, build

CUDA = ROOT / "csrc" / "cuda"


class EmulationError(RuntimeError):
    """A kernel did what it must not do. The text names the thread and the line of the source."""


class Launch(NamedTuple):
    kernel: str
    blocks: int
    threads: int
    shared_bytes: int


class Settings(ctypes.Structure):
    """The struct of this name in machine/machine.h, which documents the fields."""

    NUMBERS = "races compute_capability truncates dry shared_bytes"
    _fields_ = [("seed", ctypes.c_uint64), *((n, ctypes.c_int) for n in NUMBERS.split())]


class Emulator:
    """Settings hold until they are changed."""

    def __init__(self, library: Path):
        self.path = library
        self.lib = ctypes.CDLL(str(library))
        for name in ("register", "launches"):
            getattr(self.lib, f"simt_{name}").restype = ctypes.c_char_p
        self.lib.simt_copy_of.restype = ctypes.c_void_p
        self.settings = Settings.in_dll(self.lib, "simt_settings")
        self._defaults = bytes(self.settings)
        self.reset()

    def reset(self) -> None:
        """Sets the defaults: seed 0, all checks, no fault, sm_80. Forgets launches."""
        ctypes.memmove(ctypes.byref(self.settings), self._defaults, len(self._defaults))
        self.fault("none")
        self.launches()

    def fault(self, name: str) -> None:
        """Switches one seeded fault of fault.cuh on."""
        self.lib.simt_fault(fault_numbers()[name])

    def launches(self) -> list[Launch]:
        """What was launched since the last call."""
        lines = self.lib.simt_launches().decode().splitlines()
        rows = [line.split("\t") for line in lines]
        return [Launch(kernel, *map(int, numbers)) for kernel, *numbers in rows]

    @contextlib.contextmanager
    def dry(self) -> Iterator[list[Launch]]:
        """Within the block nothing runs. After it the list holds what would have been launched."""
        found: list[Launch] = []
        self.settings.dry = 1
        self.launches()
        try:
            yield found
        finally:
            self.settings.dry = 0
            found += self.launches()

    @contextlib.contextmanager
    def arrays(self, **arrays: np.ndarray | tuple[np.ndarray, str]) -> Iterator[None]:
        """Kernels may read these arrays, and write those that are given as ``(array, "w")``.

        They work on copies, and what they have written is in the arrays after the block.
        """
        known = []
        try:
            for name, given in arrays.items():
                array, writable = (given[0], True) if isinstance(given, tuple) else (given, False)
                address = ctypes.c_void_p(array.ctypes.data)
                size = ctypes.c_size_t(array.nbytes)
                problem = self.lib.simt_register(address, size, name.encode(), int(writable))
                if problem:
                    raise ValueError(problem.decode())
                known.append(address)
            yield
        finally:
            for address in known:
                self.lib.simt_unregister(address)

    def call(self, name: str, *args: np.ndarray | int | str) -> None:
        """Calls ``const char* name(...)``, which returns null or what went wrong."""
        function = getattr(self.lib, name)
        function.restype = ctypes.c_char_p
        problem = function(*map(self._argument, args))
        if problem:
            raise EmulationError(symbolise(problem.decode()))

    def _argument(self, value):
        if isinstance(value, np.ndarray):
            return ctypes.c_void_p(self.lib.simt_copy_of(ctypes.c_void_p(value.ctypes.data)))
        return value.encode() if isinstance(value, str) else ctypes.c_int(value)


@functools.cache
def own_kernels() -> Emulator:
    """Builds and loads the kernels of the emulator's own tests."""
    return Emulator(build("own"))


def run_case(emulator: Emulator, name: str, bad: bool = False, out=None) -> None:
    """Runs a CASE of kernels/ on arrays of 64. A report raises EmulationError."""
    given = np.arange(64, dtype=np.float32)
    out = np.zeros(64, np.float32) if out is None else out
    with emulator.arrays(**{"in": given, "out": (out, "w")}):
        emulator.call("run_case", name, int(bad), given, out)


def symbolise(text: str) -> str:
    """Replaces ``<library+0x12>`` by the source line, if there is addr2line."""

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


# ---- seeded faults, of fault.cuh ----------------------------------------------------------------


def fault_numbers() -> dict[str, int]:
    """The faults by name; "none" is 0."""
    text = re.sub(r"//[^\n]*", "", (CUDA / "kernels" / "fault.cuh").read_text())
    body = re.search(r"enum class Fault : int \{(.*?)\};", text, re.DOTALL)
    assert body is not None
    return {name: number for number, name in enumerate(re.findall(r"\w+", body[1]))}


def placed_faults() -> list[str]:
    """Name of every ``fault(Fault::name)`` in the kernels."""
    found = []
    for path in sorted(CUDA.rglob("*.*")):
        code = re.sub(r"//[^\n]*", "", path.read_text())
        found += re.findall(r"\bfault\(Fault::(\w+)\)", code)
    return found
