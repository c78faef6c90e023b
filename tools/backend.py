"""The build backend: scikit-build-core, which builds less if the whole core fails.

scikit-build-core itself retries once. Two fallbacks are needed: the CPU kernels without CUDA, and
the package without its core. Neither takes the place of what a variable of the environment names.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from local_version import nvcc
from scikit_build_core import build
from scikit_build_core.build import (
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable", "build_sdist", "build_wheel", "get_requires_for_build_editable",
    "get_requires_for_build_sdist", "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable", "prepare_metadata_for_build_wheel",
]  # fmt: skip


def build_wheel(
    wheel_directory: str, config_settings: dict | None = None, metadata_directory: str | None = None
) -> str:
    return _built(build.build_wheel, wheel_directory, config_settings)


def build_editable(
    wheel_directory: str, config_settings: dict | None = None, metadata_directory: str | None = None
) -> str:
    return _built(build.build_editable, wheel_directory, config_settings)


def _built(hook: Callable[..., str], *arguments: object) -> str:
    """Returns the name of the wheel with the most parts that can be built.

    No hook gets the metadata that was prepared: a wheel without the core has other tags.
    """
    fallbacks = []
    if not (os.environ.get("SNNLSTM_CUDA") or os.environ.get("SNNLSTM_LOCAL_VERSION")):
        if nvcc():
            fallbacks.append(("SNNLSTM_CUDA", "failed", "CUDA kernels"))
        if not os.environ.get("SNNLSTM_CORE"):
            slower = "native core, so that every call takes the reference path, which is slower"
            fallbacks.append(("SNNLSTM_CORE", "off", slower))
    for name, value, missing in fallbacks:
        try:
            return hook(*arguments)
        except SystemExit:  # scikit-build-core has printed why
            os.environ[name] = value
            print(f"\nsnnlstm WITHOUT its {missing}; the cause is above.\n", flush=True)
    return hook(*arguments)
