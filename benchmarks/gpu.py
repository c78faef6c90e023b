"""`make gpu` builds, tests, checks and measures on a GPU in nine minutes, and writes one report.

    python -m benchmarks.gpu [--out DIR] [--minutes 9]

The command needs torch with CUDA and nvcc, and no network. It says all that is missing at once,
with the line that installs it; before that this file imports Python's own modules alone. Each step
has a time by which it must end, so later steps get the time that earlier steps leave over. The
command goes on after a step that fails or is stopped, unless all other steps need it. The report,
out/gpu-DATE/report.md, is written anew after each step.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
# The modules and programs that the steps need, as pip installs them. The build is not isolated.
NEEDED = {
    "pybind11": "pybind11>=2.13", "setuptools": "setuptools>=77", "wheel": "wheel",
    "pytest": "pytest>=8", "hypothesis": "hypothesis>=6.100", "snntorch": "snntorch==1.0.0",
    "tqdm": "tqdm",
}  # fmt: skip
PROGRAMS = {"cmake": "cmake>=3.24", "ninja": "ninja"}
NVCC = '"nvidia-cuda-nvcc==13.*" "nvidia-cuda-runtime==13.*" "nvidia-cuda-cccl==13.*"'
LAST = 30.0  # seconds that a shape of the benchmark may take after it was begun


class Step(NamedTuple):
    """A step is one command with placeholders, which `words` fills in.

    until: the share of the whole time after which the step is stopped. tail: the number of lines of
    its output that the report shows. needed: whether all later steps need it. optional: whether the
    step is left out where its program is not installed.
    """

    name: str
    until: float
    command: str
    environment: Sequence[str] = ()
    tail: int = 60
    needed: bool = False
    optional: bool = False


SMOKE = "{python} -m benchmarks.gpu_smoke"
# The sanitizer checks our own kernels alone, because torch's would take minutes.
SANITIZE = "{sanitizer} --error-exitcode=9 --launch-timeout=60 --kernel-name "
SANITIZE += "kernel_substring=snnlstm --tool="
BENCH = "{python} -m benchmarks --device cuda --mode forward both --memory off --no-plots --goals "
BENCH += "--kernels --limit {left} "
BUILD = ("SNNLSTM_CUDA=on", "SNNLSTM_CUDA_ARCHS=native")
UNCACHED = ("PYTORCH_NO_CUDA_MEMORY_CACHING=1",)
# These are the tests on the backend "cuda"; pytest fails if it finds none.
TESTS = '{python} -m pytest -q -k "[cuda or -cuda" --ignore=tests/simt --maxfail=50 {workers}'
GPU_SHAPES = "--shapes gpu --dtype float32 tf32 autocast bfloat16 --seconds 1.5 "
OWN_SHAPES = "--shapes cpu --dtype tf32 --seconds 0.5 "
INSTALL = "{python} -m pip install --no-build-isolation --no-deps -e ."

STEPS = (
    Step("build", 0.17, INSTALL, BUILD, needed=True),
    Step("what is there", 0.19, "{python} -m snnlstm"),
    Step("smoke", 0.3, SMOKE, tail=200, needed=True),
    Step("tests on cuda", 0.46, TESTS),
    Step("memcheck", 0.52, f"{SANITIZE}memcheck {SMOKE}", UNCACHED, optional=True),
    Step("racecheck", 0.58, f"{SANITIZE}racecheck {SMOKE}", optional=True),
    Step("GPU shapes", 0.88, f"{BENCH}{GPU_SHAPES}--out {{out}}/gpu-shapes", tail=600),
    Step("the suite's own shapes", 0.97, f"{BENCH}{OWN_SHAPES}--out {{out}}/own-shapes", tail=600),
)


class Outcome(NamedTuple):
    """Holds a step's verdict, such as "passed", its seconds, and the end of what it printed."""

    step: Step
    verdict: str
    seconds: float = 0.0
    output: str = ""
    command: str = ""


def words(step: Step, out: Path, left: float) -> list[str]:
    """Returns the words of the step's command."""
    workers = min(8, max(1, (os.cpu_count() or 1) // 2))
    values = {
        "python": sys.executable,
        "out": out,
        "sanitizer": find("compute-sanitizer") or "compute-sanitizer",
        "workers": f"-n{workers}" if importlib.util.find_spec("xdist") else "",
        "left": f"{max(1.0, left - LAST):.0f}",
    }
    return [word for part in shlex.split(step.command) if (word := part.format(**values))]


def find(program: str) -> str | None:
    """Finds a program on PATH, beside this Python, or beside nvcc."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    folders = [f"{home}/bin" for home in [*homes, "/usr/local/cuda"] if home]
    path = [os.environ.get("PATH", ""), str(Path(sys.executable).parent), *folders]
    return shutil.which(program, path=os.pathsep.join(path))


def run(step: Step, left: float, out: Path) -> Outcome:
    """Runs a step for at most `left` seconds; a log gets what the step prints.

    A step whose time is over is interrupted as by Ctrl-C, so that it may still print results. Ten
    seconds later it is killed with its children.
    """
    start, command = time.monotonic(), words(step, out, left)
    said = shlex.join(command)
    if left <= 0:
        return Outcome(step, "not begun: no time was left", command=said)
    if not shutil.which(command[0]) and step.optional:
        return Outcome(step, f"left out: {command[0]} is not installed", command=said)
    if not shutil.which(command[0]):
        return Outcome(step, f"failed: no such program: {command[0]}", command=said)
    stopping = ("timeout", "--signal=INT", "--kill-after=10", f"{left:.1f}")
    beside_python = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = {"PYTHONPATH": str(ROOT), "PATH": beside_python}
    environment |= dict(word.split("=", 1) for word in step.environment)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # children of a background job inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    log = out / f"{step.name.replace(' ', '-')}.log"
    with log.open("w") as file:
        status = subprocess.run(
            (*stopping, *command), cwd=ROOT, env=os.environ | environment,
            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, check=False,
        ).returncode  # fmt: skip
    verdict = "passed" if status == 0 else f"failed (exit status {status})"
    if status in (124, 137, -signal.SIGKILL):
        verdict = f"stopped: its time was over after {left:.0f} s"
    lines = log.read_text(errors="replace").splitlines()[-step.tail :]
    return Outcome(step, verdict, time.monotonic() - start, "\n".join(lines), said)


def run_all(planned: Sequence[Step], seconds: float, out: Path) -> list[Outcome]:
    """Runs the steps and writes the report after each."""
    begin, about = time.monotonic(), facts()
    outcomes: list[Outcome] = []
    for step in planned:
        print(f"{step.name} ...", end=" ", flush=True)
        lost = [o.step.name for o in outcomes if o.step.needed and o.verdict != "passed"]
        if lost:
            outcome = Outcome(step, f"not begun: {lost[0]} did not pass")
        else:
            outcome = run(step, begin + step.until * seconds - time.monotonic(), out)
        outcomes.append(outcome)
        print(f"{outcome.verdict} ({outcome.seconds:.0f} s)", flush=True)
        (out / "report.md").write_text(report(about, outcomes, time.monotonic() - begin))
    return outcomes


def facts() -> dict[str, str]:
    """Returns what the report says of the machine and of versions."""
    import torch

    from benchmarks import machine
    from benchmarks.providers import Setting

    major, minor = torch.cuda.get_device_capability()
    return {
        "GPU": f"{torch.cuda.get_device_name()} (sm_{major}{minor})",
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "nvcc": said("nvcc", "--version"),
        "CUDA of torch": str(torch.version.cuda),
        "machine": f"{platform.platform()}, {machine.device_name('cpu')}",
        **machine.describe(Setting("cuda")),
    }


def said(*command: str) -> str:
    """Returns the last line that is not blank of what a program prints, or "unknown"."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (done.stdout.strip().splitlines() or ["unknown"])[-1]


def report(about: dict[str, str], outcomes: Sequence[Outcome], seconds: float) -> str:
    """Returns the report, in Markdown."""
    lines = [f"# snnlstm on {about.get('GPU', 'a GPU')}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in about.items()]
    lines += ["", "| step | outcome | seconds |", "|---|---|---|"]
    lines += [f"| {o.step.name} | {o.verdict} | {o.seconds:.0f} |" for o in outcomes]
    lines += [f"| all | {summary(outcomes)} | {seconds:.0f} |"]
    for outcome in outcomes:
        command = [*outcome.step.environment, outcome.command or outcome.step.command]
        lines += ["", f"## {outcome.step.name}: {outcome.verdict}", "", f"`{' '.join(command)}`"]
        lines += ["", "````text", outcome.output or "(no output)", "````"]
    return "\n".join(lines) + "\n"


def summary(outcomes: Sequence[Outcome]) -> str:
    """Returns a text that says how many steps passed."""
    passed = sum(outcome.verdict == "passed" for outcome in outcomes)
    left_out = sum(outcome.verdict.startswith("left out") for outcome in outcomes)
    return f"{passed} of {len(outcomes)} passed" + (f", {left_out} left out" if left_out else "")


def lacking() -> str | None:
    """Returns why no step can run here, or None."""
    if not importlib.util.find_spec("torch"):
        return f"no torch: {sys.executable} has none; make gpu PYTHON=... takes another Python"
    import torch

    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        return f"no GPU: torch {torch.__version__} ({built}) of {sys.executable} sees none"
    missing = [pinned for name, pinned in NEEDED.items() if too_old(name, pinned)]
    missing += [pinned for name, pinned in PROGRAMS.items() if not find(name)]
    line = " ".join(f'"{pinned}"' if ">" in pinned else pinned for pinned in missing)
    if not nvcc():
        line = f"{line} {NVCC}".strip()
    if not line and not find("timeout"):
        return "missing: timeout, a program of GNU coreutils"
    if not line:
        return None
    text = f"missing or too old: {sys.executable} -m pip install {line}"
    owned = Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED").exists()
    if owned and sys.prefix == sys.base_prefix:
        text += (
            "\npip installs nothing into this Python (PEP 668). First: "
            f"{sys.executable} -m venv --system-site-packages .venv"
            "\nand then the line above with .venv/bin/python."
        )
    return text


def too_old(name: str, pinned: str) -> bool:
    """Says whether a module is missing, or older than `pinned` asks for."""
    if not importlib.util.find_spec(name):
        return True
    _, _, least = pinned.partition(">=")
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    numbers = [[int(n) for n in re.findall(r"\d+", v)[:2]] for v in (version, least)]
    return bool(least) and numbers[0] < numbers[1]


def nvcc() -> str | None:
    """Finds nvcc where setup.py looks for it, PyPI's packages included."""
    packages = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin/nvcc"))
    return os.environ.get("CUDACXX") or find("nvcc") or next(map(str, packages), None)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status, 1 if a step did not pass."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (default: 9)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: out/gpu-DATE-TIME")
    options = parser.parse_args(arguments)
    if trouble := lacking():
        print(trouble, file=sys.stderr)
        return 1
    out = options.out or Path("out") / f"gpu-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    outcomes = run_all(STEPS, 60 * options.minutes, out)
    print(f"{summary(outcomes)}; wrote {out / 'report.md'}")
    good = ("passed", "left out")
    return 0 if all(outcome.verdict.startswith(good) for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
