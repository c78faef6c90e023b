"""Says whether the GPU and its driver run what was built; `make gpu` goes on only if they do.

    python -m benchmarks.gpu_check [--device DEVICE]

On an emulated GPU it builds the emulator instead, in about a minute.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch

import snnlstm
from benchmarks import devices
from snnlstm.__main__ import gpus
from snnlstm.native.cuda_check import trouble


def main() -> str | None:
    """Runs the command; returns what is wrong, which ends the process with status 1."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--device", choices=devices.DEVICES, default="cuda")
    if parser.parse_args().device != "cuda":
        devices.emulator()
        return None
    print(*gpus(), flush=True)
    os.system("nvidia-smi -q -d CLOCK,POWER")
    wrong = trouble(0)
    if wrong is None:
        print(snnlstm.Leaky(0.5).cuda().sequence(torch.ones(8, 4).cuda(), False))
    return wrong


if __name__ == "__main__":
    sys.exit(main())
