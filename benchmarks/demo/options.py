"""What a training is told: its recipe, and the command line that says it."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.demo.network import NETWORKS
from benchmarks.moving_digits import Motion

DIGITS = 1437
"""Digits there are to train on."""

AMP = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What the gate convolutions and the readout compute in; states and weights stay float32."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run, but for which network is trained.

    epochs: passes over the digits. batch: digits of one step, over all processes. rate: highest
    learning rate. samples: how many of the training digits are used; 0 is all of them. seed: of
    weights, motions and order. canvas: side of the images in pixels; the digits grow with it.
    steps: event frames of a digit. amp: a key of AMP. clip: largest norm of the gradient; None
    leaves it as it is. device: "cpu" or "cuda". threads: for all processes of a machine together.
    """

    epochs: int = 12
    batch: int = 16
    rate: float = 4e-3
    samples: int = 0
    seed: int = 0
    canvas: int = Motion.canvas
    steps: int = Motion.steps
    amp: str = "none"
    clip: float | None = None
    device: str = "cpu"
    threads: int = 2

    def batches(self) -> int:
        """Batches of an epoch."""
        return -(-(self.samples or DIGITS) // self.batch)

    @property
    def motion(self) -> Motion:
        """How the digits move: as `Motion` has it, scaled to the canvas."""
        scale = self.canvas / Motion.canvas
        smallest, largest = Motion.radius
        return Motion(
            canvas=self.canvas,
            digit=Motion.digit * self.canvas // Motion.canvas,
            steps=self.steps,
            radius=(smallest * scale, largest * scale),
        )

    def decisive(self) -> dict[str, int | float | str | None]:
        """What a training that goes on may not change."""
        found = dataclasses.asdict(self)
        del found["device"], found["threads"]
        return found

    def arguments(self) -> list[str]:
        """The command line of `parser` that gives this recipe."""
        asked = dataclasses.asdict(self)
        return [f"--{name}={value}" for name, value in asked.items() if value is not None]


def whole(smallest: int, largest: int | None = None) -> Callable[[str], int]:
    """An argparse type: a whole number within the limits."""
    limits = f"at least {smallest}" if largest is None else f"in {smallest}..{largest}"

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = smallest - 1
        if value < smallest or (largest is not None and value > largest):
            raise argparse.ArgumentTypeError(f"must be a whole number, {limits}, got {text!r}")
        return value

    return convert


def positive(text: str) -> float:
    """An argparse type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, got {text!r}")
    return value


def add_common(p: argparse.ArgumentParser, threads: int) -> None:
    """The arguments that the demo and one training share; threads: the default."""
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument(
        "--epochs", type=whole(1), default=Recipe.epochs, metavar="N", help="default: %(default)s"
    )
    p.add_argument(
        "--seed",
        type=whole(0, 2**31 - 1),
        default=Recipe.seed,
        metavar="N",
        help="of weights, motions and order (default: %(default)s)",
    )
    p.add_argument(
        "--threads",
        type=whole(1),
        default=threads,
        metavar="N",
        help="of this machine, divided among the processes (default: %(default)s here)",
    )


def parser() -> argparse.ArgumentParser:
    """The arguments of one training."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.demo.training",
        description="Train a two-layer spiking ConvLSTM to read moving digits. "
        "`torchrun --standalone --nproc_per_node 2 -m benchmarks.demo.training ...` does so in two "
        "processes.",
    )
    # torchrun gives each of several processes one thread, unless OMP_NUM_THREADS says otherwise.
    alone = "TORCHELASTIC_RUN_ID" not in os.environ
    add_common(p, torch.get_num_threads() if alone else len(os.sched_getaffinity(0)))
    p.add_argument("--network", choices=tuple(NETWORKS), default="snnlstm", help="whose cells")
    p.add_argument(
        "--batch",
        type=whole(1),
        default=Recipe.batch,
        metavar="N",
        help="digits of one step, divided among the processes (default: %(default)s)",
    )
    p.add_argument(
        "--rate",
        type=positive,
        default=Recipe.rate,
        metavar="X",
        help="highest learning rate (default: %(default)s)",
    )
    p.add_argument(
        "--samples",
        type=whole(0, DIGITS),
        default=Recipe.samples,
        metavar="N",
        help="train on the first N digits alone; 0 takes all (default: %(default)s)",
    )
    p.add_argument(
        "--canvas",
        type=whole(12),
        default=Recipe.canvas,
        metavar="N",
        help="side of the images in pixels (default: %(default)s)",
    )
    p.add_argument(
        "--steps",
        type=whole(1),
        default=Recipe.steps,
        metavar="N",
        help="event frames of a digit (default: %(default)s)",
    )
    p.add_argument(
        "--amp",
        choices=tuple(AMP),
        default=Recipe.amp,
        help="mixed precision: what convolutions compute in (default: %(default)s). For the GPU: "
        "on the CPU our cell then runs in plain torch, and float16 is slow",
    )
    p.add_argument(
        "--clip",
        type=positive,
        metavar="X",
        help="scale gradients down to this norm, over all weights (default: do not)",
    )
    p.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="written at the end of each epoch"
    )
    p.add_argument(
        "--resume",
        action="store_true",
        help="go on from the checkpoint, where there is one: the same command starts and restarts",
    )
    p.add_argument("--logdir", type=Path, metavar="DIR", help="log for TensorBoard")
    p.add_argument("--json", action="store_true", help="write one JSON object a line")
    return p


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, Recipe]:
    """Read the command line of one training; leaves with status 2 where it cannot be done."""
    p = parser()
    args = p.parse_args(arguments)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    for wrong in (
        no_device(args.device, here),
        _no_checkpoint(args.checkpoint, args.resume),
        _no_log(args.logdir),
    ):
        if wrong:
            p.error(wrong)
    names = [field.name for field in dataclasses.fields(Recipe)]
    return args, Recipe(**{name: getattr(args, name) for name in names})


def no_device(device: str, processes: int) -> str:
    """Why so many processes cannot compute on the device; empty where they can."""
    if device == "cuda" and not torch.cuda.is_available():
        return "argument --device: cuda was asked for, but torch sees no CUDA device"
    if device == "cuda" and processes > torch.cuda.device_count():
        return (
            f"argument --device: {processes} processes need a CUDA device each, and torch sees "
            f"{torch.cuda.device_count()}"
        )
    return ""


def _no_checkpoint(path: Path | None, resume: bool) -> str:
    if path is None:
        return "argument --resume: needs --checkpoint FILE to go on from" if resume else ""
    if not path.parent.is_dir():
        return f"argument --checkpoint: there is no directory {path.parent} to write {path} into"
    if path.exists() and not resume:
        return (
            f"argument --checkpoint: {path} exists: --resume goes on from it, and another name "
            "begins anew"
        )
    return ""


def _no_log(folder: Path | None) -> str:
    if folder is not None and importlib.util.find_spec("tensorboard") is None:
        return "argument --logdir: needs the package tensorboard: pip install tensorboard"
    return ""
