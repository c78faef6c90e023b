"""The CUDA kernels of snntorch.Leaky return the CPU's bits.

tests/leaky/test_leaky.py compares both with snnTorch's layer.
"""

import pytest
import torch
from torch.testing import assert_close

from snnlstm import _C
from tests.emulator.modes import BF16, F16, F32, F64

SUBTRACT, ZERO, NONE, ATAN, LSO = 0, 1, 2, 1, 10  # of csrc/args.h
CALLS = {  # T, n, dtype, reset, surrogate, count and stride of beta, of threshold; what is null
    "one step": (1, 40, F32, SUBTRACT, ATAN, (1, 1), (1, 1), "grad_mem0"),
    "odd": (3, 105, F32, ZERO, ATAN, (7, 5), (5, 1), "grad_spk"),
    "channels": (2, 216, BF16, NONE, ATAN, (3, 6), (6, 36), "mem0 grad_beta grad_threshold"),
    "half": (6, 524, F16, SUBTRACT, ATAN, (524, 1), (1, 1), "grad_beta"),
    "float64": (8, 258, F64, ZERO, ATAN, (3, 43), (2, 1), "grad_mem"),
    "odd float64": (2, 35, F64, ZERO, ATAN, (1, 1), (7, 5), "grad_mem"),
    "odd bfloat16": (2, 35, BF16, ZERO, ATAN, (1, 1), (7, 5), "grad_mem"),
    "odd half": (2, 35, F16, ZERO, ATAN, (1, 1), (7, 5), "grad_mem"),
    "another surrogate": (9, 520, F32, ZERO, LSO, (1, 1), (1, 1), "grad_threshold"),
    "NaN and infinity": (7, 64, F32, SUBTRACT, ATAN, (4, 8), (1, 1), "grad_x"),
}
GIVEN = ("x", "grad_spk", "grad_mem", "mem0", "beta", "threshold", "graded")
GRADIENTS = ("grad_x", "grad_mem0", "grad_beta", "grad_threshold")
RESULTS = ("spk", "mem", "last", *GRADIENTS)


def tensors(names, steps, n, dtype, *_):
    """All are (T, n), of which calls may use only the beginning."""
    random = torch.Generator().manual_seed(1)
    types = {k: dtype if k in ("x", "grad_x") or dtype == F64 else F32 for k in names}
    return {k: (torch.rand(steps, n, generator=random) * 1.6 - 0.3).to(types[k]) for k in names}


def run(core, facts, given, absent=""):
    """The results of both passes, of the CPU without a core. `absent`: names of null pointers."""
    t = given | tensors(RESULTS, *facts)
    a = {name: 0 if name in absent.split() else tensor.data_ptr() for name, tensor in t.items()}
    steps, n, dtype, reset, surrogate, beta, threshold, _ = facts
    both = ((F32, F64, F16, BF16).index(dtype), reset, surrogate, 2.0, 0.3, steps, n)
    both += (a["beta"], *beta, a["threshold"], *threshold, a["graded"])
    forward = (t["mem0"].data_ptr(), a["x"], a["spk"])
    backward = [a[k] for k in ("mem0", "mem", "grad_spk", "grad_mem", *GRADIENTS)]
    passes = (*forward, a["last"], 0), (*forward, a["mem"], 1), backward
    for name, fields in zip(("forward", "forward", "backward"), passes, strict=True):
        device = (core.kernels.device(None), 0) if core else ()
        call = f"cuda_leaky_{name}" if core else f"leaky_{name}"
        getattr(core.module if core else _C, call)(*device, (*both, *fields))
    return {k: t[k] if k in ("spk", "mem", "grad_x") else t[k][0] for k in RESULTS if a[k]}


@pytest.mark.parametrize("name", CALLS)
def test_results_of_emulated_cuda_equal_the_cpus(core, name):
    core.settings.seed = 1
    facts, given = CALLS[name], tensors(GIVEN, *CALLS[name])
    for k, number in enumerate((torch.nan, torch.inf, -torch.inf) if "NaN" in name else ()):
        given["x"][1, k] = given["mem0"][0, 8 + k] = given["grad_spk"][2, 20 + k] = number
    for absent in (facts[-1], ""):
        actual, cpu = (run(kernels, facts, given, absent) for kernels in (core, None))
        assert_close(actual, cpu, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("n", "shift", "blocks"), [(1024, 0, 2), (1024, 1, 8), (1022, 0, 8)])
def test_a_sequence_is_one_launch_of_vectors_if_x_is_aligned(core, n, shift, blocks):
    facts = (9, n, *CALLS["channels"][2:])
    x = torch.empty(9 * n + shift, dtype=BF16)[shift:]
    with core.dry() as launches:
        run(core, facts, tensors(GIVEN, *facts) | {"x": x})
    assert [launch.blocks for launch in launches] == [blocks, blocks, 2 if shift else blocks]
