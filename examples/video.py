"""Predicts a film of two bouncing balls with a ConvLSTM, and draws the predicted frames.

    pip install matplotlib    # which draws the picture
    python examples/video.py  # for two minutes on one core

The network learns to predict the next frame. Then it continues a film from its own predictions.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import nn

import snnlstm

SIDE, STEPS = 20, 8


def films(count, steps=2 * STEPS):
    """Makes films (count, steps, 1, SIDE, SIDE), of 0 and 1, of balls with a radius of 2 pixels."""
    room, each = SIDE - 5, (count, 2, 2, 1)  # film, ball and axis
    start, speed = torch.randint(2 * room, each), 2 * torch.randint(2, each) - 1
    place = (start + speed * torch.arange(steps)) % (2 * room) - room
    place = 2 + room - place.abs()  # balls turn at the walls
    y, x = (place[..., None] - torch.arange(SIDE)).square().unbind(2)
    return (y[..., None] + x[..., None, :] < 6).any(1)[:, :, None].float()


def plain(lstm, x):
    """Computes a ConvLSTM of x (N, T, C, H, W) in plain PyTorch; returns each layer's h."""
    layers = []
    for cell in lstm.cell_list:
        (h, c), steps = cell.init_hidden(len(x), (SIDE, SIDE)), []
        for frame in x.unbind(1):
            i, f, o, g = cell.conv(torch.cat([frame, h], 1)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            steps.append(h := o.sigmoid() * c.tanh())
        layers.append(x := torch.stack(steps, 1))
    return layers


class Predictor(nn.Module):
    """Maps films (N, T, 1, SIDE, SIDE), and where pixels lie, to logits of each next frame."""

    def __init__(self):
        super().__init__()
        self.lstm = snnlstm.ConvLSTM(3, [16, 16], 3, 2, batch_first=True, return_all_layers=True)
        self.change = nn.Conv2d(32, 1, 3, padding=1)
        line = torch.linspace(-1, 1, SIDE)
        self.register_buffer("place", torch.stack(torch.meshgrid(line, line, indexing="ij")))

    def forward(self, film, states=None, loop=False):
        now = 2 * film - 1
        x = torch.cat([now, self.place.expand(*film.shape[:2], 2, SIDE, SIDE)], 2)
        hidden, states = (plain(self.lstm, x), None) if loop else self.lstm(x, states)
        change = self.change(torch.cat(hidden, 2).flatten(0, 1)).unflatten(0, film.shape[:2])
        return 4 * now + change, states


def train(net, optimizer, film, loop=False):
    """Takes a training step on films, and returns its loss and its processor time."""
    begin = time.process_time()
    logits = net(film[:, :-1], loop=loop)[0][:, 1:]  # one frame shows no direction
    loss = nn.functional.binary_cross_entropy_with_logits(logits, film[:, 2:])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item(), time.process_time() - begin


@torch.no_grad()
def continued(net, seen):
    """Returns the next STEPS frames, each predicted from the frame before."""
    frames, states = [], None
    while len(frames) < STEPS:
        logits, states = net(frames[-1] if frames else seen, states)
        frames.append(logits[:, -1:].gt(0).float())
    return torch.cat(frames, 1)


def draw(figure, rows):
    """Draws films (STEPS, 1, SIDE, SIDE) in labelled rows; returns the path of the picture."""
    for panels, (name, film) in zip(figure.subplots(3, STEPS), rows.items(), strict=True):
        panels[0].set_ylabel(name, fontsize="x-large")
        for step, panel in enumerate(panels):
            panel.imshow(film[step, 0].numpy(), cmap="gray", vmin=0, vmax=1)
            panel.set(xticks=[], yticks=[], title=step + 1 + STEPS * (name != "seen"))
    Path("out").mkdir(exist_ok=True)
    figure.savefig("out/video.png")
    return Path("out/video.png").resolve()


def main(arguments=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--batches", type=int, default=1500, help="of 6 films (default: %(default)s)")
    batches = p.parse_args(arguments).batches
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise SystemExit("The picture needs Matplotlib: pip install matplotlib") from None
    torch.set_num_threads(1)  # ratios of one thread's processor time hold on a busy machine
    torch.manual_seed(0)
    net = Predictor()
    optimizer = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-2, batches, pct_start=0.051)
    for number in range(1, batches + 1):
        loss, _ = train(net, optimizer, films(6))
        schedule.step()
        if number % max(1, batches // 10) == 0:
            print(f"batch {number}/{batches}: loss {loss:.4f}", flush=True)
    times = [[train(net, optimizer, films(6), loop)[1] for loop in (True, False)] for _ in range(7)]
    theirs, ours = torch.tensor(times).median(0).values
    seen, true = films(32).split(STEPS, 1)
    made = continued(net, seen)
    print(f"wrong pixels per pixel of a ball: {(made - true).abs().sum() / true.sum():.0%}")
    print(f"In the end it trained {theirs / ours:.1f} times as fast as a loop, in processor time.")
    rows = {"seen": seen[0], "true": true[0], "predicted": made[0]}
    print("wrote", draw(Figure(figsize=(1.25 * STEPS, 4), layout="constrained"), rows))


if __name__ == "__main__":
    main()
