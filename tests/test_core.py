"""The compiled core, called with nonsense: a Python exception each time, and never a crash."""

import pytest
from kernels import native

from snnlstm import _C

pytestmark = pytest.mark.skipif(native is None, reason="the core is not built")

FACTS = {
    "dtype": 0, "T": 1, "N": 1, "Cin": 2, "C": 4, "H": 5, "W": 6, "kernel": (3, 3),
    "stride": (1, 1), "dilation": (1, 1), "pool": 0, "pool_size": (1, 1), "reset": 2,
    "surrogate": 1, "p0": 2.0, "p1": 0.0, "inhibition": False, "num_levels": 0,
}  # fmt: skip


def plan(backward: bool = False, **changed):
    cell = _C.Cell(**FACTS | changed)
    return _C.CpuPlan(cell, 0, 1.0, 8, backward, 1)


@pytest.mark.parametrize(
    "changed",
    [
        *({name: value} for name in ("dtype", "pool", "reset", "surrogate") for value in (-1, 99)),
        *({name: value} for name in ("T", "N", "Cin", "C", "H", "W") for value in (-1, 2**61)),
        {"C": 0}, {"H": 0}, {"kernel": (2, 3)}, {"kernel": (0, 1)}, {"kernel": (-1, 1)},
        {"stride": (0, 1)}, {"dilation": (1, -2)}, {"pool_size": (9, 1), "pool": 1},
        {"pool_size": (0, 1)}, {"num_levels": -1}, {"H": 2**31, "W": 2**31, "N": 2**10},
    ],
    ids=str,
)  # fmt: skip
def test_sizes_and_numbers_are_checked(changed):
    with pytest.raises(ValueError, match=r"must|too large"):
        plan(**changed)


@pytest.mark.parametrize("changed", [{"T": 0}, {"N": 0}, {"dtype": 2}], ids=str)
def test_what_the_cpu_kernels_do_not_take(changed):
    with pytest.raises(ValueError, match=r"at least 1|float32 and float64"):
        plan(**changed)


@pytest.mark.parametrize("arguments", [(9, 1.0, 8, False, 1), (0, 1.0, 8, False, 0)], ids=str)
def test_a_plan_needs_a_known_algorithm_and_a_thread(arguments):
    with pytest.raises(ValueError, match="must"):
        _C.CpuPlan(_C.Cell(**FACTS), *arguments)


@pytest.mark.parametrize("call", ["forward", "backward"])
def test_memory_that_is_needed_must_be_given(call):
    run = getattr(plan(backward=call == "backward"), call)
    with pytest.raises(ValueError, match="must be given"):
        run()
    for wrong in ({"x": (1, 2)}, {"x": 7}, {"syn0": (0, (1, 2))}, {"threshold": -1}):
        with pytest.raises((ValueError, OverflowError, TypeError)):
            run(**wrong)


def test_the_weight_gradient_counts_its_steps():
    with pytest.raises(ValueError, match="as many steps"):
        plan(backward=True).weight_gradient(steps=[], grad_weight=64, workspace=64)
    step = (None, None, 0)
    with pytest.raises(ValueError, match="must be given"):
        plan(backward=True).weight_gradient([step], grad_weight=64, workspace=64)


def test_an_unknown_form_or_no_memory_cannot_be_packed():
    for arguments in ((7, 64, 64), (0, 0, 64), (0, 64, 0)):
        with pytest.raises(ValueError, match="must"):
            plan().pack(*arguments)
