"""Runs our cell by step and by sequence, with each algorithm, and with checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

import snnlstm
from benchmarks.cases import Case
from benchmarks.devices import backend
from benchmarks.providers.base import Provider, Runner, Setting, Spikes, Tensor, Unavailable
from benchmarks.providers.with_snntorch import cell_arguments, loop


class Snnlstm(Provider):
    """Runs the whole sequence in one call, with the algorithm that the library chooses.

    runs_as: one part of the path's name must begin with one of these texts.
    """

    name = "snnlstm"
    title = "snnlstm, the whole sequence in one call"
    algorithm = "auto"
    devices: tuple[str, ...] = ("cpu", "cuda", "simt")
    runs_as: tuple[str, ...] = ("",)
    checkpoint: bool | str = False

    @classmethod
    def why_not(cls, case: Case, setting: Setting) -> str | None:
        if backend(setting.device) not in cls.devices:
            return f"there is no {cls.algorithm} on {setting.device}"
        return None

    def build_cell(self) -> torch.nn.Module:
        arguments = cell_arguments(self.case) | {"checkpoint": self.checkpoint}
        if self.case.quant_bits:
            arguments["state_quant"] = snnlstm.quant.state_quant(num_bits=self.case.quant_bits)
        return snnlstm.SConv2dLSTM(**arguments)

    def sequence(self, x: Tensor, syn: Tensor, mem: Tensor) -> tuple[Spikes, Tensor, Tensor]:
        return self.cell(x, syn, mem)

    @property
    def path(self) -> str:
        return str(self.cell.path or "")

    @contextmanager
    def context(self) -> Iterator[None]:
        # The algorithm holds within each run alone, because other providers run in between.
        with super().context(), snnlstm.algorithm(self.algorithm):
            yield

    def prepare(self, mode: str) -> Runner:
        setup, run = super().prepare(mode)
        setup()
        run()
        # The path is such as "cpu-avx2-winograd4-sparse (why)" or "cuda-mma-tf32 (why)".
        parts = self.path.split(" ")[0].split("-")
        if not any(part.startswith(self.runs_as) for part in parts):
            raise Unavailable(f"{self.algorithm} does not run this case; the path was {self.path}")
        return setup, run


class SnnlstmStep(Snnlstm):
    """Calls our cell once a time step, as users of snnTorch do."""

    name = "snnlstm-step"
    title = "snnlstm, one call a time step"

    def sequence(self, x: Tensor, syn: Tensor, mem: Tensor) -> tuple[Spikes, Tensor, Tensor]:
        return loop(self.cell, x, syn, mem)


def _variant(name: str, title: str, *runs_as: str, **fields: Any) -> type[Snnlstm]:
    """Makes a provider that runs the whole sequence in one call, with other fields."""
    fields |= {"name": f"snnlstm-{name}", "title": f"snnlstm by sequence, {title}"}
    return type(name, (Snnlstm,), {"runs_as": runs_as or ("",), **fields})


CPU, CUDA = ("cpu",), ("cuda", "simt")
ALGORITHMS = (
    _variant("direct", "direct convolution", "direct", "fma", "mma", algorithm="direct"),
    _variant("winograd", "Winograd", "winograd", algorithm="winograd", devices=CPU),
    _variant(
        "cudnn", "behind torch's convolution", "cudnn", algorithm="cudnn",
        devices=CUDA,
    ),
    _variant(
        "hybrid", "torch for the gradients of weight and x", "hybrid", algorithm="hybrid",
        devices=CUDA,
    ),
    _variant(
        "measured", "the algorithm measured", "measured", algorithm="measure", devices=("cuda",)
    ),
)  # fmt: skip
SAVING = (_variant("checkpoint", "checkpoint=True", checkpoint=True),)
