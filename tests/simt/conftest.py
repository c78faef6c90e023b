import pytest

from tests.simt.backend import simt_core


@pytest.fixture
def core():
    """The project's kernels, emulated, with default settings before and after."""
    found = simt_core()
    yield found
    found.reset()
