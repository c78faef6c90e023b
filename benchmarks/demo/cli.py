"""The command line of `python -m benchmarks.demo`."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import machine
from benchmarks.demo import report
from benchmarks.demo.options import Recipe, add_common, no_device, whole
from benchmarks.demo.report import TITLES, Result


def parser() -> argparse.ArgumentParser:
    """The arguments of the demo."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.demo",
        description="Train a two-layer spiking ConvLSTM to read handwritten digits that move "
        "before an event camera: once with snnTorch's cell and once with ours, from the same "
        "weights, on the same digits in the same order, with the same number of threads.",
    )
    add_common(p, torch.get_num_threads())
    p.add_argument(
        "--nproc",
        type=whole(1),
        default=1,
        metavar="N",
        help="processes that train each network together (default: %(default)s); on CUDA each "
        "takes a GPU",
    )
    p.add_argument(
        "--quick", action="store_true", help="a look only: 1 epoch of 128 digits, learns little"
    )
    p.add_argument(
        "--out",
        type=Path,
        default=Path("out") / "demo",
        metavar="DIR",
        help="directory for demo.png and demo.json (default: %(default)s)",
    )
    return p


def recipe_from(args: argparse.Namespace) -> Recipe:
    """The training that the arguments ask for."""
    common = {"seed": args.seed, "device": args.device, "threads": args.threads}
    if args.quick:
        return Recipe(epochs=1, samples=128, **common)
    return Recipe(epochs=args.epochs, **common)


def command(network: str, recipe: Recipe, nproc: int) -> list[str]:
    """The command that trains in a fresh process, or by torchrun in several."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr=localhost"]
    return [
        sys.executable,
        *([] if nproc == 1 else [*launcher, f"--nproc-per-node={nproc}"]),
        *("-m", "benchmarks.demo.training", "--json", f"--network={network}"),
        *recipe.arguments(),
    ]


def train(network: str, recipe: Recipe, nproc: int = 1, *more: str) -> Result:
    """Train in nproc fresh processes and watch them; more: further arguments of the training.

    Raises RuntimeError with the last words of what failed.
    """
    result = Result(network)
    environment = dict(os.environ)
    if nproc > 1:  # torchrun sets one thread and says so; training.py divides --threads itself
        environment.setdefault("OMP_NUM_THREADS", "1")
    with (
        tempfile.TemporaryFile("w+") as errors,
        tqdm(
            total=recipe.epochs * recipe.batches(),
            desc=f"{TITLES[network]:<8}",
            unit="batch",
            disable=None,  # no bar where nobody watches: a line per epoch instead
            dynamic_ncols=True,
        ) as bar,
        subprocess.Popen(
            [*command(network, recipe, nproc), *more],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=machine.ROOT,
            env=environment,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                _follow(json.loads(line), result, bar, recipe)
        except BaseException:
            process.terminate()  # not kill: torchrun has to end its processes first
            raise
        if process.wait() != 0 or not result.end:
            errors.seek(0)
            raise RuntimeError(f"training {network} failed:\n{errors.read().strip()}")
    return result


def _follow(event: dict, result: Result, bar: tqdm, recipe: Recipe) -> None:
    kind = event["event"]
    if kind == "start":
        result.start = event
    elif kind == "batch":
        result.losses.append(event["loss"])
        recent = result.losses[-report.WINDOW :]
        bar.set_postfix_str(
            f"epoch {event['epoch'] + 1}/{recipe.epochs}, loss {sum(recent) / len(recent):.3f}",
            refresh=False,
        )
        bar.update()
    elif kind == "epoch" and bar.disable:
        print(
            f"{TITLES[result.network]:<8}  epoch {event['epoch'] + 1}/{recipe.epochs}  "
            f"loss {event['loss']:.3f}  {event['seconds']:.1f} s",
            flush=True,
        )
    elif kind == "end":
        result.end = event


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 1 if a training failed or is not comparable."""
    p = parser()
    args = p.parse_args(arguments)
    wrong = no_device(args.device, args.nproc)
    if wrong:
        p.error(wrong)
    recipe = recipe_from(args)
    motion = recipe.motion
    name = machine.device_name(recipe.device)
    workers = f"{recipe.threads} threads"
    if args.nproc > 1:
        workers = f"{args.nproc} processes, {workers}"
    print(
        f"Digits of {motion.digit}x{motion.digit} pixels move over {motion.canvas}x{motion.canvas} "
        f"pixels and are seen as ON and OFF events, {motion.steps} frames each.\n"
        f"A two-layer spiking ConvLSTM learns to read them on {name}, {workers}."
    )
    if recipe.device == "cpu" and torch.cuda.is_available():
        print("There is a GPU here: --device cuda runs the demo on it.")
    print(flush=True)
    begin = time.perf_counter()
    try:
        reference, ours = (
            train(network, recipe, args.nproc) for network in ("snntorch", "snnlstm")
        )
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    picture, data = args.out / "demo.png", args.out / "demo.json"
    caption = (
        f"Two-layer spiking ConvLSTM on moving digits, {recipe.epochs} epochs, seed {recipe.seed}; "
        f"{name}, {workers}, torch {torch.__version__}"
    )
    report.plot(reference, ours, picture, caption)
    found = {result.network: vars(result) for result in (reference, ours)}
    data.write_text(json.dumps({"caption": caption, **found}, indent=1) + "\n")
    print(f"\n{report.table(reference, ours)}")
    print(f"\nwrote {picture} and {data}; took {time.perf_counter() - begin:.0f} s")
    return 1 if report.same_start(reference, ours) else 0
