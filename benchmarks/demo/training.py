"""Trains a spiking ConvLSTM to read moving digits; a user may copy this script and change it.

    python training.py --epochs 8

The script runs alone. The demo runs it with either library's cell.

The digits are the 1797 images of 8x8 pixels that scikit-learn carries (UCI "Optical Recognition of
Handwritten Digits", https://archive.ics.uci.edu/dataset/80), so nothing is downloaded. Each digit
is enlarged and circles over a dark canvas. The camera sends an ON event where the brightness rose
from one frame to the next, and an OFF event where it fell. An edge that moves along itself sends no
events, but a full circle shows every edge. (The camera of N-MNIST moved in closed triangles for
this reason: Orchard et al., Front. Neurosci. 9:437, 2015.) One seed decides all random numbers.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = 16
THRESHOLD = 0.05
"""The threshold is low, because mem = o * tanh(syn) is small as long as the weights are."""
SLOPE = 20.0
"""The alpha of the arctan surrogate makes it as narrow as the threshold's scale of 0.05."""
CLASSES = 10
BATCH = 16
RATE = 4e-3
EVERY = 30
"""After this many batches the network is tested, which is not timed."""
EPSILON = 1e-3
"""Adam divides a gradient by its size plus epsilon. With the default of 1e-8 a gradient of the size
of a rounding error makes as large a step as any other. Two runs of one cell, from weights that are
1e-7 apart, then have different losses within an epoch."""


CANVAS, DIGIT, STEPS = 24, 16, 8
"""These are the sides of the square canvas and of the enlarged digit, in pixels, and the number T
of event frames, of T + 1 brightness frames."""
RADIUS, TURNS, CONTRAST = (2.0, 3.5), 1.0, 0.1
"""These are the smallest and the largest radius of a circle, in pixels, how often a digit goes
round in the T frames, and the change of brightness (of 0..1) above which a pixel sends an event.
The circle's place, the digit's start on it and its direction are uniformly random."""


def load_split(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Splits the digits at random, with every class in the same proportion on both sides.

    Returns train images (n, 8, 8) float32 in 0..1, train labels (n,) int64, test images, test
    labels. Equal seeds give equal splits.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(digits.images).float() / 16.0  # stored as counts 0..16
    labels = torch.from_numpy(digits.target).long()
    train, test = train_test_split(
        range(len(labels)), test_size=0.2, random_state=seed, stratify=digits.target
    )
    return images[train], labels[train], images[test], labels[test]


def trajectories(count: int, generator: torch.Generator) -> Tensor:
    """Draws top-left corners (count, T + 1, 2) as (row, column), always inside the canvas."""
    smallest, largest = RADIUS
    room = CANVAS - DIGIT
    radius = smallest + (largest - smallest) * torch.rand(count, 1, 1, generator=generator)
    centre = radius + (room - 2 * radius) * torch.rand(count, 1, 2, generator=generator)
    start = 2 * torch.pi * torch.rand(count, 1, generator=generator)
    sense = 2.0 * torch.randint(2, (count, 1), generator=generator) - 1
    angle = start + sense * torch.linspace(0, 2 * torch.pi * TURNS, STEPS + 1)
    return centre + radius * torch.stack([angle.sin(), angle.cos()], dim=-1)


def render(images: Tensor, corners: Tensor) -> Tensor:
    """Renders brightness frames (n, T + 1, CANVAS, CANVAS) in 0..1 of images (n, 8, 8) at corners.

    Corners are real numbers: digits are resampled bilinearly, so that they glide and do not jump
    from pixel to pixel.
    """
    n, frames, _ = corners.shape
    large = F.interpolate(images.unsqueeze(1), (DIGIT, DIGIT), mode="bilinear", align_corners=False)
    # A pixel p of the canvas shows the digit at p - corner; grid_sample wants (x, y) in -1..1.
    pixel = torch.arange(CANVAS, dtype=torch.float32)
    local = pixel.view(1, 1, 1, -1) - corners.unsqueeze(-1)  # (n, T + 1, 2, CANVAS)
    rows, columns = ((2 * local + 1) / DIGIT - 1).unbind(2)
    shape = (n, frames, CANVAS, CANVAS)
    grid = torch.stack([columns.unsqueeze(2).expand(shape), rows.unsqueeze(3).expand(shape)], -1)
    source = large.repeat_interleave(frames, dim=0)
    shown = F.grid_sample(source, grid.flatten(0, 1), padding_mode="zeros", align_corners=False)
    return shown.view(shape)


def moving_digits(images: Tensor, seed: int) -> Tensor:
    """Makes event sequences (T, n, 2, CANVAS, CANVAS), 0 or 1 in float32, of images (n, 8, 8).

    Channel 0 is 1 where the brightness rose by more than CONTRAST since the frame before; channel
    1 is 1 where it fell by more than that. Each image gets a random motion of its own.
    """
    generator = torch.Generator().manual_seed(seed)
    frames = render(images, trajectories(len(images), generator))
    change = frames[:, 1:] - frames[:, :-1]
    events = torch.stack([change > CONTRAST, change < -CONTRAST], dim=2)
    return events.float().transpose(0, 1).contiguous()


class Network(nn.Module):
    """The network maps events (T, N, 2, S, S) to class scores (N, 10).

    It has two spiking ConvLSTM layers, each of which halves the image by max-pooling, and a linear
    readout of the second layer's spikes, counted over time: an average would reach the readout
    with a gradient STEPS times smaller, and learn more slowly. The layers are cells of `library`,
    "snntorch" or "snnlstm". One seed gives both networks bitwise equal weights. The networks
    differ only in how a layer runs over time: snnTorch's cell is called once a time step, in the
    loop that its documentation teaches, and our cell takes the whole sequence.
    """

    def __init__(self, library: str, side: int = CANVAS) -> None:
        super().__init__()
        self.library = library
        cell = importlib.import_module(library).SConv2dLSTM
        atan = importlib.import_module(f"{library}.surrogate").atan(alpha=SLOPE)
        options = {"max_pool": 2, "threshold": THRESHOLD, "spike_grad": atan}
        self.layer1 = cell(2, CHANNELS, 3, **options)
        self.layer2 = cell(CHANNELS, CHANNELS, 3, **options)
        self.readout = nn.Linear(CHANNELS * (side // 4) ** 2, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.sequence(x) if self.library == "snnlstm" else self.loop(x)

    def sequence(self, x: Tensor) -> Tensor:
        """Calls each cell once."""
        self.layer1.reset_mem()
        self.layer2.reset_mem()
        spikes = self.layer2(self.layer1(x)[0])[0]
        return self.readout(spikes.sum(0).flatten(1))

    def loop(self, x: Tensor) -> Tensor:
        """Calls each cell once a time step."""
        syn1, mem1 = self.layer1.reset_mem()
        syn2, mem2 = self.layer2.reset_mem()
        record = []
        for x_t in x.unbind(0):
            spk1, syn1, mem1 = self.layer1(x_t, syn1, mem1)
            spk2, syn2, mem2 = self.layer2(spk1, syn2, mem2)
            record.append(spk2)
        return self.readout(torch.stack(record).sum(0).flatten(1))

    @property
    def path(self) -> str:
        """Names the implementation that ran the layers."""
        if self.library == "snnlstm":
            return f"snnlstm.SConv2dLSTM, one call a sequence: {self.layer1.path}"
        return "snntorch.SConv2dLSTM, one call a time step"


def epoch(images: Tensor, labels: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields batches of events (T, n, 2, S, S) and labels (n,), by a seed of order and motions."""
    moving = moving_digits(images, seed)
    generator = torch.Generator().manual_seed(seed)
    for part in torch.randperm(len(images), generator=generator).split(BATCH):
        yield moving[:, part], labels[part]


@torch.no_grad()
def accuracy(model: nn.Module, test: Tensor, labels: Tensor, device: str) -> float:
    """Returns the share of test digits whose own class gets the highest score."""
    model.eval()
    found = [model(part.to(device)).argmax(1).cpu() for part in test.split(60, dim=1)]
    model.train()
    return float((torch.cat(found) == labels).double().mean())


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Trains and tests a network, shows the progress, and returns the results.

    `args` are the arguments of :func:`main`. There is no bar without a terminal.
    """
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = False  # both networks in full float32
    images, labels, test_images, test_labels = load_split(args.seed)
    test = moving_digits(test_images, 1_000_000 + args.seed)
    epochs = 2 if args.quick else args.epochs
    torch.manual_seed(args.seed)
    model = Network(args.network).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, eps=EPSILON)
    batches = -(-len(images) // BATCH)
    schedule = schedule_of(optimizer, epochs * batches)
    # Ratios of one thread's processor time hold on a busy machine.
    alone = args.device == "cpu" and args.threads == 1
    clock = time.process_time if alone else time.perf_counter
    seconds, losses = [], []
    tests = [(0.0, accuracy(model, test, test_labels, args.device))]
    from tqdm import tqdm  # --help does without it

    with tqdm(desc=args.network, total=epochs * batches, unit="batch", disable=None) as bar:
        for number in range(epochs):
            for batch in epoch(images, labels, 1000 * args.seed + number):
                events, classes = (tensor.to(args.device) for tensor in batch)
                begin = clock()
                # The graph ends with `learn`, so that none is kept while the next graph is built.
                losses.append(learn(model, optimizer, events, classes))
                schedule.step()
                seconds.append(clock() - begin)
                bar.update()
                if len(losses) % EVERY == 0 or len(losses) == epochs * batches:
                    found = accuracy(model, test, test_labels, args.device)
                    tests.append((sum(seconds), found))
            mean = statistics.fmean(losses[-batches:])
            text = f"epoch {number + 1}/{epochs}  loss {mean:.3f}  {sum(seconds):.1f} s"
            tqdm.write(f"{args.network:<8}  {text}")
    return {
        "network": args.network,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "epochs": epochs,
        "losses": losses,
        "accuracy": tests[-1][1],
        "tests": tests,  # pairs of seconds of training and accuracy
        "seconds": sum(seconds),
        "clock": "processor time" if alone else "time",
        "batch_ms": 1000 * statistics.median(seconds),
        "path": model.path,
    }


def schedule_of(optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """Lets the learning rate rise to RATE in the first tenth of all steps, and fall afterwards."""
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=steps, pct_start=0.1, div_factor=5
    )


def learn(
    model: nn.Module, optimizer: torch.optim.Optimizer, events: Tensor, labels: Tensor
) -> float:
    """Makes one training step; returns the loss as a float, which waits for the device."""
    optimizer.zero_grad()
    loss = F.cross_entropy(model(events), labels)
    loss.backward()
    optimizer.step()
    return loss.item()


def positive(text: str) -> int:
    """Reads a whole number of the command line that is at least 1."""
    if text.isdecimal() and int(text) >= 1:
        return int(text)
    raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, got {text!r}")


def add_common(p: argparse.ArgumentParser) -> None:
    """Adds the arguments that the demo and one training share."""
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--epochs", type=positive, default=4, help="default: %(default)s")
    p.add_argument("--seed", type=int, default=0, help="of weights, motions and order")
    p.add_argument("--threads", type=positive, default=1, help="default: %(default)s")
    p.add_argument("--quick", action="store_true", help="2 epochs")


def parse(p: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line; ends the program with status 2 if there is no such device."""
    args = p.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("argument --device: cuda was asked for, but torch sees no CUDA device")
    if not 0 <= args.seed < 2**32:  # scikit-learn's bounds
        p.error(f"argument --seed: must be a whole number from 0 to 2**32 - 1, got {args.seed}")
    return args


def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.demo.training", description=__doc__)
    p.add_argument("--network", choices=("snnlstm", "snntorch"), default="snnlstm")
    add_common(p)
    result = run(parse(p, arguments))
    print(f"test accuracy {result['accuracy']:.1%}; {result['path']}")


if __name__ == "__main__":
    main()
