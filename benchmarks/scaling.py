"""Predicts how the time of a call falls with the number of threads, on a machine that has few.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --shapes "10 32 1 16 28 28 3x3" --threads 1 8 64 --training

For each number of threads N a plan for N threads is made, whose tasks depend on N. One thread runs
its tasks and notes the processor time of each. Then the tasks are handed out as the kernels do it:
the next task to the next free thread, and a barrier behind each phase. What is no task (Python,
packing, searches) stays serial. The cost of a barrier and the memory's bandwidth are parameters.
`--check` runs N threads as well, N at most the machine's cores, and prints the measured time beside
the predicted one. It needs a build for tests (an editable one).
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import itertools
import math
import os
import statistics
import time
import timeit
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from benchmarks.cases import Case, parse_case
from benchmarks.providers import FORMS, Provider, Runner, Setting
from snnlstm import _C

LAYERS = (
    "10 32 1 8 28 28 3", "65 128 22 16 129 1 3", "10 128 1 16 129 33 9", "10 32 16 32 11 64 3",
    "8 8 32 64 32 32 3", "8 32 128 256 8 8 3", "9 2 32 1 128 128 3", "20 1 2 16 64 64 3",
)  # fmt: skip
"""T N Cin C H W k of layers of users' networks, and of the two extremes."""


class Phase(NamedTuple):
    """Tasks that may run at the same time: their threads at most, and their seconds."""

    threads: int
    tasks: Sequence[float]


class Call(NamedTuple):
    """What was noted of a call with one thread."""

    phases: Sequence[Phase]
    serial: float  # seconds that are no task
    bytes: int  # that the call reads and writes at least


def makespan(tasks: Sequence[float], threads: int) -> float:
    """Returns when the last task ends, if each goes to the thread that is free first."""
    free = [0.0] * min(threads, len(tasks))
    for task in tasks:
        heapq.heappush(free, heapq.heappop(free) + task)
    return max(free, default=0.0)


def predicted(call: Call, threads: int, barrier: float, bandwidth: float) -> float:
    """Returns the seconds of the call on that many threads, by seconds, and bytes a second."""
    total = call.serial
    for phase in call.phases:
        n = min(threads, phase.threads)
        total += makespan(phase.tasks, n) + (barrier if n > 1 else 0)
    return max(total, call.bytes / bandwidth)


def bytes_of(case: Case, mode: str) -> int:
    """Returns how many bytes a call reads and writes at least."""
    state, x = math.prod(case.state_shape), case.batch * case.cin * case.height * case.width
    # spk is written, and x read; training writes the gates and syn, and reads them again.
    return 4 * case.steps * (state + x + (10 * state if mode == "training" else 0))


@contextlib.contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Within the block torch and our plans have so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def noted(case: Case, mode: str, runner: Runner, threads: int, repeats: int) -> Call:
    """Returns the tasks of a call whose plan is for that many threads."""
    (setup, run), runs, totals = runner, [], []
    with on_threads(threads):
        for repeat in range(repeats + 1):
            setup()
            begin = time.thread_time()
            found = _C.time_tasks(run)
            if repeat > 0:  # the first call makes the plan
                runs.append(found)
                totals.append(time.thread_time() - begin)
    best = [min(entries, key=lambda e: e[2]) for entries in zip(*runs, strict=True)]
    phases = [
        Phase(group[0][1], [nanoseconds / 1e9 for _, _, nanoseconds in group])
        for _, entries in itertools.groupby(best, key=lambda e: e[0])
        if (group := list(entries))
    ]
    # Each task reads the clock twice, and the list of entries takes time, too.
    clock = 2 * timeit.timeit(time.thread_time_ns, timer=time.thread_time, number=2000) / 2000
    spent = min(
        total - sum(e[2] for e in run) / 1e9 - len(run) * clock
        for run, total in zip(runs, totals, strict=True)
    )
    return Call(phases, max(spent, 0.0), bytes_of(case, mode))


def main(given: list[str] | None = None) -> None:
    """Prints the table."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--shapes", nargs="+", default=LAYERS, help="as 'T N Cin C H W k'")
    p.add_argument("--threads", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64])
    p.add_argument("--training", action="store_true", help="forward and backward")
    p.add_argument("--barrier", type=float, default=1.0, help="us a phase (default: %(default)s)")
    p.add_argument("--bandwidth", type=float, default=100.0, help="GB/s (default: %(default)s)")
    p.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    p.add_argument("--check", action="store_true", help="measure as well, as far as cores go")
    args = p.parse_args(given)
    mode = "training" if args.training else "inference"
    print(f"{mode}, {_C.isa_name()}; barrier {args.barrier} us, memory {args.bandwidth} GB/s")
    errors = []
    for shape in args.shapes:
        case, alone = parse_case(shape), None
        runner = Provider(case, FORMS["snnlstm"], Setting()).prepare(mode)
        print(case.title)
        for threads in args.threads:
            call = noted(case, mode, runner, threads, args.repeats)
            found = predicted(call, threads, args.barrier / 1e6, args.bandwidth * 1e9)
            alone = alone or found * threads
            work = sum(sum(phase.tasks) for phase in call.phases)
            most = max((phase.threads for phase in call.phases), default=1)
            line = (
                f"  threads: {threads:2} {found * 1e3:9.3f} ms, {alone / found / threads:5.0%} "
                f"(work {work * 1e3:.3f}, serial {call.serial * 1e3:.3f}, {len(call.phases)} "
                f"phases, threads at most: {most})"
            )
            if args.check and threads <= (os.cpu_count() or 1):
                setup, run = runner
                with on_threads(threads):
                    measured = min(timeit.repeat(run, setup, number=1, repeat=4 * args.repeats))
                errors.append(abs(found / measured - 1))
                line += f", measured {measured * 1e3:.3f} ms"
            print(line, flush=True)
    if errors:
        print(f"predicted and measured differ by {statistics.median(errors):.0%} in the median")


if __name__ == "__main__":
    main()
