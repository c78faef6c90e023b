"""Cells compute, hold and save what snntorch 1.0.0's cells do: chosen calls, and random ones.

Whole trajectories are compared with their gradients, and spikes exactly. That is sound only if no
potential comes within rounding of a discontinuity (a threshold, the middle between two levels), so
other random examples are discarded. fuzz.py tests options that only our cell has.
"""

from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import pytest
import snntorch
import torch
from hypothesis import assume, given

import snnlstm
from snnlstm.call import Call
from snnlstm.surrogate import KINDS
from tests.shared.cases import PLAIN, Case, cases, drawing
from tests.shared.cases import SURROGATES as ALL
from tests.shared.helpers import close, ours, quietly, states, steps, theirs
from tests.shared.helpers import twins as cells
from tests.shared.oracle import float32_error, pooled

# snnTorch's LSO cannot be called, and SSO draws other numbers.
SURROGATES = [
    s for s in ALL if s.name not in ("LSO", "SSO") and hasattr(snntorch.surrogate, s.name)
]
SMALL = PLAIN.but(dtype=torch.float64, in_channels=2, channels=3, height=5, width=7, reset="none")


@dataclass(frozen=True)
class Twins:
    """Holds a case, and the way in which both libraries' cells run and differentiate it."""

    case: Case = SMALL
    learn: bool = False
    explicit: bool = True  # the caller passes states, else the cell has stored states
    whole: bool = False  # our cell runs the sequence by one call
    through: str = "both"  # the loss reads "spikes", "states" or "both"

    @property
    def exact(self) -> bool:
        """Whether all but snnTorch's spikes is float64."""
        return self.dtype == torch.float64

    def error(self, path: str) -> float:
        """Returns by how much states may differ if our cell takes the path of this name."""
        return 1e-12 if self.exact else float32_error(path)

    def is_clear(self, cell: Any, inputs: list[torch.Tensor]) -> bool:
        """Returns whether nothing lies so near a discontinuity that rounding decides.

        The cell has run.
        """
        return margin(self, cell, inputs) > max(self.error(cell.path.name), 1e-10)

    @property
    def dtype(self) -> torch.dtype:
        return self.case.dtype

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
            reset_mechanism=options.reset,
            **({} if options.pool == "none" else {f"{options.pool}_pool": options.pool_size}),
        ).to(self.dtype)
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
        """Returns the gradients, by name, of a loss that weighs every element differently."""
        loss = torch.zeros((), dtype=self.dtype)
        seen = {"spikes": out[:1], "states": out[1:], "both": out}[self.through]
        for part in seen:
            # Multiples of 1/8, which a float32 spike's gradient holds exactly.
            weights = torch.arange(part.numel()).remainder(13).sub(6) / 8
            loss = loss + (part * weights.view(part.shape)).sum().to(self.dtype)
        leaves = dict(cell.named_parameters(), **dict(zip("xsm", inputs, strict=True)))
        grads = torch.autograd.grad(
            loss, list(leaves.values()), allow_unused=True, materialize_grads=True
        )
        return dict(zip(leaves, grads, strict=True))


def reference_run(cell: Any, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Returns the trajectory of the reference path in float64."""
    double = [t.double() for t in (*inputs, cell.conv.weight)]
    bias = None if cell.conv.bias is None else cell.conv.bias.double()
    threshold, graded = cell.threshold.double(), cell.graded_spikes_factor.double()
    call = Call(*double, bias, threshold, graded, record=True)
    return list(snnlstm.reference.run(call, cell._describe()))


@torch.no_grad()
def margin(case: Twins, cell: Any, inputs: list[torch.Tensor]) -> float:
    """Returns the least distance of the float64 trajectory to anything discontinuous."""
    spec = cell._describe()
    threshold = cell.threshold.detach().double()
    _, syn, mem = reference_run(cell, inputs)
    before = torch.cat([inputs[2][None].double(), mem[:-1]])
    near = [(before - threshold).abs()]
    mem = pooled(mem.flatten(0, 1), spec)
    near.append((mem - threshold).abs())
    if spec.surrogate.name == "SFS":
        near.append((mem - threshold - spec.surrogate.p1).abs())
    distances = torch.cat([part.flatten() for part in near])
    distances = distances[distances.isfinite()]
    return float(distances.min()) if distances.numel() else 1.0


@st.composite
def twins(draw: Any) -> Twins:
    """Draws small cases of what snnTorch can do, so that few come near a discontinuity."""
    case = draw(cases())
    case = case.but(
        kernel_size=tuple(min(k, 5) for k in case.options.kernel_size),
        sequence=True, record=True, stride=(1, 1), dilation=(1, 1), inhibition=False,
        checkpoint=False, quant=None, graded=1.0, surrogate=draw(st.sampled_from(SURROGATES)),
        time=draw(st.integers(1, 4)), batch=draw(st.sampled_from([1, 1, 2, 3, 0])),
        in_channels=min(case.in_channels, 4), channels=min(case.channels, 9),
        height=min(case.height, 11), width=min(case.width, 11),
        layouts=(case.layouts[0], *["contiguous"] * 3),
    )  # fmt: skip
    return Twins(
        case, *(draw(st.booleans()) for _ in range(3)),
        through=draw(st.sampled_from(["spikes", "states", "both"])),
    )  # fmt: skip


def compare(
    case: Twins, path: str, out: Any, expected: Any, grads: Any, expected_grads: Any
) -> None:
    # snnTorch's reset * threshold, and its gradient, are float32 for any dtype of the cell.
    exact = case.exact and not (case.learn and case.case.options.reset == "subtract")
    error = 1e-10 if exact else 3 * float32_error(path)
    assert torch.equal(out[0], expected[0].to(case.dtype)), "spikes differ"
    close(out[1:], [e.to(case.dtype) for e in expected[1:]], atol=case.error(path), rtol=0)
    for name, grad in grads.items():
        wanted = expected_grads[name].to(case.dtype)
        scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
        if name == "threshold":  # a number of each neuron and step, whose sum may cancel
            scale = max(scale, out[0].numel() ** 0.5)
        close(grad / scale, wanted / scale, atol=error, rtol=0)


def judge(case: Twins, backend: Any) -> tuple[torch.Tensor, ...] | None:
    """Compares both libraries' cells; returns spk, syn and mem of ours.

    The result is None if rounding may decide a spike.
    """
    cell, other = case.make(snnlstm), case.make(snntorch)
    mine, theirs = case.inputs(), case.inputs()
    out = case.run(cell, mine, case.whole)
    backend.check(cell.path, native=case.case.batch > 0)
    if not case.is_clear(cell, case.inputs()):
        return None
    expected = case.run(other, theirs, whole=False)
    grads = case.gradients(cell, mine, out), case.gradients(other, theirs, expected)
    compare(case, cell.path.name, out, expected, *grads)
    return out


PINNED = {
    "one pixel": Twins(SMALL.but(height=1, width=1, kernel_size=(5, 5), channels=1, reset="zero")),
    "no sample": Twins(SMALL.but(batch=0, reset="subtract", pool="max", pool_size=(2, 2))),
    "max pool": Twins(SMALL.but(reset="subtract", pool="max", pool_size=(2, 3)), whole=True),
    "average pool": Twins(SMALL.but(reset="zero", pool="avg", pool_size=(1, 3))),
    "float32": Twins(SMALL.but(dtype=torch.float32, channels=16), learn=True),
    # With tiles of 8x8 inputs the states differ by 7.3e-6, and by 5e-7 with direct convolution.
    "large tiles": Twins(
        PLAIN.but(
            kernel_size=(5, 5), time=4, batch=3, in_channels=4, height=11, width=11, seed=180
        ),
        whole=True,
    ),
}


# The emulator takes ten seconds for the large tiles, which only the CPU's kernels have.
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.emulator_long) if n == "large tiles" else n for n in PINNED],
)
def test_a_combination_of_options_equals_snntorch(backend, name):
    assert judge(PINNED[name], backend) is not None


@pytest.mark.drawn
def test_any_combination_of_options_equals_snntorch(backend):
    @drawing(8 if backend.name == "emulator" else 60)
    @given(twins())
    def check(case):
        assume(judge(case, backend) is not None)

    check()


@pytest.mark.parametrize("mechanism", ["none", "subtract", "zero"])
def test_nan_gradients_go_where_snntorch_lets_them(backend, mechanism):
    """They pass a neuron that was reset, at which "zero" ends others."""
    nans = []
    for cell in cells(reset_mechanism=mechanism):
        x, state = steps(1, 1, 2, 5, 5)[0], states(1, 3, 5, 5)
        state[1][0, 0, 2, 2] = 1  # which is above the threshold
        leaves = [t.requires_grad_() for t in (x, *state)]
        with snnlstm.algorithm("direct"):
            mem = cell(*leaves)[2]
        grad = torch.ones_like(mem)
        grad[0, 0, 2, 2] = torch.nan
        mem.backward(grad)
        nans.append([t.grad.isnan() for t in (*leaves, *cell.conv.parameters())])
    assert nans[1][0].sum() == 18
    close(*nans)


def test_a_nan_counts_as_no_reset(backend):
    """It does not in the gradient of the threshold, which is the number of resets."""
    gradients = []
    for cell in cells(reset_mechanism="subtract", learn_threshold=True):
        x, state = steps(1, 1, 2, 5, 5)[0], states(1, 3, 5, 5)
        x[0, 0, 2, 2] = torch.nan
        with snnlstm.algorithm("direct"):
            cell(x, *state)[2].sum().backward()
        gradients.append(cell.threshold.grad)
    close(*gradients)


def test_the_oracle_is_snntorch_1_0_0():
    assert snntorch.__version__ == "1.0.0"


@pytest.mark.parametrize("learn", [False, True])
def test_state_dicts_are_interchangeable_both_ways(learn):
    mine, snntorchs = ours(learn_threshold=learn), theirs(learn_threshold=learn, seed=5)
    keys = ["threshold", "graded_spikes_factor", "reset_mechanism_val", "conv.weight", "conv.bias"]
    assert list(mine.state_dict()) == list(snntorchs.state_dict()) == keys
    assert [n for n, _ in mine.named_parameters()] == [n for n, _ in snntorchs.named_parameters()]
    assert next(iter(dict(mine.named_parameters()))) == ("threshold" if learn else "conv.weight")
    assert mine.state_dict()["reset_mechanism_val"].dtype == torch.int64
    for old, new in ((snntorchs, ours(seed=7, learn_threshold=learn)), (mine, theirs(seed=8))):
        state = old.state_dict()
        new.load_state_dict(state, strict=True)
        for key, value in new.state_dict().items():
            assert torch.equal(value, state[key])


def test_attributes_that_users_touch(backend):
    actual, expected = cells(reset_mechanism="subtract", max_pool=2)
    x = steps(1, 2, 2, 6, 6)[0]
    for _ in range(3):
        actual(x)
        expected(x)
    for name in ("spk", "syn", "mem", "reset"):
        close(getattr(actual, name), getattr(expected, name))
    for name in (
        "in_channels", "out_channels", "kernel_size", "padding", "max_pool", "avg_pool", "bias",
        "init_hidden", "inhibition", "output", "surrogate_disable", "state_quant",
        "reset_mechanism", "reset_mechanism_val", "graded_spikes_factor", "threshold",
    ):  # fmt: skip
        assert getattr(actual, name) == getattr(expected, name), name
    assert callable(actual.spike_grad)
    close(actual.fire(actual.mem), expected.fire(expected.mem))
    close(actual.mem_reset(actual.mem), expected.mem_reset(expected.mem))


@pytest.mark.emulator_long
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("reset", ["none", "zero", "subtract"])
def test_a_threshold_that_no_loss_reaches_has_no_gradient(backend, reset, checkpoint):
    """An optimizer leaves a parameter alone whose gradient is None, and decays it at zeros."""
    options = {"learn_threshold": True, "reset_mechanism": reset}
    expected, x = theirs(3, 5, 3, **options), steps(3, 2, 3, 8, 8)
    for of_x in (lambda cell: [cell(x[0])], lambda cell: [*map(cell, x)], lambda cell: [cell(x)]):
        actual = ours(3, 5, 3, checkpoint=checkpoint, **options)
        of_x(actual)[-1][2].sum().backward()
        assert (actual.threshold.grad is None) == (reset != "subtract")
        assert actual.conv.weight.grad.any()
        actual.reset_mem()
        of_x(actual)[-1][0].sum().backward()
        assert actual.threshold.grad is not None
    expected(x[0])[2].sum().backward()
    assert (expected.threshold.grad is None) == (reset != "subtract")


@pytest.mark.parametrize("reset", ["none", "zero", "subtract"])
def test_compiled_code_says_so_where_no_spikes_leave_it(backend, fresh_compiler, reset):
    def loss_of(*tensors):
        x, weight, threshold = tensors
        options = {"threshold": threshold, "reset_mechanism": reset}
        return snnlstm.functional.sconv2dlstm(x, weight=weight, **options)[2].sum()

    cell, x = ours(3, 5, 3, learn_threshold=True), steps(3, 2, 3, 8, 8)
    torch.compile(loss_of, fullgraph=True, backend="aot_eager")(
        x, cell.conv.weight, cell.threshold
    ).backward()
    assert (cell.threshold.grad is None) == (reset != "subtract")
    assert cell.conv.weight.grad.any()


def test_inference_mode_and_no_grad(backend):
    x, start = steps(1, 2, 2, 6, 6)[0], states(2, 3, 6, 6)
    cell, other = cells(reset_mechanism="subtract")
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            close(cell(x, *start), other(x, *start))
            close(cell(x), other(x))
        backend.check(cell.path)
