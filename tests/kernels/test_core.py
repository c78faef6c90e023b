"""Random calls pass, and the core refuses what no kernel can run with an error that says why."""

import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch  # noqa: F401 (before the core)

from tests.shared.cases import FACTS, INPUT_LAYOUTS, PLAIN
from tests.shared.cpu_kernels import ISAS, native
from tests.shared.gradients import ASKED, KEPT
from tests.shared.helpers import long, more_memory
from tools import fuzz

_C = pytest.importorskip("snnlstm._C")
ROOT = Path(__file__).resolve().parents[2]


def extremes() -> Iterator[dict[str, Any]]:
    """Yields the fields of cells with one or two sizes of up to 64 bits."""
    sizes = [names for k in (1, 2) for names in combinations(("T", "N", "Cin", "C", "H", "W"), k)]
    others: list[dict[str, Any]] = [
        {}, {"pool": 1, "pool_size": (2, 3)}, {"kernel": (1999, 3)}, {"kernel": (1, 5), "dtype": 1},
        {"kernel": (99, 99), "stride": (2**30, 2**30)}, {"stride": (3, 1000), "dilation": (9, 3)},
    ]  # fmt: skip
    for names, bits, other in product(sizes, (10, 16, 20, 24, 28, 31, 48, 63), others):
        yield FACTS | dict.fromkeys(names, 2**bits - 1) | other


NEEDS = {
    "avx2": {"avx2", "fma"},
    "avx512": {"avx2", "fma", "avx512f", "avx512dq", "avx512bw", "avx512vl"},
}


def test_the_processors_instruction_sets_are_used():
    """Without them calls would be several times slower, and right."""
    told = Path("/proc/cpuinfo")
    flags = re.search(r"^flags\s*:(.*)$", told.read_text() if told.exists() else "", re.MULTILINE)
    if flags is None:
        pytest.skip("only Linux on x86 tells the processor's flags")
    has = set(flags[1].split())
    assert {name: name in ISAS for name in NEEDS} == {
        name: needed <= has for name, needed in NEEDS.items()
    }


@pytest.mark.parametrize("core", ["cpu", "emulator"])
def test_a_cell_of_any_size_is_refused_or_its_memory_counted(core):
    """A plan that does not fit into any memory must itself take less than 16 GiB."""
    module: Any = _C
    if core == "emulator":
        if not ((ROOT / "csrc").exists() and shutil.which("g++")):
            pytest.skip("no sources or no compiler for the emulator")
        from tests.emulator.backend import emulated_core

        module = emulated_core().module
    with more_memory(1 << 34) if sys.platform == "linux" else nullcontext():
        for k, facts in enumerate(extremes()):
            try:
                cell, backward = module.Cell(**facts), k % 2 == 1
                if core == "cpu":
                    numbers = k % 3, 0.01 if k % 5 else 1.0, 8, 2 ** (k % 15)
                    a_pass = _C.CpuPass(cell, *numbers, backward, True, k % 7 == 0)
                    found = [a_pass.workspace, *(count for _, _, count in a_pass.layouts)]
                else:
                    device = module.CudaDevice(80, 108, 163 * 1024)
                    a_pass = module.CudaPass(cell, device, k % 5, k % 4, backward)
                    found = [a_pass.packed_bytes, a_pass.workspace]
            except (ValueError, TypeError, RuntimeError):
                continue
            assert all(0 <= count < 2**62 for count in found), (facts, found)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"dtype": 99}, "dtype must be less than 4, got 99"),
        ({"C": 0}, "every size of a cell must be positive"),
        ({"T": 0}, "T and N must be at least 1"),
        ({"N": 0}, "T and N must be at least 1"),
        ({"H": 2**62}, "the sizes of a cell are too large"),
        ({"kernel": (2, 3)}, "kernel must be odd"),
        ({"pool": 1, "pool_size": (9, 1)}, "pool_size must fit into the state"),
        ({"spiking": False}, "spiking=False excludes reset, pool, surrogate"),
        ({"surrogate": 9}, "surrogate must not be stochastic"),
    ],
    ids=str,
)
def test_messages_name_what_is_wrong(changed, says):
    with pytest.raises(ValueError, match=says):
        _C.Cell(**FACTS | changed)


def test_the_cpu_kernels_take_no_half_type():
    with pytest.raises(ValueError, match="float32 and float64"):
        _C.CpuPass(_C.Cell(**FACTS | {"dtype": 2}), 0, 1.0, 8, 1)


ADDRESS = 1 << 20  # of memory that nobody touches
VIEW = ADDRESS, (512, 512, 64, 8, 1)
# The fields of a call of CpuPass, in the order of csrc/args.h.
COMMON = (
    ADDRESS, ADDRESS, 0, 0, 0, 0, VIEW, VIEW, VIEW, ADDRESS, 0, ADDRESS, 0, True, ADDRESS, ADDRESS,
    0,
)  # fmt: skip
FIELDS = {
    "forward": (*COMMON, 0, None, None, VIEW, VIEW, VIEW),
    "backward": (*COMMON, *[None] * 6, ADDRESS, ADDRESS, ADDRESS, 0, 0),
}
# The places of fields that must be given.
NEEDED = {
    "forward": {0, 1, 6, 7, 8, 9, 11, 15, 20, 21, 22},
    "backward": {0, 1, 6, 7, 8, 9, 11, 14, 15},
}


@pytest.mark.parametrize("name", FIELDS)
def test_fields_that_are_missing_or_of_another_kind_are_refused(name):
    """No kernel runs: each call is refused before any address is read."""
    call = _C.CpuPass(_C.Cell(**FACTS), 0, 1.0, 8, 1, name == "backward").run
    fields = FIELDS[name]
    wrong: list[Any] = [fields[:-1], (*fields, 0), list(fields)]
    for place, field in enumerate(fields):
        spoiled: list[Any] = ["x", 1.5, (1,), (ADDRESS, (-1, 0, 0, 0, 0)), (ADDRESS, (0,) * 4)]
        if place in NEEDED[name]:
            spoiled += [(0, VIEW[1]), None] if isinstance(field, tuple) else [0]
        wrong += [(*fields[:place], each, *fields[place + 1 :]) for each in spoiled]
    for spoiled in wrong:
        with pytest.raises((TypeError, ValueError)):
            call(spoiled)


def test_an_image_too_large_for_lists_of_nonzeros_has_none():
    """Places in such an image exceed the lists' 32 bits: a call would read and write elsewhere."""

    def algorithm(width):
        facts = {"Cin": 512, "C": 16, "H": 1, "W": width, "kernel": (1, 3)}
        return _C.CpuPass(_C.Cell(**FACTS | facts), 0, 0.01, 8, 1).name

    assert algorithm(2**10).endswith("-sparse")
    assert not algorithm(2**20).endswith("-sparse")


# ---- random calls --------------------------------------------------------------------------------


@pytest.mark.drawn
@pytest.mark.slow
def test_random_calls():
    done = fuzz.run(90)
    assert done["gradients"] >= 45
    assert all(done[way] for way in fuzz.WAYS)
    layouts = {f"{what} {layout}" for what in fuzz.LAID_OUT for layout in INPUT_LAYOUTS}
    assert all(done[layout] for layout in layouts | {"gradients negated"})


@pytest.mark.parametrize("way", ["one call", "steps", "a cell's calls"])
@pytest.mark.parametrize(
    ("asked", "kept"),
    [*((asked, "as it is") for asked in ASKED), *(("plain", kept) for kept in KEPT)],
)
def test_gradients_that_are_asked_for_in_unusual_ways(asked, kept, way):
    case = PLAIN.but(lengths=(1, 3))
    assert fuzz.check(case, ISAS[-1], "auto", way, asked=asked, kept=kept)


@long
def test_a_fault_is_found_and_shrunk(monkeypatch):
    forward = native.cpu.Plan.forward

    def wrong(self, call, training):
        result = forward(self, call, training)
        if self.spec.pool == "max":
            result.mem[..., -1] *= 1.001
        return result

    monkeypatch.setattr(native.cpu.Plan, "forward", wrong)
    check, cases = fuzz.check, []
    monkeypatch.setattr(fuzz, "check", lambda case, **how: cases.append(case) or check(case, **how))
    with pytest.raises(AssertionError, match="close"):
        fuzz.run(200, seed=1)
    assert cases[-1].options.pool == "max"
    assert cases[-1].batch == cases[-1].time == 1
