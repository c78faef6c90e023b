"""Defines the provider: one way of running a layer over a sequence, ready to be timed."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from benchmarks.cases import Case
from benchmarks.devices import torch_device

Tensor = torch.Tensor
Runner = tuple[Callable[[], object], Callable[[], object]]
"""A pair (setup, run), of which setup is not timed."""
Spikes = Tensor | list[Tensor]
"""The spikes of a sequence: (T, N, C, Ho, Wo), or a list of T tensors (N, C, Ho, Wo)."""


WIDE = ("tf32", "autocast", "autocast16")
"""Float32 tensors with other precisions of products."""


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
        """Allows tensor cores for float32 under "tf32" and autocast, and forbids them else."""
        torch.backends.cudnn.allow_tf32 = self.dtype in WIDE
        torch.backends.cuda.matmul.allow_tf32 = self.dtype in WIDE


class Provider(ABC):
    """A provider has a layer built for `case`, whose weights depend on the seed alone.

    Subclasses define `build_cell` and `sequence`, and `why_not` if there are cases that they cannot
    run. `states` says how many tensors of the state's size training holds per time step; the memory
    guard reads it. `spike_dtype` is the type of the spikes that `sequence` returns. `path` names
    the implementation that ran last; it is empty if there is only one.
    """

    name = "provider"
    title = "what it is, in a few words"
    states = 16
    path = ""

    def __init__(self, case: Case, setting: Setting) -> None:
        self.case, self.setting = case, setting
        setting.apply_precision()
        torch.manual_seed(setting.seed)
        self.cell = self.build_cell()
        self.cell.to(setting.torch_device, setting.torch_dtype)

    @classmethod
    def why_not(cls, case: Case, setting: Setting) -> str | None:
        """Returns why the provider cannot run `case` here, or None if it can."""
        return None

    @classmethod
    def bytes_needed(cls, case: Case, setting: Setting, mode: str) -> int:
        """Returns a rough upper bound on a run's memory: a run that would swap is not begun."""
        x = case.steps * case.batch * case.cin * case.height * case.width
        kept = case.steps if mode != "forward" else 1
        values = 3 * x + (cls.states + 4) * math.prod(case.state_shape) * kept
        return values * setting.torch_dtype.itemsize

    @property
    def spike_dtype(self) -> torch.dtype:
        return self.setting.torch_dtype

    @abstractmethod
    def build_cell(self) -> torch.nn.Module:
        """Makes the cell, initialised from torch's global generator."""

    @abstractmethod
    def sequence(self, x: Tensor, syn: Tensor, mem: Tensor) -> tuple[Spikes, Tensor, Tensor]:
        """Runs x (T, N, Cin, H, W) from states (N, C, H, W); returns spikes and last states."""

    def context(self) -> AbstractContextManager[None]:
        """Returns the context in which the provider runs, forward and backward."""
        operands = {"autocast": torch.bfloat16, "autocast16": torch.float16}
        if self.setting.dtype in operands:
            return torch.autocast(self.setting.torch_device.type, operands[self.setting.dtype])
        return nullcontext()

    def prepare(self, mode: str) -> Runner:
        """Returns (setup, run): `setup` goes before each call of `run`, and only `run` is timed.

        The mode "forward" runs without gradients. In the other modes the setup clears the gradients
        and moves the weights by about a rounding error, as an optimizer's step does between two
        batches. So a provider has to derive anew, while it is timed, what it derives from weights.
        """

        def within(run: Callable[[], object]) -> Callable[[], object]:
            def inside() -> object:
                with self.context():
                    return run()

            return inside

        setup, run = self._inference() if mode == "forward" else self._training(mode)
        return within(setup), within(run)

    def _inference(self) -> Runner:
        inputs = self.inputs("forward")

        def infer() -> object:
            with torch.no_grad():
                return self.sequence(*inputs)

        return (lambda: None), infer

    def _training(self, mode: str) -> Runner:
        inputs, gradient = self.inputs(mode), self.spike_gradient()
        weight = self.cell.conv.weight
        factor = 1 + (1e-6 if weight.element_size() > 2 else 1e-2)
        factors = itertools.cycle((factor, 1 / factor))
        held: list[Spikes] = []

        def clear() -> None:
            held.clear()
            inputs[0].grad = None
            self.cell.zero_grad()
            with torch.no_grad():  # the weight moves back and forth
                weight.mul_(next(factors))

        def backward(spikes: Spikes) -> None:
            # A list of spikes is not stacked, so that snnTorch's loop does not pay for a copy.
            listed = isinstance(spikes, list)
            torch.autograd.backward(spikes, list(gradient.unbind(0)) if listed else gradient)

        def forward_first() -> None:
            clear()
            held.append(self.sequence(*inputs)[0])

        if mode == "backward":
            return forward_first, lambda: backward(held.pop())
        return clear, lambda: backward(self.sequence(*inputs)[0])

    def inputs(self, mode: str, steps: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Returns x and zero states; in training x requires a gradient if the case counts it.

        steps: x has only this many time steps of the case.
        """
        case, setting = self.case, self.setting
        device = setting.torch_device
        x = case.make_input(device, setting.torch_dtype, setting.seed)[:steps]
        x.requires_grad_(mode != "forward" and case.grad_x)
        # For one tensor in two places torch.compile would compile a graph of its own.
        syn = torch.zeros(case.state_shape, device=device, dtype=setting.torch_dtype)
        return x, syn, torch.zeros_like(syn)

    def spike_gradient(self) -> Tensor:
        """Draws the gradient (T, N, C, Ho, Wo) that training sends into the spikes."""
        generator = torch.Generator().manual_seed(self.setting.seed + 1)
        gradient = torch.randn(self.case.spike_shape, generator=generator)
        return gradient.to(self.setting.torch_device, self.spike_dtype)


def captured(of: type[Provider], name: str) -> type[Provider]:
    """Returns a provider that captures the runs of `of` in a CUDA graph."""
    return type(name, (Captured, of), {"name": name, "title": f"{of.title}, in a CUDA graph"})


class Captured(Provider):
    """This base of a provider captures a run of all T steps in a CUDA graph, and replays it."""

    @classmethod
    def why_not(cls, case: Case, setting: Setting) -> str | None:
        if setting.device != "cuda":
            return "CUDA graphs need --device cuda"
        return super().why_not(case, setting)

    def prepare(self, mode: str) -> Runner:
        setup, run = super().prepare(mode)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # cuDNN chooses and allocates before the capture
            for _ in range(3):
                setup()
                run()
        torch.cuda.current_stream().wait_stream(side)
        if mode == "backward":
            first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(first):
                setup()
            with torch.cuda.graph(second, pool=first.pool()):
                run()
            return first.replay, second.replay
        setup()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        # Each replay overwrites the gradients in the graph's memory, so that none is cleared.
        return (lambda: None), graph.replay
