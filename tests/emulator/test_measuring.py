"""Tests measured choices with a clock of the tests' own: what is timed, kept and said."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

import snnlstm
from snnlstm.native import cuda
from tests.emulator.modes import MODES, PLAIN
from tests.shared import flat
from tests.shared.cases import wanting_gradients
from tests.shared.gradients import compare, gradients, gradients_for

NARROW = PLAIN.but(time=2, batch=1, channels=6, height=4, width=6)
WIDE = NARROW.but(channels=40)
FORWARD = {"mma-tf32-4x1", "mma-tf32-2x1", "cudnn"}
BACKWARD = {"mma-tf32-4x1", "mma-tf32-2x1x2", "cudnn"}
ON_WIDE = {"mma-tf32-4x2", "mma-tf32-2x2"}


class Clock:
    """Gives one algorithm the shortest time, and notes which are timed."""

    def __init__(self, core, best: str = "") -> None:
        core.kernels.seconds = self
        self.best = best
        self.timed: list[str] = []

    def __call__(self, run) -> float:
        run()
        (plan,) = run.args
        self.timed.append(plan.name)
        return 1.0 if plan.name == self.best else 2.0


def run(cell, x):
    spk, syn, mem = cell(x, *cell.reset_mem())
    return torch.autograd.grad(spk.sum() + mem.sum(), cell.conv.weight)[0]


def test_forward_and_backward_are_measured_once_and_apart(core):
    cell, x = snnlstm.SConv2dLSTM(2, 6, 3, threshold=0.1), torch.rand(2, 1, 2, 4, 6)
    with MODES["tf32"].running(core), snnlstm.algorithm("measure"):
        clock = Clock(core, "mma-tf32-2x1")
        spk, syn, mem = cell(x, *cell.reset_mem())
        assert set(clock.timed) == FORWARD
        assert cell.path.name == "emulator-measured-mma-tf32-2x1"
        clock.timed.clear()
        clock.best = "cudnn"
        spk.sum().backward()
        assert set(clock.timed) == BACKWARD
        clock.timed.clear()
        run(cell, x)
        assert clock.timed == []
        assert cell.path.name == "emulator-measured-mma-tf32-2x1+cudnn"
        cell(x[:1], *cell.reset_mem())  # another shape
        assert len(clock.timed) == len(FORWARD)


SHORT = {"mma-tf32-2x1", "mma-tf32-2x1x2", "cudnn"}


@pytest.mark.parametrize(
    "best",
    [
        pytest.param(name, marks=[] if name in SHORT else pytest.mark.emulator_long)
        for name in sorted(FORWARD | BACKWARD | ON_WIDE)
    ],
)
def test_every_algorithm_that_may_be_chosen_is_right(core, best):
    case = WIDE if best in ON_WIDE else NARROW
    case = MODES["tf32"].applied(case.but(pool="avg", pool_size=(2, 2)))
    inputs, grads = case.inputs(), gradients_for(case)
    with MODES["tf32"].running(core):
        clock = Clock(core, best)
        actual = gradients(
            lambda *call: flat.run(*call, "measure"), inputs, case.options, grads, ("x", "weight")
        )
        assert best in clock.timed
    exact = gradients(flat.reference, inputs.double(), case.options, grads, ("x", "weight"))
    compare(actual, exact, 1e-2, grads)


def test_the_rules_decide_while_nothing_may_be_timed(core, monkeypatch):
    """Torch's own switch measures, too. The rules' choice is kept if nothing is faster."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    with MODES["tf32"].running(core):
        clock = Clock(core)
        for algorithm, may, name in (
            ("measure", False, "mma-tf32"), ("direct", True, "mma-tf32"),
            ("auto", True, "measured-mma-tf32-2x1"),
        ):  # fmt: skip
            assert clock.timed == []
            core.kernels.may_measure = lambda may=may: may
            flat.run(*NARROW.inputs(), NARROW.options, algorithm)
            assert flat.last_name() == f"emulator-{name}"
        assert set(clock.timed) == FORWARD
        assert clock.timed[0] == "mma-tf32-2x1"


def test_a_checkpoint_recomputes_by_the_measured_choice(core):
    case = NARROW.but(record=False, checkpoint=True, time=5)
    with MODES["tf32"].running(core):
        Clock(core, "mma-tf32-2x1")
        leaves = wanting_gradients(case.inputs())
        sum(o.sum() for o in flat.run(*leaves, case.options, "measure")).backward()


# ---- the real clock, without a GPU ------------------------------------------------------------


class Event:
    """A torch.cuda.Event; `now` is the device's time."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Event.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


@pytest.mark.parametrize(
    ("runs", "seconds", "said"),
    [
        ([100.0, 9.0, 7.0, 8.0], 7e-3, []),
        ([torch.cuda.OutOfMemoryError()], math.inf, []),
        ([RuntimeError("no image")], math.inf, ["a candidate is not timed: no image"]),
    ],
)
def test_the_shortest_run_after_the_first_counts_unless_one_fails(
    runs, seconds, said, monkeypatch, caplog
):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    left = iter(runs)

    def run() -> None:
        if isinstance(time := next(left), Exception):
            raise time
        Event.now += time

    assert cuda.Backend(None).seconds(run) == pytest.approx(seconds)
    assert list(left) == []
    assert caplog.messages == said


def test_nothing_is_timed_in_a_capture_or_in_deterministic_mode(monkeypatch):
    capturing = SimpleNamespace(now=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing.now)
    kernels = cuda.Backend(None)
    assert kernels.may_measure()
    capturing.now = True
    assert not kernels.may_measure()
    capturing.now = False
    torch.use_deterministic_algorithms(True)
    try:
        assert not kernels.may_measure()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_plan_is_named_while_another_thread_measures():
    class Growing(dict):
        def items(self):
            for key, core in super().items():
                self[True, len(self)] = core  # as the other thread does
                yield key, core

    passes = cuda.Passes.__new__(cuda.Passes)
    passes.backend = SimpleNamespace(name=lambda: "cuda")
    passes._measured = Growing({(False,): SimpleNamespace(name="fused")})
    assert passes._named() == "cuda-measured-fused"
