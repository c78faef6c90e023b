"""The project's CUDA kernels, emulated, as the compiled core of snnlstm.

    core = simt_core("checked")
    with core.installed():
        snnlstm.SConv2dLSTM(...)  # on CPU tensors; runs the kernels of csrc/cuda

The core is csrc/bindings.cpp itself, with bridge/bridge.cpp in place of the CPU kernels.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from build import HERE, ROOT, build
from emulator import EmulationError, Emulator, symbolise

SOURCES = tuple(sorted((ROOT / "csrc" / "cuda").glob("*.cu")))
HOST_SOURCES = (ROOT / "csrc" / "bindings.cpp", HERE / "bridge" / "bridge.cpp")

MATRIX = {"exact": 0, "tf32": 1, "tf32x3": 2, "float16": 3, "bfloat16": 4}
ALGORITHM = {"automatic": 0, "fma": 1, "mma": 2}


class Core(Emulator):
    """A built core: the Python module, and the emulator's settings."""

    def __init__(self, library: Path):
        super().__init__(library)
        self.module = _load(library)
        self.target()

    def reset(self) -> None:
        super().reset()
        if hasattr(self, "module"):
            self.target()

    def target(
        self,
        compute_capability: int = 80,
        multiprocessors: int = 108,
        shared_bytes: int = 163 * 1024,
        matrix: str = "exact",
        algorithm: str = "automatic",
    ) -> None:
        """What the launchers are told of the device and of the precision that is wanted."""
        self.compute_capability(compute_capability)
        self.lib.simt_target(
            compute_capability, multiprocessors, shared_bytes, MATRIX[matrix], ALGORITHM[algorithm]
        )

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Within the block, snnlstm's native path for CPU tensors is this core."""
        from snnlstm import native

        before = native._C
        try:
            native._C = _Reporting(self.module)
            _forget(native)
            yield
        finally:
            native._C = before
            _forget(native)


class _Reporting:
    """The module, with the places in its error messages turned into source lines."""

    def __init__(self, module: ModuleType):
        self._module = module

    def __getattr__(self, name):
        found = getattr(self._module, name)
        if isinstance(found, type) or not callable(found):
            return found

        @functools.wraps(found)
        def call(*args):
            try:
                return found(*args)
            except RuntimeError as error:
                raise EmulationError(symbolise(str(error))) from None

        return call


def _forget(native: ModuleType) -> None:
    """Sizes and packed weights belong to the core that made them."""
    for cached in ("_cell", "_sizes"):
        getattr(native, cached).cache_clear()
    native._packed.clear()


@functools.cache
def simt_core(variant: str = "plain", defines: tuple[str, ...] = ()) -> Core:
    """Builds and loads the emulated core; see build.VARIANTS."""
    import pybind11

    library = build(
        "core",
        list(SOURCES),
        variant,
        # A namespace of its own: pybind11 must not take its classes for those of snnlstm._C.
        ("snnlstm=snnlstm_simt", *defines),
        (HERE / "bridge", Path(pybind11.get_include()), Path(sysconfig.get_path("include"))),
        HOST_SOURCES,
    )
    return Core(library)


def _load(library: Path) -> ModuleType:
    # The name's last part must be that of the module in bindings.cpp.
    spec = importlib.util.spec_from_file_location(f"snnlstm_simt_{library.stem}._C", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
