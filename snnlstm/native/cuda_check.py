"""Why the CUDA kernels of this build cannot run on a GPU of this machine, in words that help.

The first call on a GPU checks, not the import. The answers are pure functions of what the build
reports (``_C.build_info()``), of the driver and of the GPU; :func:`trouble` asks torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

OLDEST = (7, 5)
TEGRA = {72, 87, 101, 110}  # Jetson and DRIVE: 10 * major + minor
# The first driver branch that runs code of a CUDA major version. CUDA 11's is the first one that
# has cudaLaunchKernelExC, which launches the kernels.
FIRST_DRIVERS = {11: 520, 12: 525, 13: 580}


def without_kernels(build: Mapping[str, str]) -> str | None:
    """The message for a machine with a GPU if the build has no CUDA code; None if it has."""
    if build.get("cuda_archs"):
        return None
    why = build.get("cuda", "").removeprefix("not built: ") or "unknown"
    return (
        f"this build of snnlstm has no CUDA kernels ({why}); build it with SNNLSTM_CUDA=on, or "
        "with SNNLSTM_CUDA=pip for driver 580 or newer"
    )


def driver_trouble(build: Mapping[str, str], driver: int | None) -> str | None:
    """What is wrong with a driver for a build with CUDA code; None if nothing is.

    `driver` is the newest CUDA version that it runs, 1000 * major + 10 * minor, or 0 or None.
    """
    built = int(build.get("cuda_version", "").split(".")[0] or 0)
    needed = 11080 if built == 11 else 1000 * built
    if not driver or driver >= needed:
        return None
    newer = f" to {FIRST_DRIVERS[built]} or newer" if built in FIRST_DRIVERS else ""
    other = f", or install the build for CUDA {driver // 1000}" if driver // 1000 < built else ""
    return (
        f"the NVIDIA driver is too old: it runs CUDA {show(driver)}, and this build of snnlstm "
        f"needs CUDA {show(needed)}; update the driver{newer}{other}"
    )


def code_for(build: Mapping[str, str], capability: tuple[int, int]) -> tuple[str, int] | None:
    """What a GPU would run of a build: ``("machine code", 86)``, ``("PTX", 80)``, or None.

    Machine code for X.Y runs on X.Z with Z >= Y, but not between the GPUs of :data:`TEGRA` and
    others: NVIDIA's CUDA C++ Programming Guide, "Binary Compatibility". The driver translates
    PTX for all newer GPUs. PTX of 7.5 serves no GPU from 8.0 on, because it lacks the kernels that
    use tensor cores.
    """
    archs = build.get("cuda_archs", "").split()
    wanted = 10 * capability[0] + capability[1]
    older = [int(arch) for arch in archs if arch.isdigit() and int(arch) <= wanted]
    same = [arch for arch in older if arch // 10 == capability[0]]
    same = [arch for arch in same if arch == wanted or not {arch, wanted} & TEGRA]
    if same:
        return "machine code", max(same)
    translated = [int(arch[:-4]) for arch in archs if arch.endswith("+ptx")]
    oldest = 80 if wanted >= 80 else 0
    usable = [arch for arch in translated if oldest <= arch <= wanted]
    return ("PTX", max(usable)) if usable else None


def device_trouble(
    build: Mapping[str, str], name: str, capability: tuple[int, int], driver: int | None = None
) -> str | None:
    """What is wrong with a GPU of this name and compute capability; None if nothing is.

    A GPU for which the build has no machine code runs the PTX. The driver translates PTX only up
    to its own CUDA version, the minor one included.
    """
    gpu = f"{name} (compute capability {capability[0]}.{capability[1]})"
    if tuple(capability) < OLDEST:
        return f"{gpu} is too old: the CUDA kernels need {OLDEST[0]}.{OLDEST[1]} or newer"
    wanted = 10 * capability[0] + capability[1]
    code = code_for(build, capability)
    if code is None:
        archs = build.get("cuda_archs", "")
        return (
            f"{gpu} is not among the GPUs that this build of snnlstm has code for ({archs}); "
            f"build with SNNLSTM_CUDA_ARCHS={wanted}"
        )
    if code[0] != "PTX":
        return None
    major, minor = (*map(int, (build.get("cuda_version", "") or "0").split(".")[:2]), 0)[:2]
    newest = 1000 * major + 10 * minor
    if not driver or driver >= newest:
        return None
    return (
        f"{gpu} needs the PTX of this build, which is of CUDA {show(newest)}, and the NVIDIA "
        f"driver reads it up to CUDA {show(driver)}; update the driver, or build with "
        f"SNNLSTM_CUDA_ARCHS={wanted}"
    )


@cache
def trouble(index: int) -> str | None:
    """Why the kernels cannot run on GPU `index`, which torch can use; None if they can."""
    import torch

    from .. import _C
    from ..compat import torch_private

    if torch.version.hip:
        return f"torch is built for ROCm {torch.version.hip}, for which there are no kernels"
    build = _C.build_info()
    if missing := without_kernels(build):
        return missing
    driver = torch_private.driver_version()
    if old := driver_trouble(build, driver):
        return old
    card = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    return device_trouble(build, *card, driver)


def show(version: int) -> str:
    """The text of a CUDA version, which is given as 1000 * major + 10 * minor."""
    return f"{version // 1000}.{version % 1000 // 10}"
