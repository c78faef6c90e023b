"""Our cell: by step and by sequence, with each algorithm, and with checkpoint=True."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from benchmarks.cases import Case
from benchmarks.providers.base import Provider, Setting, Spikes, Tensor, Unavailable
from benchmarks.providers.with_snntorch import cell_arguments


class Snnlstm(Provider):
    """The whole sequence in one call, with the algorithm that the library picks."""

    name = "snnlstm"
    title = "snnlstm, the whole sequence in one call"
    algorithm = "auto"
    devices: tuple[str, ...] = ("cpu", "cuda")
    runs_as: tuple[str, ...] = ("",)  # how the part of the path that names the algorithm begins
    checkpoint = False

    @classmethod
    def why_not(cls, case: Case, setting: Setting) -> str | None:
        if setting.device not in cls.devices:
            return f"there is no {cls.algorithm} on {setting.device}"
        try:
            from snnlstm import SConv2dLSTM  # noqa: F401
        except ImportError as error:
            return f"snnlstm does not import: {error}"
        return None

    def build_cell(self) -> torch.nn.Module:
        import snnlstm

        arguments = cell_arguments(self.case)
        if self.case.quant_bits:
            arguments["state_quant"] = snnlstm.quant.state_quant(num_bits=self.case.quant_bits)
        if self.checkpoint:
            arguments["checkpoint"] = True
        return snnlstm.SConv2dLSTM(**arguments)

    def sequence(self, x: Tensor, syn: Tensor, mem: Tensor) -> tuple[Spikes, Tensor, Tensor]:
        return self.cell(x, syn, mem)

    @property
    def path(self) -> str:
        path = getattr(self.cell, "path", None)
        return "" if path is None else str(path)

    @contextmanager
    def context(self) -> Iterator[None]:
        import snnlstm

        # Set back each time, so that no trace is left in the providers that run in between.
        with super().context(), snnlstm.algorithm(self.algorithm):
            yield

    def prepare(self, mode: str) -> tuple[Callable[[], object], Callable[[], object]]:
        setup, run = super().prepare(mode)
        setup()
        run()
        # "cpu-avx2-winograd4-sparse (why)", "cuda-mma-tf32 (why)"
        parts = self.path.split(" ")[0].split("-")
        if not any(part.startswith(self.runs_as) for part in parts):
            raise Unavailable(f"{self.algorithm} does not run this case; the path was {self.path}")
        return setup, run


class SnnlstmStep(Snnlstm):
    """One call a time step, as a drop-in for snnTorch's loop."""

    name = "snnlstm-step"
    title = "snnlstm, one call a time step"

    def sequence(self, x: Tensor, syn: Tensor, mem: Tensor) -> tuple[Spikes, Tensor, Tensor]:
        spikes = []
        for x_t in x.unbind(0):
            spk, syn, mem = self.cell(x_t, syn, mem)
            spikes.append(spk)
        return spikes, syn, mem


class SnnlstmDirect(Snnlstm):
    """The whole sequence in one call, direct convolution."""

    name = "snnlstm-direct"
    title = "snnlstm by sequence, direct convolution"
    algorithm = "direct"
    runs_as = ("direct", "fma", "mma")


class SnnlstmWinograd(Snnlstm):
    """The whole sequence in one call, Winograd's minimal filtering wherever it applies."""

    name = "snnlstm-winograd"
    title = "snnlstm by sequence, Winograd"
    algorithm = "winograd"
    devices = ("cpu",)
    runs_as = ("winograd",)


class SnnlstmPointwise(Snnlstm):
    """The whole sequence in one call, torch's convolution (cuDNN) before our kernels."""

    name = "snnlstm-pointwise"
    title = "snnlstm by sequence, behind torch's convolution"
    algorithm = "pointwise"
    devices = ("cuda",)
    runs_as = ("pointwise",)


class SnnlstmHybrid(Snnlstm):
    """The whole sequence in one call, torch's convolution for the gradients of weight and x."""

    name = "snnlstm-hybrid"
    title = "snnlstm by sequence, torch for the gradients of weight and x"
    algorithm = "hybrid"
    devices = ("cuda",)
    runs_as = ("hybrid",)


class SnnlstmMeasured(Snnlstm):
    """The whole sequence in one call, with the algorithm that was measured to be fastest."""

    name = "snnlstm-measured"
    title = "snnlstm by sequence, the algorithm measured"
    algorithm = "measure"
    devices = ("cuda",)
    runs_as = ("measured",)


class SnnlstmCheckpoint(Snnlstm):
    """The whole sequence in one call, gates recomputed in the backward pass."""

    name = "snnlstm-checkpoint"
    title = "snnlstm by sequence, checkpoint=True"
    checkpoint = True
