"""Layers that take no sequences, run together: all of them for some steps, then for the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .gather import Gathered, first_item
from .layers import Frozen, LayerReport, may_write, report_of

__all__ = ["FOLD", "own", "run_together"]

FOLD = 2 << 20
"""Bytes of the largest tensor of steps that run as one batch on the CPU; one step may have more.

Networks with layers on 32x32 in front of a cell run 1.06 to 1.10 times as fast as step by step, and
those on 64x64 as fast (benchmarks/NOTES.md). With conv, ReLU, cell, conv, ReLU, pool, linear on
32x32 to 112x112 and all steps at once the network trained at 0.7 to 1.4 times the speed of
snnTorch's, with chunks of 2 MiB at 1.8 to 2.0. Each layer reads tensors that do not fit into the
cache from memory again, and the system maps and clears each tensor above 32 MiB anew.
"""


def run_together(
    layers: list[tuple[str, nn.Module]],
    x: Tensor,
    reports: list[LayerReport],
    lengths: Tensor | None = None,
) -> Any:
    """Run named layers over (T, N, ...); returns what the last one returns at all steps.

    Each layer's report is appended to `reports`, and `lengths` are the steps of each sample. On the
    CPU as many steps go through all layers at a time as fit the cache, and a step that is large
    goes alone, as in the loop.
    """
    run, count = _Run(layers, lengths), x.shape[0]
    gathered = Gathered(layers[-1][0], count)
    in_chunks = x.device.type == "cpu" and not torch.compiler.is_compiling()
    if count == 1 or not in_chunks or x.nbytes <= FOLD // 8:
        gathered.add(run(x))
    else:
        # The gradient of slices would fill one whole x of zeros for each of them.
        steps = x.unbind(0)
        apart = x.requires_grad and torch.is_grad_enabled()
        gathered.add(run(steps[:1]))
        most = max(1, FOLD // run.largest)
        for begin in range(1, count, most):
            end = min(begin + most, count)
            gathered.add(run(steps[begin:end] if apart or most == 1 else x[begin:end]))
    reports += run.reports
    return gathered.result()


class _Run:
    """The layers, and how each of them is called, which the first call finds out."""

    def __init__(self, layers: list[tuple[str, nn.Module]], lengths: Tensor | None) -> None:
        self.layers, self.lengths = layers, lengths
        self.calls: list[Callable[[Tensor], Any]] = []
        self.reports: list[LayerReport] = []
        self.writes: list[bool] = []  # whether a layer may write to its input
        self.largest = 1  # bytes of the largest tensor of the first call

    def __call__(self, given: Any) -> Any:
        """Run the layers over some steps: a sequence of steps (N, ...), or one tensor (k, N, ...).

        Returns the same of the last layer's results. Layers that treat every sample alone get
        several steps as one batch.
        """
        count = len(given)
        first = not self.reports
        batch = given.flatten(0, 1) if isinstance(given, Tensor) else None
        steps: Any = None if batch is not None else given
        before = ""
        for index, (name, layer) in enumerate(self.layers):
            if batch is None and index:
                steps = [first_item(before, step) for step in steps]
            if first:
                self._learn(name, layer, steps[0] if batch is None else batch)
            before = name
            writes = self.writes[index]
            if count > 1 and self.reports[index].kind == "fold":
                if batch is None:
                    batch = torch.cat(steps)
                batch = layer(own(batch) if writes else batch)
            else:
                if batch is not None:
                    steps = batch.unflatten(0, (count, batch.shape[0] // count)).unbind(0)
                    batch = None
                call = self.calls[index]
                steps = [call(own(step) if writes else step) for step in steps]
        if first:
            self._measure(steps[0] if batch is None else batch)
        if batch is None:
            return steps
        return batch.unflatten(0, (count, batch.shape[0] // count))

    def _learn(self, name: str, layer: nn.Module, x: Any) -> None:
        self.reports.append(report_of(name, layer, x.dim()))
        self.writes.append(may_write(layer))
        frozen = self.lengths is not None and self.reports[-1].kind == "step"
        self.calls.append(Frozen(layer, self.lengths) if frozen else layer)  # type: ignore[arg-type]
        self._measure(x)

    def _measure(self, out: Any) -> None:
        # A symbolic shape has no nbytes.
        x = out[0] if isinstance(out, tuple | list) else out
        if isinstance(x, Tensor) and not torch.compiler.is_compiling():
            self.largest = max(self.largest, x.nbytes)


def own(x: Tensor) -> Tensor:
    """A copy of one of several views of a tensor, to which a layer may write.

    Autograd refuses to let a layer change such a view in place; without it no copy is made.
    """
    if not torch.is_grad_enabled():
        return x
    return x.clone() if torch.compiler.is_compiling() or x._is_view() else x
