"""`make gpu` says what is right and what is slow on a GPU, and writes one report.

    python -m benchmarks.gpu [--rehearse] [--quick] [--out DIR]

What is missing is listed first, with the lines that install it; nothing needs a network. In four
minutes behind the build, --quick checks spikes, states, gradients and that results repeat, and
times layers beside snnTorch's: our own kernels ("sequence:fused") and ours around cuDNN
("sequence:cudnn") for each. Without it tests, sanitizers and large layers follow, in half an hour.
Each command must end by some time, and later ones get the time that earlier ones leave.

--rehearse goes through the same steps on an emulated T4 (tests/emulator), with tiny layers and no
limits of time; its times mean nothing. DIR gets report.md, and results.zip with all logs and rows,
anew after each step. The build goes to gpu-build beside DIR, and is kept.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from tools import local_version

ROOT = Path(__file__).resolve().parents[1]
# The modules and programs that the steps need.
NEEDED = "torch pybind11 cmake ninja pytest hypothesis pandas tqdm snntorch"
SHOWN = 600  # lines of a step's output, in the report
LINES = 15  # of a failed step's output, on the console
LAST = 10.0  # seconds that a shape of the benchmark may take after it was begun
NOT_RUN = 4  # the exit status of a benchmark whose time ended before all rows
MARKS = "WRONG", "NOT RUN", "FAILED", "ERROR", "problem"  # lines that begin so are shown at once


class Step(NamedTuple):
    """A step is one command, in which LEFT stands for the seconds that it may take.

    until: the seconds after which the step is stopped, from the end of the last step without a
    limit on; 0 means no limit, and that a failure ends the run.
    """

    name: str
    until: float
    command: str


class Outcome(NamedTuple):
    """Holds a step's verdict, such as "passed", its seconds, and the end of what it printed."""

    step: Step
    verdict: str
    seconds: float = 0.0
    output: str = ""


class Place(NamedTuple):
    """`out` gets the logs and rows of `work`. Steps run in `tree`, a copy of the sources."""

    device: str
    out: Path
    build: Path
    work: Path
    tree: Path


def lacking(rehearsal: bool) -> list[str]:
    """Returns a line for each thing that is missing, with what installs it."""
    python, has = sys.executable, importlib.util.find_spec
    packages = [name for name in NEEDED.split() if not (has(name) or shutil.which(name))]
    problems = [f"missing: {python} -m pip install {' '.join(packages)}"] * bool(packages)
    sees = has("torch") and import_module("torch").cuda.is_available()
    if not (sees or rehearsal):
        text = f"no torch that sees a GPU in {python}: make gpu PYTHON=..., "
        problems.append(text + 'or ARGS="--rehearse" to go through the steps without one')
    return problems


def building(place: Place, gpus: Sequence[int]) -> list[Step]:
    """Returns the steps that build the core, and go on where the last build stopped.

    Of the CPU kernels it has the baseline alone: that takes a tenth of the time of a release.
    """
    import pybind11

    settings = {
        "Python_EXECUTABLE": sys.executable, "pybind11_DIR": pybind11.get_cmake_dir(),
        "SNNLSTM_INPLACE": "ON", "SNNLSTM_BASELINE_ALONE": "ON", "SNNLSTM_TESTING": "ON",
        "CMAKE_CUDA_FLAGS": "-lineinfo",  # so that the sanitizers and profilers name lines
    }  # fmt: skip
    if place.device == "cuda":
        settings |= {"SNNLSTM_CUDA": "ON", "SNNLSTM_CUDA_ARCHS": ";".join(map(str, gpus))}
    objects = place.build / sys.implementation.cache_tag
    configure = ["cmake", "-S", f"{place.tree}/csrc", "-B", str(objects), "-G", "Ninja"]
    configure += [f"-D{name}={value}" for name, value in settings.items()]
    build = ["cmake", "--build", str(objects)]
    return [Step("configure", 0, shlex.join(configure)), Step("build", 0, shlex.join(build))]


def steps(place: Place, quick: bool, gpus: Sequence[int]) -> list[Step]:
    """Returns the steps, with tiny layers and few tests in a rehearsal.

    gpus: the compute capabilities, of which the first one is of the GPU that is measured.
    """
    rehearsal, cores = place.device != "cuda", os.cpu_count() or 1
    work, python = shlex.quote(str(place.work)), shlex.quote(sys.executable)
    device, small = f"--device {place.device}", " --sizes 2 1 3 5 6 7" if rehearsal else ""
    smoke = f"{python} -m benchmarks.gpu_smoke {device}{small} --algorithms"
    # Each GPU is timed in the types that it has instructions for.
    dtypes = "tf32 bfloat16 float16" if gpus[0] >= 80 else "float32 autocast16 float16"
    bench = f"{python} -m benchmarks {device} --threads all --dtype {dtypes} --limit LEFT "
    bench += '--shape "2 1 2 8 6 6 3 name=tiny" --seconds 0.2 ' * rehearsal
    shapes = "" if rehearsal else "--shapes mnist dvs column1 column3 eeg1 tiny mid --seconds 0.6 "
    beside = "snntorch snntorch-cudagraph loop sequence sequence-cudagraph sequence:fused "
    beside += "sequence:cudnn"
    look = f"{python} -m snnlstm; nvidia-smi -q -d CLOCK,POWER || true"

    def step(name: str, until: float, command: str) -> Step:
        return Step(name, float("inf") if rehearsal else until, command)

    found = [
        *building(place, gpus),
        Step("found", 0, shlex.join(["sh", "-c", look])),
        # The first has the imports, the context of the GPU and cuDNN's start.
        step("smoke fused", 60, f"{smoke} fused"),
        step("smoke cudnn", 100, f"{smoke} cudnn"),
        step("layers", 234 if quick else 700,
             f"{bench}{shapes}--providers {beside} --out {work}/layers"),
    ]  # fmt: skip
    if quick:
        return found
    # pytest fails if it finds no test of the backend.
    workers = f"-n{min(8, max(1, cores // 2))}" if importlib.util.find_spec("xdist") else ""
    tests = "tests/cell tests/sequences tests/autograd tests/bench/test_networks.py tests/torch "
    tests += "tests/leaky tests/snntorch"
    tests = "tests/cell/test_quant.py" if rehearsal else tests
    tests = f"{python} -m pytest -q --maxfail=50 {workers} -p no:cacheprovider {tests} --backend"
    shapes = "dense conv audio dvs64 wide64 dvs128 wide128 big"
    shapes = "" if rehearsal else f"--shapes {shapes} --seconds 1.5 "
    beside += " loop-cudagraph compiled-loop"
    # torch.compile takes a minute of one core for a layer.
    beside += " snntorch-compile snntorch-compile-graph" if cores >= 8 else ""
    found.append(step("tests", 1200, f"{tests} {place.device.split('-')[0]}"))
    places = os.pathsep.join(map(str, local_version.places()))
    sanitizer = shutil.which("compute-sanitizer", path=places)
    for until, tool in enumerate(("memcheck", "racecheck", "synccheck") if sanitizer else ()):
        # Our own kernels alone are checked, because torch's would take minutes.
        command = f"env PYTORCH_NO_CUDA_MEMORY_CACHING=1 {sanitizer} --tool={tool} "
        command += "--error-exitcode=9 --launch-timeout=60 --kernel-name kernel_substring=snnlstm "
        command += f'{smoke} fused --options plain "max_pool, subtract"'
        found.append(step(tool, 1280 + 80 * until, command))
    large = f"{bench}{shapes}--providers {beside} --out {work}/large"
    return [*found, step("large layers", 1770, large)]


def run(place: Place, step: Step, left: float) -> Outcome:
    """Runs a step for at most `left` seconds; a log gets what the step prints.

    It is then interrupted as by Ctrl-C, so that it prints results, and killed ten seconds later.
    """
    start = time.monotonic()
    if left <= 0:
        return Outcome(step, "not begun: no time was left")
    limit = ("timeout", "--signal=INT", "--kill-after=10", f"{left:.1f}")
    command = step.command.replace("LEFT", f"{max(1.0, left - LAST):.0f}")
    environment = {
        "PYTHONPATH": f"{place.tree}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "SNNLSTM_EMULATOR_CACHE": str(place.build / "emulator"),
    }
    log = place.work / f"{step.name.replace(' ', '-')}.log"
    with log.open("w") as file:
        status = subprocess.run(
            (*(limit if left < float("inf") else ()), *shlex.split(command)), cwd=place.tree,
            env=os.environ | environment, stdin=subprocess.DEVNULL, stdout=file,
            stderr=subprocess.STDOUT, check=False,
        ).returncode  # fmt: skip
    known = {0: "passed", NOT_RUN: "incomplete: rows were not run, as no time was left"}
    known |= dict.fromkeys((124, 137, -9), f"stopped: its time was over after {left:.0f} s")
    verdict = known.get(status, f"failed (exit status {status})")
    lines = log.read_text(errors="replace").splitlines()[-SHOWN:]
    return Outcome(step, verdict, time.monotonic() - start, "\n".join(lines))


def run_all(place: Place, planned: Sequence[Step]) -> list[Outcome]:
    """Runs the steps and writes the report after each."""
    begin, outcomes = time.monotonic(), list[Outcome]()
    for step in planned:
        print(f"{step.name} ...", end=" ", flush=True)
        if any(not one.step.until and one.verdict != "passed" for one in outcomes):
            outcome = Outcome(step, "not begun: there is no core")
        else:
            left = begin + step.until - time.monotonic() if step.until else float("inf")
            outcome = run(place, step, left)
        if not step.until:
            begin = time.monotonic()
        outcomes.append(outcome)
        lines = outcome.output.splitlines()
        end = len(lines) - LINES * outcome.verdict.startswith("failed")
        shown = [line for at, line in enumerate(lines) if at >= end or line.startswith(MARKS)]
        print("\n  ".join([f"{outcome.verdict} ({outcome.seconds:.0f} s)", *shown]), flush=True)
        (place.out / "report.md").write_text(report(place, outcomes))
        shutil.make_archive(str(place.out / "results"), "zip", place.work)
    return outcomes


def report(place: Place, outcomes: Sequence[Outcome]) -> str:
    """Returns the report, in Markdown: the machine, a table of the steps, and their output."""
    from benchmarks import devices, machine

    kind = "" if place.device == "cuda" else "Rehearsal, without times of a GPU, of "
    lines = [f"# {kind}snnlstm on {devices.name(place.device)}", ""]
    lines += [f"Commit {machine.git_commit()} on {machine.device_name('cpu')}, {time.asctime()}"]
    lines += ["", "| step | outcome | seconds |", "|---|---|---|", *table(outcomes)]
    for outcome in outcomes:
        name, command = outcome.step.name, outcome.step.command
        lines += ["", f"## {name}: {outcome.verdict}", "", f"`{command}`"]
        lines += ["", "````text", outcome.output or "(no output)", "````"]
    return "\n".join(lines) + "\n"


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """Returns a row for each step, and one for all."""
    passed = sum(one.verdict == "passed" for one in outcomes)
    seconds = sum(one.seconds for one in outcomes)
    rows = [f"| {one.step.name} | {one.verdict} | {one.seconds:.0f} |" for one in outcomes]
    return [*rows, f"| all | {passed} of {len(outcomes)} passed | {seconds:.0f} |"]


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status, 1 if a step did not pass."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="right or wrong, and where time goes")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: out/gpu-DATE-TIME")
    parser.add_argument("--rehearse", action="store_true", help="on an emulated GPU")
    options = parser.parse_args(arguments)
    if trouble := lacking(options.rehearse):
        print(*trouble, sep="\n", file=sys.stderr)
        return 1
    from benchmarks import devices

    device = "emulator-t4" if options.rehearse else "cuda"
    out = (options.out or Path("out") / time.strftime("gpu-%Y%m%d-%H%M%S")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    build = out.parent / "gpu-build"
    place = Place(device, out, build, build / "work", build / "tree")
    planned = steps(place, options.quick, devices.capabilities(device))
    for old in (place.tree, place.work):
        shutil.rmtree(old, ignore_errors=True)
    # The sources are copied with their times, but for what was built there.
    built = ".*", "__pycache__", "*.so", "build", "out", place.build.name
    shutil.copytree(ROOT, place.tree, ignore=shutil.ignore_patterns(*built))
    place.work.mkdir(parents=True)
    outcomes = run_all(place, planned)
    print("", *table(outcomes), f"to send: both files in {out}", sep="\n")
    return int(any(outcome.verdict != "passed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
