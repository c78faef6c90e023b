"""Runs random calls of the cell, with nonsense among the arguments of one call of the core in each.

The core must raise an error. Each such call is printed before it is made, so that the last line
names a call that crashed.

    python -m tools.nonsense cpu 100 0         the core of the CPU; 100 cases, drawn with the seed 0
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import torch  # before the core
from hypothesis import Phase, given, settings

from snnlstm import _C
from tests.shared import flat
from tests.shared.cases import Case, cases, drawing, wanting_gradients

MOST_MEMORY = 1 << 34  # bytes that this process may take: the core must refuse larger sizes
ERRORS = (ValueError, TypeError, OverflowError)
NO_NUMBER: list[Any] = ["x", 1.5, None, (), [1]]
# Places in the tuple of a pass's fields (csrc/args.h) that must have an address on the CPU: those
# of x, syn0, mem0 and the workspace.
NEEDED = (0, 1, 2, 17)
KERNELS = ("forward", "backward")
ANY_NUMBER = "CpuPlan.__init__", 4  # most_inputs
UNCALLED = {"time_tasks", "watch"}  # a function of Python's is their argument; the emulator's


class Refused(Exception):
    """This error says that the core refused nonsense."""


def nonsense(value: Any, needed: bool = False) -> Any:
    """Returns what must be refused in the place of a valid argument."""
    if isinstance(value, bool):
        return random.choice(["x", ()])
    if isinstance(value, int):
        return random.choice([-1, 2**64, -(2**63) - 1, *NO_NUMBER, *[0] * needed])
    if isinstance(value, float):
        return random.choice(["x", None, (1,)])
    if value is None:  # a view that is not given
        return random.choice(["x", 1.5, (0,), [1]])
    if isinstance(value, tuple) and len(value) == 2:
        memory, strides = value
        if not isinstance(strides, tuple):  # a pair
            return random.choice([(-1, 1), (0, 1), (1,), (1, 2, 3), 3, None, ("x", 1), (2**40, 1)])
        wrong = random.choice([-1, -(2**40), 2**49, 2**63, "x", 1.5, None])
        return random.choice([
            (memory, strides[:4]), (memory, (*strides, 1)), (memory, list(strides)), (memory,),
            [memory, strides], memory, "x", (memory, None), (-1, strides), (2**64, strides),
            (memory, (*strides[:2], wrong, *strides[3:])), *[(0, strides), None] * needed,
        ])  # fmt: skip
    if isinstance(value, tuple):  # the fields of a pass
        place = random.randrange(len(value))
        broken = nonsense(value[place], place in NEEDED and Spoiler.needs)
        spoiled = (*value[:place], broken, *value[place + 1 :])
        return random.choice([*[spoiled] * 9, value[:place], (*value, 0), list(value), None])
    return random.choice([7, None, "x"] if not isinstance(value, str) else ["", "nonsense", 7])


class Spoiler:
    """Stands before every function of a core, and spoils an argument of call number `target`."""

    needs = True  # whether passes without some addresses are refused
    target = number = 0

    def __init__(self, core: Any) -> None:
        self.last_cell: dict[str, Any] = {}  # the arguments of the last Cell
        self.called: set[str] = set()
        self.functions: set[str] = set()
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
        self.functions.add(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.called.add(name)
            self.number += 1
            if self.number == self.target and (kwargs or len(args) > ("." in name)):
                self.refuse(name, function, args, kwargs)
            if name == "Cell.__init__":
                self.last_cell = kwargs
            if not name.endswith(KERNELS):  # whose results nobody reads
                return function(*args, **kwargs)
            return None

        return call

    def refuse(self, name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Calls a function with one or two wrong arguments, with one too many or too few."""
        given: dict[Any, Any] = dict(enumerate(args)) | kwargs
        places = [place for place in given if place != 0 or "." not in name]  # 0 is self
        wrong = random.sample(places, min(random.choice([1, 1, 2]), len(places)))
        spoiled = given | {
            place: random.choice(NO_NUMBER) if (name, place) == ANY_NUMBER else nonsense(value)
            for place, value in given.items() if place in wrong
        }  # fmt: skip
        if random.random() < 0.1:
            wrong, spoiled = ["one too many"], given | {"nonsense": 1}
        by_place = [value for place, value in spoiled.items() if isinstance(place, int)]
        by_name = {place: value for place, value in spoiled.items() if isinstance(place, str)}
        print(f"{name}(*{by_place}, **{by_name}), wrong: {wrong}", flush=True)
        try:
            function(*by_place, **by_name)
        except ERRORS as error:
            raise Refused from error
        print("ACCEPTED", flush=True)
        raise AssertionError("accepted")


def call_others(core: Any, facts: dict[str, Any]) -> None:
    """Calls what no call of the cell does."""
    if hasattr(core, "cpu_evaluate"):
        core.set_isa(core.isa_name())
        numbers = torch.zeros(2)
        core.cpu_evaluate("tanh", 0, numbers.data_ptr(), numbers.data_ptr() + 4, 1)
    if hasattr(core, "CudaPlan"):
        device = core.CudaDevice(80, 108, 1 << 17)
        core.cuda_full_precision(device)
        if facts:
            core.CudaPlan.candidates(core.Cell(**facts), device, 1, False)


def run(spoiler: Spoiler, core: Any, case: Case, target: int, device: str) -> None:
    """Runs forward and backward passes of a case, in which a call of the core is spoiled."""
    with torch.device(device):
        leaves = wanting_gradients(case.inputs())
    spoiler.number, spoiler.target = 0, target
    with contextlib.suppress(Refused):
        call_others(core, spoiler.last_cell)
        out = flat.run(*leaves, case.options)
        sum(o.sum() for o in out if o.requires_grad).backward()
    spoiler.target = 0


def extreme(core: Any, facts: dict[str, Any], device: Any) -> None:
    """Makes a cell of any size: the core must refuse the cell, or count the bytes it needs."""

    def size(most: int) -> int:
        return int(2 ** (random.random() ** 3 * most))

    sizes = [name for name, value in facts.items() if len(name) < 4 and type(value) is int]
    facts = facts | {name: size(64) for name in random.sample(sizes, random.choice([1, 1, 2, 3]))}
    if random.random() < 0.5:
        facts["kernel"] = tuple(min(size(31), 2000) // 2 * 2 + 1 for _ in range(2))
    if random.random() < 0.5:
        facts["stride"], facts["dilation"] = ((size(31), size(31)) for _ in range(2))
    print(facts, flush=True)
    algorithm, backward = random.randrange(3), random.random() < 0.5
    try:
        cell = core.Cell(**facts)
        if device is None:
            plan = core.CpuPlan(cell, algorithm, random.random(), 8, 2 ** random.randrange(15))
            found = [bytes_ for _, _, bytes_ in plan.forms(backward, True)]
            found += [plan.forward_workspace, plan.backward_workspace(backward)]
        else:
            plan = core.CudaPlan(cell, device, random.randrange(5), algorithm, backward)
            found = [plan.packed_bytes, plan.workspace]
    except (*ERRORS, RuntimeError) as error:
        print(error)
    else:
        assert all(0 <= bytes_ < 2**62 for bytes_ in found), found


@contextlib.contextmanager
def core_of(name: str) -> Iterator[tuple[Any, Any]]:
    """Yields a core that the package uses within the block, and what it knows of a GPU."""
    if name == "simt":
        from tests.simt.backend import simt_core

        emulated = simt_core()
        with emulated.installed():
            yield emulated.module, emulated.module.CudaDevice(80, 108, 163 * 1024)
    else:
        yield _C, _C.cuda_device(0) if name == "cuda" else None


def main(name: str, count: int, seed: int) -> None:
    random.seed(seed)
    torch.set_num_threads(1)
    if sys.platform == "linux" and "asan" not in os.environ.get("LD_PRELOAD", ""):
        import resource  # not on Windows; macOS refuses such limits

        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    with core_of(name) as (core, device):
        spoiler = Spoiler(core)
        Spoiler.needs, where = device is None, "cuda" if name == "cuda" else "cpu"

        @hypothesis.seed(seed)
        @settings(drawing(count), phases=[Phase.generate])  # the first failure ends the run
        @given(cases())
        def check(case: Case) -> None:
            for _ in range(4):
                run(spoiler, core, case, random.randrange(1, 16), where)
            facts = spoiler.last_cell
            extreme(core, facts, device)
            spoiler.last_cell = facts  # and not one of any size

        check()
    prefix = "cpu" if name == "cpu" else "cuda"
    missed = {f for f in spoiler.functions - spoiler.called if f.lower().startswith(prefix)}
    assert missed <= UNCALLED, missed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("core", choices=("cpu", "cuda", "simt"), help="simt: CUDA's, emulated")
    parser.add_argument("count", type=int, help="how many cases, each of which runs four times")
    parser.add_argument("seed", type=int)
    args = parser.parse_args()
    main(args.core, args.count, args.seed)
