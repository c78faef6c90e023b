"""`python -m benchmarks.accuracy` prints the rounding errors of each algorithm."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

import snnlstm

LAYERS = {
    "2->16 k3": (2, 16, (3, 3)),
    "32->64 k3": (32, 64, (3, 3)),
    "16->32 k3x1": (16, 32, (3, 1)),
    "16->32 k5": (16, 32, (5, 5)),
    "16->32 k7": (16, 32, (7, 7)),
    "16->32 k9": (16, 32, (9, 9)),
    "1->16 k19x3": (1, 16, (19, 3)),
}
STEPS, SIDE = 100, 18
SCALES = (1, 2.5, 5, 10)
ALGORITHMS = ("reference", "direct", "winograd", "auto")


def layer(cin: int, cout: int, kernel: tuple[int, int], scale: float) -> list[Tensor]:
    """Returns x, default weight and bias times `scale`, and a random gradient of mem."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(cin + cout, 4 * cout, kernel)
    x = torch.rand(STEPS, 2, cin, SIDE, SIDE).lt(0.1).float()
    grad = torch.randn(STEPS, 2, cout, SIDE, SIDE)
    return [x, conv.weight.detach() * scale, conv.bias.detach() * scale, grad]


def run(algorithm: str, tensors: list[Tensor]) -> tuple[list[Tensor], str]:
    """Returns mem of every step with the gradients of x and weight, and the path's name."""
    x, weight, bias, grad = tensors
    cout, kernel = weight.shape[0] // 4, tuple(weight.shape[2:])
    options = {"threshold": 0.1, "dtype": weight.dtype}
    cell = snnlstm.SConv2dLSTM(weight.shape[1] - cout, cout, kernel, **options)
    cell.conv.weight, cell.conv.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
    x = x.clone().requires_grad_()
    with snnlstm.algorithm(algorithm):
        mem = cell(x, record=True)[2]
    mem.backward(grad)
    return [mem.detach(), x.grad, cell.conv.weight.grad], cell.path.name


def main() -> None:
    """Prints the table."""
    print("| layer | weights | Winograd / auto | mem | gradient of x | gradient of weight |")
    print("|---|---|---|---|---|---|")
    for name, scale in itertools.product(LAYERS, SCALES):
        tensors = layer(*LAYERS[name], scale)
        exact, _ = run("reference", [t.double() for t in tensors])
        found, paths = zip(*(run(algorithm, tensors) for algorithm in ALGORITHMS), strict=True)
        ways = " / ".join(path.split("-", 2)[-1] for path in paths[2:])
        cells = []
        for b, column in zip(exact, zip(*found, strict=True), strict=True):
            errors = [f"{float((a - b).norm() / b.norm()):.1e}" for a in column]
            cells.append(" / ".join(errors).replace("e-0", "e-").replace("e+00", "e0"))
        print(f"| {name} | {scale} x | {ways} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
