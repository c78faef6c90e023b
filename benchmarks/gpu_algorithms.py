"""Times every algorithm and block of both passes on a GPU, beside what the rules choose.

    python -m benchmarks.gpu_algorithms [--device cuda] [--out FILE.csv] [--layers NAME ...]

Each pass is captured in a CUDA graph and replayed, so the host takes no time, and run eagerly, with
the time of the host. Each row is printed, and written to FILE.csv, as it comes: layer, type, pass,
name, tile, a star if csrc/cuda/rules.cpp chooses it, us a step in the graph and eagerly. What a
candidate returns, eagerly and in the graph, must be near what the first one returns.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from benchmarks import devices
from benchmarks.cases import CASES, USERS_CASES, Case, parse_case
from benchmarks.gpu import NOT_RUN
from benchmarks.providers import FORMS, Provider, Setting
from benchmarks.run import compare
from snnlstm.calls.call import autocast_dtype, stateless_call
from snnlstm.native import backends
from snnlstm.native.cuda import Runner
from snnlstm.native.plan import Plan, Result

# The suite's own layers, users' layers at their batches, and all kinds of users' layers.
_AT_BATCHES = ("column1-n128", "column3-n128", "eeg1-n32")
LAYERS = ("tiny", "mnist", "dvs", "mid", "big", *_AT_BATCHES, *USERS_CASES)
COLUMNS = [
    "layer", "dtype", "pass", "name", "tile", "chosen", "us_a_step", "eager_us_a_step", "error"
]  # fmt: skip
DTYPES = {75: ("float32", "float16"), 80: ("tf32", "bfloat16")}


def seconds(backend: Any, run: Callable[[], Any], on_gpu: bool) -> tuple[list[float], list[Any]]:
    """Returns how long a run takes at best in a CUDA graph, and eagerly, and what both return.

    Without a GPU there is one time, and what the run returns.
    """
    begin = time.perf_counter()
    found = run()
    if not on_gpu:
        return [time.perf_counter() - begin] * 2, [found]
    replay, replayed = devices.captured(run)
    for tensor in filter(torch.is_tensor, replayed):
        tensor.zero_()
    return [backend.seconds(way) for way in (replay, run)], [found, replayed]


def results(found: Any) -> dict[str, Tensor]:
    """Returns what a pass has computed, as `compare` takes it."""
    if isinstance(found, Result):
        return {"spikes": found.spk.double(), "syn": found.syn.double(), "mem": found.mem.double()}
    return {name: tensor.double() for name, tensor in found._asdict().items() if tensor is not None}


def passes(case: Case, setting: Setting) -> list[tuple[str, ...]]:
    """Returns a row of COLUMNS for each candidate of both passes of a layer, and prints it."""
    provider = Provider(case, FORMS["sequence"], setting)
    cell, x = provider.net, provider.x[0].detach()
    with setting.context():
        call, spec = stateless_call(
            x, weight=cell.conv.weight.detach(), bias=cell.conv.bias.detach(),
            threshold=case.threshold, max_pool=case.max_pool, avg_pool=case.avg_pool,
            reset_mechanism=case.reset,
        )  # fmt: skip
        backend = backends.BACKENDS[x.device.type]
        settings = backend.settings("auto")
        operands = backends.operands_of(call, autocast_dtype(x.device.type))
        plan: Any = Plan(backend, call, spec, operands, settings)
    result = plan.forward(call, True)
    grads = torch.ones_like(result.spk), None, torch.ones_like(result.mem)
    wanted = case.grad_x, True, True, True, True, False
    ways = (
        partial(plan.forward, call, True),
        partial(plan.backward, call, result.saved, grads, wanted, result.selection, result.packed),
    )
    rows = []
    for backward, run in enumerate(ways):
        first: Any = None
        candidates = plan.backend.candidates(plan, settings.tf32, bool(backward))
        for number, core in enumerate(candidates):
            plan.passes._chosen[bool(backward)] = Runner(plan.passes, core)
            try:
                times, outs = seconds(plan.backend, run, setting.device == "cuda")
                first = first or results(outs[0])
                for out in outs:
                    compare(case, setting.dtype, first, results(out))
                found = *(f"{1e6 * taken / case.steps:.2f}" for taken in times), ""
            except Exception as error:
                found = "", "", f"{type(error).__name__}: {error}".splitlines()[0]
            named = ("forward", "backward")[backward], core.name, "x".join(map(str, core.tile))
            row = case.name, setting.dtype, *named, "*" if number == 0 else "", *found
            print(*["WRONG"] * bool(found[-1]), *row, flush=True)
            rows.append(row)
        plan.passes._chosen[bool(backward)] = Runner(plan.passes, candidates[0])
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_algorithms", description=__doc__)
    parser.add_argument("--device", choices=devices.DEVICES, default="cuda")
    parser.add_argument("--layers", nargs="+", default=LAYERS, help="names, or shapes")
    parser.add_argument("--out", default="algorithms.csv", metavar="FILE.csv")
    parser.add_argument("--limit", type=float, default=1e9, help="begin no layer after so many s")
    devices.add_rows(parser)
    options = parser.parse_args(arguments)
    begin, wrong, status = time.monotonic(), False, 0
    if options.rows[0] == 0:  # a process that goes on adds its rows
        pd.DataFrame(columns=COLUMNS).to_csv(options.out, index=False)
    capability = devices.capability(options.device)
    dtypes = DTYPES[max(known for known in DTYPES if known <= capability)]
    with devices.running(options.device):
        planned = list(itertools.product(options.layers, dtypes))[slice(*options.rows)]
        for number, (name, dtype) in enumerate(planned, options.rows[0]):
            case = CASES[name] if name in CASES else parse_case(name)
            if time.monotonic() - begin > options.limit:
                print(f"NOT RUN: {case.name}, {dtype}: no time was left", flush=True)
                status = NOT_RUN
                continue
            try:
                rows = passes(case, Setting(options.device, dtype))
            except Exception as error:
                text = f"{type(error).__name__}: {error}".splitlines()[0]
                rows = [(case.name, dtype, *[""] * 6, text)]
                print("WRONG", *rows[0], flush=True)
            table = pd.DataFrame(rows)
            table.to_csv(options.out, mode="a", header=False, index=False)
            failed = any(row[-1] for row in rows)
            wrong |= failed
            if failed and not devices.goes_on(
                "benchmarks.gpu_algorithms", arguments, number, options
            ):
                break
    return 1 if wrong else status


if __name__ == "__main__":
    sys.exit(main())
