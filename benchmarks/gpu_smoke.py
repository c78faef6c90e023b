"""Small cells through every kernel, forward and backward, compared with plain torch in float64.

    python -m benchmarks.gpu_smoke

`make gpu` runs it first, and again under compute-sanitizer.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

import snnlstm
from snnlstm.reference import sconv2dlstm

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "max_pool, subtract": {"max_pool": 2, "reset_mechanism": "subtract"},
    "avg_pool, zero": {"avg_pool": 2, "reset_mechanism": "zero"},
    "stride, dilation": {"stride": 2, "dilation": 2},
    "inhibition": {"inhibition": True},
    "quantised": {"state_quant": snnlstm.quant.state_quant(6)},
    # The spike is a kernel of its own where a window is larger than a tile.
    "one window": {"avg_pool": "image"},
}
SIZES = (2, 3, 6, 21, 13, 19)
"""T, N, Cin, C, H, W: no size is a multiple of a tile."""

# Options without decisions that a rounding error could turn: with coarse products only these.
SMOOTH = ("plain", "stride, dilation", "one window")

# The error of mem that each may add, and that of a gradient, in its norm. Where a rounding error
# can turn a decision (a maximum, a reset, a level) into another, a few neurons may differ by more.
TOLERANCE = {
    "float64": (1e-10, 1e-8),
    "float32": (3e-5, 1e-3),
    "tf32": (5e-3, 5e-2),
    "float16": (2e-2, 1e-1),
    "bfloat16": (1e-1, 3e-1),
}
DECIDING = 0.02
EXACT = ("float64", "float32")


def run(
    device: str,
    sizes: tuple[int, ...] = SIZES,
    algorithms: Sequence[str] = snnlstm.settings.ALGORITHMS[:-1],
    names: Sequence[str] = tuple(OPTIONS),
) -> list[str]:
    """Run and compare every cell; returns a line for each.

    Raises
    ------
    RuntimeError
        If something else than the kernels ran, or computed something else.
    """
    precisions = list(TOLERANCE) if device == "cuda" else EXACT
    done = {}
    for precision in precisions:
        for algorithm in algorithms:
            for name in names if precision in EXACT else SMOOTH:
                options = {
                    option: sizes[-2:] if value == "image" else value
                    for option, value in OPTIONS[name].items()
                }
                cell, x = _layer(device, precision, options, sizes)
                with snnlstm.algorithm(algorithm):
                    spk, _, mem = cell(x)
                    what = f"{precision}, {name}: {cell.path.name}"
                    if not cell.path.name.startswith(device):
                        raise RuntimeError(f"{precision}, {name}: {cell.path} ran, not the kernels")
                    apart = _apart(cell, x, spk, mem, options)
                allowed = TOLERANCE[precision]
                if not (apart[0] <= allowed[0] and apart[1] <= allowed[1]):
                    raise RuntimeError(f"{what}: mem differs by {apart[0]:.1e}, the gradients by "
                                       f"{apart[1]:.1e}; allowed are {allowed}")  # fmt: skip
                done[what] = f"{what}: mem {apart[0]:.1e}, gradients {apart[1]:.1e}"
    return list(done.values())


def _layer(
    device: str, precision: str, options: dict[str, Any], sizes: tuple[int, ...]
) -> tuple[snnlstm.SConv2dLSTM, torch.Tensor]:
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    dtype = torch.float32 if precision == "tf32" else getattr(torch, precision)
    t, n, cin, c, h, w = sizes
    torch.manual_seed(0)
    cell = snnlstm.SConv2dLSTM(cin, c, (3, 5), threshold=0.05, **options)
    x = torch.rand(t, n, cin, h, w).gt(0.7)
    return cell.to(device, dtype), x.to(device, dtype).requires_grad_()


def _apart(
    cell: snnlstm.SConv2dLSTM,
    x: torch.Tensor,
    spk: torch.Tensor,
    mem: torch.Tensor,
    options: dict[str, Any],
) -> tuple[float, float]:
    """How far mem and gradients of the kernels are from those of plain torch in float64."""
    inputs = [x, cell.conv.weight, cell.conv.bias]
    found = torch.autograd.grad(spk.double().sum() + mem.double().square().sum(), inputs)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    threshold = cell.threshold.double()
    true_spk, _, true = sconv2dlstm(
        exact[0], None, None, *exact[1:], threshold=threshold, **options
    )
    expected = torch.autograd.grad(true_spk.sum() + true.square().sum(), exact)
    far = (mem.double() - true).detach().abs().flatten()
    deciding = {"reset_mechanism", "state_quant"} & set(options)
    share = 1 - DECIDING if deciding else 1.0
    of_mem = float(far.kthvalue(max(1, int(share * far.numel()))).values)
    of_gradients = max(
        float((one.double() - other).norm() / other.norm())
        for one, other in zip(found, expected, strict=True)
    )
    return of_mem, of_gradients


if __name__ == "__main__":
    print(*run(sys.argv[1] if sys.argv[1:] else "cuda"), sep="\n")
