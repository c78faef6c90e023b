"""Defines the layers that the suite times: built-in shapes, and shapes from the command line.

Counts of floating-point operations are those of direct convolution. An algorithm with fewer
operations can therefore show an effective rate above the machine's peak.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

MODES = ("forward", "backward", "both")
"""forward is inference; backward is the pass alone, after an untimed forward; both is training."""


@dataclass(frozen=True)
class Case:
    """A case is one layer on one input; x is (steps, batch, cin, height, width).

    density: the share of ones in a binary x; None draws x from a normal distribution.
    threshold: 0.1 by default, because no mem exceeds the cell's default of 1.0.
    goals: (forward, training) speed-ups over snnTorch eager that the project aims at, or None.
    goals_of: the provider that the goals are for.
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
    quant_bits: int = 0
    threshold: float = 0.1
    density: float | None = 0.1
    goals: tuple[float, float] | None = None
    goals_of: str = "snnlstm"

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

    def pool(self, mem: torch.Tensor) -> torch.Tensor:
        """Pools mem (N, C, H, W) as the case does, if it does."""
        if self.max_pool:
            return F.max_pool2d(mem, self.max_pool)
        return F.avg_pool2d(mem, self.avg_pool) if self.avg_pool else mem

    @property
    def options(self) -> str:
        """Returns the options that differ from their defaults, as `parse_case` reads them."""
        told = []
        for option, (field, *_) in OPTIONS.items():
            value = getattr(self, field)
            if field not in ("name", "density") and value != getattr(Case, field):
                told.append(f"{option}={value}")
        return " ".join(told)

    def columns(self) -> dict[str, Any]:
        """Returns the case's fields of a row of results."""
        names = ("steps", "batch", "cin", "cout", "height", "width", "options", "density")
        kernel = "x".join(map(str, self.kernel))
        return {"case": self.name, "kernel": kernel, **{n: getattr(self, n) for n in names}}

    @property
    def title(self) -> str:
        """Returns shape and options in one line."""
        kernel = "x".join(map(str, dict.fromkeys(self.kernel)))
        x = "dense x" if self.density is None else f"{self.density:.0%} x"
        shape = f"T={self.steps} N={self.batch} {self.cin}->{self.cout} {self.height}x{self.width}"
        return f"{shape} k{kernel}, {x}" + (f", {self.options}" if self.options else "")

    def goal(self, mode: str) -> float | None:
        """Returns the goal in `mode`, or None; there is no goal for backward alone."""
        if self.goals is None or mode == "backward":
            return None
        return self.goals[0 if mode == "forward" else 1]

    def make_input(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
        """Draws x (steps, batch, cin, height, width) on the CPU, so that all devices get one x."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.steps, self.batch, self.cin, self.height, self.width)
        if self.density is None:
            x = torch.randn(shape, generator=generator)
        else:
            x = (torch.rand(shape, generator=generator) < self.density).float()
        return x.to(device, dtype)

    def flops(self, mode: str) -> int:
        """Counts the floating-point operations of the convolutions of one time step."""
        of_channel = 2 * 4 * math.prod(self.state_shape) * math.prod(self.kernel)
        forward = of_channel * (self.cin + self.cout)
        data = of_channel * (self.cout + self.cin * self.grad_x)
        backward = data + forward  # the weight gradient costs what the forward pass costs
        return {"forward": forward, "backward": backward, "both": forward + backward}[mode]

    def fewest_bytes(self, mode: str, element: int) -> int:
        """Counts the bytes of all values that one time step reads or writes, of `element` bytes.

        A forward step reads x, syn, mem and the weights, and writes syn, mem and spk. Training also
        writes four activated gates, and reads them back with both states and spk's gradient.
        """
        state, spikes = math.prod(self.state_shape), math.prod(self.spike_shape[1:])
        x = state // self.cout * self.cin
        weights = 4 * self.cout * (self.cin + self.cout) * math.prod(self.kernel)
        forward = x + 4 * state + spikes + weights
        backward = 4 * state + x * (1 + self.grad_x) + 6 * state + spikes + 2 * weights
        both = forward + 4 * state + backward
        return element * {"forward": forward, "backward": backward, "both": both}[mode]


def _named(*cases: Case, **fields: Any) -> dict[str, Case]:
    """Returns cases by name, after setting common fields."""
    return {case.name: dataclasses.replace(case, **fields) for case in cases}


_MID = Case("mid", 8, 8, 32, 64, 32, 32, goals=(5, 4.5))
_BIG = Case("big", 4, 8, 64, 128, 32, 32, goals=(5, 5))

CPU_CASES = _named(
    Case("tiny", 20, 1, 2, 16, 16, 16, goals=(12, 9)),
    Case("mnist", 10, 32, 1, 8, 28, 28, goals=(4.5, 4.5)),
    Case("doc2", 10, 32, 8, 8, 14, 14, avg_pool=2, goals=(4, 4)),
    Case("audio", 20, 8, 1, 16, 129, 33, max_pool=2, goals=(4, 4)),
    Case("dvs", 10, 16, 2, 32, 32, 32, goals=(5, 4.5)),
    _MID,
    _BIG,
    Case("k5", 8, 8, 16, 32, 32, 32, kernel=(5, 5), goals=(3, 3)),
    dataclasses.replace(_MID, name="zero", reset="zero", goals=(8, 7)),
    dataclasses.replace(_MID, name="quant", quant_bits=8, goals=(100, 50)),
    dataclasses.replace(_MID, name="mid-dense", density=None, goals=(3.5, 3.5)),
    dataclasses.replace(_BIG, name="big-dense", density=None, goals=(3.5, 3.5)),
)

# Networks call their cells once per step, so the goals of these layers are for step calls.
LOOP_CASES = _named(
    Case("loop1", 16, 1, 2, 12, 15, 17, goals=(6, 4)),
    Case("loop2", 8, 24, 1, 8, 28, 28, max_pool=2, goals=(5, 4)),
    Case("loop3", 8, 12, 2, 24, 34, 34, goals=(3.5, 2.8)),
    Case("loop4", 6, 10, 24, 40, 30, 26, goals=(3.3, 2.4)),
    goals_of="snnlstm-step",
)

# Users have such layers for spectrograms, EEG (channels by time, or one column), events, images.
USERS_CASES = _named(
    Case("spectrum", 4, 8, 1, 16, 129, 33, kernel=(9, 9)),
    Case("electrodes", 4, 8, 1, 16, 19, 125, kernel=(19, 3)),
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
    goals=(3, 2.5),
    goals_of="snnlstm-step",
)

# Networks on DVS128 Gesture have such layers: 2 polarities in, 64 or 128 pixels a side.
GPU_CASES = _named(
    Case("dvs64", 16, 16, 2, 32, 64, 64),
    Case("dvs128", 16, 16, 2, 32, 128, 128),
    Case("wide64", 16, 16, 64, 128, 64, 64),
    Case("wide128", 16, 16, 64, 128, 128, 128),
)

LONG_CASE = Case("long", 40, 8, 16, 32, 32, 32)
"""A long sequence, for memory: measured at each of LONG_STEPS."""
LONG_STEPS = (5, 10, 20, 40)

QUICK_CASES = ("tiny", "mnist", "doc2", "dvs", "mid", "k5")

TABLES = {"cpu": CPU_CASES, "loops": LOOP_CASES, "users": USERS_CASES, "gpu": GPU_CASES}

CASES = CPU_CASES | LOOP_CASES | USERS_CASES | GPU_CASES | {LONG_CASE.name: LONG_CASE}


def find_cases(names: list[str]) -> list[Any]:
    """Returns built-in cases by name; "cpu", "loops", "users" and "gpu" stand for a whole table.

    So do "networks" and "fronts", which are cases of benchmarks/whole.py. Raises ValueError that
    names an unknown shape.
    """
    found: dict[str, Any] = {}
    for name in names:
        if name in TABLES:
            found |= TABLES[name]
        elif name in CASES:
            found[name] = CASES[name]
        else:
            found |= _networks(name)
    return list(found.values())


def _networks(name: str) -> dict[str, Any]:
    """Returns the networks of a table, or one network."""
    from benchmarks.whole import TABLES as NETWORKS  # which imports what networks are made of

    each = {key: case for table in NETWORKS.values() for key, case in table.items()}
    if name not in NETWORKS and name not in each:
        known = ", ".join([*CASES, *TABLES, *NETWORKS, *each])
        raise ValueError(f"--shapes: no shape is called {name!r}; known: {known}")
    return NETWORKS[name] if name in NETWORKS else {name: each[name]}


def random_cases(count: int, seed: int) -> list[Case]:
    """Draws layers of any sizes and options; equal seeds give equal layers.

    Each order of magnitude of a size is equally likely. Images may have one pixel or one column,
    and kernels have up to 11 taps along either axis.
    """
    draw = random.Random(seed)

    def size(most: int) -> int:
        return round(math.exp(draw.uniform(0, math.log(most))))

    cases: list[Case] = []
    while len(cases) < count:
        side = draw.choice((1, 3, 3, 3, 5, 7, 9, 11))
        other = side if draw.random() < 0.6 else draw.choice((1, 3, 5, 7, 9, 11))
        image = size(80), size(80)
        pool = draw.choice((0, 0, 2, 3))
        pool = pool if pool <= min(image) else 0
        layer = (draw.randint(1, 8), draw.randint(1, 16), size(160), size(160), *image)
        kind = "max_pool" if draw.random() < 0.5 else "avg_pool"
        reset = draw.choice(("none", "subtract", "zero"))
        density = draw.choice((None, 0.01, 0.03, 0.1, 0.3))
        case = Case(
            f"random{len(cases)}", *layer, kernel=(side, other), reset=reset, density=density
        )
        if case.flops("forward") < 4e9:
            cases.append(dataclasses.replace(case, **{kind: pool}))
    return cases


def parse_case(text: str) -> Case:
    """Reads a shape of the command line: "T N Cin Cout H W k [option=value ...]".

    k is "3" or "3x5"; OPTIONS lists the options. Raises ValueError that names the wrong part.
    """
    words = text.replace(",", " ").split()
    numbers = [word for word in words if "=" not in word]
    if len(numbers) != 7:
        form = '"T N Cin Cout H W k [option=value ...]"'
        raise ValueError(f"--shape: expected {form}, got {len(numbers)} numbers in {text!r}")
    labels = ("T", "N", "Cin", "Cout", "H", "W")
    sizes = [_value(label, word) for label, word in zip(labels, numbers[:6], strict=True)]
    kernel = [_value("k", side) for side in numbers[6].lower().split("x")]
    if len(kernel) > 2 or any(side % 2 == 0 for side in kernel):
        raise ValueError(f"--shape: k must be odd, as 3 or 3x5, got {numbers[6]!r}")
    given: dict[str, Any] = {"name": "own-" + "-".join(numbers)}
    for key, value in (word.split("=", 1) for word in words if "=" in word):
        if key not in OPTIONS:
            known = ", ".join(OPTIONS)
            raise ValueError(f"--shape: unknown option {key}={value!r}; known: {known}")
        field, *accepted = OPTIONS[key]
        given[field] = _value(key, value, *accepted)
    case = Case(given.pop("name"), *sizes, (kernel[0], kernel[-1]), **given)
    if case.max_pool and case.avg_pool:
        raise ValueError("--shape: only one of max_pool and avg_pool may be given, got both")
    if min(case.spike_shape) < 1:
        raise ValueError(f"--shape: the pool is larger than the image in {text!r}")
    return case


def _value(
    label: str,
    word: str,
    what: str = "a positive whole number",
    kind: Callable[[str], Any] = int,
    accepted: Callable[[Any], bool] = lambda value: value > 0,
) -> Any:
    try:
        value = kind(word)
        if accepted(value):
            return value
    except ValueError:
        pass
    raise ValueError(f"--shape: {label} must be {what}, got {word!r}")


_RESETS = ("none", "subtract", "zero")
_SHARE = 'a share from 0 to 1 or "dense"'
OPTIONS: dict[str, tuple[Any, ...]] = {
    "max_pool": ("max_pool",),
    "avg_pool": ("avg_pool",),
    "reset": ("reset", "none, subtract or zero", str, _RESETS.__contains__),
    "quant": ("quant_bits", "a positive whole number up to 16", int, range(1, 17).__contains__),
    "threshold": ("threshold", "a number", float, lambda value: True),
    "density": ("density", _SHARE, lambda text: parse_density(text), lambda value: True),
    "name": ("name", "a name", str, bool),
}
"""An option of a shape has a field of Case, and arguments of :func:`_value` for its value."""


def parse_density(text: str) -> float | None:
    """Reads a share of ones in 0..1, or "dense", which gives None: a normally distributed x."""
    if text == "dense":
        return None
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise ValueError(f"--density must be {_SHARE}, got {text!r}")
