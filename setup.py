"""Wraps scikit-build-core for tools that call a setup.py. pip reads pyproject.toml alone."""

import runpy
from pathlib import Path

from scikit_build_core.setuptools.wrapper import setup

version = runpy.run_path("snnlstm/version.py")["__version__"]
setup(
    version=version,
    packages=[
        path.parent.as_posix().replace("/", ".") for path in Path().glob("snnlstm/**/__init__.py")
    ],
)
