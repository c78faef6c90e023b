"""Trains in several processes, on one machine or many, with DistributedDataParallel.

    torchrun --nproc-per-node 2 examples/distributed.py

Each process trains on its part of every batch, on its own GPU (nccl) if there are GPUs, otherwise
on the CPU (gloo). DDP averages gradients, but not the cells' states. Our loop is compiled.
"""

import argparse
import os
import time

import snntorch
import torch
import torch.distributed as dist
from snntorch import surrogate
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import snnlstm


class Network(nn.Module):
    """Maps events (N, T, 2, 16, 16) to class scores (N, 4), starting from zero states."""

    def __init__(self, library):
        super().__init__()
        torch.manual_seed(0)  # the same weights for both libraries
        grad = surrogate.atan(alpha=20.0)
        self.cell = library.SConv2dLSTM(2, 16, 3, threshold=0.05, max_pool=2, spike_grad=grad)
        self.readout = nn.Linear(16 * 8 * 8, 4)

    def forward(self, x):
        syn, mem = self.cell.reset_mem()
        spikes = 0
        for step in x.unbind(1):
            spk, syn, mem = self.cell(step, syn, mem)
            spikes = spikes + spk
        return self.readout(spikes.flatten(1))


def events(count):
    """Makes noisy events of four patterns with labels, the same in every process."""
    torch.manual_seed(1)
    patterns, labels = torch.rand(4, 1, 2, 16, 16).lt(0.1), torch.randint(4, (count,))
    noise = torch.rand(count, 10, 2, 16, 16)
    return TensorDataset(torch.where(patterns[labels], noise < 0.3, noise < 0.1).float(), labels)


def train(net, optimizer, x, labels):
    """Takes a training step, in which DDP averages the gradients of all processes."""
    scores = net(x)
    optimizer.zero_grad()
    nn.functional.cross_entropy(scores, labels).backward()
    optimizer.step()
    return (scores.argmax(1) == labels).float().mean()


def main(arguments=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--samples", type=int, default=640, help="for all ranks (default: %(default)s)")
    data, gpu = events(p.parse_args(arguments).samples), torch.cuda.is_available()
    if "RANK" not in os.environ:
        raise SystemExit(f"Start this script in several processes:\n{__doc__.splitlines()[2]}")
    dist.init_process_group("nccl" if gpu else "gloo")
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if gpu else "cpu")
    torch.set_num_threads(1)  # ratios of one thread's processor time hold on a busy machine
    ours = torch.compile(Network(snnlstm), backend="snnlstm")
    nets = [DistributedDataParallel(net.to(device)) for net in (Network(snntorch), ours)]
    sides = [(net, torch.optim.Adam(net.parameters(), lr=4e-3, eps=1e-3)) for net in nets]
    batches = DataLoader(data, 8, sampler=DistributedSampler(data))
    found, seconds, every = torch.zeros(2, device=device), [0.0, 0.0], max(1, len(batches) // 10)
    for number, batch in enumerate(batches, 1):
        x, labels = (tensor.to(device) for tensor in batch)
        for k, side in enumerate(sides):
            seconds[k] -= time.process_time()
            found[k] += train(*side, x, labels)
            seconds[k] += time.process_time()
        if number % every == 0:
            dist.all_reduce(found)
            right, gain = found / every / dist.get_world_size(), seconds[0] / seconds[1]
            if dist.get_rank() == 0:
                both = "snnTorch {:.0%} correct, snnlstm {:.0%} correct".format(*right.tolist())
                print(f"batch {number}/{len(batches)}: {both}", flush=True)
            found, seconds = torch.zeros_like(found), [0.0, 0.0]
    if dist.get_rank() == 0:
        print(f"In the end snnlstm trained {gain:.1f} times as fast, in processor time.")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
