import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))


def pytest_configure(config):
    config.addinivalue_line("markers", "simt_long: part of `make test-simt` only")


def pytest_collection_modifyitems(config, items):
    """The long run is asked for by name: -m simt_long."""
    if "simt_long" in (config.getoption("-m") or ""):
        return
    skip = pytest.mark.skip(reason="long: run `make test-simt`")
    for item in items:
        if item.get_closest_marker("simt_long"):
            item.add_marker(skip)
