"""`make gpu` says what is right and what is slow on a GPU, and writes one report.

    python -m benchmarks.gpu [--quick] [--minutes M] [--core PATH] [--out DIR]
    python -m benchmarks.gpu --rehearse [DEVICE] [--quick]

What is missing is listed first, with the lines that install it. With --venv DIR it is installed
into an environment, where the command goes on; otherwise it needs no network. The clock starts
behind the build, for which --core takes a core that was built elsewhere. In four minutes --quick
checks spikes, states, gradients and that results repeat, and times layers beside snnTorch's: our
own kernels ("sequence:fused") and ours around cuDNN ("sequence:cudnn") for each. Without it tests,
sanitizers and large layers follow, in half an hour.
Each command must end by some time, and later ones get the time that earlier ones leave.

--rehearse goes through the same steps on an emulated GPU (emulator-t4, tests/emulator), with tiny
layers; its times mean nothing. DIR gets report.md, and results.zip with all logs and rows, anew
after each step. The build goes to out/gpu-build and is kept.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tools.gpu_setup import building, fill, find, lacking

ROOT = Path(__file__).resolve().parents[1]
SHOWN = 600  # lines of a step's output, in the report
LINES = 15  # of a failed step's output, on the console
LAST = 10.0  # seconds that a shape of the benchmark may take after it was begun
NOT_RUN = 4  # the exit status of a benchmark whose time ended before all rows
MARKS = "WRONG", "NOT RUN", "FAILED", "ERROR"  # lines that begin so are shown at once
# Each GPU is timed in the types that it has instructions for.
DTYPES = {75: "float32 autocast16 float16", 80: "tf32 bfloat16 float16"}
TINY = '"2 1 2 8 6 6 3 name=tiny"'  # the layer of a rehearsal


class Step(NamedTuple):
    """A step is one command, in which LEFT stands for the seconds that it may take.

    until: the share of the time behind the build after which the step is stopped; 0 means no limit,
    and that a failure ends the run.
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
    """`out` gets the logs and rows of `work`; `tree` is a copy of the sources; steps run in it."""

    device: str
    capability: int
    core: Path | None  # one that is built
    out: Path
    build: Path
    work: Path
    tree: Path


def steps(place: Place, quick: bool, gpus: set[int]) -> list[Step]:
    """Returns the steps, with tiny layers and few tests in a rehearsal. gpus: see `building`."""
    rehearsal, cores = place.device != "cuda", os.cpu_count() or 1
    work, python = shlex.quote(str(place.work)), shlex.quote(sys.executable)
    device, small = f"--device {place.device}", " --sizes 2 1 3 5 6 7" if rehearsal else ""
    smoke = f"{python} -m benchmarks.gpu_smoke {device}{small} --algorithms"
    dtypes = DTYPES[max(known for known in DTYPES if known <= place.capability)]
    bench = f"{python} -m benchmarks {device} --threads all --dtype {dtypes} --limit LEFT "
    bench += f"--shape {TINY} --seconds 0.2 " if rehearsal else ""
    shapes = "" if rehearsal else "--shapes mnist dvs column1 column3 eeg1 tiny mid --seconds 0.6 "
    beside = "snntorch snntorch-cudagraph loop sequence sequence-cudagraph sequence:fused "
    beside += "sequence:cudnn"

    def step(name: str, quick_end: float, whole_end: float, command: str) -> Step:
        return Step(name, quick_end / 240 if quick else whole_end / 1800, command)

    built = building(place.core, place.tree, place.build, gpus, must=not rehearsal)
    found = [
        *(Step(name, 0, command) for name, command in built),
        Step("kernels", 0, f"{python} -m benchmarks.gpu_check {device}"),
        # The first has the imports, the context of the GPU and cuDNN's start.
        step("smoke fused", 60, 60, f"{smoke} fused"),
        step("smoke cudnn", 100, 100, f"{smoke} cudnn"),
        step("layers", 234, 700, f"{bench}{shapes}--providers {beside} --out {work}/layers"),
    ]  # fmt: skip
    if quick:
        return found
    # pytest fails if it finds no test of the backend.
    workers = f"-n{min(8, max(1, cores // 2))}" if importlib.util.find_spec("xdist") else ""
    tests = "tests/cell tests/sequences tests/autograd tests/bench/test_networks.py tests/torch "
    tests += "tests/leaky tests/snntorch"
    tests = "tests/cell/test_quant.py" if rehearsal else tests
    tests = f"{python} -m pytest -q --maxfail=50 {workers} -p no:cacheprovider {tests} --backend"
    shapes = "--shapes leaky audio dvs64 wide64 dvs128 wide128 big --seconds 1.5 " * (not rehearsal)
    beside += " loop-cudagraph compiled-loop"
    # torch.compile takes a minute of one core for a layer.
    beside += " snntorch-compile snntorch-compile-graph" if cores >= 8 else ""
    found.append(step("tests", 0, 1200, f"{tests} {place.device.split('-')[0]}"))
    sanitizer = find("compute-sanitizer")
    for until, tool in enumerate(("memcheck", "racecheck", "synccheck") if sanitizer else ()):
        # Our own kernels alone are checked, because torch's would take minutes.
        command = f"env PYTORCH_NO_CUDA_MEMORY_CACHING=1 {sanitizer} --tool={tool} "
        command += "--error-exitcode=9 --launch-timeout=60 --kernel-name kernel_substring=snnlstm "
        command += f'{smoke} fused --options plain "max_pool, subtract"'
        found.append(step(tool, 0, 1280 + 80 * until, command))
    large = f"{bench}{shapes}--providers {beside} --out {work}/large"
    return [*found, step("large layers", 0, 1770, large)]


def run(place: Place, step: Step, left: float) -> Outcome:
    """Runs a step for at most `left` seconds; a log gets what the step prints.

    It is then interrupted as by Ctrl-C, so that it prints results, and killed ten seconds later.
    """
    start = time.monotonic()
    if left <= 0:
        return Outcome(step, "not begun: no time was left")
    limit = ("timeout", "--signal=INT", "--kill-after=10", f"{left:.1f}") if step.until else ()
    command = step.command.replace("LEFT", f"{max(1.0, left - LAST):.0f}")
    environment = {
        "PYTHONPATH": f"{place.tree}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "SNNLSTM_EMULATOR_CACHE": str(place.build / "emulator"),
    }
    # Children of a background job inherit it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    log = place.work / f"{step.name.replace(' ', '-')}.log"
    with log.open("w") as file:
        status = subprocess.run(
            (*limit, *shlex.split(command)), cwd=place.tree, env=os.environ | environment,
            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, check=False,
        ).returncode  # fmt: skip
    known = {0: "passed", NOT_RUN: "incomplete: rows were not run, as no time was left"}
    over = f"stopped: its time was over after {left:.0f} s"
    known |= dict.fromkeys((124, 137, -signal.SIGKILL), over)
    verdict = known.get(status, f"failed (exit status {status})")
    lines = log.read_text(errors="replace").splitlines()[-SHOWN:]
    return Outcome(step, verdict, time.monotonic() - start, "\n".join(lines))


def run_all(place: Place, planned: Sequence[Step], seconds: float) -> list[Outcome]:
    """Runs the steps and writes the report after each."""
    begin, outcomes = time.monotonic(), list[Outcome]()
    for step in planned:
        print(f"{step.name} ...", end=" ", flush=True)
        if any(not one.step.until and one.verdict != "passed" for one in outcomes):
            outcome = Outcome(step, "not begun: the kernels cannot run")
        else:
            left = begin + step.until * seconds - time.monotonic() if step.until else float("inf")
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
    """Returns the report, in Markdown: machine and versions, a table of the steps, their output."""
    from benchmarks import devices, machine

    cuda, gpu = place.device == "cuda", devices.name(place.device)
    about = machine.describe("cuda" if cuda else "cpu")
    about["machine"] = f"{platform.platform()}, {machine.device_name('cpu')}"
    kind = "snnlstm" if cuda else "Rehearsal of snnlstm, without times of a GPU,"
    lines = [f"# {kind} on {gpu}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in about.items()]
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
    parser.add_argument("--minutes", type=float, help="after the build (default: 30, --quick: 4)")
    parser.add_argument("--core", type=Path, metavar="PATH", help="take this core, and build none")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: out/gpu-DATE-TIME")
    parser.add_argument("--build", type=Path, metavar="DIR", default=ROOT / "out" / "gpu-build")
    parser.add_argument("--rehearse", nargs="?", const="emulator-t4", metavar="DEVICE",
        help="without a GPU, on an emulated one")  # fmt: skip
    parser.add_argument("--venv", metavar="DIR", help="install what is missing there, run there")
    options = parser.parse_args(arguments)
    fills = bool(options.venv and not options.rehearse)
    trouble = lacking(bool(options.rehearse), options.core)
    if trouble and fills and not (trouble := lacking(False, options.core, fills)):
        python, words = fill(Path(options.venv), options.core), arguments or sys.argv[1:]
        os.execv(python, [python, "-m", "benchmarks.gpu", *words, "--venv="])
    if trouble:
        print(*trouble, sep="\n", file=sys.stderr)
        return 1
    from benchmarks import devices

    device = options.rehearse or "cuda"
    if device not in devices.DEVICES or (options.rehearse and "emulator" not in device):
        parser.error(f"--rehearse: {device} is none of {', '.join(devices.DEVICES[2:])}")
    out = (options.out or Path("out") / time.strftime("gpu-%Y%m%d-%H%M%S")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    capability = devices.capability(device)
    core, build = options.core and options.core.resolve(), options.build.resolve()
    place = Place(device, capability, core, out, build, build / "work", build / "tree")
    gpus = {capability} if options.rehearse else devices.capabilities()
    planned = steps(place, options.quick, gpus)
    for old in (place.tree, place.work):
        shutil.rmtree(old, ignore_errors=True)
    # The sources are copied with their times, but for what was built there.
    built = ".*", "__pycache__", "*.so", "build", "out", place.build.name
    shutil.copytree(ROOT, place.tree, ignore=shutil.ignore_patterns(*built))
    place.work.mkdir(parents=True)
    minutes = options.minutes or (4 if options.quick and not options.rehearse else 30)
    outcomes = run_all(place, planned, 60 * minutes)
    print("", *table(outcomes), f"to send: both files in {out}", sep="\n")
    return int(any(outcome.verdict != "passed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
