"""Makes events of moving handwritten digits, as an event camera would see them.

The digits are the 1797 images of 8x8 pixels that scikit-learn carries (UCI "Optical Recognition of
Handwritten Digits", https://archive.ics.uci.edu/dataset/80), so nothing is downloaded. Each digit
is enlarged and circles over a dark canvas. The camera sends an ON event where the brightness rose
from one frame to the next, and an OFF event where it fell. An edge that moves along itself sends no
events, but a full circle shows every edge. (The camera of N-MNIST moved in closed triangles for
this reason: Orchard et al., Front. Neurosci. 9:437, 2015.) One seed decides all random numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
"""So many digits are rendered at a time, which bounds the memory and changes nothing else."""


@dataclass(frozen=True)
class Motion:
    """Says how the digits move and how the camera sees them.

    canvas: the side of the square canvas, in pixels. digit: the side of the enlarged digit, in
    pixels. steps: the number T of event frames, of T + 1 brightness frames. radius: (smallest,
    largest) radius of a circle, in pixels. turns: how often a digit goes round in the T frames.
    contrast: the change of brightness (of a range 0..1) above which a pixel sends an event.
    The circle's place, the digit's start on the circle and its direction are uniformly random.
    """

    canvas: int = 24
    digit: int = 16
    steps: int = 8
    radius: tuple[float, float] = (2.0, 3.5)
    turns: float = 1.0
    contrast: float = 0.1


def load_split(seed: int, test_share: float = 0.2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
        range(len(labels)), test_size=test_share, random_state=seed, stratify=digits.target
    )
    return images[train], labels[train], images[test], labels[test]


def trajectories(count: int, motion: Motion, generator: torch.Generator) -> Tensor:
    """Draws top-left corners (count, T + 1, 2) as (row, column), always inside the canvas."""
    smallest, largest = motion.radius
    room = motion.canvas - motion.digit
    radius = smallest + (largest - smallest) * torch.rand(count, 1, 1, generator=generator)
    centre = radius + (room - 2 * radius) * torch.rand(count, 1, 2, generator=generator)
    start = 2 * torch.pi * torch.rand(count, 1, generator=generator)
    sense = 2.0 * torch.randint(2, (count, 1), generator=generator) - 1
    angle = start + sense * torch.linspace(0, 2 * torch.pi * motion.turns, motion.steps + 1)
    return centre + radius * torch.stack([angle.sin(), angle.cos()], dim=-1)


def render(images: Tensor, corners: Tensor, motion: Motion) -> Tensor:
    """Renders brightness frames (n, T + 1, canvas, canvas) in 0..1 of images (n, 8, 8) at corners.

    Corners are real numbers: digits are resampled bilinearly, so that they glide and do not jump
    from pixel to pixel.
    """
    n, frames, _ = corners.shape
    size, canvas = motion.digit, motion.canvas
    large = F.interpolate(images.unsqueeze(1), (size, size), mode="bilinear", align_corners=False)
    # A pixel p of the canvas shows the digit at p - corner; grid_sample wants (x, y) in -1..1.
    pixel = torch.arange(canvas, dtype=torch.float32)
    local = pixel.view(1, 1, 1, -1) - corners.unsqueeze(-1)  # (n, T + 1, 2, canvas)
    rows, columns = ((2 * local + 1) / size - 1).unbind(2)
    shape = (n, frames, canvas, canvas)
    grid = torch.stack([columns.unsqueeze(2).expand(shape), rows.unsqueeze(3).expand(shape)], -1)
    source = large.repeat_interleave(frames, dim=0)
    shown = F.grid_sample(source, grid.flatten(0, 1), padding_mode="zeros", align_corners=False)
    return shown.view(shape)


def moving_digits(images: Tensor, motion: Motion, seed: int, out: Tensor | None = None) -> Tensor:
    """Makes event sequences (T, n, 2, canvas, canvas), 0 or 1 in float32, of images (n, 8, 8).

    Channel 0 is 1 where the brightness rose by more than `contrast` since the frame before; channel
    1 is 1 where it fell by more than that. Each image gets a random motion of its own. The events
    are written to `out`, if it is given.
    """
    generator = torch.Generator().manual_seed(seed)
    corners = trajectories(len(images), motion, generator)
    if out is None:
        out = torch.empty(motion.steps, len(images), 2, motion.canvas, motion.canvas)
    for part in torch.arange(len(images)).split(CHUNK):
        frames = render(images[part], corners[part], motion)
        change = frames[:, 1:] - frames[:, :-1]
        events = torch.stack([change > motion.contrast, change < -motion.contrast], dim=2)
        out[:, part] = events.to(out.dtype).transpose(0, 1)
    return out
