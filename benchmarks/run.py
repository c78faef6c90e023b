"""Runs the suite that benchmarks/arguments.py describes: compares, times, and writes rows."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import itertools
import random
import sys
import time
import timeit
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.utils import benchmark
from tqdm import tqdm

from benchmarks import cases, devices, machine, networks, peak_memory, providers, report
from benchmarks.arguments import TABLES, find_case, parser
from benchmarks.cases import Case
from benchmarks.gpu import NOT_RUN
from benchmarks.providers import (
    BASELINE,
    TOLERANCE,
    Provider,
    Runner,
    Setting,
    Unavailable,
    find_form,
)
from snnlstm.dispatch import reasons

INTERRUPTED = 130  # the shell's status of a program that SIGINT ended
# What the exit status says; the first of several counts.
FAILURES = {
    1: "NOT TIMED", INTERRUPTED: "interrupted", 3: "NO RATIOS, the machine was busy",
    NOT_RUN: "no time was left for",
}  # fmt: skip
MOST_LOAD, MOST_DRIFT, FEWEST_ROUNDS, MOST_ROUNDS = 0.3, 0.1, 5, 400
CLOCKS = {"processor": time.process_time, "wall": benchmark.timer}


class Disagreement(AssertionError):
    """This error says that a provider does not compute what the baseline computes."""


def compare(
    case: Any,
    dtype: str,
    expected: dict[str, Tensor],
    actual: dict[str, Tensor],
    true_loss: Tensor | None = None,
) -> None:
    """Compares the results of a provider with the baseline's, before anything is timed.

    true_loss: a network's loss in float64. The provider's may differ from it by 1e-5, or by as much
    as the baseline's does.

    States have to agree everywhere, spikes but for a few: rounding decides a membrane potential
    close to the threshold. If a spike or a quantiser feeds back into the states, such an error can
    move a neuron by a whole step; then a few states may differ. Raises Disagreement that says which
    result differs, and by how much.
    """
    tolerance, gradient_limit = TOLERANCE[dtype]
    layer, exact = isinstance(case, Case), tolerance < 1e-4
    feeds_back = layer and (case.reset != "none" or case.quant > 0)
    # max_pool may send the gradient to another of several nearly equal values.
    gradient_limit = max(gradient_limit, 5e-2 * feeds_back, 1e-2 * (layer and case.max_pool > 0))
    # A spike that rounding decides sets off others: one early spike moved a loss by 4e-4.
    loss_limit = 5e-3 if exact and not (layer or case.autocast) else 0.1
    for name, one in expected.items():
        other = actual[name]
        if one.shape != other.shape:
            raise Disagreement(f"{name} has shape {tuple(other.shape)}, not {tuple(one.shape)}")
        if name == "loss" and true_loss is not None:
            error, own = (float((loss - true_loss).abs()) for loss in (other, one))
            if not error <= max(1e-5 * float(true_loss.abs()), own):
                raise Disagreement(f"the loss differs by {error:.2g} from {float(true_loss):.7g}")
        elif name == "spikes":
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
            if not share <= (loss_limit if name == "loss" else gradient_limit):  # NaN is no share
                raise Disagreement(f"the {name} differs by {share:.2g} of its norm")


def time_interleaved(
    runners: Mapping[str, Runner], clock: Callable[[], float], seconds: float
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
        if done >= FEWEST_ROUNDS and time.perf_counter() - begin >= seconds:
            break
    return samples


# ---- the suite -----------------------------------------------------------------------------------


def prepared(case: Case | str, name: str, setting: Setting, mode: str, small: bool) -> Runner:
    """Returns what :func:`peak_memory.measure` runs; the network of a name is found anew."""
    own: dict[str, Any] = {}
    if isinstance(case, Case):
        case = dataclasses.replace(case, steps=2, batch=1) if small else case
    else:
        case = networks.NETWORKS[case] if small and case in networks.NETWORKS else find_case(case)
        own = case.forms
    one = Provider(case, own.get(name) or find_form(name), setting)
    if not one.form.backend:
        return one.prepare(mode)
    (setup, run), _ = one.first_run(mode)
    setup()
    run()  # states of the first run have other shapes than before, for which this compiles anew
    one.net.load_state_dict(one.initial)  # so that the run packs the weights, as other forms do
    return setup, run


class Suite:
    """Measures what the arguments ask for; prints tables as they come.

    `rows` has the measurements so far, and `failed` a line for each failure, by the exit status
    that it means. Raises ValueError that names a wrong argument.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        if args.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device: cuda was asked for, but torch sees no CUDA device")
        if slow := reasons.against_device(Setting(args.device).torch_device):
            raise ValueError(f"--device: {args.device} takes the reference path: {slow.reason}")
        if "tf32" in args.dtype and args.device == "cpu":
            raise ValueError("--dtype: tf32 needs --device cuda")
        own = [cases.parse_case(shape) for shape in args.shape]
        names = [*(args.shapes or []), *args.network]
        if not names and not own:
            names = ["documentation", "mnist", "k5"] if args.quick else ["networks"]
        listed = [name for table in names for name in TABLES.get(table, [table])]
        self.cases = {name: find_case(name) for name in listed} | {case.name: case for case in own}
        self.providers = {name: find_form(name) for name in (providers.BASELINE, *args.providers)}
        self.args, self.end = args, time.monotonic() + args.limit
        self.seconds = args.seconds or (1.5 if args.quick else 12.0)
        self.rows: list[dict[str, Any]] = []
        self.peaks: dict[Setting, float] = {}  # of the machine, as measured last
        self.failed: dict[int, list[str]] = {status: [] for status in FAILURES}

    def run(self) -> None:
        """Measures each case in all types before the next one, with each number of threads."""
        args, origin = self.args, machine.describe(self.args.device)
        settings = [Setting(args.device, dtype) for dtype in dict.fromkeys(args.dtype)]
        total = len(args.threads) * len(self.cases) * len(settings) * len(args.mode)
        # With disable=None there is no bar without a terminal.
        shown = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        bar = tqdm(total=total, disable=None, leave=False, dynamic_ncols=True, bar_format=shown)
        with bar as self.bar, devices.running(args.device):
            for threads in args.threads:
                torch.set_num_threads(threads)
                # This process's processor time, where one thread has all of it.
                clock = "processor" if args.device == "cpu" and threads == 1 else "wall"
                self.origin = origin | {"threads": threads, "clock": clock}
                for setting in settings:
                    text = "snnlstm {version} on {device}, threads: {threads}"
                    tqdm.write(f"{text.format(**self.origin)}, {setting.dtype}")
                    self.peaks[setting] = machine.peak(setting)
                for (name, case), setting in itertools.product(self.cases.items(), settings):
                    label = f"{name}, {setting.dtype}"
                    if time.monotonic() > self.end:
                        self.failed[NOT_RUN].append(label)
                        tqdm.write(f"NOT RUN: {label}: no time was left\n")
                        continue
                    bar.set_description_str(f"{name}: checking")
                    built = self.checked(label, case, setting)
                    for mode in args.mode:
                        bar.set_description_str(f"{name}, {mode}")
                        self.measure(name, case, mode, setting, built)

    def checked(self, label: str, case: Any, setting: Setting) -> dict[str, Provider]:
        """Returns the providers that can run a case and compute what the first computes."""
        built: dict[str, Provider] = {}
        own = getattr(case, "forms", {})
        shared = [name for name in own if name == next(iter(own)) or name in self.providers]
        for name in shared or self.providers:
            form = own.get(name) or self.providers[name]
            try:
                one = Provider(case, form, setting)
                if not built:
                    spiking = one.spiking_threshold() if isinstance(case, Case) else None
                    expected, true_loss = functools.cache(one.results), one.exact_loss()
                # A threshold of another shape would be compiled once more, which takes a minute.
                threshold = None if form.compiled or form.backend == "inductor" else spiking
                results = expected(threshold)
                if built:
                    compare(case, setting.dtype, results, one.results(threshold), true_loss)
                built[name] = one
            except Exception as error:  # a provider that fails must not end the run
                self.skip(name, label, error)
                if not built:  # there is no baseline
                    break
        return built

    def skip(self, provider: str, label: str, error: Exception) -> None:
        """Says why a provider is skipped. An error of ours is wrong, too, if it has memory."""
        error = getattr(error, "inner_exception", error)  # what a backend of torch.compile raised
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        by_design = isinstance(error, (Unavailable, MemoryError, torch.cuda.OutOfMemoryError))
        excused = by_design or provider.startswith((BASELINE, "inductor"))
        if isinstance(error, Disagreement):
            reason, excused = f"computes something else: {reason}", False
        line = f"{label}: {provider}: {reason}"
        if not excused:
            self.failed[1].append(line)
        tqdm.write(f"{'NOT TIMED' if excused else 'WRONG'}: {line}\n")

    def measure(
        self, name: str, case: Any, mode: str, setting: Setting, built: dict[str, Provider]
    ) -> None:
        """Times one case in one mode."""
        runners, begin, others = {}, time.monotonic(), machine.others()
        compiling: dict[str, float] = {}
        notes: dict[str, list[str]] = {provider: [] for provider in built}
        for provider, one in built.items():
            try:
                own = one.form.backend and getattr(case, "own_input", None)
                if own:
                    alone = Provider(case, one.form._replace(backend="eager"), setting)
                    recorded = alone.first_run(mode)[1].seconds
                runners[provider], found = one.first_run(mode)
                if one.form.backend:
                    compiling[provider] = found.seconds
                if own:
                    text = f"compiling took {report.number(found.seconds)} s of processor time"
                    text += f', with backend="eager" {report.number(recorded)} s'
                    notes[provider].append(text)
                notes[provider] += dict.fromkeys(found.warnings)
            except (MemoryError, RuntimeError) as error:
                self.skip(provider, f"{name}, {setting.dtype}", error)

        samples = time_interleaved(runners, CLOCKS[self.origin["clock"]], self.seconds)
        self.bar.update()
        before, after = self.peaks[setting], machine.peak(setting)
        self.peaks[setting] = after
        beside = max(0.0, machine.others() - others) / (time.monotonic() - begin)  # in cores
        drift = abs(after / before - 1)
        alone = self.origin["clock"] == "processor"
        quiet = alone or (beside <= MOST_LOAD and drift <= MOST_DRIFT)
        ratios = quiet or setting.device != "cpu"
        rows: list[dict[str, Any]] = []
        first = next(iter(built), None)
        for provider, times in samples.items():
            p20, p50, p80 = (1e3 * pd.Series(times).quantile([0.2, 0.5, 0.8])).tolist()
            row = self.origin | {
                "dtype": setting.dtype, "case": name, "title": case.title,
                "shape": getattr(case, "shape", ""), "steps": getattr(case, "steps", None),
                "mode": mode, "provider": provider, "path": built[provider].path,
                "rounds": len(times), "p20": p20, "ms": p50, "p80": p80,
                "speedup": None, "gflops": None, "mib": None,
                "compiling": compiling.get(provider), "note": "",
                "beside": beside, "peak": before, "peak_after": after, "quiet": quiet,
            }  # fmt: skip
            if ratios and first in samples:
                row["speedup"] = (rows[0]["ms"] if rows else p50) / p50
            if isinstance(case, Case):
                row["gflops"] = case.flops(mode) / p50 / 1e6
            if self.args.memory:
                key = case if isinstance(case, Case) else name
                job = prepared, key, provider, setting, mode
                peak = peak_memory.measure(*job, device=setting.device)
                if isinstance(peak, str):
                    notes[provider].append(peak)
                else:
                    row["mib"] = peak
            row["note"] = "; ".join(notes[provider])
            rows.append(row)
        self.rows += rows
        if rows:
            tqdm.write(report.block(pd.DataFrame(rows)))
        if rows and not ratios:
            self.failed[3].append(f"{name}, {mode}, threads: {self.origin['threads']}")
            tqdm.write(
                f"No ratios: other programs took {beside:.1f} cores, and the machine's peak went "
                f"from {before:.0f} to {after:.0f} GFLOP/s.\n"
            )


# ---- the command line ----------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status, one of FAILURES or 0.

    The rows that were measured are written in any case.
    """
    p = parser()
    args = p.parse_args(arguments)
    try:
        suite = Suite(args)
    except ValueError as error:
        p.exit(2, f"{p.prog}: error: {error}\n")  # one line, without the usage
    out = args.out or Path("out") / f"bench-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    try:
        suite.run()
    except KeyboardInterrupt:
        suite.failed[INTERRUPTED].append("the rest was not measured")
    report.write(pd.DataFrame(suite.rows), out)
    failed = {status: lines for status, lines in suite.failed.items() if lines}
    for status, lines in failed.items():
        print(f"{FAILURES[status]}:", *lines, sep="\n  ", file=sys.stderr)
    return next(iter(failed), 0)
