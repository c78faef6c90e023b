"""Compares random calls of the cell with the float64 reference: ``make fuzz MINUTES=10``.

A call has any options, shape, dtype, memory layout, instruction set and algorithm. A sequence runs
as one call, in steps or in chunks; the caller hands states on, or a cell keeps them. Gradients are
asked for in unusual ways (ASKED), and hooks bring saved tensors back in other memory (KEPT). The
checks run on poisoned memory (checks.py). Hypothesis shrinks a failure, and prints the arguments of
:func:`check` that show it; the same --seed finds it again.

With --nonsense each call of the core comes with nonsense among its arguments first, and the core
must raise an error. Such a call is printed before it is made, so that the last line names one that
crashed.

    python -m tools.fuzz --minutes 10 --seed 0
    python -m tools.fuzz --minutes 10 --nonsense cpu
"""

import argparse
import contextlib
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import hypothesis
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from tqdm import tqdm

import snnlstm
from tests.shared import flat
from tests.shared.cases import (
    GRADIENT_LAYOUTS,
    INPUT_LAYOUTS,
    Case,
    Inputs,
    Options,
    cases,
    drawing,
    options,
)
from tests.shared.checks import check_gradients, check_results
from tests.shared.cpu_kernels import ISAS, Kernels, native, use
from tests.shared.gradients import ASKED, KEPT, NAMES, OUTPUTS, leaves_and_gradients, total
from tests.shared.helpers import quietly
from tests.shared.poison import HUGE, NAN

WAYS = ("one call", "steps", "chunks", "a cell's calls", "a cell's chunks")
LAID_OUT = ("x", "states", "weight", "gradients")
BY_STEPS = ("steps", "a cell's calls")
_MOST_WORK = 3_000_000  # multiply-adds of a gate, over all steps
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
            found, syn, mem = [], inputs.syn, inputs.mem
            for x in inputs.x.split(1 if by_steps else self.chunk):
                found.append(call(x, syn, mem))
                syn, mem = found[-1][1][-1], found[-1][2][-1]
        spks, syns, mems = zip(*found, strict=True)
        if chosen.record:
            syn, mem = torch.cat(syns), torch.cat(mems)
        # A step of a cell that does not spike has no spk.
        return torch.cat(spks if chosen.spiking or not by_steps else mems), syn, mem

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

        def call(x: Tensor, syn: Tensor, mem: Tensor) -> Any:
            one = self.way in BY_STEPS
            out = [o[None] for o in cell(x[0])] if one else cell(x, record=True)
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
        if case.options.surrogate.name == "SSO":  # in float64 the oracle draws the kernels' noise
            case = replace(case, dtype=torch.float64, layouts=("contiguous",) * 4)
        if case.options.quant and case.options.pool == "avg":  # in float64 means round alike
            case = replace(case, dtype=torch.float64)
        return check_gradients(kernels, case, outputs, wanted, pattern, ASKED[asked])
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
    case = replace(
        draw(cases(_DTYPES)), options=chosen, height=height, width=width,
        time=mostly_small(40) if chosen.sequence else 1, batch=mostly_small(9),
        in_channels=mostly_small(100), channels=mostly_small(80),
        density=draw(st.sampled_from([1.0, 0.3, 0.1, 0.02, 0.0])),
        gain=draw(st.sampled_from([1.0, 1.0, 1.0, 1e-3, 0.1, 10.0, 100.0])),
    )  # fmt: skip
    while _work(case) > _MOST_WORK:  # halve the largest size, but for the image's
        names = ("time", "batch", "channels", "in_channels")
        largest = max(names, key=lambda name: getattr(case, name))
        case = replace(case, **{largest: getattr(case, largest) // 2})
    return case


def _work(case: Case) -> int:
    (kh, kw), (n, c, ho, wo) = case.options.kernel_size, case.state_shape
    return case.time * n * ho * wo * kh * kw * c * (case.in_channels + c)


def _subsets(names: tuple[str, ...]) -> st.SearchStrategy[tuple[str, ...]]:
    return st.sets(st.sampled_from(names), min_size=1).map(lambda s: tuple(sorted(s)))


ARGUMENTS: dict[str, st.SearchStrategy] = {
    "case": st.one_of(cases(), large_cases()),
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


# ---- nonsense ------------------------------------------------------------------------------------

_MOST_MEMORY = 1 << 34  # bytes that this process may take: the core must refuse larger sizes
_ERRORS = (ValueError, TypeError, OverflowError)
_WRONG: dict[type, list[Any]] = {
    bool: ["x", ()],
    int: [-1, 2**64, -(2**63) - 1, "x", 1.5, None, (), [1]],
    float: ["x", None, (1,)],
    str: ["", "nonsense", 7],
    type(None): ["x", 1.5, (0,), [1]],  # a view that is not given
}
_PAIRS = [(-1, 1), (0, 1), (1,), (1, 2, 3), 3, None, ("x", 1), (2**40, 1)]
_STRIDES = [-1, -(2**40), 2**49, 2**63, "x", 1.5, None]
# Places in the tuple of a pass's fields (csrc/args.h) that must have an address on the CPU: those
# of the workspace, x, syn0 and mem0.
_NEEDED = (0, 6, 7, 8)
_KERNELS = ("forward", "backward")
# These take any numbers: max_tile_inputs, and the emulator's tile.
_ANY_NUMBER = {("CpuPlan.__init__", 4), ("CudaPlan.__init__", "tile")}
_UNCALLED = {"watch"}  # the emulator's, whose argument is a function of Python's


def nonsense(value: Any, needed: Sequence[int] = ()) -> Any:
    """Returns what must be refused in the place of a valid argument.

    needed: the places in a pass's fields that must have an address.
    """
    if not isinstance(value, tuple):
        return random.choice(_WRONG.get(type(value), [7, None, "x"]))
    if len(value) == 2 and not isinstance(value[1], tuple):
        return random.choice(_PAIRS)
    at = random.randrange(len(value))
    wrong = random.choice(_STRIDES) if len(value) == 5 else nonsense(value[at])
    if at in needed and random.random() < 0.5:
        wrong = (0, value[at][1]) if isinstance(value[at], tuple) else 0
    changed = (*value[:at], wrong, *value[at + 1 :])
    return random.choice([*[changed] * 9, value[:at], (*value, 0), list(value), "x"])


class Spoiler:
    """Stands before every function of a core, and calls it with nonsense first.

    device: what the core knows of a GPU; None on the CPU.
    """

    def __init__(self, core: Any, device: Any) -> None:
        self.core, self.device = core, device
        self.last_cell: dict[str, Any] = {}  # the arguments of the last Cell
        self.uncalled: set[str] = set()
        for name, found in list(vars(core).items()):
            if name.startswith("__"):
                continue
            if not isinstance(found, type):
                setattr(core, name, self.before(name, found))
                continue
            for method, function in list(vars(found).items()):
                static = isinstance(function, staticmethod)
                if method == "__init__" or (method[0] != "_" and (static or callable(function))):
                    wrapped = self.before(f"{name}.{method}", getattr(found, method))
                    setattr(found, method, staticmethod(wrapped) if static else wrapped)

    def before(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        self.uncalled.add(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.uncalled.discard(name)
            given: dict[Any, Any] = dict(enumerate(args)) | kwargs
            places = [place for place in given if place != 0 or "." not in name]  # 0 is self
            if places:
                self.refuse(name, function, given, random.choices(places, k=random.choice([1, 2])))
            if name == "Cell.__init__":
                self.last_cell = kwargs
            if not name.endswith(_KERNELS):  # whose results nobody reads
                return function(*args, **kwargs)
            return None

        return call

    def refuse(self, name: str, function: Callable[..., Any], given: Any, wrong: list[Any]) -> None:
        """Calls a function with wrong arguments, or with one too many."""
        needed = _NEEDED if self.device is None and "Plan" in name else ()
        spoiled = given | {
            place: "x" if (name, place) in _ANY_NUMBER else nonsense(given[place], needed)
            for place in wrong
        }
        if random.random() < 0.1:
            wrong, spoiled = ["one too many"], given | {"nonsense": 1}
        by_place = [value for place, value in spoiled.items() if isinstance(place, int)]
        by_name = {place: value for place, value in spoiled.items() if isinstance(place, str)}
        said = f"{name}(*{by_place}, **{by_name}), wrong: {wrong}"
        print(said, flush=True)
        try:
            function(*by_place, **by_name)
        except _ERRORS:
            return
        raise AssertionError(f"accepted: {said}")

    def call_others(self) -> None:
        """Calls what no call of the cell does."""
        core = self.core
        if hasattr(core, "cpu_evaluate"):
            core.set_isa(core.isa_name())
            numbers = torch.zeros(2)
            core.cpu_evaluate("tanh", 0, numbers.data_ptr(), numbers.data_ptr() + 4, 1)
        if hasattr(core, "CudaPlan"):
            device = core.CudaDevice(80, 108, 1 << 17)
            core.cuda_full_precision(device)
            core.CudaPlan.candidates(core.Cell(**self.last_cell), device, 1, False)
        spk, _ = snnlstm.Leaky(beta=0.9)(torch.ones(3, requires_grad=True))
        spk.sum().backward()

    def extreme(self) -> None:
        """Makes a cell of any size: the core must refuse it, or count the bytes it needs."""

        def size(most: int) -> int:
            return int(2 ** (random.random() ** 3 * most))

        core, usual = self.core, self.last_cell
        facts = dict(usual)
        sizes = [name for name, value in facts.items() if len(name) < 4 and type(value) is int]
        facts |= {name: size(64) for name in random.choices(sizes, k=random.choice([1, 1, 2, 3]))}
        if random.random() < 0.5:
            facts["kernel"] = tuple(min(size(31), 2000) // 2 * 2 + 1 for _ in range(2))
        if random.random() < 0.5:
            facts["stride"], facts["dilation"] = ((size(31), size(31)) for _ in range(2))
        print(facts, flush=True)
        algorithm, backward = random.randrange(3), random.random() < 0.5
        try:
            cell = core.Cell(**facts)
            if self.device is None:
                plan = core.CpuPlan(cell, algorithm, random.random(), 8, 2 ** random.randrange(15))
                found = [bytes_ for _, _, bytes_ in plan.forms(backward, True)]
                found += [plan.forward_workspace, plan.backward_workspace(backward)]
            else:
                plan = core.CudaPlan(cell, self.device, random.randrange(5), algorithm, backward)
                found = [plan.packed_bytes, plan.workspace]
        except (*_ERRORS, RuntimeError) as error:
            print(error)
        else:
            assert all(0 <= bytes_ < 2**62 for bytes_ in found), found
        self.last_cell = usual


@contextlib.contextmanager
def refusing(name: str) -> Iterator[Callable[[int, int], Counter[str]]]:
    """Within the block a core gets nonsense; yields what :func:`run` is otherwise."""
    torch.set_num_threads(1)
    if sys.platform == "linux" and "asan" not in os.environ.get("LD_PRELOAD", ""):
        import resource  # not on Windows; macOS refuses such limits

        resource.setrlimit(resource.RLIMIT_AS, (_MOST_MEMORY, _MOST_MEMORY))
    core, installed = snnlstm._C, contextlib.nullcontext()
    device = core.cuda_device(0) if name == "cuda" else None
    if name == "emulator":
        from tests.emulator.backend import emulated_core

        emulated = emulated_core()
        core, installed = emulated.module, emulated.installed()
        device = core.CudaDevice(80, 108, 163 * 1024)
    spoiler = Spoiler(core, device)

    def refuse(count: int, seed: int) -> Counter[str]:
        @hypothesis.seed(seed)
        @settings(drawing(count), phases=[Phase.generate])  # the first failure ends the run
        @given(cases(), st.integers(0, 2**32))
        def check_case(case: Case, number: int) -> None:
            random.seed(number)
            with torch.device("cuda" if name == "cuda" else "cpu"):
                inputs, grads = leaves_and_gradients(case)
            total(flat.run(*inputs, case.options), grads).backward()
            spoiler.call_others()
            spoiler.extreme()

        check_case()
        return Counter(cases=count)

    with installed:
        yield refuse
    prefix = "cpu" if name == "cpu" else "cuda"
    missed = {f for f in spoiler.uncalled - _UNCALLED if f.lower().startswith(prefix)}
    assert not missed, missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, help="0: one round of examples")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--round", type=int, default=100, metavar="N", help="examples of a seed")
    cores = ("cpu", "cuda", "emulator")
    parser.add_argument("--nonsense", choices=cores, help="emulator: CUDA's core, emulated")
    chosen = parser.parse_args()
    end, done, seed = time.monotonic() + 60 * chosen.minutes, Counter[str](), chosen.seed
    which = refusing(chosen.nonsense) if chosen.nonsense else contextlib.nullcontext(run)
    with which as check_some, tqdm(unit=" calls", disable=None) as progress:
        while not done or time.monotonic() < end:
            done += check_some(chosen.round, seed)
            seed += 1
            progress.update(chosen.round)
    print(f"seeds {chosen.seed} to {seed - 1}: {dict(done)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
