"""`python -m snnlstm`: what was built, what was found, and what is wrong with it.

For bug reports and for installations that behave strangely, so nothing here may fail: whatever is
missing or broken is part of the report.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .native import cuda_check

MISSING = "missing: "  # a fact that could not be found out is a text that starts with this
IN_TORCH = "so that every call runs in plain torch, and slower: "


def attempt(probe: Callable[[], Any]) -> Any:
    """What `probe` returns, or "missing: " and the reason where it raises."""
    try:
        return probe()
    except (Exception, SystemExit) as error:  # even an import may exit
        text = " ".join(str(error).split())
        return MISSING + type(error).__name__ + (f": {text}" if text else "")


def is_missing(fact: Any) -> bool:
    return isinstance(fact, str) and fact.startswith(MISSING)


def facts_of(name: str, **probes: Callable[[Any], Any]) -> dict[str, Any]:
    """What each of `probes` finds out from a module, or why it could not."""
    module = attempt(lambda: importlib.import_module(name))
    if is_missing(module):
        return dict.fromkeys(probes, module)
    return {fact: attempt(partial(probe, module)) for fact, probe in probes.items()}


def version(module: Any) -> str:
    return str(module.__version__)


def gpus(torch: Any) -> list[dict[str, Any]]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    name, capability = torch.cuda.get_device_name, torch.cuda.get_device_capability
    return [{"name": name(i), "capability": list(capability(i))} for i in range(count)]


def collect() -> dict[str, Any]:
    """All facts of the report, ready for JSON."""
    with warnings.catch_warnings(record=True) as caught:  # a broken driver warns
        warnings.simplefilter("always")
        torch = facts_of(  # torch comes first, so that snnlstm._C finds torch's OpenMP
            "torch",
            version=version,
            cuda=lambda torch: torch.version.cuda,
            driver=lambda torch: cuda_check.driver_version(),
            threads=lambda torch: torch.get_num_threads(),
            devices=gpus,
        )
    facts: dict[str, Any] = {
        **facts_of("snnlstm.version", version=version),
        "path": str(Path(__file__).resolve().parent),
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "executable": sys.executable,
        "platform": platform.platform(),
        **facts_of("numpy", numpy=version),
        **facts_of("snntorch", snntorch=version),
        **facts_of("snnlstm.native.function", devices=lambda native: sorted(native.DEVICES)),
        "forced_isa": os.environ.get("SNNLSTM_ISA"),
        "native": facts_of(
            "snnlstm._C",
            core=lambda core: core.__file__,
            isas=lambda core: core.isa_names(),
            isa=lambda core: core.isa_name(),
            openmp=lambda core: core.openmp_library(),
            build=lambda core: core.build_info(),
        ),
        "torch": torch | {"notes": [" ".join(str(w.message).split()) for w in caught]},
    }
    facts["problems"] = problems(facts["native"], torch)
    return facts


def problems(native: dict[str, Any], torch: dict[str, Any]) -> list[str]:
    """What keeps the native kernels from running here, and what to do about it."""
    found = []
    if is_missing(native["core"]):
        absent = native["core"] == MISSING + "ModuleNotFoundError: No module named 'snnlstm._C'"
        found.append(
            f"this installation has no native core, {IN_TORCH}pip builds the core where it finds a "
            "C++17 compiler, such as GCC 9 or Clang 14 (`pip install -v` says which, or why none "
            "served); in a checkout, `pip install -e .` does"
            if absent
            else f"the native core does not load, {IN_TORCH}{native['core']}"
        )
    elif is_missing(native["isa"]):
        found.append(f"no instruction set could be chosen ({native['isa']})")
    elif native["openmp"] == "":
        found.append(
            "no OpenMP runtime of torch's was found, whose threads the kernels use: every call on "
            "the CPU runs on one thread"
        )
    if is_missing(torch["version"]):
        found.append(f"torch cannot be imported ({torch['version']}): pip install torch")
    elif is_missing(torch["devices"]):
        found.append(f"torch cannot use the GPU ({torch['devices']})")
    elif not is_missing(native["core"]):  # what the first call on each GPU would say
        said = [attempt(partial(cuda_check.trouble, i)) for i in range(len(torch["devices"]))]
        texts = dict.fromkeys(text for text in said if text)
        found += [f"CUDA tensors take the reference path: {text}" for text in texts]
    return found


def gpu_and_code(build: dict[str, str], gpu: dict[str, Any]) -> str:
    """A GPU, and what of the build it runs."""
    kind, arch = cuda_check.code_for(build, tuple(gpu["capability"])) or ("no code", 0)
    of = {"machine code": f" of sm_{arch}", "PTX": f" of compute_{arch}"}.get(kind, "")
    return f"{gpu['name']} (sm_{''.join(map(str, gpu['capability']))}), {kind}{of}"


def table(facts: dict[str, Any]) -> str:
    """The report as a table for people."""
    native, torch = facts["native"], facts["torch"]
    build = native["build"] if isinstance(native["build"], dict) else {}
    forced = f" (forced by SNNLSTM_ISA={facts['forced_isa']})" if facts["forced_isa"] else ""
    gpus, driver = torch["devices"], torch["driver"]
    if isinstance(gpus, list):
        gpus = [gpu_and_code(build, gpu) for gpu in gpus]
    rows: list[tuple[str, Any]] = [
        ("snnlstm", f"{facts['version']}  {facts['path']}"),
        ("Python", f"{facts['python']}  {facts['executable']}"),
        ("platform", facts["platform"]),
        ("torch", torch["version"]),
        ("numpy", facts["numpy"]),
        ("snntorch", facts["snntorch"]),
        ("", ""),
        ("native core", native["core"]),
        ("compiler", build.get("compiler", "unknown")),
        ("instruction sets", native["isas"]),
        ("in use", f"{native['isa']}{forced}"),
        ("used on", facts["devices"]),
        ("threads", torch["threads"]),
        ("OpenMP", native["openmp"]),
        ("", ""),
        ("CUDA kernels", build.get("cuda", "unknown")),
        ("torch's CUDA", torch["cuda"]),
        ("driver's CUDA", cuda_check.show(driver) if isinstance(driver, int) else driver),
        ("GPUs", gpus or ("" if torch["cuda"] else "none (torch is built without CUDA)")),
        *(("note", note) for note in torch["notes"]),
    ]
    rows = [(name, ", ".join(v) if isinstance(v, list) else v) for name, v in rows]
    lines = [f"{name:<18}{value or 'none'}" if name else "" for name, value in rows]
    found = [f"problem: {text}" for text in facts["problems"]]
    return "\n".join([*lines, "", *(found or ["Nothing is wrong."])])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m snnlstm",
        description="Prints which kernels were built, which are in use here, and what is missing.",
        epilog="SNNLSTM_ISA forces an instruction set, such as SNNLSTM_ISA=avx2.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    as_json = parser.parse_args(arguments).json
    facts = collect()
    print(json.dumps(facts, indent=2) if as_json else table(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
