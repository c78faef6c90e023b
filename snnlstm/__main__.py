"""`python -m snnlstm`: what was built, what was found, and what is wrong with it.

For bug reports and for installations that behave strangely, so nothing here may fail: whatever is
missing or broken is part of the report.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .native import cuda_check

# A fact that could not be found out is a text that starts with this.
MISSING = "missing: "
NOT_THERE = MISSING + "ModuleNotFoundError: No module named 'snnlstm._C'"
NO_CORE = (
    "this installation has no native core, so that every call runs in plain torch, and slower: "
    "pip builds the core where it finds a C++17 compiler, such as GCC 9 or Clang 14 (`pip install "
    "-v` says which, or why none served); in a checkout, `pip install -e .` does"
)
BROKEN_CORE = "the native core does not load, so that every call runs in plain torch, and slower: "


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
    return {
        fact: module if is_missing(module) else attempt(functools.partial(probe, module))
        for fact, probe in probes.items()
    }


def version(module: Any) -> str:
    return str(getattr(module, "__version__", "unknown"))


def gpus(torch: Any) -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    name, capability = torch.cuda.get_device_name, torch.cuda.get_device_capability
    return [
        {"name": name(i), "capability": list(capability(i))}
        for i in range(torch.cuda.device_count())
    ]


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
        "platform": attempt(platform.platform),
        **facts_of("numpy", numpy=version),
        **facts_of("snntorch", snntorch=version),
        **facts_of("snnlstm.native.backend", devices=lambda backend: sorted(backend.DEVICES)),
        "forced_isa": os.environ.get("SNNLSTM_ISA"),
        "native": facts_of(
            "snnlstm._C",
            core=lambda core: str(getattr(core, "__file__", "unknown")),
            isas=lambda core: list(core.isa_names()),
            isa=lambda core: str(core.isa_name()),
            openmp=lambda core: str(core.openmp_library()),
            build=lambda core: {str(k): str(v) for k, v in dict(core.build_info()).items()},
        ),
        "torch": torch | {"notes": [" ".join(str(w.message).split()) for w in caught]},
    }
    facts["problems"] = problems(facts)
    return facts


def problems(facts: dict[str, Any]) -> list[str]:
    """What keeps the native kernels from running here, and what to do about it."""
    found = []
    native, torch = facts["native"], facts["torch"]
    if is_missing(native["core"]):
        found.append(NO_CORE if native["core"] == NOT_THERE else BROKEN_CORE + native["core"])
    elif is_missing(native["isa"]):
        found.append(f"no instruction set could be chosen ({native['isa']})")
    elif native["openmp"] == "":
        found.append(
            "no OpenMP runtime of torch's was found, whose threads the kernels use: every call on "
            "the CPU runs in plain torch, and slower"
        )
    if is_missing(facts["numpy"]):
        found.append(f"numpy cannot be imported ({facts['numpy']}): pip install numpy")
    if is_missing(torch["version"]):
        found.append(f"torch cannot be imported ({torch['version']}): pip install torch")
    elif is_missing(torch["devices"]):
        found.append(f"torch cannot use the GPU ({torch['devices']})")
    elif torch["devices"] and not is_missing(native["core"]):
        found += gpu_problems(native["build"], torch["driver"], torch["devices"])
    return found


def gpu_problems(build: Any, driver: Any, gpus: list[dict[str, Any]]) -> list[str]:
    """What the first call on each GPU would say."""
    build = build if isinstance(build, dict) else {}
    driver = driver if isinstance(driver, int) else None
    general = cuda_check.without_kernels(build) or cuda_check.driver_trouble(build, driver)
    if general:
        return [f"CUDA tensors take the reference path: {general}"]
    trouble = cuda_check.device_trouble
    found = [trouble(build, gpu["name"], tuple(gpu["capability"]), driver) for gpu in gpus]
    return [text for text in found if text]


def gpu_and_code(build: dict[str, str], gpu: dict[str, Any]) -> str:
    """A GPU, and what of the build it runs."""
    own = f"{gpu['name']} (sm_{''.join(map(str, gpu['capability']))})"
    code = cuda_check.code_for(build, tuple(gpu["capability"]))
    if code is None:
        return f"{own}, no code"
    kind, arch = code
    return f"{own}, machine code of sm_{arch}" if kind != "PTX" else f"{own}, PTX of compute_{arch}"


def words(fact: Any) -> Any:
    """A list's items as one text; any other fact as it is."""
    return ", ".join(fact) if isinstance(fact, list) else fact


def table(facts: dict[str, Any]) -> str:
    """The report as a table for people."""
    native, torch, build = facts["native"], facts["torch"], facts["native"]["build"]
    build = build if isinstance(build, dict) else {}
    forced = f" (forced by SNNLSTM_ISA={facts['forced_isa']})" if facts["forced_isa"] else ""
    gpus, driver = torch["devices"], torch["driver"]
    if isinstance(gpus, list):
        gpus = [gpu_and_code(build, gpu) for gpu in gpus]
    no_gpus = "none" if torch["cuda"] else "none (torch is built without CUDA)"
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
        ("instruction sets", words(native["isas"]) or "none"),
        ("in use", f"{native['isa']}{forced}"),
        ("used on", words(facts["devices"])),
        ("threads", torch["threads"] if torch["threads"] is not None else "unknown"),
        ("OpenMP", native["openmp"] or "none"),
        ("", ""),
        ("CUDA kernels", build.get("cuda", "unknown")),
        ("torch's CUDA", torch["cuda"] or "none"),
        ("driver's CUDA", cuda_check.show(driver) if isinstance(driver, int) else driver or "none"),
        ("GPUs", words(gpus) or no_gpus),
        *(("note", note) for note in torch["notes"]),
    ]
    width = max(len(name) for name, _ in rows) + 2
    lines = [f"{name:<{width}}{value}".rstrip() for name, value in rows]
    found = [f"problem: {text}" for text in facts["problems"]]
    return "\n".join([*lines, "", *(found or ["Nothing is wrong."])])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m snnlstm",
        description="Prints which kernels were built, which are in use here, and what is missing.",
        epilog="SNNLSTM_ISA forces an instruction set, such as SNNLSTM_ISA=avx2.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    options = parser.parse_args(arguments)
    facts = collect()
    print(json.dumps(facts, indent=2) if options.json else table(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
