"""Cells compute, hold and save what snntorch 1.0.0's cells do: chosen calls, and random ones.

Whole trajectories are compared with their gradients, and spikes exactly, in float64: no potential
comes within its rounding of a threshold. tests/kernels compares float32 with float64, and fuzz.py
tests options that only our cell has.
"""

from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import pytest
import snntorch
import torch
from hypothesis import example, given

import snnlstm
from snnlstm.surrogate import KINDS
from tests.shared.cases import IN_SNNTORCH, PLAIN, Case, cases, drawing
from tests.shared.gradients import gradients_by_name
from tests.shared.helpers import close, quietly, states, steps, twins
from tests.shared.table import arguments, tagged

SMALL = PLAIN.but(dtype=torch.float64, in_channels=2, channels=3, height=5, width=7, reset="none")


@dataclass(frozen=True)
class Twins:
    """Holds a case, and the way in which both libraries' cells run and differentiate it."""

    case: Case = SMALL
    learn: bool = False
    explicit: bool = True  # the caller passes states, else the cell has stored states
    whole: bool = False  # our cell runs the sequence by one call
    through: str = "both"  # the loss reads "spikes", "states" or "both"

    def make(self, library: Any) -> Any:
        options, inputs = self.case.options, self.case.inputs()
        kind, *parameters = vars(options.surrogate).values()
        spike_grad = getattr(snntorch.surrogate, KINDS[kind].name)
        cell = quietly(
            library.SConv2dLSTM,
            self.case.in_channels,
            self.case.channels,
            options.kernel_size,
            bias=self.case.bias,
            threshold=inputs.threshold.float(),
            learn_threshold=self.learn,
            spike_grad=spike_grad(**dict(zip(KINDS[kind].parameters, parameters, strict=False))),
            **arguments(options),
        ).double()
        with torch.no_grad():
            cell.conv.weight.copy_(inputs.weight)
            if self.case.bias:
                cell.conv.bias.copy_(inputs.bias)
        return cell

    def inputs(self) -> list[torch.Tensor]:
        """Returns x, syn and mem as leaves that require a gradient."""
        return [t.requires_grad_() for t in self.case.inputs()[:3]]

    def run(self, cell: Any, inputs: list[torch.Tensor], whole: bool) -> list[torch.Tensor]:
        """Returns spk, syn and mem of every step, (T, ...)."""
        x, *state = inputs
        if not self.explicit:
            cell.syn, cell.mem = state
            state = []
        if whole:
            return list(cell(x, *state, record=True))
        out = []
        for x_t in x:
            out.append(cell(x_t, *state))
            state = out[-1][1:] if self.explicit else []
        return [torch.stack(part) for part in zip(*out, strict=True)]

    def gradients(self, cell: Any, inputs: list[torch.Tensor], out: list[torch.Tensor]) -> Any:
        """Returns the gradients through spikes, states or both, by name."""
        seen = {"spikes": out[:1], "states": out[1:], "both": out}[self.through]
        leaves = dict(cell.named_parameters(), **dict(zip("xsm", inputs, strict=True)))
        return gradients_by_name(seen, leaves)


def of_snntorch(case: Case) -> Case:
    """Returns a small call of what snnTorch's cell can do."""
    spike = case.options.surrogate
    return case.but(
        dtype=torch.float64, sequence=True, record=True, spiking=True, stride=(1, 1),
        dilation=(1, 1), quant=None, graded=1.0, lengths=None,
        surrogate=spike if spike in IN_SNNTORCH else IN_SNNTORCH[0],
        layouts=(case.layouts[0], *["contiguous"] * 3),
        in_channels=min(case.in_channels, 4), channels=min(case.channels, 9),
        height=min(case.height, 11), width=min(case.width, 11),
    )  # fmt: skip


TWINS = st.builds(
    Twins, cases().map(of_snntorch), st.booleans(), st.booleans(), st.booleans(),
    st.sampled_from(["spikes", "states", "both"]),
)  # fmt: skip


def judge(case: Twins, backend: Any) -> None:
    """Compares both libraries' cells."""
    cell, other = case.make(snnlstm), case.make(snntorch)
    mine, theirs = case.inputs(), case.inputs()
    out = case.run(cell, mine, case.whole)
    backend.check(cell.path, native=case.case.batch > 0)
    expected = case.run(other, theirs, whole=False)
    assert torch.equal(out[0], expected[0].double()), "spikes differ"
    close(out[1:], [e.double() for e in expected[1:]], atol=1e-12, rtol=0)
    # snnTorch's reset * threshold, and its gradient, are float32 for any dtype of the cell.
    error = 6e-6 if case.learn and case.case.options.reset == "subtract" else 1e-10
    wanted = case.gradients(other, theirs, expected)
    for name, grad in case.gradients(cell, mine, out).items():
        right = wanted[name].double()
        scale = max(1.0, float(right.abs().max())) if right.numel() else 1.0
        if name == "threshold":  # a number of each neuron and step, whose sum may cancel
            scale = max(scale, out[0].numel() ** 0.5)
        close(grad / scale, right / scale, atol=error, rtol=0)


@pytest.mark.drawn
def test_any_combination_of_options_equals_snntorch(backend):
    @drawing({"emulator": 3, "reference": 20}.get(backend.name, 60))
    @example(Twins(SMALL.but(height=1, width=1, kernel_size=(5, 5), channels=1, reset="zero")))
    @example(Twins(SMALL.but(batch=0, reset="subtract", pool="max", pool_size=(2, 2))))
    @given(TWINS)
    def check(case):
        judge(case, backend)

    for case in tagged("snntorch").values():
        check = example(Twins(case.but(dtype=torch.float64, time=2), learn=True, whole=True))(check)
    check()


@pytest.mark.parametrize("in_x", [False, True], ids=["gradient", "x"])
@pytest.mark.parametrize("mechanism", ["none", "subtract", "zero"])
def test_nan_goes_where_snntorch_lets_it(backend, mechanism, in_x):
    """A NaN gradient passes a neuron that was reset, at which "zero" ends others.

    A NaN of x counts as no reset in the gradient of the threshold, which is the number of resets.
    """
    found = []
    for cell in twins(reset_mechanism=mechanism, learn_threshold=True):
        x, state = steps(1, 1, 2, 5, 5)[0], states(1, 3, 5, 5)
        state[1][0, 0, 2, 2] = 1  # which is above the threshold
        x[0, 0, 2, 2] = torch.nan if in_x else 0
        leaves = [t.requires_grad_() for t in (x, *state)]
        with snnlstm.algorithm("direct"):
            mem = cell(*leaves)[2]
        grad = torch.ones_like(mem)
        grad[0, 0, 2, 2] = 1 if in_x else torch.nan
        mem.backward(grad)
        found.append(
            [cell.threshold.grad, *(t.grad.isnan() for t in (*leaves, *cell.conv.parameters()))]
        )
    assert in_x or found[1][1].sum() == 18
    close(*found)


def test_the_oracle_is_snntorch_1_0_0():
    assert snntorch.__version__ == "1.0.0"


def test_attributes_that_users_touch(backend):
    actual, expected = twins(2, 3, (3, 5), reset_mechanism="subtract", max_pool=2)
    x = steps(1, 2, 2, 6, 6)[0]
    for _ in range(3):
        actual(x)
        expected(x)
    for name in ("spk", "syn", "mem"):
        close(getattr(actual, name), getattr(expected, name))
    for name in (
        "in_channels", "out_channels", "kernel_size", "padding", "max_pool", "avg_pool", "bias",
        "init_hidden", "inhibition", "output", "surrogate_disable", "state_quant",
        "reset_mechanism", "reset_mechanism_val", "graded_spikes_factor", "threshold",
    ):  # fmt: skip
        assert getattr(actual, name) == getattr(expected, name), name
    assert callable(actual.spike_grad)
    entries, wanted = (
        [(name, value.dtype, value.shape) for name, value in cell.state_dict().items()]
        for cell in (actual, expected)
    )
    assert entries == wanted
    close(actual.fire(actual.mem), expected.fire(expected.mem))
    close(actual.mem_reset(actual.mem), expected.mem_reset(expected.mem))
