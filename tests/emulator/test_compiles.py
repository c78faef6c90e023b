"""Kernels compile with nvcc for every architecture, and fit into registers.

`make test` compiles them for one architecture, and all but leaky.cu without optimisations. All take
two to three minutes of one core. The results are kept under build/emulator.
"""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

from tests.emulator import gpu_tools
from tests.emulator.builder import ROOT
from tools import local_version

needs_nvcc = pytest.mark.skipif(gpu_tools.find("nvcc") is None, reason="there is no nvcc")
SOURCES = sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))
LEAKY = ROOT / "csrc" / "cuda" / "kernels" / "leaky.cu"
ARCHITECTURES = [*(pytest.param(arch, marks=pytest.mark.emulator_long) for arch in (75, 90)), 80]
TUNED = (75, 80, 90)  # the architectures whose registers and shared memory were chosen with care


@cache
def compiled() -> dict[Path, tuple[Path, str]]:
    """Machine code of each source for every architecture, and what ptxas said."""
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        return dict(zip(SOURCES, workers.map(gpu_tools.compile_all, SOURCES), strict=True))


@needs_nvcc
@pytest.mark.emulator_long
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.name)
def test_every_source_compiles_for_every_architecture(source):
    _, archs = local_version.machine_code(gpu_tools.find("nvcc"), local_version.ARCHS)
    _, log = compiled()[source]
    assert "warning" not in log
    rows = re.findall(
        r"Compiling entry function '(\w+)' for 'sm_(\d+)a?'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
        log, re.DOTALL,
    )  # fmt: skip
    assert {arch for _, arch, *_ in rows} == ({*archs.split()[:-1]} if rows else set())
    for name, (_, arch, *local) in zip(gpu_tools.demangle([r[0] for r in rows]), rows, strict=True):
        if int(arch) in TUNED and "double" not in name:  # kernels of float64 are not tuned
            assert not any(map(int, local)), f"{name} needs local memory on sm_{arch}"


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "source", [source for source in SOURCES if source != LEAKY], ids=lambda path: path.name
)
def test_a_kernel_multiplies_or_traps(source, arch):
    """No kernel uses the tensor cores of sm_75."""
    kernels = gpu_tools.reached_ptx(source, arch)
    for name, instructions in zip(gpu_tools.demangle([*kernels]), kernels.values(), strict=True):
        assert instructions != {"ret"}, f"{name} is empty"
        if "_mma" in name and "pack_mma" not in name:
            wanted = "trap" if arch == 75 else "mma.sync"
            assert any(wanted in what for what in instructions), name


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_leaky_rounds_each_product_and_stores_whole_vectors(arch):
    for name, instructions in gpu_tools.reached_ptx(LEAKY, arch, optimised=True).items():
        assert instructions != {"ret"}, f"{name} is empty"
        if "forward" in name:  # exp, in the backward pass, has an fma of its own
            assert not any(what.startswith("fma") for what in instructions), name
        if "Li1E" not in name:
            stores = [what for what in instructions if what.startswith("st.global")]
            assert all(re.search(r"\.v[24]\.", what) for what in stores), name
