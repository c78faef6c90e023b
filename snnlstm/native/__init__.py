"""The compiled core and its callers: no other package imports ``snnlstm._C``.

:mod:`~snnlstm.native.backends` says which devices have kernels, and :mod:`~snnlstm.native.function`
runs the plan of a call.
"""

from __future__ import annotations

from pathlib import Path

WAYS_OUT = (
    "run Python in another folder, where it finds what `pip install .` has installed, or run "
    "`pip install -e .` in the checkout"
)
"""Ways out if a checkout has no core: Python prefers its sources to an installed package."""


def checkout() -> Path | None:
    """The checkout that Python took this package from; None if it is installed."""
    folder = Path(__file__).resolve().parents[2]
    return folder if (folder / "csrc").is_dir() else None
