"""Predicts a video of two bouncing balls with a ConvLSTM, and draws the predicted frames.

    python examples/video.py    # writes out/video.png: a film above its prediction

The network learns to predict the next frame. Then it continues a film from its own predictions.
"""

import argparse
import time
from pathlib import Path

import torch
from matplotlib.image import imsave
from torch import nn

import snnlstm

SIDE, STEPS = 24, 10


def films(count, steps=2 * STEPS):
    """Makes films (count, steps, 1, SIDE, SIDE), in 0..1, of balls with a radius of 3 pixels."""
    room, each = SIDE - 6, (count, 2, 2, 1)  # film, ball and axis
    start, speed = torch.randint(2 * room, each), 2 * torch.randint(2, each) - 1
    place = (start + speed * torch.arange(steps)).remainder(2 * room)
    place = 3 + room - (place - room).abs()  # balls turn at the walls
    y, x = (place[..., None] - torch.arange(SIDE)).square().unbind(2)
    return (3.5 - (y[..., None] + x[..., None, :]).sqrt()).clamp(0, 1).amax(1)[:, :, None]


def plain(lstm, x):
    """Computes a ConvLSTM of x (N, T, C, H, W) in plain PyTorch; returns the last layer's h."""
    for cell in lstm.cell_list:
        h, c = cell.init_hidden(len(x), (SIDE, SIDE))
        steps = []
        for frame in x.unbind(1):
            i, f, o, g = cell.conv(torch.cat([frame, h], 1)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            steps.append(h)
        x = torch.stack(steps, 1)
    return x


def train(lstm, out, optimizer, film, loop=False):
    """Takes a training step on films (N, T, 1, H, W), and returns its processor time."""
    begin = time.process_time()
    hidden = plain(lstm, film[:, :-1]) if loop else lstm(film[:, :-1])[0][-1]
    logits, frames = out(hidden.flatten(0, 1)), film[:, 1:].flatten(0, 1)
    loss = nn.functional.binary_cross_entropy_with_logits(logits, frames)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return time.process_time() - begin


@torch.no_grad()
def continued(lstm, out, seen):
    """Returns the next STEPS frames, each predicted from the frame before."""
    frames, states = [], None
    while len(frames) < STEPS:
        hidden, states = lstm(frames[-1].round() if frames else seen, states)
        frames.append(out(hidden[-1][:, -1]).sigmoid()[:, None])
    return torch.cat(frames, 1)


def main(arguments=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--batches", type=int, default=800)
    torch.set_num_threads(1)  # ratios of one thread's processor time hold on a busy machine
    torch.manual_seed(0)
    lstm = snnlstm.ConvLSTM(1, [16, 16], 3, 2, batch_first=True, return_all_layers=True)
    net = lstm, nn.Conv2d(16, 1, 1)
    optimizer = torch.optim.Adam(nn.ModuleList(net).parameters(), lr=1e-2)
    for _ in range(p.parse_args(arguments).batches):
        train(*net, optimizer, films(4))
    times = [[train(*net, optimizer, films(4), loop) for loop in (True, False)] for _ in range(7)]
    theirs, ours = torch.tensor(times).median(0).values
    seen, future = films(4).split(STEPS, 1)
    made = continued(*net, seen)
    errors = [(frames - future).square().mean() for frames in (made, seen[:, -1:])]
    print("mean squared error {:.3f}; repeating the last frame: {:.3f}".format(*errors))
    print(f"the ConvLSTM trained {theirs / ours:.1f} times as fast as a loop, in processor time")
    Path("out").mkdir(exist_ok=True)
    rows = torch.cat([future[0, :, 0], made[0, :, 0]], 1)
    imsave("out/video.png", rows.transpose(0, 1).flatten(1), cmap="gray", vmin=0, vmax=1)


if __name__ == "__main__":
    main()
