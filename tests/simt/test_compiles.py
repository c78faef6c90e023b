"""Kernels compile with nvcc for every architecture, and fit into registers.

`make test` compiles them for one architecture. All take two to three minutes of one core. The
results are kept under build/simt.
"""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

from tests.simt import gpu_tools
from tests.simt.builder import ROOT

needs_nvcc = pytest.mark.skipif(gpu_tools.find("nvcc") is None, reason="there is no nvcc")
needs_cuobjdump = pytest.mark.skipif(
    None in (gpu_tools.find("cuobjdump"), gpu_tools.find("nvdisasm")),
    reason="pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm",
)
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
# One architecture, and others at length.
ARCHITECTURES = [*(pytest.param(arch, marks=pytest.mark.simt_long) for arch in (75, 80)), 90]
TUNED = (75, 80, 90)  # the architectures whose registers and shared memory were chosen with care


def overflowing(resources):
    """Kernels that need local memory. Those of float64 are not tuned, and do not count."""
    return [r for r in resources if (r.frame or r.spilled) and "double" not in r.kernel]


@cache
def compiled() -> dict[Path, tuple[Path, str]]:
    """Machine code of each source for every architecture, and what ptxas said."""
    archs = gpu_tools.known_architectures()
    with ThreadPoolExecutor(os.cpu_count() or 2) as pool:  # the longest first
        order = sorted(SOURCES, key=lambda p: "mma" not in p.name)
        return dict(
            zip(order, pool.map(lambda p: gpu_tools.compile_fatbin(p, archs), order), strict=True)
        )


@needs_nvcc
def test_local_memory_is_seen(tmp_path):
    source = tmp_path / "local.cu"
    source.write_text(
        "__global__ void indexed(int* p) {\n"
        "  int a[64];\n"
        "  for (int i = 0; i < 64; ++i) a[i] = p[i];\n"
        "  for (int i = 0; i < 64; ++i) p[i] = a[p[i] & 63];\n"
        "}\n"
        "__global__ void __launch_bounds__(1024, 2) crowded(float* p) {\n"
        "  float a[64];\n"
        "  for (int i = 0; i < 64; ++i) a[i] = p[i];\n"
        "  __syncthreads();\n"
        "  for (int i = 0; i < 64; ++i) p[i] = a[63 - i] + a[i ^ 5];\n"
        "}\n"
    )
    _, log = gpu_tools.compile_fatbin(source, (80,))
    bad = overflowing(gpu_tools.resources_of_log(log))
    assert {r.kernel.split("(")[0] for r in bad} == {"indexed", "crowded"}
    assert all(r.spilled for r in bad if "crowded" in r.kernel)


@needs_nvcc
@pytest.mark.simt_long
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.name)
def test_every_source_compiles_for_every_architecture(source):
    archs = gpu_tools.known_architectures()
    _, log = compiled()[source]
    assert "warning" not in log
    resources = gpu_tools.resources_of_log(log)
    if resources:
        assert {r.arch for r in resources} == set(archs)
    assert overflowing(r for r in resources if r.arch in TUNED) == []


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_a_kernel_multiplies_on_tensor_cores_or_traps(source, arch):
    """Tensor cores of sm_75 multiply fp16_sm75 alone, others all types but that."""
    for name, instructions in gpu_tools.entries_of_ptx(source, arch).items():
        assert instructions, f"{name} is empty"
        if "_mma" not in name or "pack_mma" in name:
            continue
        of_sm75 = "fp16_sm75" in name or "MultiplyE5" in name
        wanted = "trap" if of_sm75 != (arch == 75) else "mma.sync"
        assert any(wanted in line for line in instructions), name


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES[1:])
@pytest.mark.parametrize("source", ["forward.cu", "backward.cu"])
def test_steps_wait_for_the_launch_before_on_sm_90(source, arch):
    """Unless they trap. Launches overlap only where the code is from PTX of 9.0 on."""
    entries = gpu_tools.entries_of_ptx(ROOT / "csrc" / "cuda" / source, arch)
    for name, instructions in entries.items():
        waits = [line for line in instructions if "griddepcontrol.wait" in line]
        begins = [line for line in instructions if "griddepcontrol.launch_dependents" in line]
        traps = any("trap" in line for line in instructions)
        step = re.search(r"(forward|backward)_(mma|fma)I", name) is not None
        assert len(waits) == len(begins)
        if arch < 90 or step or "data_gradient_mma" not in name:
            assert bool(waits) == (step and arch >= 90 and not traps), name
