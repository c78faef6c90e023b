"""Compares random calls of the cell with the float64 reference: ``make fuzz MINUTES=10``.

A call has any options, shape, dtype, memory layout, instruction set, algorithm, and lengths of its
samples. A sequence runs as one call, in steps or in chunks; the caller hands states on, or a cell
keeps them. Gradients are asked for in unusual ways (ASKED), and hooks bring saved tensors back in
other memory (KEPT). The checks run on poisoned memory (checks.py). Hypothesis shrinks a failure,
and prints the arguments of :func:`check` that show it; the same --seed finds it again.

    python -m tools.fuzz --minutes 10 --seed 0
"""

import argparse
import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import hypothesis
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from tqdm import tqdm

import snnlstm
from tests.shared.cases import (
    GRADIENT_LAYOUTS,
    INPUT_LAYOUTS,
    Case,
    Inputs,
    Options,
    cases,
    drawing,
)
from tests.shared.checks import check_gradients, check_results
from tests.shared.cpu_kernels import ISAS, Kernels, native, use
from tests.shared.gradients import ASKED, KEPT, NAMES, OUTPUTS
from tests.shared.helpers import quietly
from tests.shared.poison import HUGE, NAN

WAYS = ("one call", "steps", "chunks", "a cell's calls", "a cell's chunks")
LAID_OUT = ("x", "states", "weight", "gradients")
BY_STEPS = ("steps", "a cell's calls")
ROUND = 100  # examples of a seed
_DTYPES = (*[torch.float32] * 4, *[torch.float64] * 2, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Calls(Kernels):
    """These kernels run a sequence in one of :data:`WAYS`."""

    way: str = "one call"
    chunk: int = 2
    gain: float = 1.0
    kept: str = "as it is"

    def state_error(self, dtype: torch.dtype) -> float:
        if dtype.itemsize == 2:
            return torch.finfo(dtype).eps
        return super().state_error(dtype) * max(1.0, self.gain)

    def run(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *tensors, chosen = arguments
        inputs, back = Inputs(*tensors), KEPT[self.kept]
        with saved_tensors_hooks(lambda t: t, back) if back else contextlib.nullcontext():
            if self.way == "one call" or not chosen.sequence:
                return super().run(*arguments)
            by_cell, by_steps = "cell" in self.way and chosen.spiking, self.way in BY_STEPS
            call = (self._cell if by_cell else self._functional)(inputs, chosen)
            outputs, syn, mem, left = [], inputs.syn, inputs.mem, chosen.lengths
            for x in inputs.x.split(1 if by_steps else self.chunk):
                lengths = left and tuple(min(max(length, 0), len(x)) for length in left)
                left = left and tuple(length - len(x) for length in left)
                outputs.append(call(x, syn, mem, lengths))
                syn, mem = outputs[-1][1][-1], outputs[-1][2][-1]
        spks, syns, mems = zip(*outputs, strict=True)
        if chosen.record:
            syn, mem = torch.cat(syns), torch.cat(mems)
        # A step call of a cell that does not spike has no spk.
        no_spk = by_steps and not chosen.spiking and chosen.lengths is None
        return torch.cat(mems if no_spk else spks), syn, mem

    def _functional(self, inputs: Inputs, chosen: Options) -> Callable[..., Any]:
        """Returns a function that runs one or several steps from given states."""
        if self.way == "steps" and chosen.lengths is None:
            step = replace(chosen, sequence=False, record=False)
            return lambda x, syn, mem, _: [
                o[None] for o in super(Calls, self).run(x[0], syn, mem, *inputs[3:], step)
            ]
        return lambda x, syn, mem, lengths: super(Calls, self).run(
            x, syn, mem, *inputs[3:], replace(chosen, record=True, lengths=lengths)
        )

    def _cell(self, inputs: Inputs, chosen: Options) -> Callable[..., Any]:
        """Returns a function that runs one or several steps by a cell, which keeps the states."""
        cell = quietly(
            snnlstm.SConv2dLSTM, inputs.x.shape[-3], inputs.mem.shape[1], chosen.kernel_size,
            inputs.bias is not None, dilation=chosen.dilation, dtype=inputs.x.dtype,
        )  # fmt: skip
        cell._spec = chosen.spec
        cell._buffers |= {"threshold": inputs.threshold, "graded_spikes_factor": inputs.graded}
        cell.syn, cell.mem = inputs.syn, inputs.mem
        # Tensors of a graph take the place of parameters.
        del cell.conv.weight, cell.conv.bias
        cell.conv._parameters = {"weight": inputs.weight, "bias": inputs.bias}

        def call(x: Tensor, syn: Tensor, mem: Tensor, lengths: Any) -> Any:
            one = self.way in BY_STEPS and lengths is None
            out = [o[None] for o in cell(x[0])] if one else cell(x, record=True, lengths=lengths)
            assert cell.path.native, str(cell.path)
            return out

        return call


def check(
    case: Case,
    isa: str,
    algorithm: str,
    way: str,
    chunk: int = 2,
    outputs: tuple[str, ...] = OUTPUTS,
    wanted: tuple[str, ...] = NAMES,
    pattern: int = NAN,
    asked: str = "plain",
    kept: str = "as it is",
) -> bool:
    """Checks results and gradients; returns False if the gradients were not compared.

    Gradients cannot be compared if rounding led kernels and reference to different decisions, as it
    does in half types, or if the weights are so large that the recurrence is chaotic.
    """
    if algorithm == "winograd" and case.dtype != torch.float32:
        algorithm = "auto"
    kernels = Calls(isa, algorithm, way, chunk, case.gain, kept)
    for _ in use(kernels):
        check_results(case, kernels)
        if case.gain > 1 or case.dtype.itemsize == 2:
            return False
        if case.options.quant and case.options.pool == "avg":  # in float64 means round alike
            case = replace(case, dtype=torch.float64)
        return check_gradients(kernels, case, outputs, wanted, pattern, ASKED[asked])
    raise AssertionError


def _subsets(names: tuple[str, ...]) -> st.SearchStrategy[tuple[str, ...]]:
    return st.sets(st.sampled_from(names), min_size=1).map(lambda s: tuple(sorted(s)))


ARGUMENTS: dict[str, st.SearchStrategy] = {
    "case": st.one_of(cases(), cases(_DTYPES, large=True)),
    # Every processor draws the same examples, and runs those of another one by what it has.
    "isa": st.sampled_from(["baseline", "avx2", "wide", "avx512"]).map(
        lambda isa: isa if isa in ISAS else ISAS[-1]
    ),
    "algorithm": st.sampled_from(native.cpu.ALGORITHMS),
    "chunk": st.integers(2, 5),
    "outputs": _subsets(OUTPUTS),
    "wanted": _subsets(NAMES),
    "pattern": st.sampled_from([NAN, HUGE]),
    "asked": st.sampled_from([*ASKED]),
    "kept": st.sampled_from([*KEPT]),
}


def run(count: int, seed: int | None = None) -> Counter[str]:
    """Checks `count` random calls or some more; counts them by what they are.

    Each memory layout comes as often as another, and so does each way, which Hypothesis would not
    draw.
    """
    done: Counter[str] = Counter()
    for k, gradient_layout in enumerate(GRADIENT_LAYOUTS):
        places = (k, k + 3 + (seed or 0), k + 5)
        input_layouts = [INPUT_LAYOUTS[place % len(INPUT_LAYOUTS)] for place in places]
        way = WAYS[(k + (seed or 0)) % len(WAYS)]
        _run(-(-count // len(GRADIENT_LAYOUTS)), seed, (*input_layouts, gradient_layout), way, done)
    return done


def _run(
    count: int, seed: int | None, layouts: tuple[str, ...], way: str, done: Counter[str]
) -> None:
    """Checks random calls in one way; x, states, weight and output gradients have these layouts."""

    def check_call(**arguments: Any) -> None:
        done["gradients"] += check(**arguments)
        done[way] += 1
        done.update(f"{what} {layout}" for what, layout in zip(LAID_OUT, layouts, strict=True))

    check_call.__name__ += "_".join(layouts)  # by its name Hypothesis draws the same for everybody
    case = ARGUMENTS["case"].map(lambda case: replace(case, layouts=layouts))
    fixed = {"case": case, "way": st.just(way)}
    # One bug alone is reported, so that its exception is raised.
    chosen = settings(drawing(count), report_multiple_bugs=False)
    checked = chosen(given(**ARGUMENTS | fixed)(check_call))
    (checked if seed is None else hypothesis.seed(seed)(checked))()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, help="0: one round of examples")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    chosen = parser.parse_args()
    end, done, seed = time.monotonic() + 60 * chosen.minutes, Counter[str](), chosen.seed
    with tqdm(unit=" calls", disable=None) as progress:
        while not done or time.monotonic() < end:
            done += run(ROUND, seed)
            seed += 1
            progress.update(ROUND)
    print(f"seeds {chosen.seed} to {seed - 1}: {dict(done)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
