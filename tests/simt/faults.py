"""Finds the names and numbers of seeded faults in fault.cuh, and their places in kernels."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from tests.simt.builder import ROOT

HEADER = ROOT / "csrc" / "cuda" / "fault.cuh"


def fault_numbers() -> dict[str, int]:
    """``{"missing_wait": 1, ...}``, as in fault.cuh."""
    body = re.search(r"enum class Fault : int \{(.*?)\};", HEADER.read_text(), re.DOTALL)[1]
    return {name: int(n) for name, n in re.findall(r"(\w+) = (\d+)", body) if n != "0"}


def placed_faults(paths: Iterable[Path]) -> dict[tuple[str, int], str]:
    """The file of every ``fault(Fault::name, place)`` in these sources, by name and place."""
    found = {}
    for path in paths:
        if path.name in ("fault.cuh", "primitives.cuh"):
            continue
        code = re.sub(r"//[^\n]*", "", path.read_text())
        for name, place in re.findall(r"\bfault\(\s*Fault::(\w+)\s*(?:,\s*(\d+)\s*)?\)", code):
            found[name, int(place or 0)] = path.name
    return dict(sorted(found.items()))
