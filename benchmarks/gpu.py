"""`make gpu`: everything that only a GPU can show, in nine minutes, and one report of it.

    python -m benchmarks.gpu [--out DIR] [--minutes 9]

Needs torch with CUDA, nvcc, and no network. Each step has a time by which it must be done; what an
early one leaves over goes to those after it. A step that fails or is stopped does not stop the
others, and the report, out/gpu-DATE/report.md, is written anew after each.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import machine

ROOT = Path(__file__).resolve().parent.parent
NEEDED = {  # module -> what pip calls it
    "pybind11": "pybind11",
    "setuptools": "setuptools",
    "pytest": "pytest",
    "hypothesis": "hypothesis",
    "snntorch": "snntorch==1.0.0",
    "tqdm": "tqdm",
}
PROGRAMS = ("cmake", "ninja")
TAIL = 60  # lines of a step's output in the report
BENCHMARK_TAIL = 600
ON_CUDA = "[cuda or -cuda"  # by the parameters in a test's name
LEFT = "LEFT"
LAST = 30.0  # seconds that a shape of the benchmark may take after it was begun


@dataclass(frozen=True)
class Step:
    """One command; LEFT in it stands for the seconds within which to begin nothing new.

    until: the share of the whole time by which it is stopped.
    """

    name: str
    command: Sequence[str]
    until: float
    tail: int = TAIL
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How a step went: "passed", "failed ..." or "stopped ...", and the end of what it printed."""

    step: Step
    verdict: str
    seconds: float
    output: str


def steps(out: Path) -> list[Step]:
    """What is done, in this order."""
    python = sys.executable
    pip = (python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", ".")
    # The tests that run on the backend "cuda", and no others: none is a failure.
    pytest = (python, "-m", "pytest", "-q", "-k", ON_CUDA, "--ignore=tests/simt", "--maxfail=50")
    if importlib.util.find_spec("xdist"):
        pytest += ("-n", str(min(8, max(1, (os.cpu_count() or 1) // 2))))
    sanitize = (sanitizer(), "--error-exitcode=9", "--launch-timeout=60")
    # Only our own kernels: checking torch's too takes minutes.
    sanitize += ("--kernel-name", "kernel_substring=snnlstm")
    subset = (python, "-m", "benchmarks.gpu_subset")

    def bench(name: str, *arguments: str) -> tuple[str, ...]:
        return (
            python, "-m", "benchmarks", "--device", "cuda", "--mode", "forward", "both",
            "--memory", "off", "--no-plots", "--out", str(out / name),
            "--limit", LEFT, *arguments,
        )  # fmt: skip

    build = (("SNNLSTM_CUDA", "on"), ("SNNLSTM_CUDA_ARCHS", "native"))
    return [
        Step("build", pip, 0.17, environment=build),
        Step("what is there", (python, "-m", "snnlstm"), 0.19),
        Step("tests on cuda", pytest, 0.42),
        Step(
            "memcheck", (*sanitize, "--tool=memcheck", *subset), 0.5,
            environment=(("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),
        ),
        Step("racecheck", (*sanitize, "--tool=racecheck", *subset), 0.58),
        Step(
            "GPU shapes",
            bench("gpu-shapes", "--shapes", "gpu", "--dtype", "float32", "tf32", "bfloat16",
                  "--seconds", "1.5"),
            0.89, BENCHMARK_TAIL,
        ),
        Step(
            "the suite's own shapes",
            bench("own-shapes", "--shapes", "cpu", "--seconds", "0.5"),
            0.97, BENCHMARK_TAIL,
        ),
    ]  # fmt: skip


def sanitizer() -> str:
    """compute-sanitizer, on PATH or beside nvcc."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    folders = [str(Path(home) / "bin") for home in [*homes, "/usr/local/cuda"] if home]
    name = "compute-sanitizer"
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders)) or name


def run(step: Step, begin: float, seconds: float, log: Path) -> Outcome:
    """Run a step until it ends or its time is over; `log` gets all that it prints."""
    start = time.monotonic()
    left = begin + step.until * seconds - start
    if left <= 0:
        return Outcome(step, "not begun: no time was left", 0.0, "")
    limit = f"{max(1.0, left - LAST):.0f}"
    command = [limit if word == LEFT else word for word in step.command]
    beside_python = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": beside_python}
    environment |= dict(step.environment)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background: children inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with log.open("w") as file:
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
                stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return Outcome(step, f"failed: {error.strerror}: {command[0]}", 0.0, "")
        verdict = wait(process, left)
    text = log.read_text(errors="replace").splitlines()
    output = "\n".join(text[-step.tail :])
    return Outcome(step, verdict, time.monotonic() - start, output)


def wait(process: subprocess.Popen[bytes], seconds: float) -> str:
    """Wait, then interrupt it as Ctrl-C would, so that it may still say what it has; then kill."""
    try:
        status = process.wait(seconds)
        return "passed" if status == 0 else f"failed (exit status {status})"
    except subprocess.TimeoutExpired:
        pass
    for sign, patience in ((signal.SIGINT, 10.0), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, sign)
            process.wait(patience)
            break
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    return f"stopped: its time was over after {seconds:.0f} s"


def facts() -> dict[str, str]:
    """Where the report comes from."""
    major, minor = torch.cuda.get_device_capability()
    return {
        "GPU": f"{torch.cuda.get_device_name()} (sm_{major}{minor})",
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "nvcc": said("nvcc", "--version"),
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda})",
        "snntorch": machine.package_version("snntorch"),
        "snnlstm": f"{machine.package_version('snnlstm')} at {machine.git_commit()}",
        "Python": platform.python_version(),
        "machine": f"{platform.platform()}, {machine.device_name('cpu')}",
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def said(*command: str) -> str:
    """The last line but blank ones that a program prints, or "unknown"."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (done.stdout.strip().splitlines() or ["unknown"])[-1]


def report(about: dict[str, str], outcomes: Sequence[Outcome], seconds: float) -> str:
    """The report, in Markdown."""
    lines = [f"# snnlstm on {about.get('GPU', 'a GPU')}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in about.items()]
    lines += ["", "| step | outcome | seconds |", "|---|---|---|"]
    lines += [f"| {o.step.name} | {o.verdict} | {o.seconds:.0f} |" for o in outcomes]
    lines += [f"| all | {summary(outcomes)} | {seconds:.0f} |"]
    for outcome in outcomes:
        changed = "".join(f"{name}={value} " for name, value in outcome.step.environment)
        lines += ["", f"## {outcome.step.name}: {outcome.verdict}", ""]
        lines += [f"`{changed}{' '.join(outcome.step.command)}`", ""]
        lines += ["````text", outcome.output or "(no output)", "````"]
    return "\n".join(lines) + "\n"


def summary(outcomes: Sequence[Outcome]) -> str:
    passed = sum(outcome.verdict == "passed" for outcome in outcomes)
    return f"{passed} of {len(outcomes)} passed"


def lacking() -> str | None:
    """Why nothing can be done here, or None."""
    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        return f"no GPU: torch {torch.__version__} ({built}) of {sys.executable} sees none"
    missing = [pip for module, pip in NEEDED.items() if not importlib.util.find_spec(module)]
    missing += [
        program
        for program in PROGRAMS
        if not shutil.which(program) and not (Path(sys.executable).parent / program).exists()
    ]
    return f"missing: pip install {' '.join(missing)}" if missing else None


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Build for this machine's GPU, test, run compute-sanitizer, measure, and write "
        "a report.",
    )
    p.add_argument("--minutes", type=float, default=9.0, help="for everything (default: 9)")
    p.add_argument("--out", type=Path, metavar="DIR", help="default: out/gpu-DATE-TIME")
    return p


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if trouble := lacking():
        print(trouble, file=sys.stderr)
        return 1
    begin, seconds = time.monotonic(), 60 * options.minutes
    out = options.out or Path("out") / f"gpu-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    about, outcomes = facts(), []
    for step in steps(out):
        print(f"{step.name} ...", end=" ", flush=True)
        outcomes.append(run(step, begin, seconds, out / f"{step.name.replace(' ', '-')}.log"))
        print(f"{outcomes[-1].verdict} ({outcomes[-1].seconds:.0f} s)", flush=True)
        text = report(about, outcomes, time.monotonic() - begin)
        (out / "report.md").write_text(text)
    print(f"{summary(outcomes)}; wrote {out / 'report.md'}")
    return 0 if all(outcome.verdict == "passed" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
