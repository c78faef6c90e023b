import pytest

from tests.emulator.backend import emulated_core


@pytest.fixture
def core():
    """The project's kernels, emulated, with default settings before and after."""
    found = emulated_core()
    yield found
    found.reset()
