"""Runs programs in fresh processes that have imported torch, and nothing that imports it.

A server imports torch once for a whole session, which takes seconds, and forks for each program.
"""

import atexit
import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.shared.helpers import HANG

SERVER = """
import json, os, runpy, signal, sys, traceback
import torch

def run(job):
    for name, number in ("stdout", 1), ("stderr", 2):
        os.dup2(os.open(f"{job['printed']}/{name}", os.O_CREAT | os.O_WRONLY), number)
    signal.alarm(job["hang"])
    sys.path[:0] = job["path"]
    os.chdir(job["path"][-1])
    try:
        if job["module"]:
            runpy.run_module(job["program"], run_name="__main__", alter_sys=True)
        else:
            exec(job["program"], {"__name__": "__main__"})
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

for line in sys.stdin:
    if not (child := os.fork()):
        status = run(json.loads(line))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def _server() -> "subprocess.Popen[str]":
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    server = subprocess.Popen([sys.executable, "-c", SERVER], text=True, **pipes)
    atexit.register(server.communicate)  # the end of its input ends it
    return server


def fresh(
    program: str, path: Sequence[Path | str] = (), module: bool = False
) -> "subprocess.CompletedProcess[str]":
    """Runs a program, or with `module` the module of this name; returns status and output.

    It searches `path` first, and runs in the last folder of `path`, or else of the tests.
    """
    folders = [*map(str, path)] or [str(Path.cwd())]
    with tempfile.TemporaryDirectory() as printed:
        job = {"program": program, "module": module, "path": folders, "printed": printed}
        server = _server()
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(job | {"hang": HANG}) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        out, err = (Path(printed, name).read_text() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(program, status, out, err)
