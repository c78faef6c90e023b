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
import copy
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
from snnlstm.reference import fire

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
    "Leaky, steps": {"leaky": True, "loop": True},
    "Leaky, zero": {"leaky": True, "reset_mechanism": "zero", "learn_beta": True},
    "Leaky, channels": {"leaky": True, "beta": "channels", "learn_beta": True},
}
SIZES = (2, 3, 6, 21, 13, 18)
"""The sizes T, N, Cin, C, H, W are no multiples of a tile's. An even width has plain steps."""
EXACT = ("float64", "float32")
ALGORITHMS = ("fused", "hybrid", "cudnn")
ROUNDING = ("max_pool, subtract", "avg_pool, zero", "inhibition", "quantised")
"""Rounding changes decisions of these options; coarse precisions leave them out."""
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
        if precision not in EXACT and name in ROUNDING:
            continue
        setting = Setting(device, precision)
        try:
            with snnlstm.algorithm(algorithm), setting.context():
                line, right = Cell(setting, sizes, **OPTIONS[name]).judged()
        except RuntimeError as error:
            line, right = str(error).splitlines()[0], False
        yield f"{algorithm}, {precision}, {name}: {line}", right


class Loop(nn.Module):
    """Calls a cell once a step. A CUDA graph can hold it, since states pass in and out."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """Returns spk and the states of every step."""
        steps = []
        for x_t in x:
            spk, *states = self.cell(x_t, *states)
            steps.append((spk, *states))
        return tuple(torch.stack(every) for every in zip(*steps, strict=True))


class Cell:
    """A cell with random spikes and states, which is judged by what it returns.

    channels_last: the layout of x. lengths: some samples end earlier. loop: steps are called one by
    one, in a CUDA graph where there is one. leaky: it is a Leaky.
    """

    def __init__(
        self, setting: Setting, sizes: Sequence[int], channels_last: bool = False,
        lengths: bool = False, loop: bool = False, leaky: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        setting.apply_precision()
        torch.manual_seed(0)
        t, n, cin, c, h, w = sizes
        c = cin if leaky else c
        self.setting, self.loop, self.leaky = setting, loop, leaky
        on: Any = {"device": setting.torch_device, "dtype": setting.torch_dtype}
        x, stride = torch.rand(t, n, cin, h, w).gt(0.7), options.get("stride", 1)
        x = x.movedim(2, -1).contiguous().movedim(-1, 2) if channels_last else x
        states = torch.rand(2 - leaky, n, c, -(-h // stride), -(-w // stride)).sub(0.5).mul(0.4)
        named = {"image": (h, w), "channels": torch.linspace(0.2, 0.9, cin)[:, None, None]}
        self.options = {k: named.get(str(value), value) for k, value in options.items()}
        self.inputs = [of.to(**on) for of in (x, *states)]
        if leaky:
            on["dtype"] = torch.promote_types(torch.float32, on["dtype"])
            of_leaky = {"beta": 0.9, "threshold": 0.0, "learn_threshold": True} | self.options
            cell: Any = snnlstm.Leaky(**of_leaky)
        else:
            # A number in plain cells, and otherwise one for each channel.
            threshold = torch.zeros(c, 1, 1) if options else 0.0
            cell = snnlstm.SConv2dLSTM(
                cin, c, (3, 5), threshold=threshold, learn_threshold=True, **self.options
            )
        self.cell = cell.to(**on)
        self.lengths = (1 + torch.arange(n, device=on["device"]) % t) if lengths else None
        with torch.no_grad():
            mem = self.pooled(self.exact()[0][-1])
            groups = mem.movedim(2, 0).flatten(1) if cell.threshold.dim() else mem.view(1, -1)
            # snnTorch's resets round the threshold to float32.
            cell.threshold.copy_(groups.quantile(1 - SPIKING, 1).float().view_as(cell.threshold))

    def exact(self) -> tuple[list[Tensor], list[Tensor]]:
        """Returns what :meth:`results` does, on the reference path in float64."""
        other = copy.deepcopy(self)
        other.cell.double()
        other.inputs, other.loop = [of.double() for of in other.inputs], self.leaky
        plain = torch.autocast(self.setting.torch_device.type, enabled=False)
        with plain, snnlstm.algorithm("reference"):
            return other.results()

    def pooled(self, mem: Tensor) -> Tensor:
        """Returns mem (T, N, C, H, W) as the threshold sees it, in float64."""
        for name, pool in (("max_pool", F.max_pool2d), ("avg_pool", F.avg_pool2d)):
            if name in self.options:
                images = pool(mem.double().flatten(0, 1), self.options[name])
                return images.unflatten(0, mem.shape[:2])
        return mem.double()

    def called(self, record: bool = True) -> tuple[Tensor, ...]:
        """Returns spk and the states of every step, or only the last states."""
        if self.leaky and not (self.loop and record):
            self.cell.mem = self.inputs[1]
            spk = self.cell.sequence(self.inputs[0], record)
            return spk if record else (spk, self.cell.mem)
        if not (self.loop and record):
            return self.cell(*self.inputs, record=record, lengths=self.lengths)
        loop: Any = Loop(self.cell)
        # A graph under autocast needs a setting of its own.
        plain = not self.leaky and "autocast" not in self.setting.dtype
        if plain and self.setting.device == "cuda":
            samples = tuple(torch.zeros_like(of).requires_grad_() for of in self.inputs)
            loop = torch.cuda.make_graphed_callables(loop, samples)
        return loop(*self.inputs)

    def results(self) -> tuple[list[Tensor], list[Tensor]]:
        """Returns spk and the states of every step, and the gradients of all tensors.

        The loss weighs each spike differently. Where no gradients are computed there are none.
        """
        tensors = [*(of.requires_grad_() for of in self.inputs), *self.cell.parameters()]
        out = spk, *states = self.called()
        weights = torch.rand(spk.shape, generator=torch.Generator().manual_seed(1)).to(spk.device)
        loss = (weights.double() * spk).sum() + sum(of.double().square().sum() for of in states)
        grads = torch.autograd.grad(loss, tensors) if loss.requires_grad else ()
        return [of.detach() for of in out], list(grads)

    def judged(self) -> tuple[str, bool]:
        """Runs the cell; returns what is to be said, and whether all is right."""
        (_, *true), expected = self.exact()
        (spk, *states), found = self.results()
        with torch.no_grad():  # inference, without recorded states
            last_spk, *last = self.called(record=False)
        wrong, rounded = self.wrong_spikes(spk, states[-1])
        wrong += self.wrong_spikes(last_spk[-1:], last[-1][None])[0]
        rounded = max(rounded, float((last_spk != spk).double().mean()))
        pairs = zip((*states, *last), (*true, *(of[-1] for of in true)), strict=True)
        # The rest is explained by decisions that rounding changes.
        share = 1 - DECIDING * bool({"reset_mechanism", "state_quant"} & set(self.options))
        far = [(one.double() - other).abs() for one, other in pairs]
        of_states = _largest([difference.flatten().quantile(share) for difference in far])
        pairs = zip(found, expected, strict=True)
        gradients = _largest([(one - other).norm() / other.norm() for one, other in pairs])
        # The tolerances of coarse types are made for longer sequences and larger layers.
        of_type = 1.0 if self.setting.dtype in EXACT else 0.2
        most, most_of_gradients = (of_type * of for of in TOLERANCE[self.setting.dtype])
        # snnTorch's own spikes are float32.
        most_of_gradients = max(most_of_gradients, 1e-4 * self.leaky)
        spiking, path = float(spk.ne(0).double().mean()), self.cell.path
        right = (
            wrong == 0 and rounded <= ROUNDED and of_states <= most
            and gradients <= most_of_gradients
            and spiking > (0 if "inhibition" in self.options else SPIKING / 3)
            and path.name.startswith(self.setting.device.split("-")[0])
        )  # fmt: skip
        text = f"{path.name}, {wrong} wrong and {spiking:.1%} of all spike, states {of_states:.1e}"
        return f"{text}, gradients {gradients:.1e}", right

    def wrong_spikes(self, spk: Tensor, mem: Tensor) -> tuple[int, float]:
        """Counts the spikes (T, N, C, H, W) that mem of the same run does not give.

        Those that rounding decides are not among them: they are the second result, as a share.
        """
        threshold, pooled = self.cell.threshold.detach().double(), self.pooled(mem)
        one = threshold.new_ones(())
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
        for line, right in run(*given):
            print(line if right else f"WRONG  {line}", flush=True)
            wrong += not right
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
