"""Tells which way a bar moves past an event camera, with a convolution, Leaky and a cell.

python examples/event_camera.py    # --nmnist DIR: digits of N-MNIST, after `pip install tonic`
"""

import argparse
import importlib
import time

import numpy as np
import snntorch
import torch
from snntorch import surrogate
from torch import nn

import snnlstm

SIDE, WINDOW = 34, 10_000  # pixels of N-MNIST's sensor, microseconds per frame


def moving_bar(random):
    """Makes a recording (50 to 120 ms) like tonic's, and its label: right, down, left or up."""
    label, t = random.integers(4), np.arange(0, WINDOW * random.integers(5, 13), 60)
    across, p = random.integers(SIDE, size=len(t)), random.integers(2, size=len(t))
    ahead = t // 4_000 + 3 * p  # ON events lead, OFF events follow
    along = (random.integers(SIDE) + (ahead if label < 2 else -ahead)) % SIDE
    x, y = (across, along) if label % 2 else (along, across)
    return np.rec.fromarrays([x, y, t, p], names="x,y,t,p"), label  # t in microseconds


def collate(recordings):
    """Makes frames (T, N, 2, SIDE, SIDE) like tonic's ToFrame, with lengths and labels."""
    frames, labels = [], torch.tensor([label for _, label in recordings])
    for events, _ in recordings:
        step = (events["t"] - events["t"][0]) // WINDOW
        frames.append(torch.zeros(step[-1] + 1, 2, SIDE, SIDE))
        frames[-1].numpy()[step, events["p"].astype(int), events["y"], events["x"]] = 1
    return nn.utils.rnn.pad_sequence(frames), torch.tensor([*map(len, frames)]), labels


def network(library):
    torch.manual_seed(0)  # the same weights for both libraries
    options = {"spike_grad": surrogate.atan(alpha=20.0), "init_hidden": True}
    return nn.Sequential(
        nn.Conv2d(2, 16, 3, stride=2, padding=1),
        library.Leaky(beta=0.8, threshold=0.3, **options),
        library.SConv2dLSTM(16, 16, 3, threshold=0.05, max_pool=2, **options),
        nn.Flatten(),
        nn.Linear(16 * (SIDE // 4) ** 2, 10),
    )


def train(net, optimizer, frames, lengths, labels):
    """Trains on the sum over each recording's own steps; returns which labels were predicted."""
    snnlstm.reset(net)
    if isinstance(net[1], snnlstm.Leaky):
        out = snnlstm.unroll(frames, *net, lengths=lengths)
    else:
        out = torch.stack([net(frame) for frame in frames])  # (T, N, 10)
    own = torch.arange(len(out))[:, None, None] < lengths[:, None]
    scores = (out * own).sum(0)
    optimizer.zero_grad()
    nn.functional.cross_entropy(scores, labels).backward()
    optimizer.step()
    return (scores.argmax(1) == labels).tolist()


def main(arguments=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--nmnist", metavar="DIR", help="train on N-MNIST, which tonic stores in DIR")
    p.add_argument("--recordings", type=int, default=640, help="bars (default: %(default)s)")
    args, random = p.parse_args(arguments), np.random.default_rng(0)
    torch.set_num_threads(1)  # ratios of one thread's processor time hold on a busy machine
    data = [moving_bar(random) for _ in range(args.recordings)]
    if args.nmnist:
        data = importlib.import_module("tonic").datasets.NMNIST(args.nmnist)
    batches = torch.utils.data.DataLoader(data, 16, shuffle=True, collate_fn=collate)
    nets = [network(library) for library in (snntorch, snnlstm)]
    sides = [(net, torch.optim.Adam(net.parameters(), lr=4e-3, eps=1e-3)) for net in nets]
    found, seconds = ([], []), [0.0, 0.0]
    for number, batch in enumerate(batches, 1):
        for k, side in enumerate(sides):
            seconds[k] -= time.process_time()
            found[k].extend(train(*side, *batch))
            seconds[k] += time.process_time()
        if number % max(1, len(batches) // 10) == 0:
            theirs, ours = (f"{sum(f) / len(f):.0%} correct" for f in found)
            print(f"batch {number}/{len(batches)}: snnTorch {theirs}, snnlstm {ours}", flush=True)
            gain, found, seconds = seconds[0] / seconds[1], ([], []), [0.0, 0.0]
    print(f"In the end snnlstm trained {gain:.1f} times as fast, in processor time.")


if __name__ == "__main__":
    main()
