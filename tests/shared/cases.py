"""Describes calls of the cell: options, shapes, memory layouts, numbers; hypothesis draws some."""

import inspect
import os
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import snntorch.surrogate
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from snnlstm import surrogate
from snnlstm.calls.spec import CellSpec
from snnlstm.quant import StateQuant, state_quant


def unusual(kind: surrogate.Kind) -> surrogate.Surrogate:
    """Returns a surrogate of this kind whose numbers are no defaults, and exact in float32."""
    make = getattr(surrogate, kind.name)
    return make(*(p.default / 4 + 1 / 16 for p in inspect.signature(make).parameters.values()))


SURROGATES = (*map(unusual, surrogate.KINDS[1:]), surrogate.NONE)
IN_KERNELS = [s for s in SURROGATES if not s.is_random]
# snnTorch's LSO cannot be called.
IN_SNNTORCH = [s for s in IN_KERNELS if s.name in {*dir(snntorch.surrogate)} - {"LSO"}]
LAYOUTS = ("contiguous", "channels_last", "sliced", "strided", "transposed", "shifted", "expanded")
INPUT_LAYOUTS = (*LAYOUTS, "overlapping")
GRADIENT_LAYOUTS = (*INPUT_LAYOUTS, "negated")


@dataclass(frozen=True)
class Options(CellSpec):
    """What a call computes: a cell's spec, and whether the call is of a sequence, and records."""

    sequence: bool = False
    record: bool = False
    lengths: tuple[int, ...] | None = None  # the steps of each sample of a sequence

    def __hash__(self) -> int:
        return super().__hash__()

    def __post_init__(self) -> None:
        super().__post_init__()
        # torch.compile cannot trace fields(), so the spec alone, as cells have it, is made here.
        object.__setattr__(self, "spec", CellSpec(**_fields_of(self)))


def _fields_of(spec: CellSpec) -> dict[str, Any]:
    return {f.name: getattr(spec, f.name) for f in fields(CellSpec) if f.init}


class Inputs(NamedTuple):
    """These are the tensors of a call."""

    x: Tensor
    syn: Tensor
    mem: Tensor
    weight: Tensor
    bias: Tensor | None
    threshold: Tensor
    graded: Tensor

    def double(self) -> "Inputs":
        """Returns equal numbers in float64, contiguous and detached from any graph."""
        return Inputs(*(None if t is None else t.detach().double().contiguous() for t in self))


def wanting_gradients(inputs: Inputs) -> Inputs:
    """Returns leaves in the same memory; all but the graded factor require a gradient."""
    *leaves, graded = (None if t is None else t.detach() for t in inputs)
    return Inputs(*(None if t is None else t.requires_grad_() for t in leaves), graded)


def laid_out(values: Tensor, layout: str) -> Tensor:
    """Returns `values` in memory of the given layout.

    "sliced" and "strided" values have NaN around them. "expanded" repeats the first entry along the
    first dimension, with stride 0.
    """
    if layout == "contiguous" or values.dim() < 3:  # the spk of a step without spikes is (0,)
        return values.contiguous()
    if layout == "expanded":
        return values[:1].expand_as(values)
    if layout == "negated":  # the sign is a flag of the tensor
        return torch._neg_view(-values)
    if layout == "channels_last":
        return values.movedim(-3, -1).contiguous().movedim(-1, -3)
    if layout == "overlapping":  # each row begins within the one before
        width = values.shape[-1]
        strides = values.new_empty((*values.shape[:-1], max(width // 2, 1))).stride()
        size = 1 + sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True))
        return values.reshape(-1)[:size].clone().as_strided(values.shape, strides)
    if layout == "transposed":
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "shifted":  # no vector of it is aligned
        return values.new_empty(values.numel() + 1)[1:].view(values.shape).copy_(values)
    step = {"sliced": 1, "strided": 2}[layout]
    around = values.new_full([step * n + 2 for n in values.shape], torch.nan)
    inside = around[tuple(slice(1, 1 + step * n, step) for n in values.shape)]
    return inside.copy_(values)


@dataclass(frozen=True)
class Case:
    """This is one call of the cell; `inputs` and `output_gradients` draw its numbers."""

    options: Options
    dtype: torch.dtype
    time: int
    batch: int
    in_channels: int
    channels: int
    height: int
    width: int
    threshold: str = "number"  # or "column" (C, 1, 1), or "four" (1, C, 1, 1)
    bias: bool = True
    graded: float = 1.0
    density: float = 1.0  # the share of x that is not zero
    spikes: bool = False  # x holds 0 and 1, else normally distributed numbers
    layouts: tuple[str, ...] = ("contiguous",) * 4  # of x, states, weight, output gradients
    seed: int = 0
    gain: float = 1.0  # the weights are this factor times weights that make gates of order 1

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.channels, *self.options.state_size(self.height, self.width))

    @property
    def work(self) -> int:
        """Returns the multiply-adds of a gate, over all steps."""
        (kh, kw), (n, c, ho, wo) = self.options.kernel_size, self.state_shape
        return self.time * n * ho * wo * kh * kw * c * (self.in_channels + c)

    @property
    def running(self) -> Tensor:
        """Returns which steps are a sample's own, (T, N), or ()."""
        if self.options.lengths is None:
            return torch.tensor(True)
        return torch.arange(self.time)[:, None] < torch.tensor(self.options.lengths)

    def inputs(self) -> Inputs:
        """Returns the case's numbers, equal at every call; x of padded samples is NaN."""
        random = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, dtype=torch.float64).to(self.dtype)

        lead = (self.time,) if self.options.sequence else ()
        x = normal(*lead, self.batch, self.in_channels, self.height, self.width)
        kept = torch.rand(x.shape, generator=random) < self.density
        x = torch.where(kept, torch.ones_like(x) if self.spikes else x, 0)
        if self.layouts[0] not in ("expanded", "overlapping"):  # whose samples share memory
            x[~self.running] = torch.nan
        c, fan_in = self.channels, self.in_channels + self.channels
        kh, kw = self.options.kernel_size
        weight = normal(4 * c, fan_in, kh, kw) * self.gain / (fan_in * kh * kw) ** 0.5
        shape = {"number": (), "column": (c, 1, 1), "four": (1, c, 1, 1)}[self.threshold]
        threshold = torch.rand(shape, generator=random, dtype=torch.float64).to(self.dtype)
        x_layout, state_layout, weight_layout, _ = self.layouts
        return Inputs(
            laid_out(x, x_layout),
            laid_out(normal(*self.state_shape), state_layout),
            laid_out(normal(*self.state_shape) * 0.3, state_layout),
            laid_out(weight, weight_layout),
            normal(4 * c) * 0.2 if self.bias else None,
            threshold * 0.2,
            torch.tensor(self.graded, dtype=self.dtype),
        )

    @property
    def output_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Returns the shapes of spk, syn and mem."""
        options, (n, c, ho, wo) = self.options, self.state_shape
        (ph, pw), lead = options.pool_size, (self.time,) if options.sequence else ()
        states = (*(lead if options.record else ()), n, c, ho, wo)
        spk = (*lead, n, c, ho // ph, wo // pw) if lead or options.spiking else (0,)
        return spk, states, states

    def output_gradients(self) -> tuple[Tensor, ...]:
        """Returns random gradients of spk, syn and mem, which are equal at every call."""
        random = torch.Generator().manual_seed(self.seed + 1)
        return tuple(
            laid_out(
                torch.randn(shape, generator=random, dtype=torch.float64).to(self.dtype),
                self.layouts[3],
            )
            for shape in self.output_shapes
        )

    def but(self, **changes: object) -> "Case":
        """Returns the call with other values for some of its fields or of its options' fields."""
        own = {name: value for name, value in changes.items() if name in _FIELDS}
        rest = {name: value for name, value in changes.items() if name not in _FIELDS}
        return replace(self, **{"options": replace(self.options, **rest)} | own)

    def recorded(self) -> "Case":
        """Returns the call with every state among its results."""
        return self.but(record=self.options.sequence)


_FIELDS = {field.name for field in fields(Case)}
PLAIN = Case(
    Options((3, 3), sequence=True, record=True, surrogate=surrogate.atan(), reset="subtract"),
    torch.float32,
    time=3,
    batch=2,
    in_channels=5,
    channels=9,
    height=7,
    width=10,
    threshold="column",
)


# Another value of each field of a spec.
FIELDS = {
    "kernel_size": (1, 5), "stride": (2, 1), "dilation": (1, 3), "reset": "zero", "pool": "max",
    "pool_size": (3, 2), "surrogate": surrogate.spike_rate_escape(0.3, 7), "quant": state_quant(3),
    "inhibition": True, "spiking": False,
}  # fmt: skip

# What makes a call one of the cell without spikes.
SILENT: dict[str, Any] = {
    "spiking": False,
    "reset": "none",
    "pool": "none",
    "pool_size": (1, 1),
    "surrogate": surrogate.NONE,
    "quant": None,
}


# The fields of the core's Cell, which is a small layer.
FACTS: dict[str, Any] = {
    "dtype": 0, "T": 1, "N": 1, "Cin": 1, "C": 8, "H": 8, "W": 8, "kernel": (3, 3),
    "stride": (1, 1), "dilation": (1, 1), "pool": 0, "pool_size": (1, 1), "reset": 2,
    "surrogate": 1, "p0": 2.0, "p1": 0.0, "num_levels": 0,
}  # fmt: skip


_SIDES = st.one_of(st.integers(1, 9), st.sampled_from([11, 13, 16, 17, 19]))
# The numbers of channels lie around one and two vectors of 4, 8 and 16 lanes.
_CHANNELS = st.one_of(st.integers(1, 9), st.sampled_from([11, 13, 16, 17, 23, 24, 33]))
_KERNELS = st.one_of(
    st.just((3, 3)),
    st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3, 5])),
    st.sampled_from([(7, 1), (1, 7), (5, 5), (7, 7)]),
)
# The most multiply-adds of a gate, over all steps.
_MOST_WORK, _MOST_WORK_OF_LARGE = 1_000_000, 3_000_000
_QUANTS: tuple[StateQuant | None, ...] = (
    None,
    None,
    None,
    state_quant(4, threshold=0.5),
    state_quant(2, uniform=False, threshold=0.3),
    StateQuant(torch.tensor([-0.5, 0.0, 0.0, 0.25])),
)


@st.composite
def options(draw: Any, height: int, width: int, far: bool = False) -> Options:
    """Draws any options of the kernels that an image of this size allows.

    `far` allows strides and dilations that skip much of an image, which then has no pool.
    """
    plain = draw(st.booleans())  # half of the cases have neither stride nor dilation
    most = 20 if far else 3
    sizes = st.tuples(st.integers(1, most), st.integers(1, most))
    kernel = draw(_KERNELS)
    stride = (1, 1) if plain else draw(sizes)
    dilation = (1, 1) if plain else draw(sizes)
    ho, wo = -(-height // stride[0]), -(-width // stride[1])
    pool = "none" if far and not plain else draw(st.sampled_from(["none", "max", "avg"]))
    pool_size = (1, 1)
    if pool != "none":
        pool_size = draw(st.tuples(st.integers(1, min(3, ho)), st.integers(1, min(3, wo))))
    sequence = draw(st.booleans())
    drawn = Options(
        kernel_size=kernel,
        stride=stride,
        dilation=dilation,
        reset=draw(st.sampled_from(["none", "subtract", "zero"])),
        pool=pool,
        pool_size=pool_size,
        surrogate=draw(st.sampled_from(IN_KERNELS)),
        quant=draw(st.sampled_from(_QUANTS)),
        sequence=sequence,
        record=sequence and draw(st.booleans()),
    )
    return replace(drawn, **SILENT) if draw(st.integers(0, 4)) == 0 else drawn


@st.composite
def cases(
    draw: Any,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64),
    large: bool = False,
) -> Case:
    """Draws any call that the kernels cover; `large` ones also have weights of any gain.

    A third of the sequences has lengths.
    """

    def size(small: Any, most: int) -> int:
        return min(draw(st.integers(1, most)), draw(st.integers(1, most))) if large else draw(small)

    height, width = size(_SIDES, 40), size(_SIDES, 40)
    chosen = draw(options(height, width, large and draw(st.booleans())))
    layout = st.sampled_from(LAYOUTS)
    case = Case(
        chosen,
        draw(st.sampled_from(dtypes)),
        size(st.integers(1, 5), 40) if chosen.sequence else 1,
        size(st.integers(1, 3), 9),
        size(_CHANNELS, 100),
        size(_CHANNELS, 80),
        height,
        width,
        draw(st.sampled_from(["number", "column", "four"])),
        draw(st.booleans()),
        draw(st.sampled_from([1.0, 0.7, -2.0])),
        draw(st.sampled_from([1.0, 0.3, 0.1, 0.02, *[0.0] * large])),
        draw(st.booleans()),
        (draw(layout), draw(layout), draw(layout), draw(layout)),
        draw(st.integers(0, 2**16)),
        draw(st.sampled_from([1.0, 1.0, 1.0, 1e-3, 0.1, 10.0, 100.0])) if large else 1.0,
    )
    while case.work > (_MOST_WORK_OF_LARGE if large else _MOST_WORK):  # halve the largest size
        names = ("time", "batch", "channels", "in_channels")
        largest = max(names, key=lambda name: getattr(case, name))
        case = case.but(**{largest: getattr(case, largest) // 2})
    if not chosen.sequence or draw(st.integers(0, 2)) > 0:
        return case
    return case.but(lengths=draw(st.tuples(*[st.integers(0, case.time)] * case.batch)))


def drawing(count: int) -> settings:
    """Returns a decorator of functions with ``@given``, which then draw `count` examples.

    The examples are equal for everybody, and no clock decides. With SNNLSTM_EXAMPLES=fresh, as in
    ``make fuzz``, they are fresh and ten times as many. A failure prints the code that repeats it.
    """
    fresh = os.environ.get("SNNLSTM_EXAMPLES") == "fresh"
    return settings(
        max_examples=10 * count if fresh else count, derandomize=not fresh, database=None,
        deadline=None, print_blob=True, suppress_health_check=list(HealthCheck),
    )  # fmt: skip
