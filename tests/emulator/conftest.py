import pytest

from tests.emulator.backend import emulated_core
from tests.emulator.library import own_kernels


@pytest.fixture
def core():
    """The project's kernels, emulated, with default settings before and after."""
    found = emulated_core()
    yield found
    found.reset()


@pytest.fixture
def emulator():
    """The kernels of the emulator's own tests, with default settings before and after."""
    found = own_kernels()
    yield found
    found.reset()
