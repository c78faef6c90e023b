"""What a provider is: one way of running a layer over a sequence, ready to be timed."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from benchmarks.cases import Case

Tensor = torch.Tensor
Runner = tuple[Callable[[], object], Callable[[], object]]
"""(setup, run): setup is not timed."""
Spikes = Tensor | list[Tensor]
"""The spikes of a sequence: (T, N, C, Ho, Wo), or a list of T tensors (N, C, Ho, Wo)."""


class Unavailable(Exception):
    """A provider cannot run a case here; the text says why."""


@dataclass(frozen=True)
class Setting:
    """What all providers of a run share.

    device: "cpu" or "cuda". dtype: "float32", "tf32" (float32 tensors, tensor cores), "autocast"
    (float32 tensors under torch.autocast to bfloat16), "float64", "bfloat16" or "float16".
    seed: of the weights and of x.
    """

    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        """Type of x, states and weights."""
        wide = self.dtype in ("tf32", "autocast")
        return torch.float32 if wide else getattr(torch, self.dtype)

    def apply_precision(self) -> None:
        """Allow tensor cores for float32 under "tf32" and "autocast", forbid them elsewhere."""
        torch.backends.cudnn.allow_tf32 = self.dtype in ("tf32", "autocast")
        torch.backends.cuda.matmul.allow_tf32 = self.dtype in ("tf32", "autocast")


class Provider(ABC):
    """A layer built for `case`, with weights that depend on the seed alone.

    Subclasses define `build_cell`, `sequence`, and `why_not` where they cannot run everything.
    states: how many tensors of the state's size training holds per time step, for the memory guard.
    spike_dtype: type of the spikes that `sequence` gives. path: which implementation ran last, for
    the report; empty where there is only one.
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
        self.cell.to(setting.device, setting.torch_dtype)

    @classmethod
    def why_not(cls, case: Case, setting: Setting) -> str | None:
        """Why the provider cannot run `case` here, or None if it can."""
        return None

    @classmethod
    def bytes_needed(cls, case: Case, setting: Setting, mode: str) -> int:
        """A rough upper bound on what a run allocates, to refuse before the machine swaps."""
        x = case.steps * case.batch * case.cin * case.height * case.width
        kept = case.steps if mode != "forward" else 1
        values = 3 * x + (cls.states + 4) * math.prod(case.state_shape) * kept
        return values * setting.torch_dtype.itemsize

    @property
    def spike_dtype(self) -> torch.dtype:
        return self.setting.torch_dtype

    @abstractmethod
    def build_cell(self) -> torch.nn.Module:
        """The cell, freshly initialised from torch's global generator."""

    @abstractmethod
    def sequence(self, x: Tensor, syn: Tensor, mem: Tensor) -> tuple[Spikes, Tensor, Tensor]:
        """T time steps: x (T, N, Cin, H, W), states (N, C, H, W) to spikes and the last states."""

    def context(self) -> AbstractContextManager[None]:
        """What has to be in force while the provider runs, forward and backward."""
        if self.setting.dtype == "autocast":
            return torch.autocast(self.setting.device, torch.bfloat16)
        return nullcontext()

    def prepare(self, mode: str) -> Runner:
        """(setup, run): `run` is what is timed, `setup` goes before each call of it, untimed.

        forward runs without gradients. In the other modes the setup clears the gradients and moves
        the weights by a rounding error or two, as an optimizer's step does between two batches:
        whatever a provider derives from its weights has to be derived anew, inside the timing.
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
            with torch.no_grad():  # back and forth
                weight.mul_(next(factors))

        def backward(spikes: Spikes) -> None:
            # Listed spikes are not stacked: snnTorch's loop is not charged for a copy.
            listed = isinstance(spikes, list)
            torch.autograd.backward(spikes, list(gradient.unbind(0)) if listed else gradient)

        def forward_first() -> None:
            clear()
            held.append(self.sequence(*inputs)[0])

        if mode == "backward":
            return forward_first, lambda: backward(held.pop())
        return clear, lambda: backward(self.sequence(*inputs)[0])

    def inputs(self, mode: str, steps: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x and zero states; x asks for a gradient in training where the case counts it.

        steps: use only so many time steps of the case.
        """
        case, setting = self.case, self.setting
        device = torch.device(setting.device)
        x = case.make_input(device, setting.torch_dtype, setting.seed)[:steps]
        x.requires_grad_(mode != "forward" and case.grad_x)
        # Two tensors: the same one twice makes torch.compile specialise on their being equal.
        syn = torch.zeros(case.state_shape, device=device, dtype=setting.torch_dtype)
        return x, syn, torch.zeros_like(syn)

    def spike_gradient(self) -> Tensor:
        """The gradient that training sends into the spikes: normal, (T, N, C, Ho, Wo)."""
        generator = torch.Generator().manual_seed(self.setting.seed + 1)
        gradient = torch.randn(self.case.spike_shape, generator=generator)
        return gradient.to(self.setting.device, self.spike_dtype)


class Captured(Provider):
    """Goes before the provider that it captures in a CUDA graph: all T steps in one replay."""

    @classmethod
    def why_not(cls, case: Case, setting: Setting) -> str | None:
        if setting.device != "cuda":
            return "CUDA graphs need --device cuda"
        return super().why_not(case, setting)

    def prepare(self, mode: str) -> Runner:
        setup, run = super().prepare(mode)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # cuDNN picks and allocates outside the capture
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
        # Each replay overwrites the gradients, which the graph allocated: nothing to clear.
        return (lambda: None), graph.replay
