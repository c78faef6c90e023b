"""Random cells compute what snntorch 1.0.0's cells compute.

Whole trajectories are compared with their gradients, and spikes exactly. That is sound only if no
potential comes within rounding of a discontinuity (a threshold, the middle between two levels), so
other examples are discarded. fuzz.py tests options that only our cell has.
"""

from dataclasses import dataclass
from typing import Any

import flat
import hypothesis.strategies as st
import pytest
import snntorch
import snntorch.functional.quant
import torch
from cases import PLAIN, Case, cases
from cases import SURROGATES as ALL
from drawing import drawing
from helpers import close, quietly
from hypothesis import assume, given
from oracle import pooled
from rounding import gradient_error, state_error

import snnlstm
from snnlstm.surrogate import KINDS, triangular

# snnTorch holds the triangle's height in float32.
SURROGATES = (*ALL[:4], triangular(0.5), *ALL[5:8])
SMALL = PLAIN.but(dtype=torch.float64, in_channels=2, channels=3, height=5, width=7, reset="none")


@dataclass(frozen=True)
class Twins:
    """Holds a case, and the way in which both libraries' cells run and differentiate it."""

    case: Case = SMALL
    quant: int = 0  # bits
    learn: bool = False
    explicit: bool = True  # the caller passes states, else the cell has stored states
    whole: bool = False  # our cell runs the sequence by one call
    through: str = "both"  # the loss reads "spikes", "states" or "both"

    @property
    def kernel(self) -> tuple[int, ...]:
        """Returns the size of the part of the kernel that meets more than the border."""
        sizes = self.case.height, self.case.width
        return tuple(
            min(k, 2 * n - 1) for k, n in zip(self.case.options.kernel_size, sizes, strict=True)
        )

    @property
    def exact(self) -> bool:
        """Whether all is float64; snnTorch's spikes and quantised states never are."""
        return self.dtype == torch.float64 and not self.quant

    def error(self, path: str) -> float:
        """Returns by how much states may differ if our cell takes the path of this name."""
        return 1e-12 if self.exact else state_error(path, self.kernel)

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
            state_quant=self.quant and snntorch.functional.quant.state_quant(self.quant),
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
    """Returns the trajectory in float64 and plain torch."""
    options = cell._describe(True, True)
    double = [t.double() for t in (*inputs, cell.conv.weight)]
    bias = None if cell.conv.bias is None else cell.conv.bias.double()
    threshold, graded = cell.threshold.double(), cell.graded_spikes_factor.double()
    return list(flat.reference(*double, bias, threshold, graded, options))


@torch.no_grad()
def margin(case: Twins, cell: Any, inputs: list[torch.Tensor]) -> float:
    """Returns the least distance of the float64 trajectory to anything discontinuous."""
    options = cell._describe(True, True)
    threshold = cell.threshold.detach().double()
    _, syn, mem = reference_run(cell, inputs)
    before = torch.cat([inputs[2][None].double(), mem[:-1]])
    near = [(before - threshold).abs()]
    mem = pooled(mem.flatten(0, 1), options)
    if options.quant is not None:
        # The states before their quantisation come from single steps of a cell without quantiser.
        plain = case.make(snnlstm)
        plain.state_quant = False
        starts = torch.cat([inputs[1][None].double(), syn[:-1]]), before
        for t in range(case.case.time):
            step = [inputs[0][t : t + 1], starts[0][t], starts[1][t]]
            _, s, m = reference_run(plain, step)
            near += [between_levels(s, options.quant), between_levels(m, options.quant)]
        if options.pool == "avg":
            near.append(between_levels(mem, options.quant))
        mem = options.quant(mem)
    near.append((mem - threshold).abs())
    if options.surrogate.name == "SFS":
        near.append((mem - threshold - options.surrogate.p1).abs())
    distances = torch.cat([part.flatten() for part in near])
    distances = distances[distances.isfinite()]
    return float(distances.min()) if distances.numel() else 1.0


def between_levels(x: torch.Tensor, quant: Any) -> torch.Tensor:
    levels = quant.levels.double()
    return ((levels[1:] + levels[:-1]) / 2 - x[..., None]).abs().amin(-1)


@st.composite
def twins(draw: Any) -> Twins:
    """Draws small cases of what snnTorch can do, so that few come near a discontinuity."""
    case, quant = draw(cases()), draw(st.sampled_from([0, 0, 2, 4]))
    case = case.but(
        kernel_size=tuple(min(k, 5) for k in case.options.kernel_size),
        sequence=True, record=True, stride=(1, 1), dilation=(1, 1), inhibition=False,
        checkpoint=False, quant=None, graded=1.0, surrogate=draw(st.sampled_from(SURROGATES)),
        # Some float32 state always lies within rounding of the middle between two levels.
        dtype=torch.float64 if quant else case.dtype,
        time=draw(st.integers(1, 4)), batch=draw(st.sampled_from([1, 1, 2, 3, 0])),
        in_channels=min(case.in_channels, 4), channels=min(case.channels, 9),
        height=min(case.height, 11), width=min(case.width, 11),
        layouts=(case.layouts[0], *["contiguous"] * 3),
    )  # fmt: skip
    return Twins(
        case, quant, *(draw(st.booleans()) for _ in range(3)),
        through=draw(st.sampled_from(["spikes", "states", "both"])),
    )  # fmt: skip


def compare(
    case: Twins, path: str, out: Any, expected: Any, grads: Any, expected_grads: Any
) -> None:
    # snnTorch's reset * threshold, and its gradient, are float32 for any dtype of the cell.
    exact = case.exact and not (case.learn and case.case.options.reset == "subtract")
    error = 1e-10 if exact else gradient_error(path, case.kernel)
    assert torch.equal(out[0], expected[0].to(case.dtype)), "spikes differ"
    close(out[1:], [e.to(case.dtype) for e in expected[1:]], atol=case.error(path), rtol=0)
    for name, grad in grads.items():
        wanted = expected_grads[name].to(case.dtype)
        scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
        if name == "threshold":  # a number of each neuron and step, whose sum may cancel
            scale = max(scale, out[0].numel() ** 0.5)
        close(grad / scale, wanted / scale, atol=error, rtol=0)


def some(backend):
    """Draws few examples for the emulated kernels."""
    return drawing(8 if backend.name == "simt" else 60, backend.name)


def judge(case: Twins, backend: Any) -> bool:
    """Compares both libraries' cells; returns False if rounding may decide a spike."""
    cell, other = case.make(snnlstm), case.make(snntorch)
    mine, theirs = case.inputs(), case.inputs()
    out = case.run(cell, mine, case.whole)
    backend.check(cell.path, native=case.case.batch > 0)
    if not case.is_clear(cell, case.inputs()):
        return False
    expected = case.run(other, theirs, whole=False)
    grads = case.gradients(cell, mine, out), case.gradients(other, theirs, expected)
    compare(case, cell.path.name, out, expected, *grads)
    return True


PINNED = {
    "one pixel": Twins(SMALL.but(height=1, width=1, kernel_size=(5, 5), channels=1, reset="zero")),
    "no sample": Twins(SMALL.but(batch=0, reset="subtract", pool="max", pool_size=(2, 2))),
    "max pool, 2 bits": Twins(
        SMALL.but(reset="subtract", pool="max", pool_size=(2, 3)), quant=2, whole=True
    ),
    "average pool, 4 bits": Twins(SMALL.but(reset="zero", pool="avg", pool_size=(1, 3)), quant=4),
    "float32": Twins(SMALL.but(dtype=torch.float32, channels=16), learn=True),
    # With tiles of 8x8 inputs the states differ by 7.3e-6, and by 5e-7 with direct convolution.
    "large tiles": Twins(
        PLAIN.but(
            kernel_size=(5, 5), time=4, batch=3, in_channels=4, height=11, width=11, seed=180
        ),
        whole=True,
    ),
}


@pytest.mark.parametrize("name", PINNED)
def test_a_combination_of_options_equals_snntorch(backend, name):
    assert judge(PINNED[name], backend)


@pytest.mark.drawn
def test_any_combination_of_options_equals_snntorch(backend):
    @some(backend)
    @given(twins())
    def check(case):
        assume(judge(case, backend))

    check()


@pytest.mark.drawn
def test_nan_infinity_and_huge_states_go_where_snntorch_lets_them(backend):
    @some(backend)
    @given(
        twins(),
        st.sampled_from([torch.nan, torch.inf, -torch.inf, 1e30]),
        st.sampled_from([0, 1]),  # syn or mem
        st.integers(0, 10**6),
    )
    def check(case, value, which, at):
        assume(case.case.batch > 0)
        cell, other = case.make(snnlstm), case.make(snntorch)
        x, *state = (t.detach() for t in case.inputs())
        spoiled = state[which].view(-1)
        spoiled[at % spoiled.numel()] = value
        with snnlstm.algorithm("direct"):  # Winograd's algorithm spreads a NaN over its tile
            out = case.run(cell, [x, *state], case.whole)
        assume(case.is_clear(cell, [x, *state]))
        expected = case.run(other, [x, *state], whole=False)
        assert torch.equal(out[0], expected[0].to(case.dtype))
        close(out[1:], [e.to(case.dtype) for e in expected[1:]], atol=1e-5)

    check()
