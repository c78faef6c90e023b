"""The command line of `python -m benchmarks.demo`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import machine
from benchmarks.demo import report
from benchmarks.demo.report import TITLES, Result
from benchmarks.demo.training import Recipe, request
from benchmarks.moving_digits import Motion


def parser() -> argparse.ArgumentParser:
    """The arguments of the demo."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.demo",
        description="Train a two-layer spiking ConvLSTM to read handwritten digits that move "
        "before an event camera: once with snnTorch's cell and once with ours, from the same "
        "weights, on the same digits in the same order, with the same number of threads.",
    )
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument(
        "--epochs", type=int, default=Recipe.epochs, metavar="N", help="default: %(default)s"
    )
    p.add_argument("--seed", type=int, default=0, help="of weights, motions and order (default: 0)")
    p.add_argument(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        metavar="N",
        help="for both networks (default: torch's own, %(default)s here)",
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
    """The training that the arguments ask for; raises ValueError naming the one that is wrong."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: cuda was asked for, but torch sees no CUDA device")
    for name in ("epochs", "threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if not 0 <= args.seed < 2**31:
        raise ValueError(f"--seed must lie in 0..2147483647, got {args.seed}")
    common = {"seed": args.seed, "device": args.device, "threads": args.threads}
    if args.quick:
        return Recipe(epochs=1, samples=128, **common)
    return Recipe(epochs=args.epochs, **common)


def train(network: str, recipe: Recipe, motion: Motion) -> Result:
    """Train in a fresh process and watch it. Raises RuntimeError with the process's last words."""
    result = Result(network)
    command = [sys.executable, "-m", "benchmarks.demo.training"]
    with (
        tempfile.TemporaryFile("w+") as errors,
        tqdm(
            total=recipe.batches(),
            desc=f"{TITLES[network]:<8}",
            unit="batch",
            disable=None,  # no bar where nobody watches: a line per epoch instead
            dynamic_ncols=True,
        ) as bar,
        subprocess.Popen(
            [*command, request(network, recipe, motion)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=machine.ROOT,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                _follow(json.loads(line), result, bar, recipe)
        except BaseException:
            process.kill()
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
    try:
        recipe = recipe_from(args)
    except ValueError as error:
        p.error(str(error))
    motion = Motion()
    name = machine.device_name(recipe.device)
    print(
        f"Digits of {motion.digit}x{motion.digit} pixels move over {motion.canvas}x{motion.canvas} "
        f"pixels and are seen as ON and OFF events, {motion.steps} frames each.\n"
        f"A two-layer spiking ConvLSTM learns to read them on {name}, {recipe.threads} threads."
    )
    if recipe.device == "cpu" and torch.cuda.is_available():
        print("There is a GPU here: --device cuda runs the demo on it.")
    print(flush=True)
    begin = time.perf_counter()
    try:
        reference, ours = (train(network, recipe, motion) for network in ("snntorch", "snnlstm"))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    picture, data = args.out / "demo.png", args.out / "demo.json"
    caption = (
        f"Two-layer spiking ConvLSTM on moving digits, {recipe.epochs} epochs, seed {recipe.seed}; "
        f"{name}, {recipe.threads} threads, torch {torch.__version__}"
    )
    report.plot(reference, ours, picture, caption)
    found = {result.network: vars(result) for result in (reference, ours)}
    data.write_text(json.dumps({"caption": caption, **found}, indent=1) + "\n")
    print(f"\n{report.table(reference, ours)}")
    print(f"\nwrote {picture} and {data}; took {time.perf_counter() - begin:.0f} s")
    return 1 if report.same_start(reference, ours) else 0
