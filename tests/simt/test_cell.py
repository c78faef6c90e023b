"""The project's CUDA kernels, emulated, against the float64 reference: every type and precision.

The cases and the oracle are those of the CPU kernels (tests/cases.py, tests/oracle.py). All runs
are checked: bounds, races, uninitialised shared memory, divergence; outputs and workspaces hold
NaN before.
"""

import re
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import flat
import pytest
import torch
from backend import SOURCES, float32_precision, simt_core
from cases import Case, cases, wanting_gradients
from hypothesis import HealthCheck, given, settings
from oracle import check_steps

from benchmarks import gpu_smoke
from snnlstm import surrogate
from snnlstm.call import CellOptions
from snnlstm.quant import state_quant

SCHEDULES = [("in_order", 0), ("shuffled", 1), ("ahead", 1)]


@dataclass(frozen=True)
class Mode:
    """A type of the states, how products are formed, and the error that a step may add."""

    dtype: torch.dtype
    error: float
    precision: str = "ieee"  # torch's setting
    operands: torch.dtype | None = None  # as under autocast
    compute_capability: int = 80
    algorithm: str = "direct"
    kernels: str = "fused"  # see backend.ALGORITHMS
    shared_bytes: int = 163 * 1024

    @contextmanager
    def running(self, core):
        """Within the block, the native path for CPU tensors is this one."""
        core.device(self.compute_capability, shared_bytes=self.shared_bytes, algorithm=self.kernels)
        with core.installed(), float32_precision(self.precision):
            yield

    def of(self, case: Case) -> Case:
        """The same call in this mode's types."""
        options = replace(case.options, operands=self.operands)
        return replace(case, dtype=self.dtype, options=options)

    def run(self, *call: Any) -> tuple[torch.Tensor, ...]:
        return flat.run(*call, self.algorithm)


# On sm_86 plain float32 is faster than three products in tf32, on sm_80 it is slower.
MODES = {
    "float64": Mode(torch.float64, 1e-12),
    "float32": Mode(torch.float32, 2e-6, compute_capability=86),
    "float32 on sm_75": Mode(torch.float32, 2e-6, "tf32", compute_capability=75),
    "tf32x3": Mode(torch.float32, 5e-6),
    "tf32": Mode(torch.float32, 4e-3, "tf32"),
    "float16 states": Mode(torch.float16, 3e-3),
    "bfloat16 states": Mode(torch.bfloat16, 3e-2),
    "float16 autocast": Mode(torch.float32, 4e-3, operands=torch.float16),
    "bfloat16 autocast": Mode(torch.float32, 3e-2, operands=torch.bfloat16),
    "float16 on sm_75": Mode(torch.float16, 3e-3, compute_capability=75),
    "bfloat16 on sm_75": Mode(torch.bfloat16, 3e-2, compute_capability=75),
    "bfloat16 autocast on sm_75": Mode(
        torch.float32, 3e-2, operands=torch.bfloat16, compute_capability=75
    ),
    "float32 behind torch": Mode(torch.float32, 2e-6, algorithm="pointwise"),
    "float64 behind torch": Mode(torch.float64, 1e-12, algorithm="pointwise"),
    "bfloat16 behind torch": Mode(torch.bfloat16, 3e-2, algorithm="pointwise"),
    "bfloat16 autocast behind torch": Mode(
        torch.float32, 3e-2, operands=torch.bfloat16, algorithm="pointwise"
    ),
}

# The forward pass is the kernels'.
HYBRID = {
    f"{name} hybrid": replace(MODES[name], algorithm="hybrid")
    for name in ("float32", "float64", "tf32x3", "bfloat16 states", "bfloat16 autocast")
}

# A whole sequence in one launch, on a GPU with as much shared memory as an H100.
RESIDENT = {
    f"resident {name}": replace(MODES[name], kernels="resident", shared_bytes=227 * 1024)
    for name in MODES
    if "behind" not in name
}

SEQUENCE = CellOptions((3, 3), surrogate=surrogate.atan(2.0), sequence=True, record=True)
PLAIN = Case(SEQUENCE, torch.float32, 3, 2, 5, 9, 7, 10)


def with_options(case: Case = PLAIN, **changes: object) -> Case:
    return replace(case, options=replace(case.options, **changes))


CASES = {
    "plain": PLAIN,
    "one step": with_options(sequence=False, record=False),
    "one pixel": replace(PLAIN, height=1, width=1),
    "odd sizes": replace(PLAIN, batch=1, height=9, width=13),
    "one channel": replace(PLAIN, in_channels=1, channels=1),
    "wide": replace(PLAIN, time=2, batch=1, in_channels=16, channels=24, height=16, width=16),
    "channels last": replace(
        PLAIN, in_channels=8, channels=16, height=8, width=8, layouts=("channels_last",) * 4
    ),
    "sliced": replace(PLAIN, layouts=("sliced",) * 4),
    # The input half of the first steps at once, then that of the others.
    "long": replace(PLAIN, time=18, batch=1, height=3, width=4),
    "kernel 5x1": with_options(kernel_size=(5, 1), reset="subtract"),
    "kernel 1x1": with_options(kernel_size=(1, 1), reset="zero"),
    "short chunks": replace(
        with_options(kernel_size=(1, 1)),
        time=2,
        in_channels=96,
        channels=40,
        height=4,
        layouts=("channels_last",) * 4,
    ),
    "stride, dilation": with_options(stride=(2, 3), dilation=(2, 1)),
    "max pool": with_options(pool="max", pool_size=(2, 2), reset="subtract"),
    "uneven average pool": with_options(pool="avg", pool_size=(3, 2)),
    "inhibition": with_options(inhibition=True, reset="zero"),
    "pooled inhibition": with_options(inhibition=True, pool="max", pool_size=(2, 2)),
    "one window": with_options(pool="max", pool_size=(7, 10)),
    "quantised": with_options(quant=state_quant(3), reset="subtract"),
    "quantised and pooled": with_options(
        quant=state_quant(4, uniform=False), pool="max", pool_size=(2, 2)
    ),
    "threshold per channel": replace(PLAIN, threshold="column", bias=False, graded=0.7),
    # Weights of half types that do not fit into the shared memory of the kernel that packs them.
    "kernel 5x5": replace(with_options(kernel_size=(5, 5)), time=1, batch=1),
}


def crossed(modes, names):
    """Every mode with every case; a fifth of them, all modes and cases among these, at once, the
    rest in the long run."""
    return [
        pytest.param(
            mode,
            name,
            marks=[]
            if (i + j) % 5 == 0 or name in ("plain", "one step")
            else pytest.mark.simt_long,
        )
        for i, mode in enumerate(modes)
        for j, name in enumerate(names)
    ]


@pytest.fixture
def core():
    found = simt_core("faults")
    yield found
    found.reset()


def recorded(case: Case) -> Case:
    return case.recorded() if case.options.sequence else case


def check(core, case: Case, mode: Mode) -> None:
    """One inference and one training forward call, judged step by step."""
    case = mode.of(recorded(case))
    inputs = case.inputs()
    with mode.running(core):
        with torch.no_grad():
            out = mode.run(*inputs, case.options)
        check_steps(case, inputs, out, mode.error)
        trained = mode.run(*wanting_gradients(inputs), case.options)
    if case.options.checkpoint:  # in segments, each of which decides anew how x is convolved
        check_steps(case, inputs, [part.detach() for part in trained], mode.error)
    else:
        for one, other in zip(trained, out, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(("mode", "name"), crossed(MODES, CASES))
def test_forward(core, mode, name):
    schedule = SCHEDULES[(list(MODES).index(mode) + list(CASES).index(name)) % 3]
    core.schedule(*schedule)
    check(core, CASES[name], MODES[mode])


def test_full_precision_bears_tensor_cores_that_truncate(core):
    """One accumulator over all of K, three additions a k-step, would shrink sums by 1e-5."""
    case = replace(with_options(sequence=False, record=False), batch=1, in_channels=64,
                   channels=64, height=4, width=4)  # fmt: skip
    inputs = case.inputs()
    for positive in (inputs.x, inputs.mem, inputs.weight):
        positive.abs_()
    inputs.weight.div_(inputs.weight.mean() * 9 * 128 * inputs.x.mean())
    found = []
    with MODES["tf32x3"].running(core), torch.no_grad():
        for truncates in (False, True):
            core.truncate(truncates)
            found.append(MODES["tf32x3"].run(*inputs, case.options)[1])
    torch.testing.assert_close(*found, atol=3e-6, rtol=0)


def test_the_smoke_test_for_gpus_runs_every_kernel(core):
    """In this build, which checks every access, for races too."""
    launched = set()
    for source in SOURCES:
        for how in re.findall(r"Launch how\{.*?;", source.read_text(), re.DOTALL):
            launched |= set(re.findall(r'"([^"]+)"', how))
    assert len(launched) >= 15
    core.device(shared_bytes=227 * 1024)
    core.kernels.name = lambda: "cpu"
    core.checks(counters=True)
    core.reset_counters()
    with core.installed(), float32_precision("ieee"):
        for sizes, *which in (
            ((2, 1, 3, 9, 4, 6), ("fused", "resident", "pointwise"), ("plain", "inhibition")),
            ((2, 1, 3, 9, 4, 6), ("fused",), ("max_pool, subtract", "quantised")),
            ((1, 1, 2, 3, 11, 12), ("fused",), ("one window",)),
        ):
            ways = gpu_smoke.run("cpu", sizes, *which)
            assert len(ways) == 2 * len(which[0]) * len(which[1])
    assert set(core.counters()) == launched


@pytest.mark.simt_long
@pytest.mark.parametrize("mode", MODES)
def test_forward_of_random_calls(core, mode):
    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(cases((MODES[mode].dtype,)))
    def check_case(case: Case) -> None:
        core.schedule("ahead", case.seed)
        check(core, case, MODES[mode])

    check_case()


@pytest.mark.simt_long
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("mode", ["float32", "tf32", "bfloat16 states"])
def test_forward_with_one_warp_ahead(core, mode, seed):
    """Twenty orders of events, over all cases in turn."""
    core.schedule("ahead", seed)
    names = list(CASES)
    for k in range(3):
        check(core, CASES[names[(seed + 7 * k) % len(names)]], MODES[mode])
