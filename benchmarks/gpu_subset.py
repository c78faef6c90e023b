"""A few small cells, forward and backward, for compute-sanitizer, under which everything is slow.

compute-sanitizer --tool racecheck python -m benchmarks.gpu_subset
"""

from __future__ import annotations

import sys

import torch

import snnlstm

OPTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "max_pool, subtract": {"max_pool": 2, "reset_mechanism": "subtract"},
    "avg_pool, zero": {"avg_pool": 2, "reset_mechanism": "zero"},
    "stride, dilation": {"stride": 2, "dilation": 2},
    "inhibition, learned threshold": {"inhibition": True, "learn_threshold": True},
}


def run(device: str) -> list[str]:
    """Run every cell; returns what ran each. RuntimeError if that was not the kernels."""
    precisions = ["float32", "bfloat16", "float16", "float64"] if device == "cuda" else ["float32"]
    algorithms = ("direct", "pointwise") if device == "cuda" else ("direct",)
    ran = []
    for precision in [*precisions, *(["tf32"] if device == "cuda" else [])]:
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        dtype = torch.float32 if precision == "tf32" else getattr(torch, precision)
        for algorithm in algorithms:
            for name, options in OPTIONS.items():
                with snnlstm.algorithm(algorithm):
                    path = train(device, dtype, options)
                if not path.startswith(device):
                    raise RuntimeError(f"{precision}, {name}: {path} ran, not {device}'s kernels")
                ran.append(f"{precision}, {name}: {path}")
    return ran


def train(device: str, dtype: torch.dtype, options: dict[str, object]) -> str:
    """One step of training; no size is a multiple of a tile."""
    on = {"device": device, "dtype": dtype}
    cell = snnlstm.SConv2dLSTM(6, 21, (3, 5), threshold=0.05, **options, **on)  # type: ignore[arg-type]
    x = torch.rand(2, 3, 6, 13, 19, **on).gt(0.7).to(dtype).requires_grad_()  # type: ignore[call-overload]
    sum(out.float().sum() for out in cell(x)).backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return str(cell.path)


if __name__ == "__main__":
    print(*run(sys.argv[1] if sys.argv[1:] else "cuda"), sep="\n")
