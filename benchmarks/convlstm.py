"""Times the ConvLSTM without spikes beside others' implementations, in interleaved rounds.

    python -m benchmarks.convlstm [--seconds 8] [--cases nowcasting ...]

Every provider has the same weights, and is timed only if it computes what the plain loop does.
Keras takes part where it is installed, with torch as its backend.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

import snnlstm
from benchmarks.timing import Budget, time_interleaved, warm_up
from tests.shared.plain_convlstm import Stack


@dataclass(frozen=True)
class Case:
    """A case is a stack of layers on an x of (batch, steps, channels, height, width)."""

    name: str
    hidden: list[int]
    kernel: int
    shape: tuple[int, int, int, int, int]
    goals: tuple[float, float]  # speed-ups over the plain loop, of inference and of training

    def build(self, kind: Callable[..., nn.Module]) -> nn.Module:
        """Returns a stack of a class, with the weights that one seed gives."""
        torch.manual_seed(0)
        kernel = self.kernel, self.kernel
        return kind(self.shape[2], self.hidden, kernel, len(self.hidden), batch_first=True)


CASES = (
    Case("nowcasting", [16, 16], 3, (8, 10, 1, 48, 48), (3.5, 3)),
    Case("video", [32], 3, (8, 10, 16, 32, 32), (3, 2.5)),
    Case("5x5", [16], 5, (8, 10, 8, 40, 40), (4, 3)),
)


def with_keras(case: Case) -> nn.Module:
    """Returns Keras's layers with the weights of the plain stack; its gates are i, f, g, o."""
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    layers = []
    plain: Any = case.build(Stack)
    for cell, hidden in zip(plain.cell_list, case.hidden, strict=True):
        layer = keras.layers.ConvLSTM2D(
            hidden, case.kernel, padding="same", return_sequences=True,
            data_format="channels_first", recurrent_activation="sigmoid", unit_forget_bias=False,
        )  # fmt: skip
        layer.build((None, None, cell.input_dim, *case.shape[3:]))
        i, f, o, g = cell.conv.weight.detach().chunk(4)
        weight = torch.cat([i, f, g, o]).permute(2, 3, 1, 0)
        i, f, o, g = cell.conv.bias.detach().chunk(4)
        halves = weight.split([cell.input_dim, hidden], 2)
        layer.set_weights([t.numpy() for t in (*halves, torch.cat([i, f, g, o]))])
        layers.append(layer)
    return nn.Sequential(*layers)


def compiled(model: nn.Module) -> nn.Module:
    """Returns the model with its cells compiled, as users compile a loop."""
    for cell in model.cell_list:  # type: ignore[union-attr]
        cell.compile(dynamic=False)
    return model


PROVIDERS: dict[str, Callable[[Case], Any]] = {
    "plain loop": lambda case: case.build(Stack),
    "plain, compiled": lambda case: compiled(case.build(Stack)),
    "snnlstm": lambda case: case.build(snnlstm.ConvLSTM),
    "snnlstm, compiled": lambda case: torch.compile(case.build(snnlstm.ConvLSTM), dynamic=False),
}
if find_spec("keras"):
    PROVIDERS["keras"] = with_keras


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """Returns h of every step of the last layer."""
    out = model(x)
    return out[0][0] if isinstance(out, tuple) else out


def infer(model: nn.Module, x: Tensor) -> None:
    """Runs inference."""
    with torch.no_grad():
        outputs(model, x)


def train(model: nn.Module, x: Tensor) -> None:
    """Runs both passes."""
    outputs(model, x).square().sum().backward()


def main() -> None:
    """Prints milliseconds per step, and the times of the plain loop over them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=8, help="for each case and mode")
    parser.add_argument("--cases", nargs="+", default=[case.name for case in CASES])
    chosen = parser.parse_args()
    for case in CASES:
        if case.name not in chosen.cases:
            continue
        torch._dynamo.reset()
        x = torch.rand(case.shape)
        x.requires_grad_(case.shape[2] > 4)  # a first layer's input needs no gradient
        models = {name: build(case) for name, build in PROVIDERS.items()}
        with torch.no_grad():
            expected = outputs(models["plain loop"], x)
            for name, model in models.items():
                torch.testing.assert_close(outputs(model, x), expected, atol=1e-4, rtol=0, msg=name)
        for mode, goal in zip(("inference", "training"), case.goals, strict=True):
            step = partial(infer if mode == "inference" else train, x=x)
            budget = Budget(chosen.seconds)
            runners = {
                name: (model.zero_grad, partial(step, model)) for name, model in models.items()
            }
            for runner in runners.values():
                warm_up(runner, "cpu", budget)
            times = time_interleaved(runners, "cpu", budget)
            print(f"{case.name}, {mode} (goal {goal}):")
            for name, found in times.items():
                ratio = times["plain loop"].p50 / found.p50
                per_step = 1e3 * found.p50 / case.shape[1]
                print(f"  {name:18} {per_step:8.2f} ms a step  {ratio:5.2f} times", flush=True)


if __name__ == "__main__":
    main()
