"""Judges mutmut's mutants of the package, each in a fork of a process that has collected the tests.

    python tools/judge.py --modules path state --tests tests/cell -k "not compile"

mutmut itself collects the thousands of tests again for each mutant, and runs them in any order.
Here a mutant meets the tests that call its function, until one fails: first those that killed other
mutants of the module, then those of messages and of the module, then the quickest. The program is
a plugin of the pytest that it starts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import Any

import mutmut.__main__ as mutmut
import pytest
from _pytest.runner import runtestprotocol
from mutmut.mutation.trampoline import set_mutant_under_test
from mutmut.state import state

MADE = Path("made.json")  # the hash of the function of each mutant
# [mutant, the hash of its function, the verdict] in each line. A killed one is not judged again.
VERDICTS = Path("verdicts.jsonl")
KILLED, LEFT, LOST = "killed", "left", "died or did not end in time"


def make(modules: list[str]) -> None:
    """Writes the mutants of modules to the folder mutants."""
    mutmut.set_mutant_under_test("mutant_generation")
    for part in ("snnlstm", "tests"):  # mutmut makes no mutants where an older file lies
        shutil.rmtree(Path("mutants", part), ignore_errors=True)
    Path("mutants").mkdir(exist_ok=True)
    mutmut.copy_src_dir()
    mutmut.copy_also_copy_files()
    mutmut.setup_source_paths()
    mutmut.create_mutants(len(os.sched_getaffinity(0)))
    made = {}
    for module in modules:
        meta = json.loads(Path(f"mutants/snnlstm/{module}.py.meta").read_text())
        for mutant in meta["exit_code_by_key"]:
            function = mutant.rpartition("__mutmut_")[0].rpartition(".")[2]
            made[mutant] = meta["hash_by_function_name"][function]
    ("mutants" / MADE).write_text(json.dumps(made))


def verdicts() -> dict[str, str]:
    """The last verdict on each mutant, "" before the first."""
    made = json.loads(MADE.read_text())
    found = dict.fromkeys(made, "")
    for line in VERDICTS.read_text().splitlines() if VERDICTS.exists() else ():
        mutant, of_function, verdict = json.loads(line)
        if made.get(mutant) == of_function:
            found[mutant] = verdict
    return found


def results(tests: list[pytest.Item]) -> Iterator[tuple[str, bool]]:
    """Runs tests; yields the name of each, and whether it passed."""
    for test, following in zip_longest(tests, tests[1:]):
        reports = runtestprotocol(test, log=False, nextitem=following)
        yield test.nodeid, not any(report.failed for report in reports)


def first_failure(tests: list[pytest.Item]) -> str:
    """Runs tests until one fails; returns its name, or "" where all pass."""
    return next((name for name, passed in results(tests) if not passed), "")


def observe(tests: list[pytest.Item]) -> dict[str, Any]:
    """Runs tests without a mutant; returns those that call each function, and their seconds."""
    calling, seconds = defaultdict(list), {}
    begin = sum(os.times()[:4])  # the processor's, of children too, however busy the machine is
    for name, passed in results(tests):
        if not passed:
            return {"failed": name}
        now = sum(os.times()[:4])
        seconds[name], begin = now - begin, now
        for function in state()._stats:
            calling[function].append(name)
        state()._stats.clear()
    return {"calling": calling, "seconds": seconds}


def in_a_fork(mutant: str, work: Callable[[], Any], limit: float) -> Any:
    """What `work` returns in a fork that runs `mutant`; None if it dies, or after the limit."""
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
    """Writes the verdicts on mutants; `known` is what :func:`observe` returned."""
    made, most = json.loads(MADE.read_text()), float(os.environ["JUDGE_SECONDS"])
    calling, seconds = known["calling"], known["seconds"]
    kills: Counter[tuple[str, str]] = Counter()
    for mutant in mutants:
        function = mutant.rpartition("__mutmut_")[0]
        module = function.rpartition(".")[0]
        near = "/test_messages.py", f"/test_{module.rpartition('.')[2]}.py"
        order = sorted(
            (-kills[module, name], not any(file in name for file in near), seconds[name], name)
            for name in calling.get(function, ())
        )
        spent = accumulate(seconds[name] for *_, name in order)
        chosen = [name for (*_, name), by in zip(order, spent, strict=True) if by <= most]
        limit = 60 + 20 * sum(seconds[name] for name in chosen)
        killer = in_a_fork(mutant, partial(first_failure, [tests[t] for t in chosen]), limit)
        if killer and seconds[killer] < 1:
            kills[module, killer] += 1
        verdict = LOST if killer is None else KILLED if killer else LEFT
        with VERDICTS.open("a") as lines:
            lines.write(json.dumps([mutant, made[mutant], verdict]) + "\n")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool:
    """In the place of a run of the tests, judges the mutants that are not killed, on all cores."""
    known = in_a_fork("stats", lambda: observe(session.items), limit=3600)
    if "seconds" not in (known or ()):
        raise pytest.UsageError(f"without a mutant, a test fails: {known}")
    mutants = [mutant for mutant, verdict in verdicts().items() if verdict != KILLED]
    tests = {test.nodeid: test for test in session.items}
    workers = len(os.sched_getaffinity(0))
    for k in range(workers):
        if os.fork() == 0:
            try:
                judge(mutants[k::workers], tests, known)
            finally:
                os._exit(0)
    for _ in range(workers):
        os.wait()
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modules", nargs="+", required=True)
    parser.add_argument("--tests", nargs="+", required=True, help="files and folders, for pytest")
    parser.add_argument("-k", default="", help="pytest's choice among the tests")
    parser.add_argument("--seconds", default="inf", help="of tests for one mutant, at most")
    chosen = parser.parse_args()
    make(chosen.modules)
    os.chdir("mutants")
    # A fork loses the threads of OpenMP: no test may have computed with several before it.
    path = os.pathsep.join((str(Path.cwd()), str(Path(__file__).parent)))
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "JUDGE_SECONDS": chosen.seconds}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "judge"]
    command += ["-k", chosen.k, *chosen.tests]
    subprocess.run(command, env=os.environ | environment, check=True)
    found = verdicts()
    os.chdir("..")
    for mutant, verdict in found.items():
        if verdict != KILLED:
            print(f"{verdict}: {mutant}", mutmut.get_diff_for_mutant(mutant), sep="\n")
    print(*(f"{count} {verdict}" for verdict, count in Counter(found.values()).items()), sep=", ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
