"""Tells the left hand from the right one by EEG rhythms, in trials of different lengths.

    python examples/eeg.py

Moving a hand weakens the 10 Hz rhythm over the opposite half of the head. This script makes such
trials of 1 to 4 s. A time step is an image of electrodes by samples, a quarter of a second long.
Each batch is padded to its longest trial. With `lengths` the kernels skip the padding, which a loop
has to compute.
"""

import argparse
import time

import snntorch
import torch
from snntorch import surrogate
from torch import nn

import snnlstm

ELECTRODES, RATE, SAMPLES = 22, 128, 32  # rate in Hz, samples per step


def trial(label):
    """Makes a trial (T, 1, ELECTRODES, SAMPLES); the last electrodes are on the right."""
    length = int(torch.randint(4, 17, ()))
    t = torch.arange(length * SAMPLES) / RATE
    rhythm = torch.sin(2 * torch.pi * (10 * t + torch.rand(1)))
    weak = (torch.arange(ELECTRODES) < ELECTRODES // 2) == bool(label)
    signal = torch.where(weak, 0.3, 1.0)[:, None] * rhythm + 0.5 * torch.randn(ELECTRODES, len(t))
    return signal.view(ELECTRODES, length, 1, SAMPLES).permute(1, 2, 0, 3)


def collate(labels):
    """Makes a batch (T, N, 1, ELECTRODES, SAMPLES), with lengths and labels."""
    trials = [trial(label) for label in labels]
    lengths = torch.tensor([*map(len, trials)])
    return nn.utils.rnn.pad_sequence(trials), lengths, torch.tensor(labels)


def network(library):
    torch.manual_seed(0)  # the same weights for both libraries
    options = {"spike_grad": surrogate.atan(alpha=20.0), "init_hidden": True}
    return nn.Sequential(
        library.SConv2dLSTM(1, 8, 3, threshold=0.05, max_pool=2, **options),
        library.SConv2dLSTM(8, 16, 3, threshold=0.05, max_pool=2, **options),
        nn.Flatten(),
        nn.Linear(16 * (ELECTRODES // 4) * (SAMPLES // 4), 2),
    )


def train(net, optimizer, x, lengths, labels):
    """Trains on the sum over each trial's own steps; returns which labels were predicted."""
    snnlstm.reset(net)
    if isinstance(net[0], snnlstm.SConv2dLSTM):
        out = snnlstm.unroll(x, *net, lengths=lengths)
    else:
        out = torch.stack([net(step) for step in x])  # (T, N, 2)
    own = torch.arange(len(out))[:, None, None] < lengths[:, None]
    scores = (out * own).sum(0)
    optimizer.zero_grad()
    nn.functional.cross_entropy(scores, labels).backward()
    optimizer.step()
    return (scores.argmax(1) == labels).tolist()


def main(arguments=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--trials", type=int, default=320, help="for training (default: %(default)s)")
    batches = torch.randint(2, (p.parse_args(arguments).trials,)).split(16)
    torch.set_num_threads(1)  # ratios of one thread's processor time hold on a busy machine
    nets = [network(library) for library in (snntorch, snnlstm)]
    sides = [(net, torch.optim.Adam(net.parameters(), lr=4e-3, eps=1e-3)) for net in nets]
    found, seconds = ([], []), [0.0, 0.0]
    for number, labels in enumerate(batches, 1):
        batch = collate(labels.tolist())
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
