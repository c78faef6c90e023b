"""Reads the command line of `python -m benchmarks`, and runs the suite."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import compare, devices, gpu_goals, machine, report
from benchmarks.cases import (
    CASES,
    MODES,
    QUICK_CASES,
    Case,
    find_cases,
    parse_case,
    parse_density,
    random_cases,
)
from benchmarks.kernel_times import KernelTime
from benchmarks.providers import PROVIDERS, QUICK_PROVIDERS, Setting, find_providers
from benchmarks.rows import Row, read_rows, write_csv, write_rows
from benchmarks.suite import Plan, Suite
from benchmarks.timing import Budget

DTYPES = ("float32", "tf32", "autocast", "autocast16", "float64", "bfloat16", "float16")

EPILOG = f"""\
shapes:
{chr(10).join(f"  {case.name:<10} {case.title}" for case in CASES.values())}

providers:
{chr(10).join(f"  {name:<22} {provider.title}" for name, provider in PROVIDERS.items())}

examples:
  python -m benchmarks --quick
  python -m benchmarks --shapes mid big --mode both --goals --out out/before
  python -m benchmarks --shape "8 4 32 48 30 40 3x5 reset=zero density=0.02"
  python -m benchmarks --compare out/before out/after
  python -m benchmarks --random 20 --mode forward both --providers snntorch snnlstm --seconds 2
  python -m benchmarks --shapes networks fronts --mode forward both --seconds 2
  python -m benchmarks --device cuda --shapes gpu --dtype float32 tf32 bfloat16
"""


HELP = {
    "shapes": 'built-in shapes of the list below; "cpu", "loops", "users" and "gpu" stand for '
    'whole tables, "networks" for whole networks, "fronts" for layers in front of a cell '
    "(default: cpu, or gpu with --device cuda)",
    "shape": "a shape of your own, may be repeated; options after k: max_pool=2 avg_pool=2 "
    "reset=zero quant=8 threshold=0.1 density=0.1 (or density=dense) name=mine",
    "random": "time N random shapes, drawn with --seed, and list the ratios in order, the ten "
    "lowest with their shapes",
    "providers": "providers of the list below; snntorch is always timed (default: all that run)",
    "mode": "forward: inference; backward: backward alone; both: training (default: all three)",
    "density": 'share of ones in x, or "dense" for normally distributed x, in place of the '
    "shapes' own (0.1 mostly)",
    "device": "device of all providers (default: %(default)s); simt-...: a GPU that tests/simt "
    "emulates, whose times mean nothing",
    "dtype": "tf32: float32 tensors on tensor cores (CUDA); autocast, autocast16: float32 tensors "
    "under torch.autocast to bfloat16 and to float16",
    "threads": "threads of torch, and so of every provider (default: %(default)s, torch's own)",
    "seed": "seed of weights and x (default: %(default)s)",
    "quick": "time fewer shapes, providers and modes, in under 2 minutes",
    "seconds": "time for one shape in one mode, all providers together (default: 12; --quick: 1.5)",
    "limit": "begin no further shape after S seconds in all (default: none)",
    "memory": "peak memory of each shape and against T, against T only, or not (default: all; "
    "--quick: long)",
    "busy": "keep one core busy with another program, to see how much slower each provider gets",
    "kernels": "profile one run of snnlstm and of snntorch for each shape and mode, and write "
    "the time of each kernel to kernels.csv",
    "goals": "compare the speed-ups with our goals",
    "out": "directory for rows.csv, rows.json, table.md and the plots (default: "
    "out/bench-DATE-TIME)",
    "no-plots": "write rows only",
    "compare": "print what changed from run A to run B (directories or files of rows)",
    "plot": "draw the plots of a run again",
}


def at_least(least: float, kind: type[float] = int) -> Callable[[str], float]:
    """Returns an argparse type that accepts numbers from `least` on."""

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not value >= least:
            raise argparse.ArgumentTypeError(f"must be at least {least:g}, got {text!r}")
        return value

    return convert


def parser() -> argparse.ArgumentParser:
    """Makes the parser of the suite's arguments."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time snnlstm's SConv2dLSTM beside snnTorch's and others, in interleaved "
        "rounds, weigh their memory, and write rows (CSV, JSON) and plots.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = p.add_argument_group("what to measure")

    def add(name: str, **options: Any) -> None:
        group.add_argument(f"--{name}", help=HELP[name], **options)

    add("shapes", nargs="+", metavar="NAME")
    add("shape", action="append", default=[], metavar='"T N Cin Cout H W k ..."')
    add("random", type=at_least(0), default=0, metavar="N")
    add("providers", nargs="+", metavar="NAME")
    add("mode", nargs="+", choices=MODES)
    add("density", metavar="D")
    add("device", choices=devices.DEVICES, default="cpu")
    add("dtype", nargs="+", choices=DTYPES, default=["float32"])
    add("threads", type=at_least(1), default=torch.get_num_threads(), metavar="N")
    add("seed", type=int, default=0)
    group = p.add_argument_group("how long")
    add("quick", action="store_true")
    add("seconds", type=at_least(0.001, float), metavar="S")
    add("limit", type=float, default=math.inf, metavar="S")
    add("memory", choices=("all", "long", "off"))
    add("busy", action="store_true")
    add("kernels", action="store_true")
    group = p.add_argument_group("what to show")
    add("goals", action="store_true")
    add("out", type=Path, metavar="DIR")
    add("no-plots", action="store_true")
    group = p.add_argument_group("instead of measuring")
    add("compare", nargs=2, type=Path, metavar=("A", "B"))
    add("plot", type=Path, metavar="DIR")
    return p


def plan_from(args: argparse.Namespace, dtype: str) -> Plan:
    """Returns the plan that the arguments ask for; a ValueError names a wrong argument."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: cuda was asked for, but torch sees no CUDA device")
    if dtype == "tf32" and args.device == "cpu":
        raise ValueError("--dtype: tf32 needs --device cuda")
    quick, names = args.quick, args.shapes
    own = [*map(parse_case, args.shape), *random_cases(args.random, args.seed)]
    if names is None and not own:
        few = list(QUICK_CASES) if args.device == "cpu" else ["dvs64", "wide64"]
        names = few if quick else ["cpu" if args.device == "cpu" else "gpu"]
    cases = find_cases(names or []) + own
    if args.density is not None:
        density = parse_density(args.density)
        layers = [case for case in cases if isinstance(case, Case)]
        cases = [dataclasses.replace(case, density=density, goals=None) for case in layers]
    return Plan(
        cases=cases,
        providers=find_providers(args.providers or (QUICK_PROVIDERS if quick else PROVIDERS)),
        modes=args.mode or (["forward", "both"] if quick else list(MODES)),
        setting=Setting(args.device, dtype, args.seed),
        threads=args.threads,
        budget=Budget(seconds=args.seconds or (1.5 if quick else 12.0)),
        memory=args.memory or ("long" if quick else "all"),
        long_steps=(10, 40) if quick else Plan.long_steps,
        deadline=time.monotonic() + args.limit,
        kernels=args.kernels,
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status, 1 if a provider computes something else."""
    p = parser()
    args = p.parse_args(arguments)
    try:
        if args.compare:
            print(compare.report(*map(read_rows, args.compare)))
            return 0
        if args.plot:
            folder = args.plot if args.plot.is_dir() else args.plot.parent
            return _draw(read_rows(args.plot), folder)
        plans = [plan_from(args, dtype) for dtype in dict.fromkeys(args.dtype)]
    except ValueError as error:
        p.error(str(error))
    return _measure(plans, args)


def _measure(plans: list[Plan], args: argparse.Namespace) -> int:
    """Runs the plans; after an interruption, the rows that were measured are still written."""
    out = args.out or Path("out") / f"bench-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    suites: list[Suite] = []
    begin = time.perf_counter()
    status = 0
    try:
        for plan in plans:
            suites.append(Suite(plan))
            busy = machine.one_core_busy() if args.busy else contextlib.nullcontext()
            with busy, devices.running(args.device):
                _run(suites[-1], args.goals)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130  # the shell's status of a program that SIGINT ended
    rows = [row for suite in suites for row in suite.rows]
    written = [*write_rows(rows, out)]
    if args.kernels:
        kernels = [kernel for suite in suites for kernel in suite.kernels]
        written.append(write_csv(out / "kernels.csv", KernelTime._fields, kernels))
    if args.goals and args.device != "cpu":
        print(gpu_goals.verdict(rows))
    if table := report.markdown(rows):
        written.append(out / "table.md")
        written[-1].write_text(table)
    for path in written:
        print(f"wrote {path}")
    if not args.no_plots:
        _draw(rows, out)
    print(f"took {time.perf_counter() - begin:.0f} s")
    for line in (disagreements := [line for suite in suites for line in suite.disagreements]):
        print(f"NOT TIMED, computes something else: {line}", file=sys.stderr)
    return 1 if disagreements else status


def _run(suite: Suite, goals: bool) -> None:
    origin, plan = suite.origin, suite.plan
    print(
        f"snnlstm {origin['version']} at {origin['commit']}, torch {origin['torch']}, "
        f"snntorch {origin['snntorch']}\n{origin['device']}, {plan.threads} threads, "
        f"{plan.setting.dtype}\n"
    )
    if machine.busy_cores() > 0.5:
        print(
            f"The machine is busy (a load of {machine.busy_cores():.1f} in the last minute): "
            "ratios will still be fair, milliseconds will not.\n"
        )
    try:
        suite.run()
    finally:
        print(report.summary(suite.rows, goals))
        print(report.ranking(suite.rows))
    if table := report.memory_table(suite.rows, goals):
        print(f"\n{table}\n")
    print(report.peaks_line(suite.peaks))


def _draw(rows: list[Row], directory: Path) -> int:
    try:
        from benchmarks.plots import draw_all

        drawn = draw_all(rows, directory)
    except ImportError as error:
        print(f"no plots: {error} (pip install 'snnlstm[bench]')", file=sys.stderr)
        return 1
    for path in drawn:
        print(f"wrote {path}")
    return 0
