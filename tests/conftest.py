"""Fixtures that all tests share."""

import os

# OpenMP reads this when torch loads it: its waiting threads leave the cores to other workers.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest
import snntorch
import torch
from kernels import isa, kernels, native  # noqa: F401  (fixtures for every test)

import snnlstm.run

SIMT = Path(__file__).parent / "simt"
sys.path.append(str(SIMT))

# Fresh examples on a developer's machine, the same ones on every run of CI. A failure prints
# what is needed to see it again.
hypothesis.settings.register_profile("default", deadline=None, print_blob=True)
hypothesis.settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Runs slow tests first, so that workers end together, and skips simt_long unless asked for."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if "simt_long" in (config.getoption("-m") or ""):
        return
    skip = pytest.mark.skip(reason="long: run `make test-simt`")
    for item in items:
        if item.get_closest_marker("simt_long"):
            item.add_marker(skip)


@dataclass(frozen=True)
class Backend:
    """One implementation of the cell under test.

    "reference" hides the core; "simt" is the CUDA kernels, emulated, for CPU tensors.
    """

    name: str
    device: torch.device
    native: bool

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within the block, cells on the device run this implementation."""
        if self.name == "reference":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(snnlstm.run, "_native", None)
                yield
        elif self.name == "simt":
            from backend import emulated  # builds it: half a minute, the first time

            with emulated():
                yield
        elif self.name == "cuda":
            # Everything that a test makes is on the GPU; at full precision, as on the CPU.
            with torch.device(self.device), pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.backends.cudnn, "allow_tf32", False)
                yield
        else:
            yield

    def check(self, path: "snnlstm.run.Path | None", native: bool = True) -> None:
        """Assert which path a call took; `native`: whether the kernels can do this call."""
        assert path is not None
        assert path.native == (self.native and native), str(path)
        assert not path.native or path.name.startswith(self.name), str(path)


def _backends() -> list[Backend]:
    backends = [Backend("reference", torch.device("cpu"), native=False)]
    if native is not None:
        backends.append(Backend("cpu", torch.device("cpu"), native=True))
        # The kernels are built from csrc, which the tests of a wheel do not have.
        if (SIMT.parents[1] / "csrc").exists() and shutil.which(os.environ.get("CXX", "g++")):
            backends.append(Backend("simt", torch.device("cpu"), native=True))
    if native is not None and torch.cuda.is_available() and "cuda" in native.DEVICES:
        backends.append(Backend("cuda", torch.device("cuda"), native=True))
    return backends


@pytest.fixture(params=_backends(), ids=lambda backend: backend.name, scope="session")
def backend(request: pytest.FixtureRequest) -> Backend:
    """Run a test once for each implementation that is there, on its device by default."""
    return request.param


@pytest.fixture(autouse=True)
def _same_start(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    # snnTorch keeps all of its cells, and some of them cannot be detached.
    snntorch.SpikingNeuron.instances.clear()
    if "backend" not in request.fixturenames:
        yield
        return
    with request.getfixturevalue("backend").running():
        yield
