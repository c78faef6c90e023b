"""The project's CUDA kernels, emulated, in the place of snnlstm's native path for CPU tensors.

    core = emulated_core()
    with core.installed():
        snnlstm.SConv2dLSTM(...)  # on CPU tensors: runs the kernels of csrc/cuda

The Python of the real kernels (snnlstm.native.cuda) calls them, through the real bindings
(csrc/bindings_cuda.h).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from snnlstm.native import backends as native
from snnlstm.native import cuda
from tests.emulator.builder import build
from tests.emulator.library import EmulationError, Emulator, symbolise

MODULE = "snnlstm_emulator"


@contextlib.contextmanager
def _readable_reports() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, EmulationError):
            raise
        raise EmulationError(symbolise(str(error))) from None


class Emulated(cuda.Backend):
    """The CUDA backend without a GPU, of which tests say what the core knows."""

    def __init__(self, core: Any, device: Any) -> None:
        super().__init__(core)
        self._device = device

    def on_device(self, device: torch.device) -> AbstractContextManager:
        return _readable_reports()

    def device(self, device: torch.device) -> Any:
        return self._device

    def stream(self, device: torch.device) -> int:
        return 0

    def name(self) -> str:
        return "emulator"


class Core(Emulator):
    """The emulator's settings, and the kernels."""

    def __init__(self, library: Path) -> None:
        self.module = _load(library)
        super().__init__(library)

    def reset(self) -> None:
        super().reset()
        self.device()

    def device(
        self,
        compute_capability: int = 80,
        multiprocessors: int = 108,
        shared_bytes: int = 163 * 1024,
    ) -> None:
        """Describes the emulated card."""
        self.settings.compute_capability = compute_capability
        self.settings.shared_bytes = shared_bytes
        device = self.module.CudaDevice(compute_capability, multiprocessors, shared_bytes)
        self.kernels = Emulated(self.module, device)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Within the block, snnlstm's native path for CPU tensors is this core."""
        before = native.BACKENDS["cpu"]
        native.BACKENDS["cpu"] = self.kernels
        try:
            yield
        finally:
            native.BACKENDS["cpu"] = before


@contextlib.contextmanager
def float32_precision(precision: str) -> Iterator[None]:
    """Within the block, torch's convolutions on CUDA have this precision: "tf32" or "ieee"."""
    owner: Any = getattr(torch.backends.cudnn, "conv", None)
    name, value = "fp32_precision", precision
    if not hasattr(owner, name):  # before torch 2.9
        owner, name, value = torch.backends.cudnn, "allow_tf32", precision == "tf32"
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _load(library: Path) -> ModuleType:
    loader = ExtensionFileLoader(MODULE, str(library))
    spec = spec_from_loader(MODULE, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


@functools.cache
def emulated_core() -> Core:
    """Builds and loads the emulated core."""
    return Core(build("core"))


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """Runs the ordinary tests' backend "emulator": float32 at full precision."""
    core = emulated_core()
    core.device(compute_capability=86)
    try:
        with core.installed(), float32_precision("ieee"):
            yield
    finally:
        core.reset()
