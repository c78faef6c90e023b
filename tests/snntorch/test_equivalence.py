"""Random cells compute what snntorch 1.0.0's cells compute.

Whole trajectories are compared with their gradients, and spikes exactly. That is sound only if no
potential comes within rounding of a discontinuity (a threshold, the middle between two levels), so
other examples are discarded. fuzz.py tests options that only our cell has.
"""

from dataclasses import dataclass
from typing import Any

import flat
import hypothesis.strategies as st
import snntorch
import snntorch.functional.quant
import torch
from cases import PLAIN, Case, cases
from cases import SURROGATES as ALL
from helpers import close, quietly
from hypothesis import HealthCheck, assume, example, given, settings
from oracle import pooled

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
    def band(self) -> float:
        """Returns how near a discontinuity rounding matters; snnTorch's levels are float32."""
        if self.dtype == torch.float32:
            return 1e-5
        return 1e-6 if self.quant else 1e-10

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


def compare(case: Twins, out: Any, expected: Any, grads: Any, expected_grads: Any) -> None:
    # snnTorch's spikes and quantised states are float32 for any dtype of the cell.
    exact = case.dtype == torch.float64 and not case.quant
    # snnTorch's reset * threshold, and its gradient, are float32, too.
    exact_gradient = exact and not (case.learn and case.case.options.reset == "subtract")
    atol = 1e-12 if exact else 4e-6
    assert torch.equal(out[0], expected[0].to(case.dtype)), "spikes differ"
    close(out[1:], [e.to(case.dtype) for e in expected[1:]], atol=atol, rtol=0)
    for name, grad in grads.items():
        wanted = expected_grads[name].to(case.dtype)
        scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
        close(grad / scale, wanted / scale, atol=1e-10 if exact_gradient else 2e-5, rtol=0)


def slow(backend):
    """Returns settings of a search, with few examples for the emulated kernels."""
    examples = 8 if backend.name == "simt" else 60
    return settings(max_examples=examples, suppress_health_check=list(HealthCheck))


def test_any_combination_of_options_equals_snntorch(backend):
    @slow(backend)
    @given(twins())
    @example(Twins(SMALL.but(height=1, width=1, kernel_size=(5, 5), channels=1, reset="zero")))
    @example(Twins(SMALL.but(batch=0, reset="subtract", pool="max", pool_size=(2, 2))))
    @example(Twins(SMALL.but(reset="subtract", pool="max", pool_size=(2, 3)), quant=2, whole=True))
    @example(Twins(SMALL.but(reset="zero", pool="avg", pool_size=(2, 2)), quant=4))
    @example(Twins(SMALL.but(dtype=torch.float32, channels=16), learn=True))
    def check(case):
        cell, other = case.make(snnlstm), case.make(snntorch)
        assume(margin(case, cell, case.inputs()) > case.band)
        mine, theirs = case.inputs(), case.inputs()
        out = case.run(cell, mine, case.whole)
        expected = case.run(other, theirs, whole=False)
        grads = case.gradients(cell, mine, out), case.gradients(other, theirs, expected)
        compare(case, out, expected, *grads)
        backend.check(cell.path, native=case.case.batch > 0)

    check()


def test_nan_infinity_and_huge_states_go_where_snntorch_lets_them(backend):
    @slow(backend)
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
        assume(margin(case, cell, [x, *state]) > case.band)
        with snnlstm.algorithm("direct"):  # Winograd's algorithm spreads a NaN over its tile
            out = case.run(cell, [x, *state], case.whole)
        expected = case.run(other, [x, *state], whole=False)
        assert torch.equal(out[0], expected[0].to(case.dtype))
        close(out[1:], [e.to(case.dtype) for e in expected[1:]], atol=1e-5)

    check()
