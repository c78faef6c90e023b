"""Runs small cells through every kernel, forward and backward, and checks all that they return.

    python -m benchmarks.gpu_smoke [--device cuda] [--algorithms NAME ...] [--few]

The reference path in float64 says what the states and all gradients should be, within a tolerance.
Spikes are checked against the states of the same run: they must be exactly those of its mem, but
where the mean of a pooling window rounds. The threshold lets 15 % of each channel spike, and the
loss weighs each spike differently.

Each line is printed as it comes, and a deviation ends nothing: it sets the exit status. `make gpu`
runs each algorithm in a process of its own, because an error of a kernel ends all work of its
process on the GPU, and a few cells again under compute-sanitizer. The types are those that a GPU
has tensor cores for, besides float32 and float64.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import snnlstm
from benchmarks import devices
from benchmarks.providers import TOLERANCE, Setting
from snnlstm.reference import fire, sconv2dlstm

# The options of cells. Three are of the call: the layout of x, the steps of each sample, and a loop
# of step calls, which runs in a CUDA graph where there is one.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "max_pool, subtract": {"max_pool": 2, "reset_mechanism": "subtract"},
    "avg_pool, zero": {"avg_pool": 2, "reset_mechanism": "zero"},
    "stride, dilation": {"stride": 2, "dilation": 2},
    "inhibition": {"inhibition": True},
    "quantised": {"state_quant": snnlstm.quant.state_quant(6)},
    # A kernel of its own forms the spikes if a window is larger than a tile.
    "one window": {"avg_pool": "image"},
    "channels last": {"channels_last": True},
    "lengths": {"lengths": True},
    "step loop": {"loop": True},
}
OF_CALL = ("channels_last", "lengths", "loop")
SIZES = (2, 3, 6, 21, 13, 18)
"""The sizes T, N, Cin, C, H, W are no multiples of a tile's. An even width has plain steps."""
EXACT = ("float64", "float32")
# Under compute-sanitizer, where the start alone takes half a minute.
FEW = ("plain", "max_pool, subtract")
ALGORITHMS = ("fused", "hybrid", "cudnn")
SMOOTH = ("plain", "stride, dilation", "one window", "channels last", "lengths", "step loop")
"""No decision of these options depends on rounding; coarse precisions run these options alone."""
SPIKING, ROUNDED = 0.15, 0.05
"""The share of neurons that spike, and the largest share that may spike by rounding."""
DECIDING = 0.02
"""This share of neurons may differ by more than the tolerance if a rounding error can change a
decision (a reset, a level)."""


def precisions(device: str) -> tuple[str, ...]:
    """Returns the types that a device computes in by itself, for tensors or under autocast."""
    if device == "cpu":
        return EXACT
    halves = ("float16", "autocast16")
    if devices.capability(device) >= 80:
        halves = ("tf32", *halves, "bfloat16", "autocast")
    return (*EXACT, *halves)


def run(
    device: str,
    sizes: tuple[int, ...] = SIZES,
    algorithms: Sequence[str] = ALGORITHMS,
    names: Sequence[str] = tuple(OPTIONS),
) -> Iterator[tuple[str, bool]]:
    """Runs and checks every cell; yields a line for each, and whether it is right.

    It is not if the reference path ran, if an error was raised, or if the results are wrong.
    """
    for precision, algorithm in itertools.product(precisions(device), algorithms):
        for name in names:
            if precision not in EXACT and name not in SMOOTH:
                continue
            what = f"{algorithm}, {precision}, {name}"
            try:
                cell = Cell(Setting(device, precision), sizes, OPTIONS[name])
                with snnlstm.algorithm(algorithm), cell.setting.context():
                    line, right = cell.judged()
            except RuntimeError as error:
                yield f"{what}: {str(error).splitlines()[0]}", False
                continue
            path = cell.cell.path
            right = right and path is not None and path.name.startswith(devices.backend(device))
            yield f"{what}: {path and path.name}, {line}", right


# What `main` runs. Another layer gets its check here: a function like `run`.
CHECKS = (run,)


class Loop(nn.Module):
    """Calls a cell once a step. The states pass in and out, as a CUDA graph needs them to."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, syn: Tensor, mem: Tensor) -> tuple[Tensor, ...]:
        """Returns spk, syn and mem of every step."""
        steps = []
        for x_t in x:
            spk, syn, mem = self.cell(x_t, syn, mem)
            steps.append((spk, syn, mem))
        return tuple(torch.stack(every) for every in zip(*steps, strict=True))


class Cell:
    """A cell is given random spikes and states, and judged by what it returns."""

    def __init__(self, setting: Setting, sizes: tuple[int, ...], options: dict[str, Any]) -> None:
        t, n, cin, c, h, w = sizes
        self.setting, dtype = setting, setting.torch_dtype
        self.of_call = [name for name in OF_CALL if name in options]
        self.options = {
            name: (h, w) if value == "image" else value
            for name, value in options.items()
            if name not in OF_CALL
        }
        setting.apply_precision()
        torch.manual_seed(0)
        # A number in plain cells, and otherwise a threshold for each channel.
        start = torch.zeros(c, 1, 1) if options else 0.0
        cell = snnlstm.SConv2dLSTM(
            cin, c, (3, 5), threshold=start, learn_threshold=True, **self.options
        )
        x = torch.rand(t, n, cin, h, w).gt(0.7)
        if "channels_last" in self.of_call:
            x = x.movedim(2, -1).contiguous().movedim(-1, 2)
        size = (2, n, c, *cell._describe().state_size(h, w))
        syn, mem = torch.rand(size).sub(0.5).mul(0.4)
        self.cell = cell.to(setting.torch_device, dtype)
        self.inputs = [
            tensor.to(setting.torch_device, dtype).requires_grad_() for tensor in (x, syn, mem)
        ]
        some = 1 + torch.arange(n, device=setting.torch_device) % t
        self.lengths = some if "lengths" in self.of_call else None
        self.threshold_at(SPIKING)

    @torch.no_grad()
    def threshold_at(self, share: float) -> None:
        """Sets the threshold that `share` of the neurons of each channel exceed."""
        mem = self.pooled(self.exact([t.double() for t in self.tensors])[2])
        groups = mem.movedim(2, 0).flatten(1) if self.cell.threshold.dim() else mem.view(1, -1)
        found = groups.quantile(1 - share, 1)
        self.cell.threshold.copy_(found.view(self.cell.threshold.shape))

    @property
    def tensors(self) -> list[Tensor]:
        """Returns what gets a gradient: x, syn, mem, weight, bias and threshold."""
        conv: Any = self.cell.conv
        return [*self.inputs, conv.weight, conv.bias, self.cell.threshold]

    def exact(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns spk, syn and mem of every step on the reference path."""
        with torch.autocast(self.setting.torch_device.type, enabled=False):
            return sconv2dlstm(
                *tensors[:5], threshold=tensors[5], record=True, lengths=self.lengths,
                **self.options,
            )  # fmt: skip

    def pooled(self, mem: Tensor) -> Tensor:
        """Returns mem (..., H, W) as the threshold sees it, in float64."""
        pools = {"max_pool": F.max_pool2d, "avg_pool": F.avg_pool2d}
        for name, pool in pools.items():
            if name in self.options:
                size, images = self.options[name], mem.double().flatten(0, 1)
                return pool(images, size).unflatten(0, mem.shape[:2])
        return mem.double()

    def called(self) -> tuple[Tensor, ...]:
        """Returns spk, syn and mem of every step."""
        if "loop" not in self.of_call:
            return self.cell(*self.inputs, record=True, lengths=self.lengths)
        loop: Any = Loop(self.cell)
        if self.setting.device == "cuda" and not torch.is_autocast_enabled("cuda"):
            samples = tuple(torch.zeros_like(t).requires_grad_() for t in self.inputs)
            loop = torch.cuda.make_graphed_callables(loop, samples)
        return loop(*self.inputs)

    def judged(self) -> tuple[str, bool]:
        """Runs the cell; returns what is to be said, and whether all is right."""
        spk, syn, mem = self.called()
        of_training, rounded = self.wrong_spikes(spk, mem)
        weights = torch.rand(spk.shape, generator=torch.Generator().manual_seed(1)).double()
        weights = weights.to(spk.device)
        found = torch.autograd.grad(_loss(spk, syn, mem, weights), self.tensors)
        exact = [t.detach().double().requires_grad_() for t in self.tensors]
        true = self.exact(exact)
        expected = torch.autograd.grad(_loss(*true, weights), exact)
        # Inference without recorded states is another way through the kernels.
        with torch.no_grad():
            last = self.cell(*self.inputs, lengths=self.lengths)
        of_inference = self.wrong_spikes(last[0][-1:], last[2][None])[0]
        other = float((last[0] != spk).double().mean())

        pairs = [(syn, true[1]), (mem, true[2]), (last[1], true[1][-1]), (last[2], true[2][-1])]
        of_states = max(self.distance(one, other) for one, other in pairs)
        pairs = list(zip(found, expected, strict=True))
        of_gradients = max(float((one - other).norm() / other.norm()) for one, other in pairs)
        # The tolerances of coarse types are made for longer sequences and larger layers.
        of_type = 1.0 if self.setting.dtype in EXACT else 0.2
        allowed = [of_type * most for most in TOLERANCE[self.setting.dtype]]
        spiking = float(spk.ne(0).double().mean())
        enough = SPIKING / 3 if "inhibition" not in self.options else 0.0
        right = (
            of_training + of_inference == 0 and max(rounded, other) <= ROUNDED
            and of_states <= allowed[0] and of_gradients <= allowed[1] and spiking > enough
        )  # fmt: skip
        return (
            f"{of_training} + {of_inference} wrong of {spiking:.1%} spikes, "
            f"states {of_states:.1e}, gradients {of_gradients:.1e}"
        ), right

    def wrong_spikes(self, spk: Tensor, mem: Tensor) -> tuple[int, float]:
        """Counts the spikes (T, N, C, H, W) that mem of the same run does not give.

        Those that rounding decides are not among them: they are the second result, as a share.
        """
        pooled, threshold = self.pooled(mem.detach()), self.cell.threshold.detach().double()
        inhibition, one = "inhibition" in self.options, torch.ones((), device=spk.device).double()
        true = torch.stack(
            [fire(of, threshold, one, lambda u: u > 0, None, inhibition) for of in pooled]
        )
        if self.lengths is not None:
            t = torch.arange(self.inputs[0].shape[0], device=spk.device)[-len(spk):, None]
            true = true * (t < self.lengths).view(*true.shape[:2], 1, 1, 1)
        wrong, rounds = spk.double() != true, torch.zeros_like(true).bool()
        if "avg_pool" in self.options:
            pixels = mem[0, 0, 0].numel() // pooled[0, 0, 0].numel()
            of_sum = torch.finfo(torch.promote_types(mem.dtype, torch.float32)).eps * pixels
            error = torch.finfo(mem.dtype).eps * pooled.abs() + of_sum * mem.detach().abs().max()
            rounds = (pooled - threshold).abs() <= error
        return int((wrong & ~rounds).sum()), float((wrong & rounds).double().mean())

    def distance(self, one: Tensor, other: Tensor) -> float:
        """Returns the largest difference of two states, but for those that decisions explain."""
        far = (one.double() - other).detach().abs().flatten()
        deciding = {"reset_mechanism", "state_quant"} & set(self.options)
        share = 1 - DECIDING if deciding else 1.0
        return float(far.kthvalue(max(1, int(share * far.numel()))).values)


def _loss(spk: Tensor, syn: Tensor, mem: Tensor, weights: Tensor) -> Tensor:
    """Returns a loss in which each spike has a weight of its own."""
    return (weights * spk).sum() + mem.double().square().sum() + syn.double().square().sum()


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_smoke", description=__doc__)
    parser.add_argument("--device", choices=devices.DEVICES, default="cuda")
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=ALGORITHMS)
    parser.add_argument("--few", action="store_true", help="two options alone")
    parser.add_argument("--sizes", nargs=6, type=int, default=SIZES, metavar="SIZE")
    options = parser.parse_args(arguments)
    names, wrong = FEW if options.few else tuple(OPTIONS), 0
    given = options.device, tuple(options.sizes), options.algorithms, names
    with devices.running(options.device):
        for line, right in itertools.chain.from_iterable(check(*given) for check in CHECKS):
            print(line if right else f"WRONG  {line}", flush=True)
            wrong += not right
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
