"""Compares launches that overlap with launches that do not, and equal calls, bit for bit.

    python -m benchmarks.gpu_overlap [--device cuda] [--limit SECONDS] [--layers SHAPE ...]

The kernels add in a fixed order, so equal calls have equal results. On GPUs from 9.0 on a step's
kernel may start while the step before still runs (programmatic dependent launch): without a wait it
would read old states. So there a second process, with SNNLSTM_PDL=0, runs each row, too: layers
whose steps have several waves of blocks, up to fifty times forward and backward. All results of a
row must have the same hash. The rows share the time, and each is printed as it comes.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import snnlstm
from benchmarks import devices
from benchmarks.cases import parse_case
from benchmarks.gpu import NOT_RUN
from benchmarks.providers import FORMS, OPERANDS, Provider, Setting

# The wide one has a reset, which reads mem, and a pool. Training takes about 3 GB in float32.
LAYERS = (
    "16 128 2 16 32 32 3 threshold=0.02 name=narrow",
    "12 32 32 64 32 32 3 threshold=0.02 max_pool=2 reset=zero name=wide",
)
WAYS = ("sequence", "lengths", "steps")


def hashed(tensor: Tensor) -> int:
    """Returns a number that depends on each bit of a tensor, and on its place."""
    bits = tensor.detach().flatten().view(torch.int16).split(1 << 24)
    places = torch.arange(1, len(bits[0]) + 1, device=tensor.device)
    return hash(tuple(int((piece * places[: len(piece)]).sum()) for piece in bits))


def rows(device: str, layers: Sequence[str]) -> list[tuple[Any, str, str]]:
    """Returns the rows: a layer, a type, and a way to call it."""
    types = [dtype for dtype in devices.precisions(device) if dtype not in ("float64", *OPERANDS)]
    return list(itertools.product(map(parse_case, layers), types, WAYS))


def hashes(device: str, layers: Sequence[str], seconds: Iterable[float]) -> Iterator[str]:
    """Yields a line for each row: the hashes of at least two calls, in about so many seconds.

    One hash is right.
    """
    for (case, dtype, way), limit in zip(rows(device, layers), seconds, strict=False):
        setting, found, end = Setting(device, dtype), list[int](), time.monotonic() + limit
        provider = Provider(case, FORMS["sequence"], setting)
        cell, x = provider.net, provider.x[0]
        inputs = [x.requires_grad_(), *cell.parameters()]
        lengths = torch.arange(1, case.batch + 1, device=x.device) % (case.steps + 1)
        while len(found) < 2 or (len(found) < 50 and time.monotonic() < end):
            cell.reset_mem()
            with snnlstm.algorithm("fused"):
                if way == "steps":
                    out = list(itertools.chain.from_iterable(map(cell, x)))
                else:
                    out = cell(x, lengths=lengths if way == "lengths" else None)
                grads = torch.autograd.grad(sum(result.square().sum() for result in out), inputs)
            found.append(hash(tuple(map(hashed, (*out, *grads)))))
        text = " or ".join(f"{number:x}" for number in sorted(set(found)))
        yield f"{case.name}, {dtype}, {way}: {text}"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_overlap", description=__doc__)
    parser.add_argument("--device", choices=devices.DEVICES, default="cuda")
    parser.add_argument("--layers", nargs="+", default=LAYERS, help="shapes")
    parser.add_argument("--limit", type=float, default=60, help="begin no row after so many s")
    parser.add_argument("--apart", action="store_true", help="a row for each line of seconds")
    options = parser.parse_args(arguments)
    given, end = (options.device, options.layers), time.monotonic() + options.limit
    two, left, wrong = devices.capability(options.device) >= 90, len(rows(*given)), False
    with devices.running(options.device):
        if options.apart:
            for line in hashes(*given, map(float, sys.stdin)):
                print(line, flush=True)
            return 0
        command = [sys.executable, "-m", "benchmarks.gpu_overlap", "--apart", "--device"]
        other: Any = two and subprocess.Popen(
            [*command, options.device, "--layers", *options.layers], text=True, bufsize=1,
            env=os.environ | {"SNNLSTM_PDL": "0"}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        os.environ["SNNLSTM_PDL"] = "1"
        shares = iter(lambda: max(0, end - time.monotonic()) / left / (1 + two), 0)
        for line in hashes(*given, shares):
            apart = line
            if two:
                print(max(0, end - time.monotonic()) / (2 * left - 1), file=other.stdin)
                apart = other.stdout.readline().strip()
            right = apart == line and " or " not in line
            print(line if right else f"WRONG  {line}; apart: {apart}", flush=True)
            wrong, left = wrong or not right, left - 1
        if two:
            other.communicate()
    if left:
        print(f"NOT RUN: {left} rows, as no time was left")
    return 1 if wrong else NOT_RUN if left else 0


if __name__ == "__main__":
    sys.exit(main())
