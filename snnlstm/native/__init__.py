"""The compiled core, and all that calls it: no other package imports ``snnlstm._C``.

:mod:`~snnlstm.native.function` runs a call, and finds its plan.
"""

from __future__ import annotations

from pathlib import Path

WAYS_OUT = (
    "run Python in another folder, where it finds what `pip install .` has installed, or run "
    "`pip install -e .` in the checkout"
)
"""What helps where a checkout has no core: Python takes its sources before what is installed."""


def checkout() -> Path | None:
    """The checkout that Python took this package from; None if it is installed."""
    folder = Path(__file__).resolve().parents[2]
    return folder if (folder / "csrc").is_dir() else None
