"""Tables for the tests: numbers and ways in which the emulated kernels run, and the calls."""

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.backends import mkldnn, nnpack

from snnlstm import surrogate
from snnlstm.quant import state_quant
from tests.emulator.backend import float32_precision
from tests.shared import cases, flat
from tests.shared.cases import SILENT, Case
from tests.shared.table import tagged


@dataclass(frozen=True)
class Mode:
    """A type of the states, a way to form products, and the errors that both may make."""

    dtype: torch.dtype
    error: float  # added by a step
    gradient: float  # error, relative to the largest element of a gradient
    precision: str = "ieee"  # see float32_precision()
    operands: torch.dtype | None = None  # under autocast
    compute_capability: int = 80
    algorithm: str = "fused"
    shared_bytes: int = 163 * 1024
    multiprocessors: int = 108

    @contextmanager
    def running(self, core):
        """Within the block, the native path for CPU tensors runs in this mode."""
        core.device(self.compute_capability, self.multiprocessors, self.shared_bytes)
        # torch's convolution stands in for cuDNN's; oneDNN 3 with AMX would give wrong sums for
        # bfloat16 images of one column with stride and dilation, and NNPACK coarse ones for 16
        # images or more.
        (enabled, *_) = mkldnn.set_flags(False)
        autocast = torch.autocast("cpu", self.operands, enabled=self.operands is not None)
        try:
            with core.installed(), float32_precision(self.precision), autocast, nnpack.flags(False):
                yield
        finally:
            mkldnn.set_flags(enabled)

    def applied(self, case: Case) -> Case:
        """The same call with states of this mode's type."""
        return case.but(dtype=self.dtype)

    def run(self, *call: Any) -> tuple[torch.Tensor, ...]:
        return flat.run(*call, self.algorithm)

    @property
    def exact(self) -> bool:
        """Whether products are as good as float32's: then the kernels decide as float64 does."""
        return self.gradient <= 3e-5


F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
# Like a T4, but with one multiprocessor: small calls then have blocks as large ones have.
T4: dict[str, Any] = {"compute_capability": 75, "shared_bytes": 64 * 1024, "multiprocessors": 1}
MODES = {
    "float64": Mode(F64, 1e-12, 1e-10),
    "float32": Mode(F32, 2e-6, 3e-5),
    "float32 on sm_75": Mode(F32, 2e-6, 3e-5, "tf32", **T4),
    "tf32": Mode(F32, 4e-3, 1e-2, "tf32"),
    "float16 states": Mode(F16, 3e-3, 2e-2),
    "bfloat16 states": Mode(BF16, 3e-2, 1.2e-1),
    "float16 autocast": Mode(F32, 4e-3, 1e-2, operands=F16),
    "bfloat16 autocast": Mode(F32, 3e-2, 8e-2, operands=BF16),
    "float16 on sm_75": Mode(F16, 3e-3, 2e-2, **T4),
    "float16 autocast on sm_75": Mode(F32, 4e-3, 1e-2, operands=F16, **T4),
    "bfloat16 on sm_75": Mode(BF16, 3e-2, 1.2e-1, **T4),
    "bfloat16 autocast on sm_75": Mode(F32, 3e-2, 8e-2, operands=BF16, **T4),
}
CUDNN = {
    f"{name} cudnn": replace(MODES[name], precision="ieee", algorithm="cudnn")
    for name in (
        "float32", "float64", "bfloat16 states", "bfloat16 autocast", "float16 states",
        "float32 on sm_75", "float16 on sm_75", "bfloat16 on sm_75", "float16 autocast on sm_75",
    )
}  # fmt: skip
CUDNN["tf32 cudnn"] = replace(MODES["tf32"], algorithm="cudnn")
ALL = MODES | CUDNN

PLAIN = cases.PLAIN.but(reset="none", threshold="number")
# Three samples are enough of different lengths, of which one has no step.
FEW_LENGTHS = {"time": 3, "batch": 3, "lengths": (1, 3, 0)}
CASES = {
    name: case.but(**FEW_LENGTHS) if case.options.lengths else case
    for name, case in tagged("emulator").items()
} | {
    "plain": PLAIN,
    "odd sizes": PLAIN.but(batch=1, height=9, width=13),
    "one odd row": PLAIN.but(batch=1, channels=1, height=1, width=13),
    "wide": PLAIN.but(time=2, batch=1, in_channels=16, channels=24, height=16, width=16),
    "channels last": PLAIN.but(
        in_channels=8, channels=16, height=8, width=8, layouts=("channels_last",) * 4
    ),
    "sliced": PLAIN.but(layouts=("sliced",) * 4),
    "long": PLAIN.but(time=18, batch=1, height=3, width=4),
    "kernel 5x1": PLAIN.but(kernel_size=(5, 1), reset="subtract"),
    "short chunks": PLAIN.but(
        kernel_size=(1, 1),
        time=2,
        in_channels=96,
        channels=40,
        height=4,
        layouts=("channels_last",) * 4,
    ),
    "quantised and pooled": PLAIN.but(
        quant=state_quant(4, uniform=False), pool="max", pool_size=(2, 2)
    ),
    "threshold per channel": PLAIN.but(threshold="column", bias=False, graded=0.7),
    "kernel 5x5": PLAIN.but(kernel_size=(5, 5), time=1, batch=1),
    # Taps that only ever meet the border, and images of one column, which run as one row.
    "pooled column": PLAIN.but(height=14, width=1, pool="max", pool_size=(3, 1), stride=(1, 3)),
    "kernel 9x7": PLAIN.but(kernel_size=(9, 7), height=3, width=4, dilation=(1, 2)),
    "no spikes, one step": PLAIN.but(**SILENT, sequence=False, record=False),
    "two steps": PLAIN.but(time=2, batch=1),
}


def shorter(calls):
    """The calls with two steps in the place of three: then a pass has a first and a last step.

    The plain call keeps its step between them, and lengths need more. One sample is
    enough where only the numbers of a neuron are others.
    """

    def stays(name, case):
        return case.time != 3 or name == "plain" or case.options.lengths

    return {
        name: case
        if stays(name, case)
        else case.but(time=2, batch=1 if name in OF_NEURONS else case.batch)
        for name, case in calls.items()
    }


OF_NEURONS = (
    "quantised", "threshold per channel", "no spikes, last states", "dilation and stride",
    "kernel 1x1", "kernel 5x5", "every neuron's own surrogate", "no gradient of spikes",
)  # fmt: skip


# Calls without decisions, for the gradients of coarse modes, which would decide some resets
# otherwise, and then differ.
SMOOTH = shorter({
    "last states": PLAIN.but(record=False),
    "average pool": PLAIN.but(pool="avg", pool_size=(2, 2)),
    **{
        name: CASES[name].but(reset="none")
        for name in (
            "plain", "one step", "wide", "channels last", "short chunks", "dilation and stride",
            "one pixel", "one column", "kernel 9x7", "threshold per channel", "lengths",
            "no spikes, last states", "no spikes, one step", "two steps",
        )
    },
})  # fmt: skip
JUMPING = shorter(CASES | {
    "every neuron's own surrogate": PLAIN.but(surrogate=surrogate.sigmoid(25), reset="zero"),
    "no gradient of spikes": PLAIN.but(surrogate=surrogate.NONE),
    "kernel 5x5": PLAIN.but(kernel_size=(5, 5)),
})  # fmt: skip


def crossed(modes, calls):
    """Every mode and case, with a schedule's seed. Short runs have each case once, and that of two
    steps in each mode."""
    return [
        pytest.param(
            mode,
            case,
            (i + j) % 3,
            id=f"{mode}-{name}",
            marks=pytest.mark.emulator_long if (i + j) % len(modes) and name != "two steps" else (),
        )
        for i, mode in enumerate(modes)
        for j, (name, case) in enumerate(calls.items())
    ]


def named(table: dict[str, Mode], exact: bool) -> list[str]:
    """The modes whose products are as good as float32's, or the others."""
    return [name for name, mode in table.items() if mode.exact == exact]
