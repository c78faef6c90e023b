"""cuda_check says which drivers, GPUs and builds do not fit; the tests need no GPU."""

from __future__ import annotations

import types

import pytest
import torch

from snnlstm import _C
from snnlstm.compat import torch_private
from snnlstm.native import cuda_check

BUILD = {
    "cuda": "built with nvcc 13.0.88 for sm_75 80 90 80+ptx (found through PATH)",
    "cuda_version": "13.0.88",
    "cuda_archs": "75 80 90 80+ptx",
}
WITHOUT = {"cuda": "not built: SNNLSTM_CUDA=off", "cuda_version": "", "cuda_archs": ""}


@pytest.fixture
def machine(monkeypatch):
    """Returns a function that gives this process GPUs, a driver and a build.

    The function returns a list of the questions that the GPUs were asked.
    """
    asked: list[str] = []

    def give(build: dict[str, str], driver: int, *capabilities: tuple[int, int]) -> list[str]:
        def name(index: int) -> str:
            asked.append("name")
            return f"GPU {index}"

        cuda = types.SimpleNamespace(
            get_device_name=name, get_device_capability=lambda index: capabilities[index]
        )
        monkeypatch.setattr(torch, "cuda", cuda)
        monkeypatch.setattr(torch_private, "driver_version", lambda: driver)
        monkeypatch.setattr(_C, "build_info", lambda: build)
        return asked

    cuda_check.trouble.cache_clear()
    yield give
    cuda_check.trouble.cache_clear()


OLD = ("driver is too old", "CUDA 12.4", "needs CUDA 13.0", "580", "build for CUDA 12")
OLD_11 = ("driver is too old", "CUDA 11.7", "needs CUDA 11.8", "update the driver to 520 or newer")
NO_KERNELS = ("no CUDA kernels", "SNNLSTM_CUDA=off", "SNNLSTM_CUDA=on", "SNNLSTM_CUDA=pip")


@pytest.mark.parametrize(
    ("build", "driver", "capability", "words"),
    [
        *((BUILD, 13020, fits, ()) for fits in ((7, 5), (8, 6), (9, 0), (10, 3), (12, 0))),
        (BUILD, 14000, (9, 0), ()),
        (BUILD, 0, (9, 0), ()),  # the driver does not tell its version
        (BUILD, 12040, (9, 0), OLD),
        (BUILD | {"cuda_version": "11.8.89"}, 11070, (8, 0), OLD_11),
        (BUILD | {"cuda_version": "11.8.89"}, 11080, (8, 0), ()),
        (BUILD, 13000, (7, 0), ("GPU 0 (compute capability 7.0) is too old", "need 7.5 or newer")),
        (WITHOUT, 13000, (9, 0), NO_KERNELS),
    ],
)
def test_what_is_said_of_a_machine(machine, build, driver, capability, words):
    asked = machine(build, driver, capability)
    said = cuda_check.trouble(0)
    assert (said is None) == (not words)
    assert all(word in said for word in words)
    assert bool(asked) == (words not in (OLD, OLD_11, NO_KERNELS))


# A GPU's compute capability, what a build has code for, and what the GPU runs: machine code for 8.0
# runs on 8.9, PTX on all that is newer, and neither goes between Jetson's GPUs and others.
@pytest.mark.parametrize(
    ("capability", "archs", "code"),
    [
        ((8, 0), "80 80+ptx", ("machine code", 80)),
        ((8, 9), "80 86 80+ptx", ("machine code", 86)),
        ((8, 9), "86", ("machine code", 86)),
        ((7, 5), "75 80 80+ptx", ("machine code", 75)),
        ((7, 5), "75 75+ptx", ("machine code", 75)),
        ((10, 3), "80 90 90+ptx", ("PTX", 90)),
        ((8, 7), "86 80+ptx", ("PTX", 80)),
        ((8, 7), "87", ("machine code", 87)),
        ((7, 5), "80 90 90+ptx", None),
        ((9, 0), "80 86", None),
        ((8, 0), "86 86+ptx", None),
        ((8, 0), "75 75+ptx", None),  # PTX of 7.5 has no kernels for tensor cores
        ((8, 7), "86", None),
        ((8, 9), "87", None),
    ],
)
def test_what_a_gpu_runs_of_a_build(capability, archs, code):
    assert cuda_check.code_for({"cuda_archs": archs}, capability) == code
    said = cuda_check.device_trouble({"cuda_archs": archs}, "A card", capability)
    assert (said is None) == (code is not None)
    if said:
        assert f"A card (compute capability {capability[0]}.{capability[1]})" in said
        assert archs in said


@pytest.mark.parametrize(
    ("capability", "driver", "serves"),
    [
        ((8, 9), 13000, True),  # for machine code the major version alone counts
        ((12, 1), 13020, True),
        ((12, 1), 13010, False),
        ((12, 1), None, True),
        ((8, 7), 13010, False),  # machine code for 8.0 is for other GPUs than Jetson's
    ],
)
def test_a_driver_that_must_translate_knows_the_minor_version_too(capability, driver, serves):
    build = {"cuda_archs": "80 90 80+ptx", "cuda_version": "13.2.51"}
    said = cuda_check.device_trouble(build, "A card", capability, driver)
    assert (said is None) == serves
    if said:
        major, minor = capability
        own = f"(compute capability {major}.{minor})"
        for words in (own, "CUDA 13.2", "CUDA 13.1", f"_ARCHS={major}{minor}"):
            assert words in said


def test_a_gpu_of_rocm_has_no_kernels(machine, monkeypatch):
    machine(BUILD, 13000, (9, 0))
    monkeypatch.setattr(torch.version, "hip", "6.2", raising=False)
    cuda_check.trouble.cache_clear()
    assert cuda_check.trouble(0).startswith("torch is built for ROCm 6.2")
    cuda_check.trouble.cache_clear()


def test_each_gpu_is_judged_by_itself_and_asked_once(machine):
    asked = machine(BUILD, 13000, (9, 0), (7, 0))
    for _ in range(2):
        assert cuda_check.trouble(0) is None
        assert "GPU 1" in cuda_check.trouble(1)
    assert len(asked) == 2
