"""Defines the providers, which are the ways of running a layer that the suite compares."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import snntorch
import torch
from snntorch.functional import quant
from torch import Tensor

import snnlstm
from benchmarks.cases import Case
from benchmarks.devices import torch_device

Runner = tuple[Callable[[], object], Callable[[], object]]
"""A pair (setup, run), of which setup is not timed."""
Spikes = Tensor | list[Tensor]
"""The spikes of a sequence: (T, N, C, Ho, Wo), or a list of T tensors (N, C, Ho, Wo)."""

MODES = ("inference", "training")
OPERANDS = {"autocast": torch.bfloat16, "autocast16": torch.float16}
WIDE = ("tf32", *OPERANDS)  # float32 tensors with other precisions of products

TOLERANCE = {
    "float64": (1e-10, 1e-8),
    "float32": (3e-5, 1e-3),
    "tf32": (5e-3, 5e-2),
    "autocast": (1e-1, 3e-1),
    "autocast16": (2e-2, 1e-1),
    "float16": (2e-2, 1e-1),
    "bfloat16": (1e-1, 3e-1),
}
"""The largest differences over a short sequence, by dtype: an absolute difference of states, and a
relative difference of a gradient in norm."""


class Unavailable(Exception):
    """This error says why a provider cannot run a case here."""


@dataclass(frozen=True)
class Setting:
    """All providers of a run share one setting.

    device: see benchmarks/devices.py. dtype: "float32", "tf32" (float32 tensors, tensor cores),
    "autocast" (float32 tensors under torch.autocast to bfloat16), "autocast16" (to float16),
    "float64", "bfloat16" or "float16". seed: the seed of the weights and of x.
    """

    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        """Returns the type of x, states and weights."""
        return torch.float32 if self.dtype in WIDE else getattr(torch, self.dtype)

    @property
    def torch_device(self) -> torch.device:
        """Returns the device of x, states and weights."""
        return torch.device(torch_device(self.device))

    def apply_precision(self) -> None:
        """Allows tensor cores for float32 under "tf32" and autocast, and forbids them otherwise."""
        torch.backends.cudnn.allow_tf32 = self.dtype in WIDE
        torch.backends.cuda.matmul.allow_tf32 = self.dtype in WIDE

    def context(self) -> AbstractContextManager[Any]:
        """Returns the context in which a provider runs, forward and backward."""
        if self.dtype in OPERANDS:
            return torch.autocast(self.torch_device.type, OPERANDS[self.dtype])
        return nullcontext()


class Provider:
    """A provider has a layer built for `case`, whose weights depend on the seed alone.

    Subclasses define `build_cell`, which makes the cell, and `sequence`, which runs x
    (T, N, Cin, H, W) from states (N, C, H, W) and returns spikes and last states. `path` names the
    implementation that ran last. `spike_dtype` is the type of the spikes, None for the setting's.
    """

    title = "what it is, in a few words"
    path = ""
    spike_dtype: torch.dtype | None = None
    build_cell: Callable[[], torch.nn.Module]
    sequence: Callable[[Tensor, Tensor, Tensor], tuple[Spikes, Tensor, Tensor]]

    def __init__(self, case: Case, setting: Setting) -> None:
        self.case, self.setting = case, setting
        setting.apply_precision()
        torch.manual_seed(setting.seed)
        self.cell = self.build_cell().to(setting.torch_device, setting.torch_dtype)

    def context(self) -> AbstractContextManager[Any]:
        """Returns the context in which the provider runs, forward and backward."""
        return self.setting.context()

    def prepare(self, mode: str) -> Runner:
        """Returns (setup, run): `setup` goes before each call of `run`, and only `run` is timed.

        Inference runs without gradients. In training the setup clears the gradients and moves the
        weights by about a rounding error, as an optimizer's step does between two batches. So a
        provider has to derive anew, while it is timed, what it derives from weights.
        """
        inputs, gradient = self.inputs(mode), self.spike_gradient()
        weight = self.cell.conv.weight
        factor = 1 + (1e-6 if weight.element_size() > 2 else 1e-2)
        factors = itertools.cycle((factor, 1 / factor))

        def infer() -> object:
            with self.context(), torch.no_grad():
                return self.sequence(*inputs)

        def clear() -> None:
            inputs[0].grad = None
            self.cell.zero_grad()
            with torch.no_grad():  # the weight moves back and forth
                weight.mul_(next(factors))

        def train() -> None:
            with self.context():
                spikes = self.sequence(*inputs)[0]
                # A list of spikes is not stacked, so that snnTorch's loop does not pay for a copy.
                listed = isinstance(spikes, list)
                torch.autograd.backward(spikes, list(gradient.unbind(0)) if listed else gradient)

        return ((lambda: None), infer) if mode == "inference" else (clear, train)

    def inputs(self, mode: str, steps: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Returns x and zero states; in training x requires a gradient if the case counts it.

        steps: x has only this many time steps of the case.
        """
        case, setting = self.case, self.setting
        device = setting.torch_device
        x = case.make_input(device, setting.torch_dtype, setting.seed)[:steps]
        x.requires_grad_(mode != "inference" and case.grad_x)
        # For one tensor in two places torch.compile would compile a graph of its own.
        syn = torch.zeros(case.state_shape, device=device, dtype=setting.torch_dtype)
        return x, syn, torch.zeros_like(syn)

    def spike_gradient(self) -> Tensor:
        """Draws the gradient (T, N, C, Ho, Wo) that training sends into the spikes."""
        generator = torch.Generator().manual_seed(self.setting.seed + 1)
        gradient = torch.randn(self.case.spike_shape, generator=generator)
        dtype = self.spike_dtype or self.setting.torch_dtype
        return self.case.without_padding(gradient).to(self.setting.torch_device, dtype)

    def results(self) -> dict[str, Tensor]:
        """Computes three steps' spikes, last states, and the gradients of weight and x, in float64.

        States and gradients pass from step to step twice. A case with lengths has no last states to
        compare: snnTorch's cell runs on behind a sample's last step.
        """
        case, steps = self.case, 3
        x, syn, mem = self.inputs("training", steps)
        wanted = {"weight": self.cell.conv.weight} | ({"x": x} if x.requires_grad else {})
        with self.context():
            spikes, syn, mem = self.sequence(x, syn, mem)
            stacked = torch.stack(spikes) if isinstance(spikes, list) else spikes
            loss = (stacked * self.spike_gradient()[:steps]).sum()
            if not case.lengths:
                loss = loss + mem.square().sum() + syn.sum()
            gradients = torch.autograd.grad(loss, list(wanted.values()))
        results = {"spikes": case.without_padding(stacked)}
        results |= {} if case.lengths else {"syn": syn, "mem": mem}
        results |= {f"gradient of {n}": g for n, g in zip(wanted, gradients, strict=True)}
        return {name: tensor.detach().double().cpu() for name, tensor in results.items()}


def cell_arguments(case: Case) -> dict[str, Any]:
    """Returns the keyword arguments of the case's cell, for snnTorch's class and for ours."""
    return {
        "in_channels": case.cin,
        "out_channels": case.cout,
        "kernel_size": case.kernel,
        "max_pool": case.max_pool,
        "avg_pool": case.avg_pool,
        "threshold": case.threshold,
        "reset_mechanism": case.reset,
        "state_quant": quant.state_quant(case.quant_bits) if case.quant_bits else False,
    }


def loop(step: Callable, x: Tensor, syn: Tensor, mem: Tensor) -> tuple[Spikes, Tensor, Tensor]:
    """Calls `step` once a time step; returns the list of spikes and the last states."""
    spikes = []
    # The backward pass of x[t] in the place of unbind would fill one whole x of zeros per step.
    for x_t in x.unbind(0):
        spk, syn, mem = step(x_t, syn, mem)
        spikes.append(spk)
    return spikes, syn, mem


class SnnTorch(Provider):
    """Calls snnTorch's cell once a time step, as its users do."""

    title = "snnTorch eager, one call a time step"
    spike_dtype = torch.float32  # snntorch 1.0.0 returns such spikes from a cell of any type

    def build_cell(self) -> torch.nn.Module:
        cell = snntorch.SConv2dLSTM(**cell_arguments(self.case))
        # The list would keep every cell and its last state for ever.
        snntorch._neurons.neurons.SpikingNeuron.instances.clear()
        return cell

    def step(self, x: Tensor, syn: Tensor, mem: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Runs one time step."""
        return self.cell(x, syn, mem)

    def sequence(self, x: Tensor, syn: Tensor, mem: Tensor) -> tuple[Spikes, Tensor, Tensor]:
        return loop(self.step, x, syn, mem)


class Compiled(SnnTorch):
    """Runs the same loop with snnTorch's cell under torch.compile with default settings."""

    title = "snnTorch under torch.compile, one call a time step"

    def __init__(self, case: Case, setting: Setting) -> None:
        super().__init__(case, setting)
        torch._dynamo.reset()  # graphs of the case before would count towards the recompile limit
        self.step = torch.compile(self.cell, dynamic=False)


class Snnlstm(Provider):
    """Runs the whole sequence in one call, with the algorithm that the library chooses."""

    title = "snnlstm, the whole sequence in one call"
    algorithm = "auto"
    checkpoint = False

    def build_cell(self) -> torch.nn.Module:
        arguments = cell_arguments(self.case) | {"checkpoint": self.checkpoint}
        if self.case.quant_bits:
            arguments["state_quant"] = snnlstm.quant.state_quant(num_bits=self.case.quant_bits)
        return snnlstm.SConv2dLSTM(**arguments)

    def sequence(self, x: Tensor, syn: Tensor, mem: Tensor) -> tuple[Spikes, Tensor, Tensor]:
        if not self.case.lengths:
            return self.cell(x, syn, mem)
        lengths = self.case.steps_of_samples.clamp(max=len(x)).to(x.device)
        return self.cell(x, syn, mem, lengths=lengths)

    @property
    def path(self) -> str:  # type: ignore[override]
        return path_of(self.cell)

    @contextmanager
    def context(self) -> Iterator[None]:
        # The algorithm holds within each run alone, because other providers run in between.
        with super().context(), snnlstm.algorithm(self.algorithm):
            yield


def path_of(*cells: Any) -> str:
    """Returns the names of what ran in cells of ours, with the reason against the kernels."""
    paths = [cell.path for cell in cells if cell.path]
    return ", ".join(dict.fromkeys(path.name if path.native else str(path) for path in paths))


class SnnlstmStep(Snnlstm):
    """Calls our cell once a time step, as users of snnTorch do."""

    title = "snnlstm, one call a time step"

    def sequence(self, x: Tensor, syn: Tensor, mem: Tensor) -> tuple[Spikes, Tensor, Tensor]:
        return loop(self.cell, x, syn, mem)


class SnnlstmCheckpoint(Snnlstm):
    title = "snnlstm by sequence, checkpoint=True"
    checkpoint = True


class Captured(Provider):
    """This base of a provider captures a run of all T steps in a CUDA graph, and replays it."""

    def prepare(self, mode: str) -> Runner:
        if self.setting.device != "cuda":
            raise Unavailable("CUDA graphs need --device cuda")
        setup, run = super().prepare(mode)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # cuDNN chooses and allocates before the capture
            for _ in range(3):
                setup()
                run()
        torch.cuda.current_stream().wait_stream(side)
        setup()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        # Each replay overwrites the gradients in the graph's memory, so that none is cleared.
        return (lambda: None), graph.replay


def _captured(kind: type[Provider]) -> type[Provider]:
    return type("Captured", (Captured, kind), {"title": f"{kind.title}, in a CUDA graph"})


PROVIDERS: dict[str, type[Provider]] = {
    "snntorch": SnnTorch,
    "snntorch-compile": Compiled,
    "snntorch-cudagraph": _captured(SnnTorch),
    "snntorch-compile-graph": _captured(Compiled),
    "snnlstm-step": SnnlstmStep,
    "snnlstm": Snnlstm,
    "snnlstm-cudagraph": _captured(Snnlstm),
    "snnlstm-checkpoint": SnnlstmCheckpoint,
}
BASELINE = "snntorch"
DEFAULT = (BASELINE, "snnlstm-step", "snnlstm")


def find_provider(name: str) -> type[Provider]:
    """Returns the provider of a name; "snnlstm:direct" forces an algorithm of the library.

    Raises ValueError that names an unknown provider or algorithm.
    """
    name, _, algorithm = name.partition(":")
    if name not in PROVIDERS:
        known = ", ".join(PROVIDERS)
        raise ValueError(f"--providers: no provider is called {name!r}; known: {known}")
    kind = PROVIDERS[name]
    if not algorithm:
        return kind
    if algorithm not in snnlstm.settings.ALGORITHMS or not issubclass(kind, Snnlstm):
        known = ", ".join(snnlstm.settings.ALGORITHMS)
        raise ValueError(f"--providers: expected snnlstm:ALGORITHM of {known}, got {algorithm!r}")
    return type("Forced", (kind,), {"algorithm": algorithm})
