"""A plugin of pytest that judges mutmut's mutants, each in a fork of the process that has the tests.

mutmut itself would collect the thousands of tests again for each mutant, and run them in any order.
Here a mutant meets the tests that call its function, until one fails: first those that killed other
mutants of the module, then the quickest. A fork loses the threads of OpenMP, so OMP_NUM_THREADS
must be 1.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from _pytest.runner import runtestprotocol
from mutmut.mutation.trampoline import set_mutant_under_test
from mutmut.state import state

VERDICTS = Path("verdicts.jsonl")  # [mutant, verdict] in each line; those are not judged again


def results(tests: list[pytest.Item]) -> Iterator[tuple[str, bool]]:
    """Runs tests; yields the name of each, and whether it passed."""
    for test, following in zip(tests, [*tests[1:], None], strict=True):
        reports = runtestprotocol(test, log=False, nextitem=following)
        yield test.nodeid, not any(report.failed for report in reports)


def first_failure(tests: list[pytest.Item]) -> str:
    """Runs tests until one fails; returns its name, or "" where all pass."""
    return next((name for name, passed in results(tests) if not passed), "")


def observe(tests: list[pytest.Item]) -> dict[str, Any]:
    """Runs tests without a mutant; returns those that call each function, and their seconds."""
    calling, seconds = defaultdict(list), {}
    begin = time.perf_counter()
    for name, passed in results(tests):
        if not passed:
            return {"failed": name}
        seconds[name], begin = time.perf_counter() - begin, time.perf_counter()
        for function in state()._stats:
            calling[function].append(name)
        state()._stats.clear()
    return {"calling": calling, "seconds": seconds}


def in_a_fork(mutant: str, work: Callable[[], Any], limit: float) -> Any:
    """What `work` returns in a fork that runs `mutant`; None if it dies or takes `limit` seconds."""
    answer = Path(f"answer-{os.getpid()}.json")
    answer.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        os.setsid()
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        set_mutant_under_test(mutant)
        try:
            answer.write_text(json.dumps(work()))
        finally:
            os._exit(0)
    end = time.monotonic() + limit
    while not os.waitpid(child, os.WNOHANG)[0]:
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            break
        time.sleep(0.01)
    return json.loads(answer.read_text()) if answer.exists() else None


def judge(mutants: list[str], tests: dict[str, pytest.Item], known: dict[str, Any]) -> None:
    kills: Counter[tuple[str, str]] = Counter()
    calling, seconds = known["calling"], known["seconds"]
    for mutant in mutants:
        function = mutant.rpartition("__mutmut_")[0]
        module = function.rpartition(".")[0]
        chosen = sorted(
            calling.get(function, ()), key=lambda name: (-kills[module, name], seconds[name])
        )
        limit = 60 + 10 * sum(seconds[name] for name in chosen)
        killer = in_a_fork(mutant, lambda: first_failure([tests[name] for name in chosen]), limit)
        if killer and seconds[killer] < 1:
            kills[module, killer] += 1
        verdict = {None: "died or did not end", "": "left"}.get(killer, "killed")
        with VERDICTS.open("a") as verdicts:
            verdicts.write(json.dumps([mutant, verdict]) + "\n")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool:
    """In the place of a run of the tests judges the mutants of the modules in JUDGED."""
    known = in_a_fork("stats", lambda: observe(session.items), limit=3600)
    if "seconds" not in (known or ()):
        raise pytest.UsageError(f"without a mutant, a test fails: {known}")
    judged = {}
    if VERDICTS.exists():
        judged = dict(map(json.loads, VERDICTS.read_text().splitlines()))
    mutants = [
        mutant
        for module in os.environ["JUDGED"].split()
        for mutant in json.loads(Path(f"snnlstm/{module}.py.meta").read_text())["exit_code_by_key"]
        if mutant not in judged
    ]
    tests = {test.nodeid: test for test in session.items}
    workers = range(os.cpu_count() or 1)
    for k in workers:
        if os.fork() == 0:
            try:
                judge(mutants[k :: len(workers)], tests, known)
            finally:
                os._exit(0)
    for _ in workers:
        os.wait()
    return True
