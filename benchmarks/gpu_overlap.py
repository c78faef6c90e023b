"""Compares launches that overlap with launches that do not, and equal calls, bit for bit.

The kernels add in a fixed order, so equal calls have equal results. On GPUs from 9.0 on a step's
kernel may start while the step before still runs (programmatic dependent launch): without a wait it
would read old states. So one process with SNNLSTM_PDL=0 and one with 1 run layers whose steps have
several waves of blocks, fifty times forward and backward, with lengths and step by step, too, and
all results must have the same hash.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

import snnlstm
from benchmarks.cases import Case
from benchmarks.gpu_smoke import precisions
from benchmarks.providers import OPERANDS, Setting

# The wide one has a reset, which reads mem, and a pool.
LAYERS = (
    Case("narrow", 64, 128, 2, 16, 32, 32, threshold=0.02),
    Case("wide", 64, 48, 32, 64, 32, 32, threshold=0.02, max_pool=2, reset="zero"),
)


def hashed(tensor: Tensor) -> int:
    """Returns a number that depends on each bit of a tensor, and on its place."""
    bits = tensor.detach().flatten().view(torch.int16).split(1 << 24)
    places = torch.arange(1, len(bits[0]) + 1, device=tensor.device)
    return hash(tuple(int((piece * places[: len(piece)]).sum()) for piece in bits))


WAYS = ("sequence", "lengths", "steps")


def hashes(device: str, layers: Sequence[Case] = LAYERS, repeats: int = 50) -> Iterator[str]:
    """Yields a line for each layer, type and way to call it: the hashes of its results.

    One hash is right.
    """
    for case, dtype, way in itertools.product(layers, precisions(device), WAYS):
        if dtype in ("float64", *OPERANDS):
            continue
        setting, found = Setting(device, dtype), set()
        setting.apply_precision()
        torch.manual_seed(0)
        cell = case.make(snnlstm.SConv2dLSTM).to(setting.torch_device, setting.torch_dtype)
        size = case.steps, case.batch, case.cin, case.height, case.width
        x = torch.rand(size, device=setting.torch_device).lt(0.1).to(setting.torch_dtype)
        inputs = [x.requires_grad_(), *cell.parameters()]
        lengths = torch.arange(1, case.batch + 1, device=x.device) % (case.steps + 1)
        for _ in range(repeats):
            cell.reset_mem()
            with snnlstm.algorithm("fused"):
                if way == "steps":
                    out = list(itertools.chain.from_iterable(map(cell, x)))
                else:
                    out = cell(x, lengths=lengths if way == "lengths" else None)
                grads = torch.autograd.grad(sum(result.square().sum() for result in out), inputs)
            found.add(hash(tuple(map(hashed, (*out, *grads)))))
        text = " or ".join(f"{number:x}" for number in sorted(found))
        yield f"{case.name}, {dtype}, {way}: {text}"


def main() -> int:
    """Runs the command; returns the exit status."""
    if sys.argv[1:]:
        print(*hashes("cuda"), sep="\n")
        return 0
    command, found = [sys.executable, "-m", "benchmarks.gpu_overlap", "alone"], []
    for overlap in ("0", "1"):
        environment = os.environ | {"SNNLSTM_PDL": overlap}
        found.append(subprocess.check_output(command, env=environment, text=True).splitlines())
    for apart, overlapping in zip(*found, strict=True):
        right = apart == overlapping and " or " not in apart
        print(apart if right else f"WRONG  {apart}; overlapping {overlapping}")
    return int(found[0] != found[1] or " or " in str(found))


if __name__ == "__main__":
    sys.exit(main())
