"""Runs whole networks: an unchanged loop over time with either library's cell, and as sequences."""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import snntorch
import torch

import snnlstm
from benchmarks.agreement import Disagreement
from benchmarks.networks import NETWORKS, Network
from benchmarks.providers.base import Runner, Setting, Unavailable
from benchmarks.unrolled import DOCUMENTED, FRONTS, SEQUENCES
from snnlstm.native.function import _SConv2dLSTM

FORMS: dict[str, tuple[int, Any]] = {
    "snntorch": (0, snntorch.SConv2dLSTM),
    "snnlstm-step": (0, snnlstm.SConv2dLSTM),
    "snnlstm": (1, snnlstm.SConv2dLSTM),
}
"""The name of a provider has what it runs, the loop (0) or the sequences (1), and its cell."""


@dataclass(frozen=True)
class NetworkCase:
    """Stands for a Case in the suite's tables; `forms` are the loop and the sequences."""

    name: str
    forms: tuple[Network, Network]
    goals: tuple[float, float] | None = None
    goals_of: str = "snnlstm-step"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.forms[0].data[0]

    @property
    def batch(self) -> int:
        return self.shape[self.forms[0].batch_dim]

    @property
    def steps(self) -> int:
        """Returns the number of times that the loop calls the last layer."""
        return self.forms[0].infer(_made(self.forms[0], snnlstm.SConv2dLSTM), self.data[0]).shape[0]

    @property
    def data(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.forms[0].batches()[0]

    @property
    def title(self) -> str:
        return f"x {'x'.join(map(str, self.shape))}"

    def columns(self) -> dict[str, Any]:
        """Returns the fields of a row of results; a network has no channels of its own."""
        none = dict.fromkeys(("cin", "cout", "height", "width"), 0)
        named = {"case": self.name, "options": self.title, "kernel": "", "density": 0.3}
        return none | named | {"steps": self.steps, "batch": self.batch}

    def goal(self, mode: str) -> float | None:
        """Returns the goal in `mode`, or None."""
        return None if self.goals is None else self.goals[0 if mode == "forward" else 1]

    def providers(self, names: Iterable[str], setting: Setting) -> dict[str, WholeNetwork]:
        """Makes the providers of these names; a Disagreement says that one computes otherwise."""
        if setting.dtype != "float32":
            raise Unavailable(f"networks run in float32, not in {setting.dtype}")
        made = {name: WholeNetwork(self, name, setting) for name in FORMS if name in names}
        losses = {name: provider.loss() for name, provider in made.items()}  # one may train
        expected = losses["snntorch"]
        # bfloat16 decides some spikes otherwise.
        bound = 0.05 if self.forms[0].autocast else 1e-4
        for name, loss in losses.items():
            if not abs(loss - expected) <= bound * (1 + abs(expected)):
                raise Disagreement(f"{name}: the loss is {loss}, not {expected}")
        return made


def _made(network: Network, cell: Any) -> Any:
    torch.manual_seed(0)
    return network.make(cell)


class WholeNetwork:
    """Runs one form of a network with one library's cell."""

    def __init__(self, case: NetworkCase, name: str, setting: Setting) -> None:
        form, cell = FORMS[name]
        self.network, self.setting = case.forms[form], setting
        with self.context():
            self.net = _made(self.network, cell)
            self.x, self.y = self.network.batches()[0]
        self.optimizer = self.network.optimizer(self.net.parameters())
        self.initial = copy.deepcopy(self.net.state_dict())

    def context(self) -> Any:
        """Makes the device of the setting torch's default."""
        cuda = self.setting.device == "cuda"
        return torch.device("cuda") if cuda else nullcontext()

    @property
    def path(self) -> str:
        """Returns the paths of our cells."""
        cells = [m for m in self.net.modules() if isinstance(m, snnlstm.SConv2dLSTM)]
        return ", ".join(dict.fromkeys(str(cell.path) for cell in cells))

    def prepare(self, mode: str) -> Runner:
        """Returns (setup, run), as every provider.

        Each training step begins with the same weights but for a rounding error, as in the suite.
        """
        if mode == "backward":
            raise Unavailable("a network trains in whole steps, of which backward is a part")

        factors = itertools.cycle((1 + 1e-6, 1.0))

        def setup() -> None:
            self.net.load_state_dict(self.initial)
            if mode == "both":
                with torch.no_grad():
                    factor = next(factors)
                    for parameter in self.net.parameters():
                        parameter.mul_(factor)

        def run() -> object:
            with self.context():
                if mode == "both":
                    return self.network.step(self.net, self.optimizer, self.x, self.y)
                with torch.no_grad():
                    return self.network.infer(self.net, self.x)

        return setup, run

    def loss(self) -> float:
        """Returns the loss of a first training step."""
        setup, run = self.prepare("both")
        setup()
        torch.manual_seed(1)  # dropout
        return run().item()  # type: ignore[attr-defined]

    def not_cell(self, runner: Runner, rounds: int = 9) -> float:
        """Returns the share of the time of a run that is not spent in our cells."""
        setup, run = runner
        shares = []
        for _ in range(rounds):
            setup()
            with _timed_cells() as spent:
                begin = time.perf_counter()
                run()
                whole = time.perf_counter() - begin
            shares.append(1 - sum(spent) / whole)
        return statistics.median(shares)


@contextmanager
def _timed_cells() -> Iterator[list[float]]:
    """Within the block, notes the seconds of each call of a cell, and of its backward pass."""
    spent: list[float] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent.append(time.perf_counter() - begin)

        return call

    forward = mock.patch.object(snnlstm.SConv2dLSTM, "forward", timed(snnlstm.SConv2dLSTM.forward))
    backward = staticmethod(timed(_SConv2dLSTM.backward))
    with forward, mock.patch.object(_SConv2dLSTM, "backward", backward):
        yield spent


TABLES = {
    "networks": {
        "documentation": NetworkCase("documentation", DOCUMENTED, goals=(3, 2.6)),
        **{name: NetworkCase(name, (NETWORKS[name], SEQUENCES[name])) for name in NETWORKS},
    },
    "fronts": {name: NetworkCase(name, forms) for name, forms in FRONTS.items()},
}
