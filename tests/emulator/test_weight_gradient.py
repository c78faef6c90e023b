"""The kernels that form the gradient of weight, apart from the rest of a backward pass.

The backward pass is given gates and syn that no forward pass has saved: positive ones, so that a
sum loses what its rounding takes from it. Algorithm "cudnn" hands equal d_gates and mem to torch,
which tells the tests what the kernels have summed.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from snnlstm.native import cuda
from snnlstm.native.plan import Result
from tests.emulator.modes import MODES, PLAIN, Mode
from tests.shared import flat
from tests.shared.cases import Case

WEIGHT = (False, False, False, True, False, False)


class Given:
    """A backward pass of a recorded sequence without spikes' gradients."""

    def __init__(self, core, case: Case, mode: Mode) -> None:
        self.core, self.mode, self.case = core, mode, mode.applied(case)
        self.generator = torch.Generator().manual_seed(1)
        inputs = self.case.inputs()
        images = (self.positive(t.shape).to(t.dtype) for t in inputs[:3])
        self.call = (*images, *inputs[3:], self.case.options)
        with mode.running(core):
            plan = flat.plan_of(self.call, "fused")
        self.saved = torch.zeros(plan.saved.bytes, dtype=torch.uint8)
        gates, syn = (plan.saved.part(self.saved, number) for number in range(2))
        channels = torch.arange(syn.shape[-1]) < case.channels
        gates.copy_((self.positive(gates.shape).unflatten(-1, (4, -1)) / 2 * channels).flatten(-2))
        syn.copy_(self.positive(syn.shape) * channels)
        states = (case.time, *self.case.state_shape)
        self.grads = (None, *(self.positive(states).to(inputs.x.dtype) for _ in range(2)))

    def positive(self, shape) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator) + 0.5

    def backward(self, algorithm: str = "fused"):
        with self.mode.running(self.core):
            result = Result(*self.call[:3], self.saved)
            return flat.backward(self.call, result, self.grads, WEIGHT, algorithm)

    def summed(self, monkeypatch) -> tuple[torch.Tensor, torch.Tensor]:
        """mem before each step, (T, N, Cp, Ho, Wo), and d_gates, (T, N, Ho * Wo, 4, Cp)."""
        found = []

        def note(plan, how, x, mem, d_gates, wanted):
            found.extend((mem.double(), d_gates.double().unflatten(-1, (4, -1))))
            return None, None

        with monkeypatch.context() as patch:
            patch.setattr(cuda.cudnn, "_weight_gradient", note)
            self.backward("cudnn")
        return tuple(found)


def long_sums(core, monkeypatch, mode: str, time: int, special: float | None = None):
    """Gradients of a 1x1 convolution of few channels in one block, and the same in float64."""
    one = replace(MODES[mode], multiprocessors=1)
    case = PLAIN.but(kernel_size=(1, 1), time=time, batch=1, in_channels=1, channels=8,
                     height=32, width=32)  # fmt: skip
    core.settings.races = 0
    given = Given(core, case, one)
    x = given.call[0]
    if special is not None:
        x[0, 0, 0, 3, 5] = special
    found = given.backward().weight.double().reshape(32, 9)
    mem, d_gates = given.summed(monkeypatch)
    inputs = torch.cat([x.double(), mem], 2).flatten(3)
    return found, torch.einsum("tnpg,tnip->gi", d_gates.flatten(3), inputs)


# The share by which long sums may shrink, since each k-step loses half a unit in the 24th bit of
# the sum so far for each of 10 terms. In tf32 and 16-bit types a fold comes after 128 k-steps,
# which is little beside the operands' errors.
SHRINKS = {"tf32": 4e-5, "bfloat16 autocast": 4e-5}


@pytest.mark.emulator_long
@pytest.mark.parametrize("mode", SHRINKS)
def test_long_sums_survive_truncating_tensor_cores(core, monkeypatch, mode):
    """One accumulator over all of a block's tiles would shrink them by 5e-5 and more."""
    nearest, _ = long_sums(core, monkeypatch, mode, time=128)
    core.settings.truncates = 1
    actual, expected = long_sums(core, monkeypatch, mode, time=128)
    assert abs(float((actual / nearest).mean()) - 1) < SHRINKS[mode]
    assert float((actual / expected - 1).abs().max()) < 1e-3


@pytest.mark.emulator_long
def test_long_sums_without_tensor_cores(core, monkeypatch):
    actual, expected = long_sums(core, monkeypatch, "float32", time=64)
    assert float((actual / expected - 1).abs().max()) < 2e-6


@pytest.mark.parametrize("special", [torch.inf, -torch.inf, torch.nan, 1e30])
def test_infinity_and_nan_come_out_as_they_are(core, monkeypatch, special):
    actual, expected = long_sums(core, monkeypatch, "tf32", 1, special)
    torch.testing.assert_close(actual, expected, atol=0, rtol=1e-3, equal_nan=True)
