"""Moving digits as an event camera would see them, made from real handwritten digits.

The digits are the 1797 images of 8x8 pixels that scikit-learn carries (UCI "Optical Recognition of
Handwritten Digits", https://archive.ics.uci.edu/dataset/80). Nothing is downloaded. Each digit is
enlarged and circles over a dark canvas; an event camera reports where the brightness changed from
one frame to the next: ON events where it rose, OFF events where it fell. An edge that moves along
itself sends no events; going round once shows every edge (for the same reason the camera of
N-MNIST moved in closed triangles: Orchard et al., Front. Neurosci. 9:437, 2015). Everything random
comes from one seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
"""Digits that are rendered at a time: bounds the memory, changes nothing else."""


@dataclass(frozen=True)
class Motion:
    """How the digits move and how the camera sees them.

    canvas: side of the square canvas, in pixels. digit: side of the enlarged digit, in pixels.
    steps: event frames T; the camera looks at T + 1 brightness frames. radius: (smallest, largest)
    of the circle, in pixels; where on the canvas the circle lies, where on it the digit starts, and
    which way round it goes are uniform. turns: how often it goes round in the T frames. contrast:
    the change of brightness (of a range 0..1) above which a pixel sends an event.
    """

    canvas: int = 24
    digit: int = 16
    steps: int = 8
    radius: tuple[float, float] = (2.0, 3.5)
    turns: float = 1.0
    contrast: float = 0.1


def load_split(seed: int, test_share: float = 0.2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The digits, split at random with every class in the same proportion on both sides.

    Returns train images (n, 8, 8) float32 in 0..1, train labels (n,) int64, test images, test
    labels. The same seed gives the same split.
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
    """Top-left corners (count, T + 1, 2) as (row, column), float32, inside the canvas always."""
    smallest, largest = motion.radius
    room = motion.canvas - motion.digit
    radius = smallest + (largest - smallest) * torch.rand(count, 1, 1, generator=generator)
    centre = radius + (room - 2 * radius) * torch.rand(count, 1, 2, generator=generator)
    start = 2 * torch.pi * torch.rand(count, 1, generator=generator)
    sense = 2.0 * torch.randint(2, (count, 1), generator=generator) - 1
    angle = start + sense * torch.linspace(0, 2 * torch.pi * motion.turns, motion.steps + 1)
    return centre + radius * torch.stack([angle.sin(), angle.cos()], dim=-1)


def render(images: Tensor, corners: Tensor, motion: Motion) -> Tensor:
    """Brightness frames (n, T + 1, canvas, canvas) in 0..1 of images (n, 8, 8) at corners.

    Positions are real numbers: the digit is resampled bilinearly, so that it glides and does not
    jump from pixel to pixel.
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
    """Event sequences (T, n, 2, canvas, canvas), 0 or 1 in float32, of images (n, 8, 8).

    Channel 0 is 1 where the brightness rose by more than `contrast` since the frame before, channel
    1 where it fell by more than that. Each image gets a motion of its own, drawn from `seed` alone.
    out: a tensor of that shape to write into.
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
