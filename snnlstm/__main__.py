"""`python -m snnlstm` reports what was built, what was found, and what is wrong.

It also runs one step by the kernels and compares it with the reference path. The report is for new
installations, for broken ones and for bug reports. So nothing here may fail: the report names
whatever is missing or broken.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import sys
import warnings
from collections.abc import Callable
from functools import cache, partial
from operator import attrgetter
from typing import Any

from .native import WAYS_OUT, checkout, cuda_check

MISSING = "missing: "  # the text of a fact that could not be found begins so
IN_TORCH = "so that every call takes the reference path, which is slower: "

# A row has a fact's name, a module, and the module's attribute or function that tells the fact.
# torch comes first, so that snnlstm._C finds torch's OpenMP.
FACTS = (
    ("torch", "torch", "__version__"),
    ("torch's CUDA", "torch", "version.cuda"),
    ("threads", "torch", "get_num_threads"),
    ("snnlstm", "snnlstm.version", "__version__"),
    ("numpy", "numpy", "__version__"),
    ("snntorch", "snntorch", "__version__"),
    ("native core", "snnlstm._C", "__file__"),
    ("build", "snnlstm._C", "build_info"),
    ("instruction sets", "snnlstm._C", "isa_names"),
    ("in use", "snnlstm._C", "isa_name"),
    ("OpenMP", "snnlstm._C", "openmp_library"),
    ("used on", "snnlstm.native.backends", "DEVICES"),
    ("algorithm", "snnlstm.calls.algorithms", "get_algorithm"),
    ("driver's CUDA", "snnlstm.__main__", "driver"),
    ("GPUs", "snnlstm.__main__", "gpus"),
)


def attempt(probe: Callable[[], Any]) -> Any:
    """Return what `probe` returns, or "missing: " and the reason if it raises."""
    try:
        return probe()
    except (Exception, SystemExit) as error:  # even an import may exit
        text = " ".join(str(error).split())
        return MISSING + type(error).__name__ + (f": {text}" if text else "")


def is_missing(fact: Any) -> bool:
    return isinstance(fact, str) and fact.startswith(MISSING)


@cache  # a broken module is imported only once, because the second error would say less
def module_of(name: str) -> Any:
    return attempt(partial(importlib.import_module, name))


def fact_of(name: str, attribute: str) -> Any:
    """Return an attribute of a module, or what it returns if it is a function."""
    module = module_of(name)
    fact = module if is_missing(module) else attrgetter(attribute)(module)
    return fact() if callable(fact) else fact


def driver() -> Any:
    from .compat import torch_private

    newest = torch_private.driver_version()
    return cuda_check.show(newest) if newest else None


def gpus() -> list[str]:
    """Return the name of each GPU, which code of the build it runs, and what the build is for."""
    torch, build = importlib.import_module("torch"), fact_of("snnlstm._C", "build_info")
    texts, build = [], {} if is_missing(build) else build
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        capability = torch.cuda.get_device_capability(index)
        code = cuda_check.code_for(build, capability)
        runs = f"{code[0]} of {code[1]}" if code else "no code"
        runs += f", built for {build.get('cuda_archs') or 'none'}"
        texts.append(f"{torch.cuda.get_device_name(index)} {capability}: {runs}")
    return texts


def one_step(gpus: Any) -> dict[str, str]:
    """Return for each device that has kernels how a step there compares with plain PyTorch."""
    if is_missing(module_of("snnlstm._C")):
        return {}
    indices = range(0 if is_missing(gpus) else len(gpus))
    usable = [
        f"cuda:{index}" for index in indices if not attempt(partial(cuda_check.trouble, index))
    ]
    return {device: attempt(partial(compared, device)) for device in ["cpu", *usable]}


def compared(device: str) -> str:
    """Run a training step by the kernels and in plain PyTorch, and return how they compare.

    Raises RuntimeError if they differ by more than rounding, which on CUDA is that of tf32.
    """
    import torch

    # The package has no names if its import failed, and these modules say why.
    from .calls.algorithms import algorithm, get_algorithm
    from .neurons.sconv2dlstm import SConv2dLSTM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        cell = SConv2dLSTM(2, 8, 3, threshold=0.05).to(device)
        x, *states = (torch.randn(2, channels, 16, 16).to(device) for channels in (2, 8, 8))
    results, paths = [], []
    for chosen in (get_algorithm(), "reference"):
        with algorithm(chosen):
            spk, syn, mem = cell(x, *states)
        weights = torch.autograd.grad(spk.sum() + mem.sum(), list(cell.conv.parameters()))
        results.append([tensor.detach() for tensor in (syn, mem, *weights, spk)])
        paths.append(cell.path)
    if not paths[0].native:
        return str(paths[0])
    *numbers, spikes = zip(*results, strict=True)
    error = torch.stack([(a - b).abs().max() / b.abs().max() for a, b in numbers]).max().item()
    limit = 1e-5 if device == "cpu" else 1e-2
    flipped = (spikes[0] != spikes[1]) & ((mem.detach() - 0.05).abs() > limit)
    if flipped.any() or not error <= limit:  # NaN is no small error
        raise RuntimeError(f"{paths[0].name} differs from plain PyTorch by {error:.0e}")
    return f"{paths[0].name} agrees with plain PyTorch to {error:.0e}"


def collect() -> dict[str, Any]:
    """Return the report: all facts, torch's warnings, and the problems."""
    with warnings.catch_warnings(record=True) as caught:  # torch warns of a broken driver
        warnings.simplefilter("always")
        facts = {name: attempt(partial(fact_of, *where)) for name, *where in FACTS}
    facts |= {
        "forced": os.environ.get("SNNLSTM_ISA"),
        "path": os.path.dirname(os.path.abspath(__file__)),
        "python": f"{platform.python_version()}, {sys.executable}",
        "platform": platform.platform(),
        "notes": [str(w.message) for w in caught if w.category is UserWarning],
        "one step on": one_step(facts["GPUs"]),
    }
    return facts | {"problems": problems(facts)}


def problems(facts: dict[str, Any]) -> list[str]:
    """Return what prevents the native kernels from running here, and what to do about it."""
    texts, core = [], facts["native core"]
    if core == MISSING + "ModuleNotFoundError: No module named 'snnlstm._C'":
        texts.append(
            f"the checkout {folder} has no native core, {IN_TORCH}{WAYS_OUT}"
            if (folder := checkout())
            else f"this installation has no native core, {IN_TORCH}pip builds the core if it "
            "finds a C++17 compiler, such as GCC 9 or Clang 14 (`pip install -v` says which, or "
            "why not)"
        )
    elif is_missing(core):
        texts.append(f"the native core does not load, {IN_TORCH}{core}")
    elif is_missing(facts["in use"]):
        texts.append(f"no instruction set could be chosen ({facts['in use']})")
    elif facts["OpenMP"] == "":
        texts.append(
            "torch's OpenMP runtime, whose threads the kernels use, was not found: every call on "
            "the CPU runs on one thread"
        )
    if is_missing(facts["torch"]):
        texts.append(f"torch cannot be imported ({facts['torch']}): pip install torch")
    elif is_missing(facts["GPUs"]):
        texts.append(f"torch cannot use the GPU ({facts['GPUs']})")
    elif not is_missing(core):  # as the first call on each GPU does
        answers = [attempt(partial(cuda_check.trouble, i)) for i in range(len(facts["GPUs"]))]
        reasons = dict.fromkeys(text for text in answers if text)
        texts += [f"CUDA tensors take the reference path: {reason}" for reason in reasons]
        steps = facts["one step on"].items()
        texts += [
            f"one step on {device} failed ({text})" for device, text in steps if is_missing(text)
        ]
    return texts


def table(facts: dict[str, Any]) -> str:
    """Return the report as lines of text."""
    lines = []
    for name, value in facts.items():
        items = value.items() if isinstance(value, dict) else [("", value)]
        for key, fact in items:
            text = ", ".join(fact) if isinstance(fact, list | tuple | frozenset) else fact
            lines.append(f"{name} {key}".ljust(19) + str(text or "none"))
    problems = [f"problem: {text}" for text in facts["problems"]]
    return "\n".join([*lines[:-1], "", *(problems or ["Nothing is wrong."])])


if __name__ == "__main__":
    argparse.ArgumentParser(
        "python -m snnlstm",
        description="Reports what was built and found, runs one step, and says what is wrong.",
    ).parse_args()
    print(table(collect()))
