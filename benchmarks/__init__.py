"""Measures snnlstm: `python -m benchmarks` is the suite, `python -m benchmarks.demo` the demo."""

import sys


def what_brings(text: str) -> str:
    """Completes a message about a package that is missing by the command that installs it."""
    return f'{text}: in the checkout run {sys.executable} -m pip install -e ".[bench]"'
