"""Defines the layers that the suite times: built-in shapes, and shapes from the command line."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import snnlstm
from benchmarks.theirs import quant, snntorch


def loop(step: Callable, x: Tensor, syn: Tensor, mem: Tensor) -> tuple[list, Tensor, Tensor]:
    """Calls `step` once a time step; returns the list of spikes and the last states."""
    spikes = []
    # The backward pass of x[t] in the place of unbind would fill one whole x of zeros per step.
    for x_t in x.unbind(0):
        spk, syn, mem = step(x_t, syn, mem)
        spikes.append(spk)
    return spikes, syn, mem


def widest_gap(values: Tensor, numbers: Tensor, share: float) -> Tensor:
    """Returns the middle of the widest gap near a quantile of `numbers`, of each row.

    The gap is one between two of `values`, which are sorted. If none lies within 5 % of the
    quantile, the nearest one counts.
    """
    middles, gaps = (values[:, 1:] + values[:, :-1]) / 2, values.diff(dim=1)
    ordered, count = numbers.sort(1).values, numbers.shape[1]  # torch.quantile takes 2^24 at most
    low, wanted, high = (ordered[:, int((share + by) * count), None] for by in (-0.05, 0.0, 0.05))
    inside = (low < middles) & (middles < high)
    widths = gaps.where(inside, -(middles - wanted).abs()).masked_fill(gaps == 0, -math.inf)
    return middles.gather(1, widths.argmax(1, True))


@dataclass(frozen=True)
class Case:
    """A case is one layer on one input; x is (steps, batch, cin, height, width).

    density: the share of ones in a binary x; None draws x from a normal distribution.
    threshold: 0.1 by default, because no mem exceeds the cell's default of 1.0.
    weights: the weight is this factor times the initial one; training may reach 6.
    lengths: sample n of N has steps * (n + 1) / N steps, at least one; snnTorch's cell runs all.
    """

    name: str
    steps: int
    batch: int
    cin: int
    cout: int
    height: int
    width: int
    kernel: tuple[int, int] = (3, 3)
    max_pool: int = 0
    avg_pool: int = 0
    reset: str = "none"
    quant: int = 0  # bits
    threshold: float = 0.1
    density: float | None = 0.1
    weights: float = 1.0
    lengths: bool = False

    dtypes = torch.float64, torch.bfloat16, torch.float16  # besides float32
    autocast, captures = False, True
    optimizer = functools.partial(torch.optim.SGD, lr=0.0)
    loop = staticmethod(loop)

    @property
    def grad_x(self) -> bool:
        """Returns whether training counts the gradient of x: a network's first layer needs none."""
        return self.cin > 4

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """Returns the shape of syn and mem."""
        return self.batch, self.cout, self.height, self.width

    @property
    def spike_shape(self) -> tuple[int, int, int, int, int]:
        """Returns the shape of the whole sequence's spikes."""
        pool = self.max_pool or self.avg_pool or 1
        return self.steps, self.batch, self.cout, self.height // pool, self.width // pool

    def make(self, cell: Any) -> torch.nn.Module:
        """Makes a cell of snnTorch's class or of ours."""
        ours = cell is snnlstm.SConv2dLSTM
        quantise = snnlstm.quant.state_quant if ours else quant.state_quant
        made = cell(
            self.cin, self.cout, self.kernel, max_pool=self.max_pool, avg_pool=self.avg_pool,
            threshold=self.threshold, reset_mechanism=self.reset,
            state_quant=quantise(self.quant) if self.quant else False,
        )  # fmt: skip
        made.conv.weight.data.mul_(self.weights)
        # The list would keep every cell and its last state for ever.
        snntorch._neurons.neurons.SpikingNeuron.instances.clear()
        return made

    def batches(self, dtype: torch.dtype) -> list[tuple[Any, Tensor]]:
        """Draws x and zero states, and the gradient (T, N, C, Ho, Wo) that training sends back."""
        draw = {"generator": torch.Generator("cpu").manual_seed(0), "device": "cpu"}
        size = (self.steps, self.batch, self.cin, self.height, self.width)
        if self.density is None:
            x = torch.randn(size, **draw)
        else:
            x = (torch.rand(size, **draw) < self.density).float()
        gradient = self.without_padding(torch.randn(self.spike_shape, **draw))
        syn = torch.zeros(self.state_shape, dtype=dtype)
        x = x.to(syn).requires_grad_(self.grad_x)
        # For one tensor in two places torch.compile would compile a graph of its own.
        return [((x, syn, torch.zeros_like(syn)), gradient.to(syn.device))]

    @property
    def lengths_of_samples(self) -> Tensor:
        """Returns the number of steps of each sample, (N,)."""
        samples = torch.arange(1, self.batch + 1, device="cpu")
        return (samples * self.steps // self.batch).clamp(min=1)

    def without_padding(self, x: Tensor) -> Tensor:
        """Returns x (T, N, ...) with zeros behind each sample's last step."""
        if not self.lengths:
            return x
        running = torch.arange(len(x), device="cpu")[:, None] < self.lengths_of_samples
        return x * running.to(x).view(*x.shape[:2], *[1] * (x.dim() - 2))

    @torch.no_grad()
    def spiking_threshold(self, cell: Any, x: Tensor, syn: Tensor, mem: Tensor) -> Tensor:
        """Returns the threshold (C, 1, 1) that some 15 % of each channel's mem exceed.

        At their own thresholds many layers hardly spike, and a comparison of spikes says nothing.
        Pixels without a one near them have equal mems, and rounding would decide all of them: so
        the threshold lies in the widest gap near the 85 % quantile.
        """
        mems = []
        for x_t in x[:3]:
            _, syn, mem = cell(x_t, syn, mem)
            mems.append(mem)
        ordered = torch.stack(mems).movedim(2, 0).flatten(1).float().sort(1).values
        return widest_gap(ordered, ordered, 0.85)[..., None].to(mem.dtype)

    def sequences(self, cell: Any, x: Tensor, syn: Tensor, mem: Tensor) -> Any:
        """Calls the cell once; returns spikes and the last states."""
        if not self.lengths:
            return cell(x, syn, mem)
        lengths = self.lengths_of_samples.clamp(max=len(x)).to(x.device)
        return cell(x, syn, mem, lengths=lengths)

    def infer(self, run: Callable[..., Any], cell: Any, x: tuple[Tensor, ...]) -> Any:
        """Runs all steps."""
        return run(cell, *x)

    def train(self, run: Callable[..., Any], cell: Any, _: Any, x: Any, y: Tensor) -> None:
        """Runs all steps forward and backward, without an optimizer's step."""
        spikes = run(cell, *x)[0]
        # A list of spikes is not stacked, so that snnTorch's loop does not pay for a copy.
        spikes = spikes if isinstance(spikes, list) else [spikes]
        gradients = [y] if len(spikes) == 1 else y.unbind()
        # snntorch 1.0.0 returns float32 spikes from a cell of any type.
        pairs = zip(spikes, gradients, strict=True)
        torch.autograd.backward(spikes, [g.to(s.dtype).view_as(s) for s, g in pairs])

    def results(self, run: Callable[..., Any], cell: Any, _: Any, x: Any, y: Tensor) -> Any:
        """Returns three steps' spikes, last states, and the gradients of weight and x.

        States and gradients pass from step to step twice. With lengths there are no last states to
        compare: snnTorch's cell runs on behind a sample's last step.
        """
        steps = x[0][:3]
        wanted = [cell.conv.weight, *([steps] if self.grad_x else [])]
        spikes, syn, mem = run(cell, steps, *x[1:])
        spikes = self.without_padding(torch.stack(spikes) if isinstance(spikes, list) else spikes)
        loss, results = (spikes * y[:3]).sum(), {"spikes": spikes}
        if not self.lengths:
            results |= {"syn": syn, "mem": mem}
            loss = loss + mem.square().sum() + syn.sum()
        gradients = torch.autograd.grad(loss, wanted)
        names = "gradient of weight", "gradient of x"
        return results | dict(zip(names, gradients, strict=False))

    @property
    def shape(self) -> str:
        """Returns the shape and the options that differ from their defaults, as `--shape` does."""
        kernel = "x".join(map(str, dict.fromkeys(self.kernel)))
        sizes = (self.steps, self.batch, self.cin, self.cout, self.height, self.width, kernel)
        words = [*map(str, sizes)]
        for option in OPTIONS:
            value = getattr(self, option)
            if value != getattr(Case, option, value):  # the name has no default
                words.append(f"{option}={'dense' if value is None else value}")
        return " ".join(words)

    @property
    def title(self) -> str:
        """Returns shape and options in one line."""
        _, _, _, _, _, _, kernel, *options = self.shape.split(" ")
        layer = f"{self.cin}->{self.cout} {self.height}x{self.width}, k{kernel}"
        return ", ".join([f"{layer}, T={self.steps} N={self.batch}", *options])

    def flops(self, mode: str) -> int:
        """Counts the floating-point operations of the convolutions of all time steps.

        The counts are those of direct convolution. An algorithm with fewer operations can therefore
        show an effective rate above the machine's peak.
        """
        per_channel = 2 * 4 * self.steps * math.prod(self.state_shape) * math.prod(self.kernel)
        forward = per_channel * (self.cin + self.cout)
        data = per_channel * (self.cout + self.cin * self.grad_x)
        # The weight gradient costs what the forward pass costs.
        return forward if mode == "inference" else 2 * forward + data


def _named(*cases: Case) -> dict[str, Case]:
    return {case.name: case for case in cases}


_MID = Case("mid", 8, 8, 32, 64, 32, 32)
_BIG = Case("big", 4, 8, 64, 128, 32, 32)

CPU_CASES = _named(
    Case("tiny", 20, 1, 2, 16, 16, 16),
    Case("mnist", 10, 32, 1, 8, 28, 28),
    Case("doc2", 10, 32, 8, 8, 14, 14, avg_pool=2),
    Case("audio", 20, 8, 1, 16, 129, 33, max_pool=2),
    Case("dvs", 10, 16, 2, 32, 32, 32),
    _MID,
    _BIG,
    Case("k5", 8, 8, 16, 32, 32, 32, kernel=(5, 5)),
    dataclasses.replace(_MID, name="zero", reset="zero"),
    dataclasses.replace(_MID, name="quant", quant=8),
    dataclasses.replace(_MID, name="mid-dense", density=None),
    dataclasses.replace(_BIG, name="big-dense", density=None),
    dataclasses.replace(_MID, name="mid-grown", weights=6),
)

# Spikes as sparse as those of trained networks, of which the kernels make lists.
SPARSE_CASES = _named(
    Case("sparse1", 8, 8, 64, 32, 32, 32, density=0.03),
    Case("sparse2", 8, 8, 128, 64, 16, 16, density=0.03),
    Case("sparse3", 8, 8, 32, 64, 16, 16, density=0.03),
)

# Users have such layers for spectrograms, EEG (channels by time, or one column), events, images.
USERS_CASES = _named(
    Case("spectrum1", 4, 8, 1, 16, 129, 33, kernel=(9, 9)),
    Case("electrodes1", 4, 8, 1, 16, 19, 125, kernel=(19, 3)),
    Case("column-3x1", 8, 16, 1, 4, 129, 33, kernel=(3, 1)),
    Case("k5-first", 8, 16, 1, 16, 28, 28, kernel=(5, 5)),
    Case("column1", 10, 16, 22, 16, 129, 1),
    Case("column2", 10, 16, 16, 32, 64, 1),
    Case("column3", 10, 16, 32, 64, 32, 1),
    Case("eeg1", 8, 8, 1, 16, 22, 129, max_pool=2),
    Case("eeg2", 8, 8, 16, 32, 11, 64, max_pool=2),
    Case("eeg3", 8, 8, 32, 64, 5, 32, max_pool=2),
    Case("frame", 2, 1, 32, 1, 720, 1580),
    Case("small", 10, 16, 16, 12, 8, 8),
)

# Networks on DVS128 Gesture have such layers: 2 polarities in, 64 or 128 pixels a side. The last
# ones are users' layers at their batches.
GPU_CASES = _named(
    Case("dvs64", 16, 16, 2, 32, 64, 64),
    Case("dvs128", 16, 16, 2, 32, 128, 128),
    Case("wide64", 16, 16, 64, 128, 64, 64),
    Case("wide128", 16, 16, 64, 128, 128, 128),
    *(
        dataclasses.replace(USERS_CASES[name], name=f"{name}-n{batch}", batch=batch)
        for name, batch in (("column1", 128), ("column3", 128), ("eeg1", 32))
    ),
)

_FULL = (
    Case("full1", 16, 16, 1, 8, 28, 28),
    Case("full2", 16, 16, 2, 16, 16, 16),
    Case("full3", 16, 16, 16, 32, 32, 32),
)
# Sample n has n steps, 53 % of all: that share of the full batch's time is the least that it costs.
LENGTHS_CASES = _named(
    *_FULL, *(dataclasses.replace(c, name=f"padded{c.name[-1]}", lengths=True) for c in _FULL)
)

# One layer at several lengths, for memory: `--shapes long --memory`.
LONG_CASES = _named(*(Case(f"long{steps}", steps, 8, 16, 32, 32, 32) for steps in (5, 10, 20, 40)))

TABLES = {
    "cpu": CPU_CASES, "sparse": SPARSE_CASES, "users": USERS_CASES, "gpu": GPU_CASES,
    "lengths": LENGTHS_CASES, "long": LONG_CASES,
}  # fmt: skip
CASES = {name: case for table in TABLES.values() for name, case in table.items()}


# An option of a shape is a field of Case, and reads its value.
OPTIONS: dict[str, Callable[[str], Any]] = {
    "max_pool": int, "avg_pool": int, "reset": str, "quant": int, "threshold": float,
    "density": lambda text: None if text == "dense" else float(text),
    "weights": float, "lengths": lambda text: text == "True", "name": str,
}  # fmt: skip


def parse_case(text: str) -> Case:
    """Reads a shape of the command line: "T N Cin Cout H W k [option=value ...]".

    k is "3" or "3x5"; OPTIONS lists the options. Raises ValueError that names the wrong part.
    """
    words = text.replace(",", " ").split()
    numbers = [word for word in words if "=" not in word]
    options = dict(word.split("=", 1) for word in words if "=" in word)
    try:
        *sizes, kernel = numbers
        sides = [int(side) for side in kernel.split("x")]
        fields = {option: OPTIONS[option](value) for option, value in options.items()}
        name = fields.pop("name", "own-" + "-".join(numbers))
        case = Case(name, *map(int, sizes), kernel=(sides[0], sides[-1]), **fields)
        case.make(snnlstm.SConv2dLSTM)  # raises what is wrong with its arguments
        if min(case.spike_shape) < 1 or not 0 <= (case.density or 0) <= 1:
            raise ValueError("a size is below 1, or the density is no share")
    except (KeyError, ValueError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"--shape: expected a layer {FORM}, got {text!r}: {error}") from None
    return case


FORM = (
    'as "T N Cin Cout H W k", k as 3 or 3x5, and options of max_pool=2, avg_pool=2, '
    "reset=zero, quant=8, threshold=0.1, density=0.1 (or dense), weights=6, lengths=True, name=mine"
)
