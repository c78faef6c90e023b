"""Defines the fixtures that all tests share."""

import gc
import logging
import os

# OpenMP reads this variable when torch loads it: waiting threads then leave cores to other workers.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import snntorch
import torch

import snnlstm.calls.entries
import snnlstm.dispatch.path
import snnlstm.dispatch.reasons
from tests.shared.cpu_kernels import isa, kernels, native  # noqa: F401  (fixtures for every test)
from tests.shared.helpers import set_seed

ROOT = Path(__file__).resolve().parents[1]

# pytest hands each logger that does not propagate its handlers, in every phase of a test. Many of
# torch's do not, and one of them writes all that is compiled if it has a handler.
for logger in logging.root.manager.loggerDict.values():
    if isinstance(logger, logging.Logger):
        logger.propagate = True


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "run only what takes the backend or device of this name as a parameter, such as cuda"
    parser.addoption("--backend", help=text)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Runs slow tests first, so that workers end together; has emulator_long only if -m names it.

    A test of several backends has the mark for the emulated one alone.
    """
    wanted, long = config.getoption("--backend"), "emulator_long" in (config.getoption("-m") or "")

    def taken(item: pytest.Item) -> bool:
        parameters = getattr(item, "callspec", None)
        values = parameters.params.values() if parameters else ()
        others = {value.name for value in values if isinstance(value, Backend)} - {"emulator"}
        if item.get_closest_marker("emulator_long") and not long and not others:
            return False
        return not wanted or any(wanted in (getattr(v, "name", None), str(v)) for v in values)

    config.hook.pytest_deselected(items=[item for item in items if not taken(item)])
    items[:] = sorted(filter(taken, items), key=lambda item: not item.get_closest_marker("slow"))


@dataclass(frozen=True)
class Backend:
    """This is one implementation of the cell under test.

    "reference" hides the core. "emulator" runs the emulated CUDA kernels on CPU tensors.
    """

    name: str
    device: torch.device
    native: bool

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within the block, cells on the device run this implementation."""
        if self.name == "reference":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(snnlstm.dispatch.reasons, "backends", None)
                patch.setattr(snnlstm.calls.entries, "BACKENDS", {})
                yield
        elif self.name == "emulator":
            from tests.emulator.backend import emulated  # the first import builds the emulator

            with emulated():
                yield
        elif self.name == "cuda":
            # A test makes all tensors on the GPU, which computes at the CPU's precision.
            with torch.device(self.device), pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.backends.cudnn, "allow_tf32", False)
                yield
        else:
            yield

    def check(self, path: "snnlstm.Path | None", native: bool = True) -> None:
        """Asserts which path a call took; `native` says whether the kernels cover the call."""
        assert path is not None
        assert path.native == (self.native and native), str(path)
        assert not path.native or path.name.startswith(self.name), str(path)


def _backends() -> list[Backend]:
    backends = [Backend("reference", torch.device("cpu"), native=False)]
    if native is not None:
        backends.append(Backend("cpu", torch.device("cpu"), native=True))
        # The emulator compiles csrc, which the tests of a wheel do not have.
        if (ROOT / "csrc").exists() and shutil.which(os.environ.get("CXX", "g++")):
            backends.append(Backend("emulator", torch.device("cpu"), native=True))
    if native is not None and torch.cuda.is_available() and "cuda" in native.DEVICES:
        backends.append(Backend("cuda", torch.device("cuda"), native=True))
    return backends


@pytest.fixture(params=_backends(), ids=lambda backend: backend.name, scope="session")
def backend(request: pytest.FixtureRequest) -> Backend:
    """Runs a test once for each available implementation, with its device as torch's default."""
    return request.param


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Drops what torch.compile has compiled, before a test and after it."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _same_start(request: pytest.FixtureRequest) -> Iterator[None]:
    set_seed(0)
    torch.set_num_threads(2)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    sys.setswitchinterval(0.005)
    snnlstm.dispatch.path._logged.clear()
    # torch's default, for convolutions and RNNs alike: a test may leave the two unlike each other,
    # and then neither torch.export nor the ONNX exporter works.
    torch.backends.cudnn.allow_tf32 = True
    # A sixth of a compilation goes into what newer torch's logs say of guards and side effects.
    if hasattr(config := sys.modules.get("torch._dynamo.config"), "side_effect_replay_policy"):
        config.side_effect_replay_policy = "silent"
        torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0
    # snnTorch keeps all of its cells, and detach_hidden() raises an error at some of them.
    snntorch.SpikingNeuron.instances.clear()
    if "backend" not in request.fixturenames:
        yield
        return
    with request.getfixturevalue("backend").running():
        yield


@pytest.fixture(autouse=True, scope="module")
def _short_collections() -> None:
    """Leaves what is imported, and what earlier files have made, out of garbage collections.

    Many tests ask for a collection, and one of all that was compiled before takes half a second.
    """
    gc.collect()
    gc.freeze()
