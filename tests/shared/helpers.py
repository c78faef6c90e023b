"""Makes cells of both libraries with equal weights, and compares their results."""

import faulthandler
import functools
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import snntorch
import torch
from torch import Tensor, nn

import snnlstm
from tests.shared.fresh import HANG, server

THRESHOLD = 0.1  # cells spike at this threshold
_CUDA = torch.cuda.is_available()
measures_memory = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc"
)

long = pytest.mark.skipif(not os.environ.get("SNNLSTM_LONG"), reason="part of `make test-all`")


def described(value: object) -> str:
    """Returns the text of a value without addresses, so that it is a test's id in every run."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def quietly(make: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls `make` without snnTorch's warning about inhibition and ours about the threshold."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return make(*args, **kwargs)


def set_seed(seed: int) -> None:
    """Does as torch.manual_seed, which also formats a stack for each kind of absent device."""
    torch.default_generator.manual_seed(seed)
    if _CUDA:
        torch.cuda.manual_seed_all(seed)


def ours(*args: Any, seed: int = 0, **kwargs: Any) -> snnlstm.SConv2dLSTM:
    """Makes a cell of 2 -> 3 channels, 3x3, with threshold 0.1, unless `args` say otherwise."""
    set_seed(seed)
    kwargs.setdefault("threshold", THRESHOLD)
    return quietly(snnlstm.SConv2dLSTM, *(args or (2, 3, 3)), **kwargs)


def theirs(*args: Any, seed: int = 0, **kwargs: Any) -> snntorch.SConv2dLSTM:
    """Makes snnTorch's cell, with the weights of :func:`ours` of the same arguments."""
    set_seed(seed)
    kwargs.setdefault("threshold", THRESHOLD)
    return quietly(snntorch.SConv2dLSTM, *(args or (2, 3, 3)), **kwargs)


def twins(*args: Any, **kwargs: Any) -> tuple[snnlstm.SConv2dLSTM, snntorch.SConv2dLSTM]:
    """Makes our cell and snnTorch's with equal arguments and weights."""
    return ours(*args, **kwargs), theirs(*args, **kwargs)


def _random(make: Any, seed: int, *shape: int) -> Tensor:
    """Draws equal numbers for every device, and puts them on torch's default device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    numbers = make(shape, generator=generator, device="cpu")
    return numbers.to(torch.empty(0).device)


def steps(time: int, *shape: int, seed: int = 1, density: float = 0.3) -> Tensor:
    """Returns random spikes of shape (`time`, *`shape`): (T, N, Cin, H, W)."""
    return (_random(torch.rand, seed, time, *shape) < density).float()


def states(*shape: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    """Returns random syn and mem, with mem within (-1, 1) as in a running cell."""
    syn, mem = _random(torch.randn, seed, 2, *shape)
    return syn, torch.tanh(mem / 3)


def close(actual: Any, expected: Any, atol: float = 2e-6, rtol: float = 1e-5) -> None:
    """Asserts that tensors, or sequences or dicts of them, agree; NaN equals NaN."""
    if isinstance(actual, dict):
        assert list(actual) == list(expected)
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol, equal_nan=True)


def same(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    """Asserts that tensors are bitwise equal."""
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def documented(name: str) -> Any:
    """Returns a function that docs/performance.md defines in one of its blocks."""
    page = Path(__file__).parents[2] / "docs" / "performance.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    scope = {"torch": torch, "snnlstm": snnlstm}
    exec(next(block for block in blocks if f"def {name}(" in block), scope)
    return scope[name]


def flat(tree: Any) -> list[Tensor]:
    """Returns the tensors in tuples and lists of them."""
    return [tree] if isinstance(tree, Tensor) else [t for branch in tree for t in flat(branch)]


def python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a fresh Python, and returns its exit status and what it prints."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG, **options)


def shell_program(path: Path, script: str) -> str:
    """Makes a program that runs a shell script, and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def watched(monkeypatch: pytest.MonkeyPatch, holder: Any, name: str) -> list[tuple[Any, Any]]:
    """Returns a list that gets the arguments and the result of each call of a function."""
    function, seen = getattr(holder, name), []

    def noting(*args: Any, **kwargs: Any) -> Any:
        seen.append((args, function(*args, **kwargs)))
        return seen[-1][1]

    monkeypatch.setattr(holder, name, noting)
    return seen


def in_threads(work: Callable[[int], Any], count: int = 4) -> None:
    """Calls `work` with a number in each of several threads, and raises the error of any thread."""
    with ThreadPoolExecutor(count) as workers:
        list(workers.map(work, range(count)))


@contextmanager
def beside(work: Callable[[], object], count: int = 1) -> Iterator[None]:
    """Calls `work` over and over in other threads until the block ends; raises its error.

    The block may change the switch interval of threads.
    """
    ended, interval = threading.Event(), sys.getswitchinterval()

    def repeat(_: int) -> None:
        while not ended.is_set():
            work()

    with ThreadPoolExecutor(count) as workers:
        found = workers.map(repeat, range(count))
        try:
            yield
        finally:
            ended.set()
            sys.setswitchinterval(interval)
    list(found)


def forked(work: Callable[[], bool]) -> int:
    """Calls `work` in a forked child, and returns the status: 0 if it returns True."""
    time.sleep(0.003)  # each child finds other threads elsewhere
    child = os.fork()
    if child == 0:
        signal.alarm(HANG // 2)
        os._exit(0 if work() else 3)
    return os.waitpid(child, 0)[1]


@contextmanager
def more_memory(size: int) -> Iterator[None]:
    """Within the block this process can map no more than `size` bytes more."""
    import resource  # which Windows does not have

    with open("/proc/self/statm") as pages:
        here = int(pages.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (here + size, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def in_processes(work: Callable[..., None], *arguments: Any, count: int = 1) -> None:
    """Calls `work` with the rank and `arguments` in each of several fresh processes.

    The error of any is raised.
    """
    server()
    torch.multiprocessing.start_processes(
        _in_one, (work, *arguments), count, start_method="forkserver"
    )


def _in_one(rank: int, work: Callable[..., None], *arguments: Any) -> None:
    faulthandler.dump_traceback_later(HANG, exit=True)  # says where it hangs
    torch.manual_seed(0)
    torch.set_num_threads(1)
    work(rank, *arguments)


def in_a_process(test: Callable[..., None]) -> Callable[..., None]:
    """Makes a test run in a process of its own, which may hang or be killed."""

    @functools.wraps(test)
    def run(**arguments: Any) -> None:
        in_processes(_unwrapped, run, arguments)

    return run


def _unwrapped(_: int, test: Any, arguments: dict[str, Any]) -> None:
    test.__wrapped__(**arguments)


def train_alike(one: nn.Module, other: nn.Module, x: Tensor) -> None:
    """Calls two cells once a step, and asserts equal spikes, states and gradients."""
    for cell in (one, other):
        sum(spk.sum() + mem.square().sum() for spk, _, mem in map(cell, x)).backward()
    close((one.spk, one.syn, one.mem), (other.spk, other.syn, other.mem))
    same_gradients(one, other, atol=1e-4)


def same_gradients(
    one: nn.Module, other: nn.Module, atol: float = 2e-5, rtol: float = 1e-4
) -> None:
    """Asserts that all parameters of two modules have equal gradients."""
    pairs = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        expected = pairs[name].grad
        assert expected is not None
        close(parameter.grad, expected, atol=atol, rtol=rtol)
