"""The CUDA kernels skip padded samples."""

import itertools

import pytest
import torch

import snnlstm
from tests.emulator.backend import float32_precision
from tests.sequences.by_length import CELLS, LENGTHS, check

NAMES = ("plain", "pool-reset", "odd-pool", "inhibition", "segments")
DTYPES = torch.float32, torch.float64
SHORT = {
    *(("fused", torch.float32, name) for name in NAMES),
    *itertools.product(["sm_90"], DTYPES, ["plain", "odd-pool"]),  # where blocks wait
    ("cudnn", torch.float64, "plain"),
}


@pytest.mark.parametrize(
    ("how", "dtype", "name"),
    [
        pytest.param(*row, marks=[] if row in SHORT else pytest.mark.emulator_long)
        for row in itertools.product(("fused", "cudnn", "sm_90"), DTYPES, NAMES)
    ],
)
def test_each_sample_is_as_it_is_alone(core, how, dtype, name):
    core.schedule("ahead", seed=2)
    core.device(**{"compute_capability": 90} if how == "sm_90" else {"algorithm": how})
    with core.installed(), float32_precision("ieee"):
        check(dtype, name == "plain", **CELLS[name])


def test_a_batch_without_steps_keeps_its_states_and_gives_no_gradient(core):
    core.schedule("in_order")
    core.device(compute_capability=80)
    cell, x = snnlstm.SConv2dLSTM(2, 3, 3, threshold=0.1), torch.ones(3, len(LENGTHS), 2, 5, 5)
    with core.installed():
        for lengths in (torch.zeros(len(LENGTHS), dtype=torch.int32), [0] * len(LENGTHS)):
            cell.reset_mem()
            spk, syn, mem = cell(x, lengths=lengths)
            assert not torch.cat([spk.flatten(), syn.flatten(), mem.flatten()]).any()
            (gradient,) = torch.autograd.grad(mem.sum(), cell.conv.weight)
            assert not gradient.any()
