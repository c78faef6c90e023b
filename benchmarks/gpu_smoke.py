"""Runs small cells through every kernel, forward and backward, and checks all that they return.

    python -m benchmarks.gpu_smoke [--device cuda] [--algorithms NAME ...]

States and gradients must be near those of the reference path in float64, and so must those of a
CUDA graph that was captured with other numbers. Spikes must be exactly those that mem of the same
run gives. The threshold lets 15 % of each channel spike, and the loss weighs each spike
differently. A deviation ends nothing: it sets the exit status. If an error ends all work of the
process on the GPU, the row and those behind it run in a new process whose launches wait, so that
the error names the kernel. `make gpu` runs a few cells again under compute-sanitizer.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import snnlstm
from benchmarks import devices
from benchmarks.cases import widest_gap
from benchmarks.providers import TOLERANCE, WIDE, Setting
from snnlstm.reference import fire
from tests.shared.table import arguments_of

CHANNELS = {"leaky": True, "beta": "channels", "learn_beta": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "max_pool, subtract": arguments_of("max_pool"),
    "avg_pool, zero": arguments_of("avg_pool", reset="zero"),
    "stride, dilation": arguments_of("dilation and stride", reset="none"),
    # One launch stores 256 levels, of 512.
    "quantised": {"n": 1, "state_quant": snnlstm.quant.state_quant(9)},
    # A pixel's number in its window needs more than a byte.
    "532 pixels": {"t": 3, "n": 1, "c": 8, "h": 19, "w": 28, "max_pool": (19, 28)},
    # A row has several tiles, and x few channels, but mem more than one chunk of them. Only the
    # last states are recorded in training, so each step reads mem in the layout of the kernels.
    "first layer": {"t": 2, "n": 1, "cin": 2, "c": 40, "h": 4, "w": 41, "record": False},
    # The batch becomes one image, with a sample in each row. Taps beside the column are skipped.
    "one column": {"n": 3, "cin": 4, "c": 8, "h": 33, "w": 1, "graded": 2.0},
    "4 channels": {"c": 4},
    # These are of the call: see Cell.
    "repeated": {"repeats": 20, "record": False} | arguments_of("max_pool", reset="zero"),
    "channels last": {"channels_last": True},
    "lengths": {"lengths": True},
    "step loop": {"loop": True},
    "Leaky, steps": {"leaky": True, "loop": True},
    "Leaky, zero": {"leaky": True, "reset_mechanism": "zero", "learn_beta": True},
    "Leaky, channels": CHANNELS | {"threshold": "channels"},
    "Leaky, one by one": {"leaky": True, "cin": 3, "h": 7, "w": 9, "loop": True},
    "Leaky, features": CHANNELS | {"cin": 64, "h": 1, "w": 1},
}  # fmt: skip
NAMES = ("t", "n", "cin", "c", "h", "w")
SIZES = (6, 2, 6, 21, 7, 10)
"""The sizes T, N, Cin, C, H, W are no multiples of a tile's, and T is none of the steps that a
thread loads at once. Options may replace a size."""
LARGE = (4, 16, 16, 40, 32, 32)  # of "repeated", on a GPU: several blocks on each multiprocessor
GRAPHS = ("cuda",)  # the devices whose results are also taken from a CUDA graph
EXACT = ("float64", "float32")
ALGORITHMS = ("fused", "cudnn")
ROUNDING = ("max_pool, subtract", "avg_pool, zero", "quantised", "532 pixels", "repeated")
"""Rounding changes decisions of these options; coarse precisions leave them out."""
SPIKING, ROUNDED, DECIDING = 0.15, 0.05, 0.02
"""The share of neurons that spike; the largest shares that may spike in one of training and
inference, and whose states may be out of tolerance if rounding can change a decision (a level)."""
CLEAR = 3e-6
"""No number that is compared with the threshold, and then resets, is nearer to it than that: about
ten times the rounding errors of float32."""


def rows(device: str, algorithms: Sequence[str], names: Sequence[str]) -> list[tuple[str, ...]]:
    """Returns the rows: precision, algorithm and name of the options."""
    types = devices.precisions(device)
    return [
        (precision, algorithm, name)
        for precision, algorithm, name in itertools.product(types, algorithms, names)
        if (precision in EXACT or name not in ROUNDING)
        # No algorithm changes a Leaky, and of precisions x's type alone; cuDNN need not repeat.
        and (algorithm in ("fused", "direct") or not {"leaky", "repeats"} & set(OPTIONS[name]))
        and (precision not in WIDE or "leaky" not in OPTIONS[name])
    ]


def run(
    device: str,
    sizes: Sequence[int] = SIZES,
    algorithms: Sequence[str] = ALGORITHMS,
    names: Sequence[str] = tuple(OPTIONS),
    which: slice = slice(None),
) -> Iterator[tuple[str, bool]]:
    """Runs and checks the cells of all rows, or of some; yields a line, and whether it is right.

    It is not if the reference path ran, if an error was raised, or if the results are wrong.
    """
    for precision, algorithm, name in rows(device, algorithms, names)[which]:
        setting = Setting(device, precision)
        try:
            with snnlstm.algorithm(algorithm), setting.context():
                line, right = Cell(setting, sizes, **OPTIONS[name]).judged()
        except Exception as error:
            line, right = f"{type(error).__name__}: {error}".splitlines()[0], False
        yield f"{algorithm}, {precision}, {name}: {line}", right


class Cell:
    """A cell with random spikes and states, which is judged by what it returns.

    channels_last: the layout of x. lengths: some samples end earlier. loop: steps are called one by
    one. record: training has the states of all steps, and inference the last ones; else the other
    way round. graded: the factor of the spikes. leaky: it is a Leaky. repeats: so many equal calls
    must have equal results, bit for bit. Options that are sizes replace those of `sizes`.
    """

    def __init__(
        self, setting: Setting, sizes: Sequence[int], channels_last: bool = False,
        lengths: bool = False, loop: bool = False, record: bool = True, graded: float = 1.0,
        leaky: bool = False, repeats: int = 0, **options: Any,
    ) -> None:  # fmt: skip
        setting.apply_precision()
        torch.manual_seed(0)
        sizes = LARGE if repeats and setting.device == "cuda" else sizes
        t, n, cin, c, h, w = (
            options.pop(name, size) for name, size in zip(NAMES, sizes, strict=True)
        )
        c = cin if leaky else c
        self.setting, self.loop, self.leaky, self.repeats = setting, loop, leaky, repeats
        self.record, self.graded = record, graded
        device = setting.torch_device
        on: Any = {"device": device, "dtype": setting.torch_dtype}
        x, stride = torch.rand(t, n, cin, h, w).gt(0.7), options.get("stride", (1, 1))
        x = x.movedim(2, -1).contiguous().movedim(-1, 2) if channels_last else x
        states = (
            torch.rand(2 - leaky, n, c, -(-h // stride[0]), -(-w // stride[1])).sub(0.5).mul(0.4)
        )
        numbers = torch.linspace(0.2, 0.9, cin)[:, None, None]
        self.options = {
            k: numbers.clone() if value == "channels" else value for k, value in options.items()
        }
        self.inputs = [tensor.to(**on) for tensor in (x, *states)]
        if leaky:
            on["dtype"] = torch.promote_types(torch.float32, on["dtype"])
            arguments = {"beta": 0.9, "threshold": 0.0, "learn_threshold": True} | self.options
            cell: Any = snnlstm.Leaky(**arguments)
        else:
            # A number in plain cells, and otherwise one for each channel.
            threshold = torch.zeros(c, 1, 1) if options else 0.0
            cell = snnlstm.SConv2dLSTM(
                cin, c, (3, 5), threshold=threshold, learn_threshold=True, **self.options
            )
        cell.graded_spikes_factor.fill_(graded)
        self.cell = cell.to(**on)
        self.lengths = (t // (1 + torch.arange(n, device=device))) if lengths else None
        self.resets = leaky or "reset_mechanism" in options
        self.weights: Tensor | None = None
        self.set_threshold()

    @torch.no_grad()
    def set_threshold(self) -> None:
        """Puts the threshold into the widest gap near the quantile of what is compared with it.

        A threshold changes what comes behind a reset, so that the next one comes from a run with
        it, until no number lies within rounding of it.
        """
        threshold = self.cell.threshold
        for number in range(50):
            mem = self.exact()[0][-1]
            compared = [self.pooled(mem), *([self.inputs[-1].double()[None], mem] * self.resets)]
            groups = [
                numbers.movedim(2, 0).flatten(1) if threshold.dim() else numbers.view(1, -1)
                for numbers in compared
            ]
            values = torch.cat(groups, 1).sort(1).values
            clear = not self.resets or (values - threshold.view(-1, 1)).abs().min() > CLEAR
            if number > 0 and clear:
                return
            gap = widest_gap(values, groups[0], 1 - SPIKING)
            # snnTorch's resets round the threshold to float32.
            threshold.copy_(gap.float().view_as(threshold))
        raise ValueError("no threshold keeps clear of all numbers")

    def exact(self) -> tuple[list[Tensor], list[Tensor]]:
        """Returns what :meth:`results` does, on the reference path in float64."""
        other = copy.deepcopy(self)
        other.cell.double()
        other.inputs, other.loop = [tensor.double() for tensor in other.inputs], self.leaky
        plain = torch.autocast(self.setting.torch_device.type, enabled=False)
        with plain, snnlstm.algorithm("reference"):
            return other.results(record=True)

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
        (x, *states), steps = self.inputs, []
        for x_t in x:
            spk, *states = self.cell(x_t, *states)
            steps.append((spk, *states))
        return tuple(torch.stack(every) for every in zip(*steps, strict=True))

    def results(self, record: bool | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """Returns spk, the states, of every step or the last ones, and the gradients, if any.

        The loss weighs each spike differently, and has the states that the cell records.
        """
        record = self.record if record is None else record
        tensors = [*(tensor.requires_grad_() for tensor in self.inputs), *self.cell.parameters()]
        out = spk, *states = self.called(record)
        if record and not self.record:
            states = [every[-1] for every in states]
        if self.weights is None:  # a graph does not capture this copy
            weights = torch.rand(spk.shape, generator=torch.Generator().manual_seed(1)).double()
            self.weights = weights.to(spk.device)
        loss = (self.weights * spk).sum() + sum(state.double().square().sum() for state in states)
        grads = torch.autograd.grad(loss, tensors) if loss.requires_grad else ()
        return [result.detach() for result in out], list(grads)

    def replayed(self) -> tuple[list[Tensor], list[Tensor]]:
        """Returns what :meth:`results` does, of a CUDA graph that was captured with zeros."""
        numbers = [tensor.detach().clone() for tensor in self.inputs]
        with torch.no_grad():
            for tensor in self.inputs:
                tensor.zero_()
        torch.clear_autocast_cache()
        replay, found = devices.captured(self.results)
        with torch.no_grad():
            for tensor, its in zip(self.inputs, numbers, strict=True):
                tensor.copy_(its)
        replay()
        return found

    def judged(self) -> tuple[str, bool]:
        """Runs the cell; returns what is to be said, and whether all is right."""
        runs = [self.results(), *([self.replayed()] if self.setting.device in GRAPHS else [])]
        with torch.no_grad():  # inference
            inferred = self.called(record=not self.record)
        path, first = self.cell.path, list(itertools.chain(*runs[0]))
        differing = sum(
            not all(map(torch.equal, first, itertools.chain(*self.results())))
            for _ in range(self.repeats)
        )
        (_, *true), expected = self.exact()
        # The tolerances of coarse types are made for longer sequences and larger layers.
        strictness = 1.0 if self.setting.dtype in EXACT else 0.2
        most, most_of_gradients = (strictness * bound for bound in TOLERANCE[self.setting.dtype])
        # snnTorch's own spikes are float32.
        most_of_gradients = max(most_of_gradients, 1e-4 * self.leaky)
        # Levels that rounding changes explain the rest.
        share, right = 1 - DECIDING * ("state_quant" in self.options), differing == 0
        texts = [] if right else [f"{differing} of {self.repeats} repeats differ"]
        for trained, found in runs:
            recorded, other = (trained, inferred) if self.record else (inferred, trained)
            (spk, *states), (last_spk, *last) = recorded, other
            wrong = self.wrong_spikes(spk, states[-1])
            wrong += self.wrong_spikes(last_spk[-1:], last[-1][None])
            rounded = float((last_spk != spk).double().mean())
            pairs = zip((*states, *last), (*true, *(every[-1] for every in true)), strict=True)
            far = [(one.double() - other).abs() for one, other in pairs]
            states = [difference.flatten().quantile(share) for difference in far]
            pairs = zip(found, expected, strict=True)
            errors = [(one - other).norm() / other.norm() for one, other in pairs]
            # NaN is the largest number.
            state_error, gradients = (float(torch.stack(e).max()) for e in (states, errors))
            spiking = float(spk.ne(0).double().mean())
            right &= (
                wrong == 0 and rounded <= ROUNDED and state_error <= most
                and gradients <= most_of_gradients and spiking > SPIKING / 3
                and path.name.startswith(self.setting.device.split("-")[0])
            )  # fmt: skip
            text = f"{wrong} wrong and {spiking:.1%} of all spike, states {state_error:.1e}"
            texts.append(f"{text}, gradients {gradients:.1e}")
        return f"{path.name}, {'; replayed '.join(texts)}", right

    def wrong_spikes(self, spk: Tensor, mem: Tensor) -> int:
        """Counts the spikes (T, N, C, H, W) that mem of the same run does not give."""
        threshold, pooled = self.cell.threshold.detach().double(), self.pooled(mem)
        graded = threshold.new_tensor(self.graded)
        true = torch.stack([fire(image, threshold, graded, lambda u: u > 0) for image in pooled])
        if self.lengths is not None:
            steps = torch.arange(len(self.inputs[0]), device=spk.device)[-len(spk) :, None]
            true *= (steps < self.lengths)[..., None, None, None]
        return int((spk.double() != true).sum())


def lost(device: str) -> bool:
    """Returns whether an error has ended all work of this process on the GPU."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_smoke", description=__doc__)
    parser.add_argument("--device", choices=devices.DEVICES, default="cuda")
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=ALGORITHMS)
    parser.add_argument("--options", nargs="+", choices=OPTIONS, default=tuple(OPTIONS))
    parser.add_argument("--sizes", nargs=6, type=int, default=SIZES, metavar="SIZE")
    parser.add_argument("--first", type=int, default=0, help="the row from which a run goes on")
    options = parser.parse_args(given)
    # A run goes on only behind an error.
    wrong, waits = int(options.first > 0), "CUDA_LAUNCH_BLOCKING" in os.environ
    with devices.running(options.device):
        rows = slice(options.first, None)
        found = run(options.device, options.sizes, options.algorithms, options.options, rows)
        for number, (line, right) in enumerate(found, options.first):
            print(line if right else f"WRONG  {line}", flush=True)
            wrong += not right
            if not right and lost(options.device):
                command = [sys.executable, "-m", "benchmarks.gpu_smoke", *given]
                command += ["--first", str(number + waits)]
                os.execve(sys.executable, command, os.environ | {"CUDA_LAUNCH_BLOCKING": "1"})
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
