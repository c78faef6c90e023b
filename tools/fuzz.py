"""Compares random calls of the cell with the float64 reference: ``make fuzz MINUTES=10``.

A call has any options, shape, dtype, memory layout, instruction set and algorithm. A sequence runs
as one call, in steps or in chunks; the caller hands states on, or a cell keeps them. Gradients are
asked for in unusual ways (ASKED), and hooks bring saved tensors back in other memory (KEPT). The
checks run on poisoned memory (checks.py). Hypothesis shrinks a failure, and a script that repeats
the failure is printed.

    python -m tools.fuzz --minutes 10 --seed 0
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import hypothesis
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from tqdm import tqdm

import snnlstm
from tests.shared.cases import LAYOUTS, Case, Inputs, Options, cases, drawing, options
from tests.shared.checks import check_gradients, check_results
from tests.shared.cpu_kernels import ISAS, Kernels, native, use
from tests.shared.gradients import ASKED, KEPT, NAMES, OUTPUTS
from tests.shared.helpers import quietly
from tests.shared.poison import HUGE, NAN

WAYS = ("one call", "steps", "chunks", "a cell's calls", "a cell's chunks")
_MOST_WORK = 3_000_000  # multiply-adds of a gate, over all steps


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
        back = KEPT[self.kept]
        if back is None:
            return self._run(*arguments)
        with saved_tensors_hooks(lambda t: t, back):
            return self._run(*arguments)

    def _run(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *tensors, chosen = arguments
        inputs = Inputs(*tensors)
        if self.way == "one call" or not chosen.sequence:
            return super().run(*arguments)
        call = (
            self._cell(inputs, chosen) if "cell" in self.way else self._functional(inputs, chosen)
        )
        spks, syns, mems = [], [], []
        syn, mem = inputs.syn, inputs.mem
        for x in inputs.x.split(1 if self._by_steps(chosen) else self.chunk):
            spk, every_syn, every_mem = call(x, syn, mem)
            syn, mem = every_syn[-1], every_mem[-1]
            for kept, found in ((spks, spk), (syns, every_syn), (mems, every_mem)):
                kept.append(found)
        if chosen.record:
            syn, mem = torch.cat(syns), torch.cat(mems)
        # A step of a cell that does not spike has no spk.
        return torch.cat(spks if chosen.spiking or not self._by_steps(chosen) else mems), syn, mem

    def _by_steps(self, chosen: Options) -> bool:
        """Returns whether each call has one step: a ConvLSTMCell takes no more."""
        cell = self.way != "steps" and "cell" in self.way
        return self.way in ("steps", "a cell's calls") or (cell and not chosen.spiking)

    def _functional(self, inputs: Inputs, chosen: Options) -> Callable[..., Any]:
        """Returns a function that runs one or several steps from given states."""
        if self.way == "steps":
            step = replace(chosen, sequence=False, record=False)
            return lambda x, syn, mem: [
                o[None] for o in super(Calls, self).run(x[0], syn, mem, *inputs[3:], step)
            ]
        recorded = replace(chosen, record=True)
        return lambda x, syn, mem: super(Calls, self).run(x, syn, mem, *inputs[3:], recorded)

    def _cell(self, inputs: Inputs, chosen: Options) -> Callable[..., Any]:
        """Returns a function that runs one or several steps by a cell, which keeps the states."""
        x, syn, mem, weight, bias, threshold, graded = inputs
        if not chosen.spiking:
            return self._plain_cell(inputs, chosen)
        pool = {} if chosen.pool == "none" else {f"{chosen.pool}_pool": chosen.pool_size}
        cell = quietly(
            snnlstm.SConv2dLSTM, x.shape[-3], mem.shape[1], chosen.kernel_size, bias is not None,
            spike_grad=chosen.surrogate, reset_mechanism=chosen.reset, inhibition=chosen.inhibition,
            state_quant=chosen.quant or False, stride=chosen.stride, dilation=chosen.dilation,
            surrogate_disable=chosen.surrogate.kind == 0, checkpoint=chosen.checkpoint,
            dtype=x.dtype, **pool,
        )  # fmt: skip
        # Tensors of a graph take the place of parameters and buffers.
        del cell.conv.weight, cell.conv.bias
        cell.conv._parameters = {"weight": weight, "bias": bias}
        cell._buffers["threshold"], cell._buffers["graded_spikes_factor"] = threshold, graded
        cell.syn, cell.mem = syn, mem

        def call(x: Tensor, syn: Tensor, mem: Tensor) -> Any:
            if self.way == "a cell's calls":
                out = [o[None] for o in cell(x[0])]
            else:
                out = cell(x, record=True)
            assert cell.path.native, str(cell.path)
            return out

        return call

    def _plain_cell(self, inputs: Inputs, chosen: Options) -> Callable[..., Any]:
        """Returns a function that runs a step by a cell without spikes."""
        cell = snnlstm.ConvLSTMCell(
            inputs.x.shape[-3], inputs.mem.shape[1], chosen.kernel_size, inputs.bias is not None,
            stride=chosen.stride, dilation=chosen.dilation, checkpoint=chosen.checkpoint,
        )  # fmt: skip
        del cell.conv.weight, cell.conv.bias
        cell.conv._parameters = {"weight": inputs.weight, "bias": inputs.bias}

        def call(x: Tensor, syn: Tensor, mem: Tensor) -> Any:
            h, c = cell(x[0], (mem, syn))
            assert cell.path.native, str(cell.path)
            return h.new_empty(1, 0), c[None], h[None]

        return call


@dataclass(frozen=True)
class Example:
    """An example has a case, the way to run it, and the gradients to compare."""

    case: Case
    isa: str
    algorithm: str
    way: str
    chunk: int
    outputs: tuple[str, ...]
    wanted: tuple[str, ...]
    pattern: int
    asked: str = "plain"
    kept: str = "as it is"

    def script(self) -> str:
        """Returns a program that runs this example alone."""
        chosen = self.case.options
        parts = [f'Options.of("{chosen.text}", {chosen.sequence}, {chosen.record})']
        parts += [repr(getattr(self.case, f.name)) for f in fields(Case)[1:]]
        rest = ", ".join(repr(getattr(self, f.name)) for f in fields(self)[1:])
        return (
            "import torch\nfrom tests.shared.cases import Case, Options\n"
            "from tools.fuzz import Example, check\n"
            f"case = Case({', '.join(parts)})\ncheck(Example(case, {rest}))\n"
        )


def check(example: Example) -> bool:
    """Checks results and gradients; returns False if the gradients were not compared.

    Gradients cannot be compared if rounding led kernels and reference to different decisions, as it
    does in half types, or if the weights are so large that the recurrence is chaotic.
    """
    case, algorithm = example.case, example.algorithm
    if algorithm == "winograd" and case.dtype != torch.float32:
        algorithm = "auto"
    kernels = Calls(example.isa, algorithm, example.way, example.chunk, case.gain, example.kept)
    for _ in use(kernels):
        check_results(case, kernels)
        if case.gain > 1 or case.dtype.itemsize == 2:
            return False
        if case.options.surrogate.name == "SSO":  # in float64 the oracle draws the kernels' noise
            case = replace(case, dtype=torch.float64, layouts=("contiguous",) * 4)
        if case.options.quant and case.options.pool == "avg":  # in float64 means round alike
            case = replace(case, dtype=torch.float64)
        outputs, wanted, pattern = example.outputs, example.wanted, example.pattern
        return check_gradients(kernels, case, outputs, wanted, pattern, ASKED[example.asked])
    raise AssertionError


@st.composite
def large_cases(draw: Any) -> Case:
    """Draws larger sizes than :func:`cases.cases` does, within _MOST_WORK."""

    def mostly_small(most: int) -> int:
        return min(draw(st.integers(1, most)), draw(st.integers(1, most)))

    height, width = mostly_small(40), mostly_small(40)
    chosen = draw(options(height, width))
    if draw(st.booleans()):
        far = st.tuples(st.integers(1, 20), st.integers(1, 20))
        chosen = replace(
            chosen, stride=draw(far), dilation=draw(far), pool="none", pool_size=(1, 1)
        )
    case = Case(
        chosen, draw(_DTYPES),
        mostly_small(40) if chosen.sequence else 1, mostly_small(9), mostly_small(100),
        mostly_small(80), height, width, draw(st.sampled_from(["number", "column", "four"])),
        draw(st.booleans()), draw(st.sampled_from([1.0, 0.7, -2.0])),
        draw(st.sampled_from([1.0, 0.3, 0.1, 0.02, 0.0])), draw(st.booleans()),
        (draw(_LAYOUTS), draw(_LAYOUTS), draw(_LAYOUTS), draw(_LAYOUTS)),
        draw(st.integers(0, 2**16)), draw(st.sampled_from([1.0, 1.0, 1.0, 1e-3, 0.1, 10.0, 100.0])),
    )  # fmt: skip
    while _work(case) > _MOST_WORK:  # halve the largest size
        names = ("time", "batch", "channels", "in_channels", "height", "width")
        largest = max(names, key=lambda name: getattr(case, name))
        if largest in ("height", "width") and getattr(case, largest) // 2 < 3:
            break
        smaller = {largest: max(1, getattr(case, largest) // 2)}
        if largest in ("height", "width"):
            smaller["options"] = replace(case.options, pool="none", pool_size=(1, 1))
        case = replace(case, **smaller)
    return case


_LAYOUTS = st.sampled_from([*LAYOUTS, "overlapping"])
_DTYPES = st.sampled_from(
    [torch.float32] * 4 + [torch.float64] * 2 + [torch.float16, torch.bfloat16]
)


def _work(case: Case) -> int:
    (kh, kw), (n, c, ho, wo) = case.options.kernel_size, case.state_shape
    return case.time * n * ho * wo * kh * kw * c * (case.in_channels + c)


# Every processor draws the same examples, and runs those of another one by what it has.
_ANY_ISA = st.sampled_from(["baseline", "avx2", "wide", "avx512"]).map(
    lambda isa: isa if isa in ISAS else ISAS[-1]
)


def _subsets(of: tuple[str, ...]) -> st.SearchStrategy[tuple[str, ...]]:
    return st.sets(st.sampled_from(of), min_size=1).map(lambda s: tuple(sorted(s)))


def _mostly_first(names: Iterable[str]) -> st.SearchStrategy[str]:
    first, *rest = names
    return st.one_of(st.just(first), st.sampled_from([first, *rest]))


def examples() -> st.SearchStrategy[Example]:
    return st.builds(
        Example, st.one_of(cases(), large_cases()), _ANY_ISA,
        st.sampled_from(native.cpu.ALGORITHMS), st.sampled_from(WAYS), st.integers(2, 5),
        _subsets(OUTPUTS), _subsets(NAMES), st.sampled_from([NAN, HUGE]), _mostly_first(ASKED),
        _mostly_first(KEPT),
    )  # fmt: skip


def run(count: int, seed: int | None = None) -> Counter[str]:
    """Checks `count` random examples; returns how many of each kind were compared."""
    done: Counter[str] = Counter()

    # One bug alone is reported, so that one script is printed, and its exception raised.
    @settings(drawing(count), report_multiple_bugs=False)
    @given(examples())
    def check_example(example: Example) -> None:
        try:
            compared = check(example)
        except Exception:
            print(f"A script that shows it:\n\n{example.script()}", file=sys.stderr)
            raise
        done["results and gradients" if compared else "results alone"] += 1
        done[example.way] += 1
        done[f"gradients {example.asked}"] += compared
        done[f"saved tensors {example.kept}"] += compared
        done[f"gradients in {example.case.dtype}"] += compared
        done[f"gradients with checkpoint={example.case.options.checkpoint}"] += compared
        done[f"{example.isa}, {example.algorithm}"] += 1

    if seed is not None:
        check_example = hypothesis.seed(seed)(check_example)
    check_example()
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    chosen = parser.parse_args()
    end, total, seed = time.monotonic() + 60 * chosen.minutes, Counter[str](), chosen.seed
    with tqdm(unit=" calls", desc=f"{chosen.minutes:g} minutes", disable=None) as progress:
        while time.monotonic() < end:
            total += run(100, seed)
            seed += 1
            progress.update(100)
    compared, alone = total["results and gradients"], total["results alone"]
    print(f"{compared + alone} calls, seeds {chosen.seed} to {seed - 1}")
    for name, count in sorted(total.items()):
        print(f"  {count:6} {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
