"""The ways in which CUDA can run the parts of a call, and the choice among them.

All ways give the same results, up to rounding, and each reads what the others have saved:

- the kernels do it all, the convolution included, in a launch for each step or in one for all
- "hybrid": the kernels go through the steps, and torch (cuDNN) forms the gradients of weight, bias
  and x over all steps at once
- "pointwise": torch convolves, and the kernels do the rest of a step

An estimate, or a measurement on the GPU at hand, chooses: :func:`snnlstm.set_algorithm`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..call import Signature
from ..measured import choices
from ..version import __version__

if TYPE_CHECKING:
    from .cuda import Kernels

__all__ = ["Way", "Ways"]

# The numbers of csrc/cuda/api.h.
_AUTOMATIC, _POINTWISE, _FUSED = 0, 3, 5


class Way(NamedTuple):
    """How a part of a call's work is run.

    `name` is as in a path, such as ``"mma-tf32"``; `target` the core's, with the kernels that are
    to run; `torch` what torch convolves: nothing, for the "gradients" of weight and x, or "all".
    """

    name: str
    target: Any
    torch: str = ""

    def hybrid(self) -> Way:
        """The same steps, with torch for the gradients of weight and x."""
        return Way(f"hybrid-{self.name}", self.target, "gradients")


class Ways:
    """The choice for each part of the work of calls that are alike.

    The parts are "forward" and "backward". ``name`` says what runs; where it is measured, what is
    known of it by now.
    """

    def __init__(
        self, kernels: Kernels, signature: Signature, cell: Any, strides: Sequence[Any],
        algorithm: str, tf32: bool, measures: bool,
    ) -> None:  # fmt: skip
        s = self._signature = signature
        self._kernels, self._cell, self._measures = kernels, cell, measures
        self._details = f"{'tf32' if tf32 else 'ieee'}; strides {strides}"
        self._target = kernels.target(s, tf32, _AUTOMATIC)
        self._fused = kernels.target(s, tf32, _FUSED)
        self._forward, self._backward = (self._estimate(algorithm, part) for part in (False, True))
        self._known: dict[str, Way] = {}  # a few dozen: wanted gradients
        name = (self._backward if algorithm == "hybrid" else self._forward).name
        self.name = f"{kernels.name()}-{name}"

    def _key(self, what: str) -> str:
        """What a measured choice depends on."""
        s = self._signature
        return "; ".join(
            (
                self._kernels.device_name(s.device), f"snnlstm {__version__}",
                f"torch {torch.__version__}", str(s.dtype), s.options.text, str(s.options.operands),
                self._details,
                f"T={s.time} N={s.n} {s.cin}->{s.c} {s.h}x{s.w}", what,
            )
        )  # fmt: skip

    def _named(self, target: Any) -> Way:
        return Way(self._kernels.core.cuda_algorithm_name(self._cell, target), target)

    def _kernels_ways(self, backward: bool) -> list[Way]:
        found = self._kernels.core.cuda_ways(self._cell, self._target, backward)
        return [Way(name, target) for name, target in found]

    def _estimate(self, algorithm: str, backward: bool) -> Way:
        """What runs unless it is measured."""
        target = self._target
        if algorithm in ("fused", "hybrid", "resident"):
            fused = self._named(self._fused)
            last = self._kernels_ways(backward)[-1] if algorithm == "resident" else fused
            if last.name.startswith("resident"):
                return last
            return fused.hybrid() if algorithm == "hybrid" and backward else fused
        automatic = algorithm in ("auto", "measure")
        if automatic and self._kernels.core.cuda_choose(self._cell, target) == _POINTWISE:
            algorithm = "pointwise"
        return Way("pointwise", target, "all") if algorithm == "pointwise" else self._named(target)

    def _candidates(self, part: str) -> list[Way]:
        """The ways that are timed."""
        found = self._kernels_ways(backward=part == "backward")
        if part == "backward":
            found.append(found[0].hybrid())
        return [*found, Way("pointwise", self._target, "all")]

    def choose(self, part: str, run: Callable[[Way], object], details: Sequence[bool] = ()) -> Way:
        """The way to run a part, measured where that is wanted and not known yet.

        `run` runs the part in a way, once or more; `details` is what else the time depends on.
        """
        estimated = self._forward if part == "forward" else self._backward
        if not self._measures:
            return estimated
        what = f"{part} {''.join('01'[detail] for detail in details)}".rstrip()
        if what in self._known:
            return self._known[what]
        ways = {way.name: way for way in self._candidates(part)}
        key = self._key(what)
        name = choices.find(key)
        if name not in ways:
            if not self._kernels.may_measure():
                return estimated
            fastest = self._fastest(ways, run)
            # Another thread may have been first, or a file may hold a name that is unknown here.
            name = kept if (kept := choices.keep(key, fastest)) in ways else fastest
        way = self._known[what] = ways[name]
        parts = {what.split()[0]: way.name for what, way in self._known.items()}
        order = [parts[part] for part in ("forward", "backward") if part in parts]
        self.name = f"{self._kernels.name()}-measured-{'+'.join(order)}"
        return way

    def _fastest(self, ways: dict[str, Way], run: Callable[[Way], object]) -> str:
        seconds = self._kernels.seconds
        times = {name: seconds(partial(run, way)) for name, way in ways.items()}
        return min(times, key=times.__getitem__)
