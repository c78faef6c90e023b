"""Our cell: by step and by sequence, with each algorithm, and with checkpoint=True."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

import snnlstm
from benchmarks.cases import Case
from benchmarks.providers.base import Provider, Runner, Setting, Spikes, Tensor, Unavailable
from benchmarks.providers.with_snntorch import cell_arguments, loop


class Snnlstm(Provider):
    """The whole sequence in one call, with the algorithm that the library picks.

    runs_as: how the part of the path that names the algorithm begins.
    """

    name = "snnlstm"
    title = "snnlstm, the whole sequence in one call"
    algorithm = "auto"
    devices: tuple[str, ...] = ("cpu", "cuda")
    runs_as: tuple[str, ...] = ("",)
    checkpoint: bool | str = False

    @classmethod
    def why_not(cls, case: Case, setting: Setting) -> str | None:
        if setting.device not in cls.devices:
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
        # Set back each time, so that no trace is left in the providers that run in between.
        with super().context(), snnlstm.algorithm(self.algorithm):
            yield

    def prepare(self, mode: str) -> Runner:
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
        return loop(self.cell, x, syn, mem)


class SnnlstmCheckpoint(Snnlstm):
    """The whole sequence in one call, gates recomputed in the backward pass."""

    name = "snnlstm-checkpoint"
    title = "snnlstm by sequence, checkpoint=True"
    checkpoint = True


class SnnlstmGates(Snnlstm):
    """The whole sequence in one call, gates kept in half the memory."""

    name = "snnlstm-gates"
    title = 'snnlstm by sequence, checkpoint="gates"'
    devices = ("cpu",)
    checkpoint = "gates"


def _with_algorithm(name: str, title: str, devices: str, *runs_as: str) -> type[Snnlstm]:
    """The whole sequence in one call, with an algorithm of its own."""
    fields = {
        "name": f"snnlstm-{name}",
        "title": f"snnlstm by sequence, {title}",
        "algorithm": name.replace("measured", "measure"),
        "devices": tuple(devices.split()),
        "runs_as": runs_as or (name,),
    }
    return type(name, (Snnlstm,), fields)


ALGORITHMS = (
    _with_algorithm("direct", "direct convolution", "cpu cuda", "direct", "fma", "mma"),
    _with_algorithm("winograd", "Winograd", "cpu"),
    _with_algorithm("pointwise", "behind torch's convolution", "cuda"),
    _with_algorithm("hybrid", "torch for the gradients of weight and x", "cuda"),
    _with_algorithm("measured", "the algorithm measured", "cuda"),
)
