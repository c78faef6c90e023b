"""Finds the names of seeded faults in fault.cuh, and their places in kernels."""

from __future__ import annotations

import re

from tests.simt.builder import ROOT

CUDA = ROOT / "csrc" / "cuda"


def fault_numbers() -> dict[str, int]:
    """The faults by name; "none" is 0."""
    text = re.sub(r"//[^\n]*", "", (CUDA / "fault.cuh").read_text())
    body = re.search(r"enum class Fault : int \{(.*?)\};", text, re.DOTALL)
    assert body is not None
    return {name: number for number, name in enumerate(re.findall(r"\w+", body[1]))}


def placed_faults() -> list[tuple[str, str]]:
    """Name and file of every ``fault(Fault::name)`` in the kernels."""
    found = []
    for path in sorted(CUDA.glob("*.cu*")):
        code = re.sub(r"//[^\n]*", "", path.read_text())
        found += [(name, path.name) for name in re.findall(r"\bfault\(Fault::(\w+)\)", code)]
    return found
