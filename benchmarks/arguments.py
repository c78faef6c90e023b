"""Reads the arguments of the suite, without the packages that only a run needs."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases, devices, networks, providers
from benchmarks.cases import Case
from benchmarks.networks import Network
from benchmarks.providers import FORMS, TOLERANCE

TABLES: dict[str, Any] = {**networks.TABLES, **cases.TABLES}
CASES = {name: case for table in TABLES.values() for name, case in table.items()}
DESCRIPTION = """\
Times layers and whole networks with snnTorch's cell and with ours, in one process.

A speed-up is the ratio of two medians over the same rounds. With one thread times are processor
time, and their ratios hold on a busy machine. With several threads they do not (NOTES.md): the
suite then prints no ratios, and its exit status is 3, if other programs take more than 0.3 of a
core, or if the machine's peaks before and after a case differ by 10 %.
"""
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
        prog="python -m benchmarks", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--shapes", nargs="+", metavar="NAME",
        help="networks, layers and tables of the lists below (default: networks)")
    p.add_argument("--shape", action="append", default=[], metavar='"T N Cin Cout H W k ..."',
        help=f"your own layer, {cases.FORM}")
    p.add_argument("--network", action="append", default=[], metavar="FILE.py:FUNCTION",
        help="your own network: FUNCTION() returns the network, with snnTorch's cells or ours, its "
        "input x and, if you wish, a loop run(network, x); both libraries' cells are timed in it")
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
    p.add_argument("--quick", action="store_true", help="few shapes, in under two minutes")
    p.add_argument("--seconds", type=float, metavar="S",
        help="for one case in one mode, all providers together (default: 12; --quick: 1.5)")
    p.add_argument("--limit", type=float, default=math.inf, metavar="S",
        help="begin no case after S seconds")
    p.add_argument("--out", type=Path, metavar="DIR",
        help="for rows.csv and table.md (default: out/bench-DATE-TIME)")
    return p
# fmt: on


def find_case(name: str) -> Case | Network:
    """Returns a built-in layer or network, or the network of "file.py:function"."""
    if ":" in name or name.endswith(".py"):
        return networks.from_file(name)
    if name in CASES:
        return CASES[name]
    raise ValueError(
        f"--shapes: no shape is called {name!r}; known: {', '.join([*TABLES, *CASES])}"
    )
