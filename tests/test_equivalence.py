"""Random cells against snntorch 1.0.0; what only ours can do, fuzz.py compares with float64.

Whole trajectories are compared, spikes exactly and gradients included. That is sound only where
no potential comes within rounding of a discontinuity (a threshold, the middle between two
levels, a tie), so examples that do are discarded.
"""

from dataclasses import dataclass, field
from typing import Any

import flat
import hypothesis.strategies as st
import snntorch
import snntorch.functional.quant
import torch
import torch.nn.functional as F
from helpers import close, quietly
from hypothesis import HealthCheck, assume, example, given, settings

import snnlstm

SIZES = (1, 2, 3, 4, 5, 7, 8, 11)
SURROGATES = (
    ("atan", (2.0,)),
    ("fast_sigmoid", (25,)),
    ("sigmoid", (10,)),
    ("straight_through_estimator", ()),
    ("triangular", (0.5,)),
    ("heaviside", ()),
    ("spike_rate_escape", (1, 5)),
    ("SFS", (25, 0.05)),
)


@dataclass(frozen=True)
class Case:
    """A cell, its input and what is differentiated."""

    time: int = 3
    batch: int = 2
    channels: tuple[int, int] = (2, 3)
    size: tuple[int, int] = (5, 7)
    kernel: Any = 3
    bias: bool = True
    reset: str = "none"
    pool: dict[str, Any] = field(default_factory=dict)
    surrogate: tuple[str, tuple[float, ...]] = SURROGATES[0]
    quant: int = 0  # bits
    threshold: str = "number"
    learn: bool = False
    double: bool = True
    explicit: bool = True  # states are passed; else those that the cell stored
    sequence: bool = False
    through: str = "both"  # what the loss sees: "spikes", "states" or "both"
    density: float = 0.3
    channels_last: bool = False
    seed: int = 0

    @property
    def band(self) -> float:
        """How near a discontinuity rounding can matter; snnTorch's quantiser gives float32."""
        if not self.double:
            return 1e-5
        return 1e-6 if self.quant else 1e-10

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.double else torch.float32

    def make(self, library: Any) -> Any:
        name, parameters = self.surrogate
        shape = {"number": (), "one": (1,), "column": (-1, 1, 1), "four": (1, -1, 1, 1)}
        random = torch.Generator().manual_seed(self.seed)
        threshold = 0.02 + torch.rand(self.channels[1], generator=random) / 5
        if self.threshold in ("number", "one"):
            threshold = threshold[:1]
        torch.manual_seed(self.seed)
        cell = quietly(
            library.SConv2dLSTM,
            *self.channels,
            self.kernel,
            bias=self.bias,
            threshold=threshold.reshape(shape[self.threshold]),
            learn_threshold=self.learn,
            spike_grad=getattr(snntorch.surrogate, name)(*parameters),
            reset_mechanism=self.reset,
            state_quant=self.quant and snntorch.functional.quant.state_quant(self.quant),
            **self.pool,
        )
        with torch.no_grad():  # gates that open and close
            cell.conv.weight.mul_(3)
        return cell.to(self.dtype)

    def inputs(self) -> list[torch.Tensor]:
        """x, syn and mem: leaves that require a gradient."""
        random = torch.Generator().manual_seed(self.seed + 1)
        x = torch.rand(self.time, self.batch, self.channels[0], *self.size, generator=random)
        x = (x < self.density).to(self.dtype)
        if self.channels_last and self.batch:
            x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).view(x.shape)
        shape = (self.batch, self.channels[1], *self.size)
        syn = torch.randn(shape, generator=random).to(self.dtype)
        mem = torch.tanh(torch.randn(shape, generator=random) / 3).to(self.dtype)
        return [t.requires_grad_() for t in (x, syn, mem)]

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
        """Gradients of a loss that weighs every element differently, by name."""
        loss = torch.zeros((), dtype=self.dtype)
        seen = {"spikes": out[:1], "states": out[1:], "both": out}[self.through]
        for part in seen:
            # Multiples of 1/8, which a float32 spike's gradient holds exactly.
            weights = torch.arange(part.numel()).remainder(13).sub(6) / 8
            loss = loss + (part * weights.view(part.shape)).sum().to(self.dtype)
        leaves = dict(cell.named_parameters(), **dict(zip("xsm", inputs, strict=True)))
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        zeros = [torch.zeros_like(leaf) for leaf in leaves.values()]
        return {
            name: zero if grad is None else grad
            for name, grad, zero in zip(leaves, grads, zeros, strict=True)
        }


def reference_run(case: Case, cell: Any, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Returns the trajectory in float64 and plain torch."""
    options = cell._describe(True, True)
    double = [t.double() for t in (*inputs, cell.conv.weight)]
    bias = None if cell.conv.bias is None else cell.conv.bias.double()
    threshold, graded = cell.threshold.double(), cell.graded_spikes_factor.double()
    return list(flat.reference(*double, bias, threshold, graded, options))


def margin(case: Case, cell: Any, inputs: list[torch.Tensor]) -> float:
    """Returns the least distance of the float64 trajectory to anything discontinuous."""
    options = cell._describe(True, True)
    threshold = cell.threshold.detach().double()
    with torch.no_grad():
        _, syn, mem = reference_run(case, cell, inputs)
        before = torch.cat([inputs[2][None].double(), mem[:-1]])
        near = [(before - threshold).abs()]
        pooled = mem.flatten(0, 1)
        if options.pool == "max":
            pooled = F.max_pool2d(pooled, options.pool_size)
        elif options.pool == "avg":
            pooled = F.avg_pool2d(pooled, options.pool_size)
        if options.quant is not None:
            # States before their quantisation: one step from those that the run came to.
            plain = case.make(snnlstm)
            plain.state_quant = False
            starts = torch.cat([inputs[1][None].double(), syn[:-1]]), before
            for t in range(case.time):
                step = [inputs[0][t : t + 1], starts[0][t], starts[1][t]]
                _, s, m = reference_run(case, plain, step)
                near += [between_levels(s, options.quant), between_levels(m, options.quant)]
            if options.pool == "avg":
                near.append(between_levels(pooled, options.quant))
            pooled = options.quant(pooled)
        near.append((pooled - threshold).abs())
        if case.surrogate[0] == "SFS":
            near.append((pooled - threshold - case.surrogate[1][1]).abs())
        distances = torch.cat([part.flatten() for part in near])
    distances = distances[distances.isfinite()]
    return float(distances.min()) if distances.numel() else 1.0


def between_levels(x: torch.Tensor, quant: Any) -> torch.Tensor:
    levels = quant.levels.double()
    return ((levels[1:] + levels[:-1]) / 2 - x[..., None]).abs().amin(-1)


@st.composite
def cases(draw: Any) -> Case:
    size = draw(st.tuples(st.sampled_from(SIZES), st.sampled_from(SIZES)))
    window = st.tuples(st.integers(1, min(3, size[0])), st.integers(1, min(3, size[1])))
    kind = draw(st.sampled_from(["", "max_pool", "avg_pool"]))
    # Some float32 state always lies within rounding of the middle between two levels.
    quant = draw(st.sampled_from([0, 0, 2, 4]))
    return Case(
        time=draw(st.integers(1, 4)),
        batch=draw(st.sampled_from([1, 1, 2, 3, 0])),
        channels=draw(st.tuples(st.integers(1, 4), st.integers(1, 9))),
        size=size,
        kernel=draw(st.sampled_from([1, 3, 3, 5, (1, 3), (5, 3), [3, 1]])),
        bias=draw(st.booleans()),
        reset=draw(st.sampled_from(["subtract", "zero", "none"])),
        pool={kind: draw(window)} if kind else {},
        surrogate=draw(st.sampled_from(SURROGATES)),
        quant=quant,
        threshold=draw(st.sampled_from(["number", "one", "column", "four"])),
        learn=draw(st.booleans()),
        double=draw(st.booleans()) or quant > 0,
        explicit=draw(st.booleans()),
        sequence=draw(st.booleans()),
        through=draw(st.sampled_from(["spikes", "states", "both"])),
        density=draw(st.sampled_from([0.05, 0.3, 1.0])),
        channels_last=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


def compare(case: Case, out: Any, expected: Any, grads: Any, expected_grads: Any) -> None:
    # snnTorch's spikes, and quantised states, are float32 whatever the cell's dtype.
    exact = case.double and not case.quant
    # Its reset * threshold, and so the gradient of that, is float32, too.
    exact_gradient = exact and not (case.learn and case.reset == "subtract")
    atol = 1e-12 if exact else 4e-6
    assert torch.equal(out[0], expected[0].to(case.dtype)), "spikes differ"
    close(out[1:], [e.to(case.dtype) for e in expected[1:]], atol=atol, rtol=0)
    for name, grad in grads.items():
        wanted = expected_grads[name].to(case.dtype)
        scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
        close(grad / scale, wanted / scale, atol=1e-10 if exact_gradient else 2e-5, rtol=0)


def slow(backend):
    """Returns settings of a search; the long search of emulated kernels is elsewhere."""
    examples = 8 if backend.name == "simt" else 60
    return settings(max_examples=examples, suppress_health_check=list(HealthCheck))


def test_any_combination_of_options_equals_snntorch(backend):
    @slow(backend)
    @given(cases())
    @example(Case(size=(1, 1), kernel=5, channels=(1, 1), time=4, reset="zero"))
    @example(Case(batch=0, reset="subtract", pool={"max_pool": (2, 2)}))
    @example(Case(pool={"max_pool": (2, 3)}, quant=2, reset="subtract", sequence=True))
    @example(Case(double=False, density=1.0, channels=(3, 16), learn=True, threshold="column"))
    def check(case):
        equals_snntorch(backend, case)

    check()


def equals_snntorch(backend, case):
    cell, other = case.make(snnlstm), case.make(snntorch)
    assume(margin(case, cell, case.inputs()) > case.band)
    mine, theirs = case.inputs(), case.inputs()
    out = case.run(cell, mine, case.sequence)
    expected = case.run(other, theirs, whole=False)
    compare(
        case,
        out,
        expected,
        case.gradients(cell, mine, out),
        case.gradients(other, theirs, expected),
    )
    backend.check(cell.path, native=case.batch > 0)


def test_nan_infinity_and_huge_states_go_where_snntorch_lets_them(backend):
    @slow(backend)
    @given(
        cases(),
        st.sampled_from([torch.nan, torch.inf, -torch.inf, 1e30]),
        st.sampled_from(["syn", "mem"]),
        st.integers(0, 10**6),
    )
    def check(case, value, where, at):
        goes_where_snntorch_lets_it(case, value, where, at)

    check()


def goes_where_snntorch_lets_it(case, value, where, at):
    assume(case.batch > 0)
    cell, other = case.make(snnlstm), case.make(snntorch)
    x, *state = (t.detach() for t in case.inputs())
    spoiled = state[where == "mem"].view(-1)
    spoiled[at % spoiled.numel()] = value
    assume(margin(case, cell, [x, *state]) > case.band)
    with snnlstm.algorithm("direct"):  # Winograd's spreads a NaN over the tile that it lies in
        out = case.run(cell, [x, *state], case.sequence)
    expected = case.run(other, [x, *state], whole=False)
    assert torch.equal(out[0], expected[0].to(case.dtype))
    close(out[1:], [e.to(case.dtype) for e in expected[1:]], atol=1e-5)
