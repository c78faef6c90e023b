"""`make gpu` builds, tests, checks and measures on a GPU in nine minutes, and writes one report.

    python -m benchmarks.gpu [--out DIR] [--minutes 9] [--steps NAME ...]
    python -m benchmarks.gpu --rehearse [--device simt-t4]

The command says first all that is missing here, with the line that installs it; until then it
imports Python's own modules alone. It needs no network. Each step has a time by which it must end,
so later steps get the time that earlier steps leave over. The command goes on after a step that
fails or is stopped, unless all other steps need it.

--rehearse goes through the same steps without a GPU, on one that tests/simt emulates, with tiny
layers; the report is marked as a rehearsal, and its times mean nothing. Two files are written anew
after each step: DIR/report.md has everything, and DIR/rows.csv all rows, which
`python -m benchmarks --compare` reads. The build goes to out/gpu-build and is kept for later runs.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import gpu_needs

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "out" / "gpu-build"
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


BUILDING = "{python} -m benchmarks.gpu_build {build} {arch}"
# The sanitizer checks our own kernels alone, because torch's would take minutes.
SANITIZE = "{sanitizer} --error-exitcode=9 --launch-timeout=60 --kernel-name "
SANITIZE += "kernel_substring=snnlstm --tool="
UNCACHED = ("PYTORCH_NO_CUDA_MEMORY_CACHING=1",)
SMOKE = "{python} -m benchmarks.gpu_smoke --device {device}"
BENCH = "{python} -m benchmarks --device {device} --no-plots --threads all --dtype {dtypes} "
BENCH += "--providers {providers} --out {out}/"
# Layers of users' networks, the smallest first, then those of the suite's own table for GPUs.
LAYERS = "--shapes mnist dvs mid big --seconds 1.5 --limit {left}"
LARGE = "--shapes tiny audio dvs64 wide64 dvs128 wide128 --seconds 1.5 --limit {left}"
TINY = '--shape "2 1 2 8 6 6 3 name=tiny" --shape "2 1 8 16 4 6 3 max_pool=2 name=pooled"'
SMALL = "--sizes 2 1 3 5 6 7"
# The tests on one backend; pytest fails if it finds none.
TESTS = "{python} -m pytest -q --backend {backend} --maxfail=50 {workers} -p no:cacheprovider "
CHECKED = "tests/cell tests/sequences tests/autograd tests/networks tests/torch tests/system"


def steps(rehearsal: bool) -> tuple[Step, ...]:
    """Returns the steps, with tiny layers and few tests in a rehearsal."""
    small, few = (f" {SMALL}", f" --few {SMALL}") if rehearsal else ("", " --few")
    build, built = (" --emulator", 0.4) if rehearsal else ("", 0.3)
    tests = "tests/cell/test_quant.py" if rehearsal else CHECKED
    first, rest = (f"{TINY} --seconds 0.2",) * 2 if rehearsal else (LAYERS, LARGE)
    return (
        Step("build", built, f"{BUILDING}{build}", needed=True),
        Step("what is there", built + 0.02, "{python} -m snnlstm"),
        Step("smoke", built + 0.12, f"{SMOKE}{small}", tail=200, needed=True),
        Step("tests", 0.56, f"{TESTS}{tests}"),
        Step("memcheck", 0.66, f"{SANITIZE}memcheck {SMOKE}{few}", UNCACHED, optional=True),
        Step("racecheck", 0.77, f"{SANITIZE}racecheck {SMOKE}{few}", optional=True),
        Step("layers", 0.9, f"{BENCH}layers {first}", tail=600),
        Step("large layers", 0.98, f"{BENCH}large {rest}", tail=600),
    )


# Each GPU is timed in the types that it has instructions for.
DTYPES = {75: "float32 autocast16 float16", 80: "tf32 bfloat16 float16"}
PROVIDERS = (
    "snntorch-cudagraph", "snnlstm-step", "snnlstm", "snnlstm:cudnn",
    "snnlstm:hybrid", "snnlstm:measure", "snnlstm-cudagraph",
)  # fmt: skip
# torch.compile takes a minute of one core for a layer.
COMPILED = ("snntorch-compile", "snntorch-compile-graph")
CORES_TO_COMPILE = 8


class Outcome(NamedTuple):
    """Holds a step's verdict, such as "passed", its seconds, and the end of what it printed."""

    step: Step
    verdict: str
    seconds: float = 0.0
    output: str = ""
    command: str = ""


class Place(NamedTuple):
    """Says where a run goes: the device, its compute capability, and the folder of results.

    arch: what the core is compiled for; None builds the CPU kernels alone.
    """

    device: str
    capability: int
    arch: int | None
    out: Path
    build: Path

    def words(self, step: Step, left: float) -> list[str]:
        """Returns the words of the step's command."""
        cores = os.cpu_count() or 1
        workers = min(8, max(1, cores // 2))
        compiled = COMPILED if cores >= CORES_TO_COMPILE else ()
        values = {
            "python": sys.executable,
            "device": self.device,
            "backend": self.device.split("-")[0],
            "arch": f"--arch {self.arch}" if self.arch else "",
            "dtypes": DTYPES[max(of for of in DTYPES if of <= self.capability)],
            "providers": " ".join((*PROVIDERS, *compiled)),
            "out": shlex.quote(str(self.out)),
            "build": shlex.quote(str(self.build)),
            "sanitizer": gpu_needs.find("compute-sanitizer") or "compute-sanitizer",
            "workers": f"-n{workers}" if importlib.util.find_spec("xdist") else "",
            "left": f"{max(1.0, left - LAST):.0f}",
        }
        return shlex.split(step.command.format(**values))

    def run(self, step: Step, left: float) -> Outcome:
        """Runs a step for at most `left` seconds; a log gets what the step prints.

        A step whose time is over is interrupted as by Ctrl-C, so that it may still print results.
        Ten seconds later it is killed with its children.
        """
        start, command = time.monotonic(), self.words(step, left)
        said = shlex.join(command)
        if left <= 0:
            return Outcome(step, "not begun: no time was left", command=said)
        if not shutil.which(command[0]) and step.optional:
            return Outcome(step, f"left out: {command[0]} is not installed", command=said)
        if not shutil.which(command[0]):
            return Outcome(step, f"failed: no such program: {command[0]}", command=said)
        stopping = ("timeout", "--signal=INT", "--kill-after=10", f"{left:.1f}")
        # The build copies the sources to this tree; steps that start there import that copy.
        tree = self.build / "tree"
        here = ROOT if step.command.startswith(BUILDING) or not tree.exists() else tree
        beside_python = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        environment = {"PYTHONPATH": gpu_needs.before("PYTHONPATH", here), "PATH": beside_python}
        environment |= {"SNNLSTM_SIMT_CACHE": str(self.build / "simt")}
        environment |= dict(word.split("=", 1) for word in step.environment)
        # Children of a background job inherit it.
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        log = self.out / f"{step.name.replace(' ', '-')}.log"
        with log.open("w") as file:
            status = subprocess.run(
                (*stopping, *command), cwd=here, env=os.environ | environment,
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, check=False,
            ).returncode  # fmt: skip
        verdict = "passed" if status == 0 else f"failed (exit status {status})"
        if status in (124, 137, -signal.SIGKILL):
            verdict = f"stopped: its time was over after {left:.0f} s"
        lines = log.read_text(errors="replace").splitlines()[-step.tail :]
        return Outcome(step, verdict, time.monotonic() - start, "\n".join(lines), said)


def run_all(place: Place, planned: Sequence[Step], seconds: float) -> list[Outcome]:
    """Runs the steps and writes the report after each."""
    begin, about = time.monotonic(), facts(place)
    outcomes: list[Outcome] = []
    for step in planned:
        print(f"{step.name} ...", end=" ", flush=True)
        lost = [o.step.name for o in outcomes if o.step.needed and o.verdict != "passed"]
        if lost:
            outcome = Outcome(step, f"not begun: {lost[0]} did not pass")
        else:
            outcome = place.run(step, begin + step.until * seconds - time.monotonic())
        outcomes.append(outcome)
        print(f"{outcome.verdict} ({outcome.seconds:.0f} s)", flush=True)
        taken = time.monotonic() - begin
        (place.out / "report.md").write_text(report(about, outcomes, taken))
        gather(place.out)
    return outcomes


def facts(place: Place) -> dict[str, str]:
    """Returns what the report says of the machine and of versions."""
    import torch

    from benchmarks import devices, machine
    from benchmarks.providers import Setting

    cuda = place.device == "cuda"
    rehearsal = {} if cuda else {"REHEARSAL": "no GPU: no time below is a GPU's"}
    driver = gpu_needs.said(
        "nvidia-smi",
        "--query-gpu=driver_version,clocks.max.sm,power.limit",
        "--format=csv,noheader",
    )
    compiler = gpu_needs.nvcc()
    return {
        **rehearsal,
        "GPU": devices.name(place.device),
        "driver, highest clock, power": driver if cuda else "none",
        "nvcc": gpu_needs.said(compiler, "--version") if compiler and place.arch else "none",
        "CUDA of torch": str(torch.version.cuda),
        "machine": f"{platform.platform()}, {machine.device_name('cpu')}",
        **machine.describe(Setting("cuda" if cuda else "cpu")),
    }


def report(about: dict[str, str], outcomes: Sequence[Outcome], seconds: float) -> str:
    """Returns the report, in Markdown."""
    kind = "Rehearsal of snnlstm" if "REHEARSAL" in about else "snnlstm"
    lines = [f"# {kind} on {about.get('GPU', 'a GPU')}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in about.items()]
    lines += ["", "| step | outcome | seconds |", "|---|---|---|"]
    lines += [f"| {o.step.name} | {o.verdict} | {o.seconds:.0f} |" for o in outcomes]
    lines += [f"| all | {summary(outcomes)} | {seconds:.0f} |"]
    for outcome in outcomes:
        command = [*outcome.step.environment, outcome.command or outcome.step.command]
        lines += ["", f"## {outcome.step.name}: {outcome.verdict}", "", f"`{' '.join(command)}`"]
        lines += ["", "````text", outcome.output or "(no output)", "````"]
    return "\n".join(lines) + "\n"


def gather(out: Path) -> None:
    """Writes the rows of all steps into one rows.csv."""
    tables = [file.read_text().splitlines() for file in sorted(out.glob("*/rows.csv"))]
    tables = [table for table in tables if table]
    lines = [line for table in tables for line in table[1:]]
    (out / "rows.csv").write_text("\n".join([*(t[0] for t in tables[:1]), *lines, ""]))


def summary(outcomes: Sequence[Outcome]) -> str:
    """Returns a text that says how many steps passed."""
    passed = sum(outcome.verdict == "passed" for outcome in outcomes)
    left_out = sum(outcome.verdict.startswith("left out") for outcome in outcomes)
    return f"{passed} of {len(outcomes)} passed" + (f", {left_out} left out" if left_out else "")


def chosen(names: Iterable[str] | None, planned: Sequence[Step]) -> list[Step]:
    """Returns the named steps, or all; a ValueError names a step that there is none of."""
    known = [step.name for step in planned]
    for name in names or ():
        if name not in known:
            raise ValueError(f"--steps: no step is called {name!r}; known: {', '.join(known)}")
    return [step for step in planned if not names or step.name in names]


def arch_of(rehearsal: bool, capability: int) -> int | None:
    """Returns what to compile for; a rehearsal compiles what it finds a compiler for."""
    off = os.environ.get("SNNLSTM_CUDA", "").strip().lower() == "off" or gpu_needs.nvcc() is None
    return None if rehearsal and off else capability


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status, 1 if a step did not pass."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (default: 9)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: out/gpu-DATE-TIME")
    parser.add_argument("--build", type=Path, metavar="DIR", default=BUILD, help="of the core")
    parser.add_argument("--steps", nargs="+", metavar="NAME", help="of the report; default: all")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, on an emulated one")
    parser.add_argument("--device", default="simt-t4", help="of a rehearsal (default: simt-t4)")
    options = parser.parse_args(arguments)
    try:
        planned = chosen(options.steps, steps(options.rehearse))
    except ValueError as error:
        parser.error(str(error))
    if trouble := gpu_needs.lacking(options.rehearse):
        print(trouble, file=sys.stderr)
        return 1
    from benchmarks import devices

    device = options.device if options.rehearse else "cuda"
    if device not in devices.DEVICES:
        parser.error(f"--device: {device!r} is none of {', '.join(devices.DEVICES)}")
    out = options.out or Path("out") / f"gpu-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    capability = devices.capability(device)
    arch = arch_of(options.rehearse, capability)
    place = Place(device, capability, arch, out, options.build.resolve())
    outcomes = run_all(place, planned, 60 * options.minutes)
    print(f"{summary(outcomes)}; to send: {out / 'report.md'} and {out / 'rows.csv'}")
    good = ("passed", "left out")
    return 0 if all(outcome.verdict.startswith(good) for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
