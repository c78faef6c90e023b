"""Gives scikit-build-core the version: that of snnlstm/version.py, +SNNLSTM_LOCAL_VERSION if set."""

import os
import runpy


def dynamic_metadata(settings: dict, project: dict) -> dict[str, str]:
    version = runpy.run_path("snnlstm/version.py")["__version__"]
    local = os.environ.get("SNNLSTM_LOCAL_VERSION")
    return {"version": f"{version}+{local}" if local else version}
