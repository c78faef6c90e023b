"""Runs small cells through every kernel, forward and backward, and checks all that they return.

    python -m benchmarks.gpu_smoke [--device cuda] [--algorithms NAME ...]

States and gradients must be near those of the reference path in float64. Spikes must be exactly
those that mem of the same run gives, but where the mean of a window rounds. The threshold lets 15 %
of each channel spike, and the loss weighs each spike differently. A deviation ends nothing: it sets
the exit status. `make gpu` runs each algorithm in a process of its own, because an error of a
kernel ends all work of its process on the GPU, and a few cells again under compute-sanitizer.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import snnlstm
from benchmarks import devices
from benchmarks.providers import TOLERANCE, Setting
from snnlstm.reference import fire, sconv2dlstm

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "max_pool, subtract": {"max_pool": 2, "reset_mechanism": "subtract"},
    "avg_pool, zero": {"avg_pool": 2, "reset_mechanism": "zero"},
    "stride, dilation": {"stride": 2, "dilation": 2},
    "inhibition": {"inhibition": True},
    "quantised": {"state_quant": snnlstm.quant.state_quant(6)},
    # A kernel of its own forms the spikes if a window is larger than a tile.
    "one window": {"avg_pool": "image"},
    # These are of the call: see Cell.
    "channels last": {"channels_last": True},
    "lengths": {"lengths": True},
    "step loop": {"loop": True},
}
SIZES = (2, 3, 6, 21, 13, 18)
"""The sizes T, N, Cin, C, H, W are no multiples of a tile's. An even width has plain steps."""
EXACT = ("float64", "float32")
ALGORITHMS = ("fused", "hybrid", "cudnn")
SMOOTH = ("plain", "stride, dilation", "one window", "channels last", "lengths", "step loop")
"""No decision of these options depends on rounding; coarse precisions run these options alone."""
SPIKING, ROUNDED, DECIDING = 0.15, 0.05, 0.02
"""The share of neurons that spike; the largest shares that may spike by rounding, and whose states
may be out of tolerance if rounding can change a decision (a reset, a level)."""


def precisions(device: str) -> tuple[str, ...]:
    """Returns the types that a device computes in by itself, of tensors or under autocast."""
    if device == "cpu":
        return EXACT
    newer = ("tf32", "bfloat16", "autocast") if devices.capability(device) >= 80 else ()
    return (*EXACT, "float16", "autocast16", *newer)


def run(
    device: str,
    sizes: Sequence[int] = SIZES,
    algorithms: Sequence[str] = ALGORITHMS,
    names: Sequence[str] = tuple(OPTIONS),
) -> Iterator[tuple[str, bool]]:
    """Runs and checks every cell; yields a line for each, and whether it is right.

    It is not if the reference path ran, if an error was raised, or if the results are wrong.
    """
    for precision, algorithm, name in itertools.product(precisions(device), algorithms, names):
        if precision not in EXACT and name not in SMOOTH:
            continue
        setting = Setting(device, precision)
        try:
            with snnlstm.algorithm(algorithm), setting.context():
                line, right = Cell(setting, sizes, **OPTIONS[name]).judged()
        except RuntimeError as error:
            line, right = str(error).splitlines()[0], False
        yield f"{algorithm}, {precision}, {name}: {line}", right


LEAKY: dict[str, dict[str, Any]] = {
    "Leaky, steps": {},
    "Leaky, zero, sequence": {"reset_mechanism": "zero", "learn_beta": True},
    "Leaky, channels": {"beta": torch.linspace(0.2, 0.9, 6)[:, None, None], "learn_beta": True},
}


def run_leaky(device: str, *_: Any) -> Iterator[tuple[str, bool]]:
    """As :func:`run`, for Leaky, which has no algorithms and no other sizes."""
    if device != "cpu":
        for dtype, name in itertools.product((*EXACT, "float16", "bfloat16"), LEAKY):
            try:
                line, right = _leaky(Setting(device, dtype), "sequence" in name, **LEAKY[name])
            except RuntimeError as error:
                line, right = str(error).splitlines()[0], False
            yield f"{dtype}, {name}: {line}", right


def _leaky(setting: Setting, whole: bool, **options: Any) -> tuple[str, bool]:
    """Runs a Leaky over x (T, 2, 6, 5, 7); returns what is to be said, and whether all is right."""
    torch.manual_seed(0)
    x = torch.randn(7, 2, 6, 5, 7).to(setting.torch_device, setting.torch_dtype)
    weights = torch.rand(2, *x.shape, device=x.device)
    found = []
    for dtype in (setting.torch_dtype, torch.float64):
        layer = snnlstm.Leaky(**{"beta": 0.9, "threshold": 0.4, "learn_threshold": True} | options)
        layer.to(x.device, torch.float64 if dtype is torch.float64 else torch.float32)
        leaf = x.to(dtype).requires_grad_()
        with snnlstm.algorithm("auto" if not found else "reference"):
            if whole and not found:
                spk, mem = layer.sequence(leaf, True)
            else:
                spk, mem = map(torch.stack, zip(*map(layer, leaf), strict=True))
        found.append((spk, mem, *torch.autograd.grad(
            (weights[0] * spk + weights[1] * mem).sum(), (leaf, *layer.parameters())
        ), layer))  # fmt: skip
    (spk, mem, *grads, ours), (_, true, *exact, _) = found
    wrong = int(((mem > ours.threshold) != spk.bool()).sum())
    states = float((mem - true).detach().abs().max())
    pairs = zip(grads, exact, strict=True)
    gradients = _largest([(one.double() - other).norm() / other.norm() for one, other in pairs])
    path, most = ours.path, 1e-12 if setting.dtype == "float64" else 1e-5
    # snnTorch's own spikes are float32, and gradients of half types are rounded to them.
    of_type = 1e-2 if setting.torch_dtype in (torch.float16, torch.bfloat16) else 1e-4
    right = path.name.startswith(devices.backend(setting.device)) and wrong == 0
    right &= states <= most and gradients <= of_type and bool(spk.any())
    return (
        f"{path.name}, {wrong} wrong spikes, states {states:.1e}, gradients {gradients:.1e}",
        right,
    )


CHECKS = (run, run_leaky)


class Loop(nn.Module):
    """Calls a cell once a step. A CUDA graph can hold it, since states pass in and out."""

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
    """A cell with random spikes and states, which is judged by what it returns.

    channels_last: the layout of x. lengths: some samples end earlier. loop: steps are called one by
    one, in a CUDA graph where there is one.
    """

    def __init__(
        self, setting: Setting, sizes: Sequence[int], channels_last: bool = False,
        lengths: bool = False, loop: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        setting.apply_precision()
        torch.manual_seed(0)
        t, n, cin, c, h, w = sizes
        self.setting, self.loop, stride = setting, loop, options.get("stride", 1)
        self.options = {k: (h, w) if value == "image" else value for k, value in options.items()}
        # A number in plain cells, and otherwise one for each channel.
        threshold = torch.zeros(c, 1, 1) if options else 0.0
        cell = snnlstm.SConv2dLSTM(
            cin, c, (3, 5), threshold=threshold, learn_threshold=True, **self.options
        )
        x = torch.rand(t, n, cin, h, w).gt(0.7)
        x = x.movedim(2, -1).contiguous().movedim(-1, 2) if channels_last else x
        states = torch.rand(2, n, c, -(-h // stride), -(-w // stride)).sub(0.5).mul(0.4)
        on: Any = {"device": setting.torch_device, "dtype": setting.torch_dtype}
        self.cell, self.inputs = cell.to(**on), [of.to(**on) for of in (x, *states)]
        self.lengths = (1 + torch.arange(n, device=on["device"]) % t) if lengths else None
        # What gets a gradient: x, syn, mem, threshold, weight and bias.
        self.tensors = [*(of.requires_grad_() for of in self.inputs), *cell.parameters()]
        with torch.no_grad():
            mem = self.pooled(self.exact([of.double() for of in self.tensors])[2])
            groups = mem.movedim(2, 0).flatten(1) if options else mem.view(1, -1)
            spiking = groups.quantile(1 - SPIKING, 1)
            cell.threshold.copy_(spiking.view(cell.threshold.shape))

    def exact(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns spk, syn and mem of every step on the reference path."""
        *call, threshold, weight, bias = tensors
        of_call = {"threshold": threshold, "record": True, "lengths": self.lengths}
        with torch.autocast(self.setting.torch_device.type, enabled=False):
            return sconv2dlstm(*call, weight, bias, **of_call, **self.options)

    def pooled(self, mem: Tensor) -> Tensor:
        """Returns mem (T, N, C, H, W) as the threshold sees it, in float64."""
        for name, pool in (("max_pool", F.max_pool2d), ("avg_pool", F.avg_pool2d)):
            if name in self.options:
                images = pool(mem.double().flatten(0, 1), self.options[name])
                return images.unflatten(0, mem.shape[:2])
        return mem.double()

    def called(self) -> tuple[Tensor, ...]:
        """Returns spk, syn and mem of every step."""
        if not self.loop:
            return self.cell(*self.inputs, record=True, lengths=self.lengths)
        loop: Any = Loop(self.cell)
        # A graph under autocast needs a setting of its own.
        if self.setting.device == "cuda" and "autocast" not in self.setting.dtype:
            samples = tuple(torch.zeros_like(of).requires_grad_() for of in self.inputs)
            loop = torch.cuda.make_graphed_callables(loop, samples)
        return loop(*self.inputs)

    def judged(self) -> tuple[str, bool]:
        """Runs the cell; returns what is to be said, and whether all is right."""
        spk, syn, mem = self.called()
        weights = torch.rand(spk.shape, generator=torch.Generator().manual_seed(1)).to(spk.device)
        found = torch.autograd.grad(_loss(weights, spk, syn, mem), self.tensors)
        exact = [of.detach().double().requires_grad_() for of in self.tensors]
        true = self.exact(exact)
        expected = torch.autograd.grad(_loss(weights, *true), exact)
        with torch.no_grad():  # inference, without recorded states
            last = self.cell(*self.inputs, lengths=self.lengths)
        wrong, rounded = self.wrong_spikes(spk, mem)
        wrong += self.wrong_spikes(last[0][-1:], last[2][None])[0]
        rounded = max(rounded, float((last[0] != spk).double().mean()))
        pairs = (syn, true[1]), (mem, true[2]), (last[1], true[1][-1]), (last[2], true[2][-1])
        # The rest is explained by decisions that rounding changes.
        share = 1 - DECIDING * bool({"reset_mechanism", "state_quant"} & set(self.options))
        far = [(one.double() - other).detach().abs() for one, other in pairs]
        states = _largest([difference.flatten().quantile(share) for difference in far])
        pairs = zip(found, expected, strict=True)
        gradients = _largest([(one - other).norm() / other.norm() for one, other in pairs])
        # The tolerances of coarse types are made for longer sequences and larger layers.
        of_type = 1.0 if self.setting.dtype in EXACT else 0.2
        most, most_of_gradients = (of_type * of for of in TOLERANCE[self.setting.dtype])
        spiking, path = float(spk.ne(0).double().mean()), self.cell.path
        assert path is not None
        right = (
            wrong == 0 and rounded <= ROUNDED and states <= most and gradients <= most_of_gradients
            and spiking > (0 if "inhibition" in self.options else SPIKING / 3)
            and path.name.startswith(devices.backend(self.setting.device))
        )  # fmt: skip
        text = f"{path.name}, {wrong} wrong and {spiking:.1%} of all spike, states {states:.1e}, "
        return f"{text}gradients {gradients:.1e}", right

    def wrong_spikes(self, spk: Tensor, mem: Tensor) -> tuple[int, float]:
        """Counts the spikes (T, N, C, H, W) that mem of the same run does not give.

        Those that rounding decides are not among them: they are the second result, as a share.
        """
        mem, threshold = mem.detach(), self.cell.threshold.detach().double()
        pooled, one = self.pooled(mem), threshold.new_ones(())
        of_cell = lambda u: u > 0, None, "inhibition" in self.options
        true = torch.stack([fire(of, threshold, one, *of_cell) for of in pooled])
        if self.lengths is not None:
            steps = torch.arange(len(self.inputs[0]), device=spk.device)[-len(spk) :, None]
            true *= (steps < self.lengths)[..., None, None, None]
        wrong, rounds = spk.double() != true, torch.zeros_like(true, dtype=torch.bool)
        if "avg_pool" in self.options:
            pixels = mem[0, 0, 0].numel() // pooled[0, 0, 0].numel()
            of_sum = torch.finfo(torch.promote_types(mem.dtype, torch.float32)).eps * pixels
            error = torch.finfo(mem.dtype).eps * pooled.abs() + of_sum * mem.abs().max()
            rounds = (pooled - threshold).abs() <= error
        return int((wrong & ~rounds).sum()), float((wrong & rounds).double().mean())


def _largest(numbers: list[Tensor]) -> float:
    """Returns the largest number, or NaN if there is one."""
    return float(torch.stack(numbers).max())


def _loss(weights: Tensor, spk: Tensor, syn: Tensor, mem: Tensor) -> Tensor:
    """Returns a loss in which each spike has a weight of its own."""
    return (weights.double() * spk).sum() + sum(of.double().square().sum() for of in (syn, mem))


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_smoke", description=__doc__)
    parser.add_argument("--device", choices=devices.DEVICES, default="cuda")
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=ALGORITHMS)
    parser.add_argument("--options", nargs="+", choices=OPTIONS, default=tuple(OPTIONS))
    parser.add_argument("--sizes", nargs=6, type=int, default=SIZES, metavar="SIZE")
    options = parser.parse_args(arguments)
    wrong, given = 0, (options.device, options.sizes, options.algorithms, options.options)
    with devices.running(options.device):
        for line, right in itertools.chain.from_iterable(check(*given) for check in CHECKS):
            print(line if right else f"WRONG  {line}", flush=True)
            wrong += not right
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
