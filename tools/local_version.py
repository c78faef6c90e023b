"""The version for scikit-build-core: that of snnlstm, with +SNNLSTM_LOCAL_VERSION if it is set."""

import os
import runpy


def dynamic_metadata(settings: dict, project: dict) -> dict[str, str]:
    version = runpy.run_path("snnlstm/version.py")["__version__"]
    local = os.environ.get("SNNLSTM_LOCAL_VERSION")
    return {"version": f"{version}+{local}" if local else version}
