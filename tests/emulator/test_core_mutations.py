"""Each fault that is seeded in the project's CUDA kernels must be caught.

One build switches the faults at run time. A fault is caught if a check reports it or the result is
judged wrong. The runs are cases of test_cell.py and test_cell_gradients.py.
"""

import re
from functools import cache

import pytest
import torch

from tests.emulator import test_cell, test_cell_gradients
from tests.emulator.backend import emulated_core
from tests.emulator.library import EmulationError, fault_numbers, placed_faults
from tests.emulator.modes import ALL, CASES

# A run, which is a check of these files with a mode and a case, and the faults that it notices.
NOTICED = {
    (test_cell, "tf32", "wide"): (
        "wrong_fragment_row", "wrong_mma_halo", "no_reuse_barrier",
        "no_border_zeros", "swapped_gates", "wrong_row_stride",
    ),
    (test_cell, "float32", "two steps"): (
        "no_fma_chunk_barrier", "wrong_fma_buffer", "wrong_fma_halo"
    ),
    (test_cell, "tf32", "max_pool"): ("no_reset",),
    (test_cell, "tf32", "one odd row"): ("wrong_tail_mask",),
    (test_cell, "float32 cudnn", "two steps"): ("no_vectors_barrier",),
    (test_cell, "bfloat16 states", "short chunks"): ("no_chunk_wait",),
    (test_cell, "bfloat16 states", "channels last"): ("wrong_source_halo", "no_chunk_barrier"),
    (test_cell_gradients, "tf32", "two steps"): (
        "wrong_tap_stride", "lost_part", "no_bias_barrier", "lost_bias_row",
        "no_weight_tile_wait", "no_weight_tile_barrier", "lost_totals",
    ),
}  # fmt: skip

# What the emulator says of faults. Kinds of errors that no kernel of kernels/ makes stand here.
KINDS = {
    "wrong_tail_mask": "out of bounds: .* reads 4 bytes at 0 bytes behind the end of 'syn0'",
    "wrong_row_stride": "misaligned: .* reads 8 bytes at",
    "no_chunk_wait": "race: .* reads .* while a cp_async of its own to it is under way",
    "no_chunk_barrier": "race: .* writes it .*, neither a barrier nor a __syncwarp between them",
    "no_fma_chunk_barrier": "uninitialised: .*, which nobody has written",
}

# The faults that a row of benchmarks/gpu_smoke.py notices by its numbers, at its default sizes:
# precision and options. tests/bench/test_rehearsal.py runs them.
NOTICED_BY_SMOKE = {
    ("float32", "4 channels"): (
        "wrong_mem_buffer", "early_syn_forward", "early_syn_backward"
    ),
    ("bfloat16", "plain"): ("lost_taps",),
    ("float32", "Leaky, zero"): ("early_leaky_x", "early_leaky_gradient"),
    ("float32", "Leaky, one by one"): ("no_scalar_leaky_spikes",),
    ("float32", "Leaky, channels"): ("one_leaky_threshold",),
    ("float32", "Leaky, features"): ("one_leaky_feature",),
    ("float16", "first layer"): ("lost_last_gradient",),
    ("bfloat16", "first layer"): ("first_tile_column", "first_chunk", "first_input_chunk"),
    ("float32", "one column"): (
        "unturned_kernel", "unjoined_rows", "untrimmed_kernel", "no_graded_factor"
    ),
    ("float32", "532 pixels"): ("narrow_argmax",),
    ("float32", "quantised"): ("lost_levels",),
}  # fmt: skip


def report_of(core, file, mode, case) -> str:
    """What is wrong with a run, or ""."""
    try:
        file.check(core, CASES[case], ALL[mode])
    except (AssertionError, EmulationError) as error:
        return str(error) or type(error).__name__
    return ""


@cache
def without_a_fault(*run) -> str:
    return report_of(emulated_core(), *run)


@pytest.mark.parametrize(
    ("name", "run"),
    [
        # `make test` seeds one fault for each kind of report, `make test-all` seeds them all.
        pytest.param(name, run, id=name, marks=() if name in KINDS else pytest.mark.emulator_long)
        for run, names in NOTICED.items()
        for name in names
    ],
)
def test_a_fault_is_caught(core, name, run):
    """The run must notice it, and pass without it."""
    core.fault(name)
    core.settings.seed = 1
    report = report_of(core, *run)
    assert report, f"the run does not notice {name}"
    assert re.search(KINDS.get(name, ""), report), report
    core.fault("none")
    assert without_a_fault(*run) == ""


def test_an_access_into_a_neighbouring_tensor_is_reported(core):
    """All tensors of the call lie in one storage, without gaps."""
    mode, case = ALL["tf32"], CASES["one odd row"]
    inputs = mode.applied(case).inputs()
    parts = torch.cat([t.reshape(-1) for t in inputs]).split([t.numel() for t in inputs])
    inputs = [part.view(t.shape) for part, t in zip(parts, inputs, strict=True)]
    core.fault("wrong_tail_mask")
    core.settings.seed = 1
    with (
        mode.running(core),
        torch.no_grad(),
        pytest.raises(EmulationError, match="0 bytes behind the end of 'syn0'"),
    ):
        mode.run(*inputs, case.options)


def test_every_fault_has_one_place_and_one_run():
    faults = sorted(set(fault_numbers()) - {"none"})
    assert sorted(placed_faults()) == faults
    runs = *NOTICED.values(), *NOTICED_BY_SMOKE.values()
    assert sorted(name for names in runs for name in names) == faults
