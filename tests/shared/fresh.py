"""Runs programs in fresh processes that have imported torch, and nothing that imports it.

A server imports torch once for a whole session, which takes seconds, and forks for each process.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HANG = 1200  # seconds; what takes longer hangs, on the busiest machine


def server() -> Any:
    """Returns the context of processes that are forked from the server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    return context


def _run(program: str, path: list[str], module: bool, printed: str) -> None:
    for name, number in ("stdout", 1), ("stderr", 2):
        os.dup2(os.open(f"{printed}/{name}", os.O_CREAT | os.O_WRONLY), number)
    signal.alarm(HANG)
    sys.argv[1:], sys.path[:0] = [], path
    os.chdir(path[-1])
    if module:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        exec(program, {"__name__": "__main__"})


def fresh(
    program: str, path: Sequence[Path | str] = (), module: bool = False
) -> "subprocess.CompletedProcess[str]":
    """Runs a program, or with `module` the module of this name; returns status and output.

    It searches `path` first, and runs in the last folder of `path`, or else of the tests.
    """
    folders = [*map(str, path)] or [str(Path.cwd())]
    with tempfile.TemporaryDirectory() as printed:
        process = server().Process(target=_run, args=(program, folders, module, printed))
        process.start()
        process.join()
        out, err = (Path(printed, name).read_text() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(program, process.exitcode, out, err)
