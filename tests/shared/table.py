"""This table has a call for each option of the cell alone, and for each kind of size.

tests/kernels/test_kernels.py checks the results of each row, on every instruction set of the CPU,
and its gradients, but for rows with the tag "results". Other tests take the rows of a tag:
"emulator" (the emulated CUDA kernels), "operators" (those of torch.library) and "snntorch" (its
cell beside ours). benchmarks/gpu_smoke.py and tests/sequences take some options by their names. No
row is of a bias, a threshold's shape, a graded factor or a density alone, because fuzz.py draws
these for every call.
"""

from typing import Any

import torch

from snnlstm.quant import StateQuant, state_quant
from tests.shared.cases import PLAIN, SILENT, Case, Options

PADDED = {"time": 6, "batch": 7, "lengths": (2, 6, 0, 5, 1, 2, 4)}
SMALL = {"in_channels": 2, "channels": 3, "height": 6, "width": 7}


def row(tags: str = "", **changes: Any) -> tuple[str, Case]:
    """Returns a row: its tags, and the plain call with these changes."""
    return tags, PLAIN.but(**changes)


TABLE = {
    "plain": row("operators"),
    "one step": row("emulator operators", sequence=False, record=False),
    "last states": row("operators", record=False),
    "no reset": row(reset="none"),
    "reset to zero": row("snntorch", reset="zero"),
    # 7 x 10: windows of 2 x 3 leave a remainder of both.
    "max_pool": row("emulator snntorch operators", pool="max", pool_size=(2, 3)),
    "avg_pool": row("emulator snntorch operators", pool="avg", pool_size=(2, 3)),
    "a window as large as the image": row("emulator", pool="max", pool_size=(7, 10)),
    "quantised": row("emulator operators", quant=state_quant(3, threshold=0.4)),
    "quantised twice": row(
        quant=StateQuant(torch.tensor([-0.51, -0.13, 0.021, 0.1, 0.27])),
        pool="avg",
        pool_size=(1, 3),
    ),
    "quantised, ties in every window": row(
        quant=StateQuant(torch.tensor([0.0, 0.15])), pool="max", pool_size=(3, 3)
    ),
    "kernel 1x1": row("emulator", kernel_size=(1, 1)),
    "kernel 5x5": row(kernel_size=(5, 5)),
    "kernel 7x7": row(kernel_size=(7, 7)),
    "kernel 9x9": row(kernel_size=(9, 9), height=13, width=11),
    "kernel 19x3": row(kernel_size=(19, 3), height=19, width=23),
    "kernel 11x1": row(kernel_size=(11, 1), height=17, width=6),
    "kernel 9x3, larger than the image": row(kernel_size=(9, 3)),
    "stride": row(stride=(2, 3)),
    "a stride beyond the kernel": row(kernel_size=(1, 1), stride=(3, 2)),
    "dilation": row(dilation=(2, 3)),
    "dilation, a kernel in parts": row(kernel_size=(9, 3), dilation=(2, 1), height=23, width=19),
    "dilation and stride": row(
        "emulator operators", kernel_size=(5, 3), dilation=(3, 2), stride=(2, 2)
    ),
    "no spikes": row(**SILENT),
    "no spikes, last states": row("emulator", **SILENT, record=False),
    "no spikes, many samples": row(**SILENT, record=False, batch=9),
    "no spikes, stride and dilation": row(
        **SILENT, record=False, stride=(2, 3), dilation=(2, 1), layouts=("channels_last",) * 4
    ),
    "few spikes": row(density=0.03, spikes=True, in_channels=17),
    "few spikes, strided": row(
        density=0.03, spikes=True, in_channels=17, height=13, stride=(2, 3), dilation=(1, 2)
    ),
    "many spikes": row(density=0.6, spikes=True),
    "nothing": row(density=0.0),
    "one pixel": row("emulator snntorch", height=1, width=1),
    "one row": row(height=1, width=29),
    "one column": row("emulator", height=29, width=1),
    "a few columns, dilated beyond them": row(
        kernel_size=(5, 7), dilation=(3, 2), height=13, width=4
    ),
    "one channel": row("emulator", in_channels=1, channels=1),
    # A tall image gives a task several blocks of rows; one row of a wide image fills a block.
    "a tall image": row(time=2, batch=1, height=61, width=19, channels=5),
    "a wide image": row(time=2, batch=1, height=3, width=275, channels=5),
    # A thread takes several small images together: with two threads four images make a group.
    "small images": row(time=2, batch=9, height=5, width=3),
    "small images, sparse x": row(
        time=2, batch=8, height=4, width=4, in_channels=17, density=0.05, spikes=True
    ),
    "small images, pooled and strided": row(
        time=2, batch=10, height=7, width=9, stride=(2, 1), pool="max", pool_size=(2, 2)
    ),
    "small images, one step": row(sequence=False, record=False, batch=9, height=3, width=3),
    # These weights do not stay in a thread's L2 cache.
    "many weights": row(time=2, batch=3, in_channels=43, channels=40, height=7, width=17),
    # 24 channels are three vectors of 8 lanes, in x and in mem.
    "three vectors": row(time=2, batch=1, in_channels=24, channels=24, height=5),
    # x and mem have more channels than one chunk of weights holds.
    "many channels": row(time=2, batch=1, in_channels=71, channels=35, height=5),
    # Samples of different lengths, of which one has no step.
    "lengths": row("emulator", **PADDED, **SMALL),
    "lengths, max_pool": row(
        **PADDED, in_channels=4, channels=16, height=12, width=13, pool="max", pool_size=(2, 2)
    ),
    "lengths, avg_pool": row(
        "emulator", **PADDED, **SMALL, record=False, pool="avg", pool_size=(3, 2)
    ),
    "lengths, small images": row(
        **PADDED, in_channels=24, channels=8, height=5, width=6, record=False
    ),
    # With levels so close to one another, or so few, rounding decides which level a state gets, and
    # with it the gradients.
    "quantised finely": row("results", quant=state_quant(5, threshold=0.4)),
    "quantised finely, twice": row(
        "results", quant=state_quant(3, threshold=0.4), pool="avg", pool_size=(2, 2)
    ),
    "quantised to equal levels": row(
        "results", quant=StateQuant(torch.tensor([-0.5, 0.0, 0.0, 0.25]))
    ),
    "quantised to one level": row("results", quant=StateQuant(torch.tensor([0.15]))),
}


def tagged(tag: str) -> dict[str, Case]:
    """Returns the calls of the rows that have a tag."""
    return {name: case for name, (tags, case) in TABLE.items() if tag in tags.split()}


ARGUMENTS = {
    "reset_mechanism": "reset", "stride": "stride", "dilation": "dilation", "state_quant": "quant",
}  # fmt: skip


def arguments(options: Options) -> dict[str, Any]:
    """Returns the arguments of a cell with these options, without those that are defaults."""
    usual = Options(options.kernel_size)
    found = {
        name: getattr(options, field)
        for name, field in ARGUMENTS.items()
        if getattr(options, field) != getattr(usual, field)
    }
    return found | ({} if options.pool == "none" else {f"{options.pool}_pool": options.pool_size})


def arguments_of(name: str, **changes: Any) -> dict[str, Any]:
    """Returns the arguments of a cell with the options of a row and these changes."""
    return arguments(TABLE[name][1].but(**changes).options)
