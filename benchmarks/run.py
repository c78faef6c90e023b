"""Times layers and whole networks with snnTorch's cell and with ours, in one process.

A speed-up is the ratio of two medians over the same rounds. With one thread times are processor
time, and their ratios hold on a busy machine. With several threads they do not (NOTES.md): the
suite then prints no ratios, and its exit status is 3, if other programs take more than 0.3 of a
core, or if the machine's peaks before and after a case differ by 10 %; --busy-anyway insists.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import math
import random
import sys
import time
import timeit
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.utils import benchmark
from tqdm import tqdm

from benchmarks import cases, devices, machine, networks, peak_memory, providers, report
from benchmarks.cases import Case
from benchmarks.networks import Network
from benchmarks.providers import (
    FORMS,
    TOLERANCE,
    Form,
    Provider,
    Runner,
    Setting,
    Unavailable,
    find_form,
)
from snnlstm import path

NOT_RUN = 4  # the exit status if the time ended before all rows
MOST_LOAD, MOST_DRIFT, MOST_ROUNDS = 0.3, 0.1, 400
CLOCKS = {"processor": time.process_time, "wall": benchmark.timer}
TABLES: dict[str, Any] = {**networks.TABLES, **cases.TABLES}
CASES = {name: case for table in TABLES.values() for name, case in table.items()}


class Disagreement(AssertionError):
    """This error says that a provider does not compute what the baseline computes."""


def compare(case: Any, dtype: str, expected: dict[str, Tensor], actual: dict[str, Tensor]) -> None:
    """Compares the results of a provider with the baseline's, before anything is timed.

    States have to agree everywhere, spikes but for a few: rounding decides a membrane potential
    close to the threshold. If a spike or a quantiser feeds back into the states, such an error can
    move a neuron by a whole step; then a few states may differ. Raises Disagreement that says which
    result differs, and by how much.
    """
    tolerance, of_gradients = TOLERANCE[dtype]
    layer, exact = isinstance(case, Case), tolerance < 1e-4
    feeds_back = layer and (case.reset != "none" or case.quant > 0)
    # max_pool may send the gradient to another of several nearly equal values.
    of_gradients = max(of_gradients, 5e-2 * feeds_back, 1e-2 * (layer and case.max_pool > 0))
    # A spike that rounding decides sets off others: one early spike moved a loss by 4e-4.
    of_loss = 5e-3 if exact and not (layer or case.autocast) else 0.1
    for name, one in expected.items():
        other = actual[name]
        if one.shape != other.shape:
            raise Disagreement(f"{name} has shape {tuple(other.shape)}, not {tuple(one.shape)}")
        if name == "spikes":
            by_channel = (spk.movedim(2, 0).flatten(1) for spk in (one, one - other))
            spiking, differing = (spk.ne(0).sum(1) for spk in by_channel)
            most = (spiking * (0.02 if exact else 0.15)).clamp(min=2)
            if bool((differing > most).any()):
                worst = int((differing / most).argmax())
                count = f"{differing[worst]} of {spiking[worst]}"
                raise Disagreement(f"in channel {worst} {count} spikes differ")
        elif name in ("syn", "mem"):
            few = (2e-3 if exact else 0.2) * feeds_back
            share = float((~((one - other).abs() <= tolerance * (1 + one.abs()))).double().mean())
            if share > few:
                raise Disagreement(f"{share:.2%} of {name} differ")
        else:
            share = float((one - other).norm()) / (float(one.norm()) or 1.0)
            if not share <= (of_loss if name == "loss" else of_gradients):  # NaN is no share
                raise Disagreement(f"the {name} differs by {share:.2g} of its norm")


def time_interleaved(
    runners: Mapping[str, Runner],
    clock: Callable[[], float],
    seconds: float,
) -> dict[str, list[float]]:
    """Times runners against each other, in a new order each round; returns the seconds of each.

    Every provider runs up to four times before: torch.compile needs three to settle, caches and
    pages one.
    """
    timers = {
        # Freeing is not timed: in a network the next layer still holds the result.
        name: timeit.Timer("kept = run()", "setup()", clock, globals={"setup": setup, "run": run})
        for name, (setup, run) in runners.items()
    }
    for timer in timers.values():
        spent = timer.timeit(1)
        for _ in range(3):
            spent += timer.timeit(1) if spent < seconds / 2 else 0.0
    samples: dict[str, list[float]] = {name: [] for name in timers}
    order, names, begin = random.Random(0), list(timers), time.perf_counter()
    for done in range(1, MOST_ROUNDS + 1):
        order.shuffle(names)
        for name in names:
            samples[name].append(timers[name].timeit(1))
        if done >= report.FEWEST_ROUNDS and time.perf_counter() - begin >= seconds:
            break
    return samples


# ---- the suite -----------------------------------------------------------------------------------


def find_case(name: str) -> Case | Network:
    """Returns a built-in layer or network, or the network of "file.py:function"."""
    if ":" in name or name.endswith(".py"):
        return networks.from_file(name)
    if name in CASES:
        return CASES[name]
    raise ValueError(
        f"--shapes: no shape is called {name!r}; known: {', '.join([*TABLES, *CASES])}"
    )


def prepared(case: Case | str, name: str, setting: Setting, mode: str, small: bool) -> Runner:
    """Returns what :func:`peak_memory.measure` runs; the network of a name is found anew."""
    if isinstance(case, Case):
        case = dataclasses.replace(case, steps=2, batch=1) if small else case
        return Provider(case, find_form(name), setting).prepare(mode)
    network = networks.NETWORKS[case] if small and case in networks.NETWORKS else find_case(case)
    return Provider(network, network.forms.get(name) or find_form(name), setting).prepare(mode)


@dataclass
class Suite:
    """Measures cases with one type and number of threads; prints tables as they come.

    deadline: no case is begun after this time (of time.monotonic()). `rows` has the measurements so
    far. `wrong` names the providers that compute something else than the baseline, `busy` the cases
    without ratios, and `left_out` those that found no time.
    """

    cases: dict[str, Case | Network]
    providers: list[str]
    modes: list[str]
    setting: Setting
    threads: int = 1
    seconds: float = 12.0
    memory: bool = False
    deadline: float = math.inf
    busy_anyway: bool = False
    rows: list[dict[str, Any]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    busy: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def clock(self) -> str:
        """Returns "processor" where times are this process's processor time."""
        return "processor" if self.setting.device == "cpu" and self.threads == 1 else "wall"

    def begin(self, bar: tqdm) -> None:
        """Says what is measured, and measures the machine's peak; `bar` shows the progress."""
        self.bar = bar
        torch.set_num_threads(self.threads)
        self.origin = machine.describe(self.setting) | {
            "threads": self.threads, "dtype": self.setting.dtype, "clock": self.clock
        }  # fmt: skip
        text = "snnlstm {version} on {device}, threads: {threads}, {dtype}"
        tqdm.write(text.format(**self.origin))
        self.peak = machine.peak(self.setting)

    def run(self, name: str, case: Case | Network) -> None:
        """Measures a case, unless the time is over."""
        if time.monotonic() > self.deadline:
            self.left_out.append(f"{name}, {self.setting.dtype}")
            tqdm.write(f"NOT RUN: {self.left_out[-1]}: no time was left\n")
            return
        self.bar.set_description_str(f"{name}: checking")
        built = self.checked(name, case)
        for mode in self.modes:
            self.bar.set_description_str(f"{name}, {mode}")
            self.measure(name, case, mode, built)

    def forms(self, case: Any) -> dict[str, Form]:
        """Returns the providers of a case, with the baseline first."""
        own = getattr(case, "forms", {})
        if not own:
            return {name: find_form(name) for name in self.providers}
        first = next(iter(own))
        return {name: own[name] for name in own if name in (first, *self.providers)}

    def checked(self, name: str, case: Case | Network) -> dict[str, Provider]:
        """Returns the providers that can run a case and compute what the first computes."""
        built: dict[str, Provider] = {}
        # The baseline's results at the threshold of the check, False, and at its own, True.
        expected: dict[bool, dict[str, Tensor]] = {}
        spiking = None
        for provider, form in self.forms(case).items():
            try:
                one = Provider(case, form, self.setting)
                if not built and isinstance(case, Case):
                    spiking = one.spiking_threshold()
                # A threshold of another shape would be compiled once more, which takes a minute.
                threshold = None if form.compiled else spiking
                actual, own = one.results(threshold), threshold is None
                if own not in expected:
                    first = next(iter(built.values()), None)
                    expected[own] = first.results() if first else actual
                if built:
                    compare(case, self.setting.dtype, expected[own], actual)
                built[provider] = one
            except Exception as error:  # a provider that fails must not end the run
                self.skip(provider, name, error)
                if not built:  # there is no baseline
                    break
        return built

    def skip(self, provider: str, case: str, error: Exception) -> None:
        """Says why a provider is skipped. An error of ours is wrong, too, if it has memory."""
        reason, word = (str(error).strip() or type(error).__name__).splitlines()[0], "NOT TIMED"
        excused = Unavailable, MemoryError, torch.cuda.OutOfMemoryError
        if isinstance(error, Disagreement):
            reason = f"computes something else: {reason}"
        if isinstance(error, Disagreement) or not (
            provider.startswith("snntorch") or isinstance(error, excused)
        ):
            self.wrong.append(f"{case}: {provider}: {reason}")
            word = "WRONG"
        tqdm.write(f"{word}: {case}, {self.setting.dtype}: {provider}: {reason}\n")

    def measure(self, name: str, case: Any, mode: str, built: dict[str, Any]) -> None:
        """Times one case in one mode."""
        load, runners = machine.Load(), {}
        for provider, one in built.items():
            try:
                setup, run = one.prepare(mode)
                setup()
                run()
                runners[provider] = setup, run
            except (MemoryError, RuntimeError) as error:
                self.skip(provider, name, error)

        samples = time_interleaved(runners, CLOCKS[self.clock], self.seconds)
        self.bar.update()
        before, self.peak = self.peak, machine.peak(self.setting)
        beside, drift = load.beside(), abs(self.peak / before - 1)
        quiet = self.clock == "processor" or (beside <= MOST_LOAD and drift <= MOST_DRIFT)
        ratios = quiet or self.busy_anyway or self.setting.device != "cpu"
        rows: list[dict[str, Any]] = []
        first = next(iter(built), None)
        for provider, times in samples.items():
            p20, p50, p80 = (1e3 * pd.Series(times).quantile([0.2, 0.5, 0.8])).tolist()
            row = self.origin | {
                "case": name, "title": case.title, "shape": getattr(case, "shape", ""),
                "steps": getattr(case, "steps", None), "mode": mode, "provider": provider,
                "path": built[provider].path, "rounds": len(times), "p20": p20, "ms": p50,
                "p80": p80, "speedup": None, "gflops": None, "mib": None, "note": "",
                "beside": beside, "peak": before, "peak_after": self.peak, "quiet": quiet,
            }  # fmt: skip
            if ratios and first in samples:
                row["speedup"] = (rows[0]["ms"] if rows else p50) / p50
            if isinstance(case, Case):
                row["gflops"] = case.flops(mode) / p50 / 1e6
            if self.memory:
                key = case if isinstance(case, Case) else name
                job = prepared, key, provider, self.setting, mode
                peak = peak_memory.measure(*job, device=self.setting.device)
                row["note" if isinstance(peak, str) else "mib"] = peak
            rows.append(row)
        self.rows += rows
        if rows:
            tqdm.write(report.block(pd.DataFrame(rows)))
        if rows and not ratios:
            self.busy.append(f"{name}, {mode}, threads: {self.threads}")
            tqdm.write(
                f"No ratios: other programs took {beside:.1f} cores, and the machine's peak went "
                f"from {before:.0f} to {self.peak:.0f} GFLOP/s.\n"
            )


def run_together(suites: Sequence[Suite]) -> None:
    """Runs suites of the same cases, each case in all of them before the next one."""
    total = sum(len(suite.cases) * len(suite.modes) for suite in suites)
    # With disable=None there is no bar without a terminal.
    shown = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with tqdm(total=total, disable=None, leave=False, dynamic_ncols=True, bar_format=shown) as bar:
        for suite in suites:
            suite.begin(bar)
        for name, case in suites[0].cases.items():
            for suite in suites:
                suite.run(name, case)


# ---- the command line ----------------------------------------------------------------------------

EPILOG = f"""\
tables: {", ".join(TABLES)}

networks, and layers as T N Cin Cout H W k:
{chr(10).join(f"  {name:<13} {case.title}" for name, case in CASES.items())}

providers:
{chr(10).join(f"  {name:<22} {form.title}" for name, form in FORMS.items())}
  sequence:ALGORITHM     an algorithm forced, such as sequence:direct

example: python -m benchmarks --shapes cpu --threads 1 all --providers sequence sequence:direct
"""


def threads(text: str) -> int:
    """Reads a number of threads; "all" is torch's default."""
    count = torch.get_num_threads() if text == "all" else int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f'must be a positive number or "all", got {text!r}')
    return count


# fmt: off
def parser() -> argparse.ArgumentParser:
    """Makes the parser of the suite's arguments."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--shapes", nargs="+", metavar="NAME",
        help="networks, layers and tables of the lists below (default: networks)")
    p.add_argument("--shape", action="append", default=[], metavar='"T N Cin Cout H W k ..."',
        help="your own layer; options after k: max_pool=2 avg_pool=2 reset=zero quant=8 "
        "threshold=0.1 density=0.1 (or density=dense) lengths=True name=mine")
    p.add_argument("--network", action="append", default=[], metavar="FILE.py:FUNCTION",
        help="your own network: FUNCTION() returns the network, with snnTorch's cells or ours, and "
        "its input; both libraries' cells are timed in it")
    p.add_argument("--random", type=int, default=0, metavar="N",
        help="N random layers, drawn with --seed; the ratios are listed in order")
    p.add_argument("--providers", nargs="+", metavar="NAME", default=providers.DEFAULT,
        help="of the list below; snntorch is always timed (default: %(default)s)")
    p.add_argument("--mode", nargs="+", choices=providers.MODES, default=providers.MODES)
    p.add_argument("--memory", action="store_true", help="each run's peak in a process of its own")
    p.add_argument("--device", choices=devices.DEVICES, default="cpu",
        help="emulator-...: a GPU that tests/emulator emulates, whose times mean nothing")
    p.add_argument("--dtype", nargs="+", choices=TOLERANCE, default=["float32"],
        help="tf32: float32 tensors on tensor cores (CUDA); autocast, autocast16: float32 tensors "
        "under torch.autocast to bfloat16 and float16")
    p.add_argument("--threads", nargs="+", type=threads, default=[1], metavar="N",
        help='numbers of threads; "all": torch\'s default (default: 1)')
    p.add_argument("--seed", type=int, default=0, help="of weights and x")
    p.add_argument("--quick", action="store_true", help="few shapes, in under two minutes")
    p.add_argument("--seconds", type=float, metavar="S",
        help="for one case in one mode, all providers together (default: 12; --quick: 1.5)")
    p.add_argument("--limit", type=float, default=math.inf, metavar="S",
        help="begin no case after S seconds")
    p.add_argument("--busy-anyway", action="store_true",
        help="print ratios of several threads in any case")
    p.add_argument("--out", type=Path, metavar="DIR",
        help="for rows.csv, table.md and pictures (default: out/bench-DATE-TIME)")
    p.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"),
        help="measure nothing: what changed from run A to run B (directories or rows.csv)")
    return p
# fmt: on


def suites_from(args: argparse.Namespace) -> list[Suite]:
    """Returns the suites that the arguments ask for; a ValueError names a wrong argument."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: cuda was asked for, but torch sees no CUDA device")
    if "tf32" in args.dtype and args.device == "cpu":
        raise ValueError("--dtype: tf32 needs --device cuda")
    own = [*map(cases.parse_case, args.shape), *cases.random_cases(args.random, args.seed)]
    names = [*(args.shapes or []), *args.network]
    if not names and not own:
        names = ["documentation", "mnist", "k5"] if args.quick else ["networks"]
    listed = [name for table in names for name in TABLES.get(table, [table])]
    asked = {name: find_case(name) for name in listed} | {case.name: case for case in own}
    wanted = list(dict.fromkeys([providers.BASELINE, *args.providers]))
    for name in wanted:
        find_form(name)
    return [
        Suite(
            asked, wanted, args.mode, Setting(args.device, dtype, args.seed), count,
            args.seconds or (1.5 if args.quick else 12.0), args.memory,
            time.monotonic() + args.limit, args.busy_anyway,
        )
        for count, dtype in itertools.product(args.threads, dict.fromkeys(args.dtype))
    ]  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status.

    It is 1 if a provider computes something else, 3 if the machine was too busy for ratios, 4 if
    the time ended before all cases, and 130 after an interruption; the rows that were measured are
    written in any case.
    """
    p = parser()
    args = p.parse_args(arguments)
    try:
        if args.compare:
            print(report.compare(*map(report.read, args.compare)))
            return 0
        suites = suites_from(args)
        if slow := path.against_device(torch.device(devices.torch_device(args.device))):
            p.error(f"--device: {args.device} would time the reference path: {slow.reason}")
    except ValueError as error:
        p.error(str(error))
    out, status = args.out or Path("out") / f"bench-{datetime.datetime.now():%Y%m%d-%H%M%S}", 0
    try:
        for _, group in itertools.groupby(suites, lambda suite: suite.threads):
            with devices.running(args.device):
                run_together(list(group))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130  # the shell's status of a program that SIGINT ended
    rows = pd.DataFrame([row for suite in suites for row in suite.rows])
    report.write(rows, out)
    if busy := [case for suite in suites for case in suite.busy]:
        print(f"NO RATIOS, the machine was busy: {'; '.join(busy)}", file=sys.stderr)
        status = status or 3
    if any(suite.left_out for suite in suites):
        status = status or NOT_RUN
    if wrong := [line for suite in suites for line in suite.wrong]:
        print("NOT TIMED:", *wrong, sep="\n  ", file=sys.stderr)
        status = 1
    return status
