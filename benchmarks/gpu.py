"""`make gpu` says what is right and what is slow on a GPU, and writes one report.

    python -m benchmarks.gpu [--quick] [--minutes M] [--steps NAME ...] [--core PATH] [--out DIR]
    python -m benchmarks.gpu --rehearse [--quick]

The command first lists everything that is missing, with the line that installs it; until then it
imports only Python's own modules. It needs no network. The build has no time limit, and --core
takes a core that was built elsewhere. The clock starts after it: --quick takes two minutes for the
comparison with float64, every algorithm and block of both passes, and layers beside snnTorch's;
without it nine minutes also have the tests, the sanitizers and large layers. Each command has a
time by which it must end, and later ones get the time that earlier ones leave. A command that fails
or is stopped ends no other.

--rehearse goes through the same steps without a GPU, on one that tests/simt emulates, with tiny
layers; its times mean nothing. DIR gets two files, written anew after each step: report.md, and
results.zip with all logs and rows. The build goes to out/gpu-build and is kept.
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
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "out" / "gpu-build"
SHOWN = 600  # lines of a step's output, in the report
LAST = 30.0  # seconds that a shape of the benchmark may take after it was begun
# Each GPU is timed in the types that it has instructions for.
DTYPES = {75: "float32 autocast16 float16", 80: "tf32 bfloat16 float16"}
TINY = '"2 1 2 8 6 6 3 name=tiny"'  # the layer of a rehearsal
# The modules and programs that the steps need, as pip installs them. The core is built with CMake
# alone, which says by itself if it is too old, or if it finds no compiler.
NEEDED = {
    "pybind11": "pybind11>=2.13", "pytest": "pytest>=8", "hypothesis": "hypothesis>=6.100",
    "numpy": "numpy", "pandas": "pandas>=2", "snntorch": "snntorch==1.0.0", "tqdm": "tqdm",
    "cmake": "cmake>=3.24", "ninja": "ninja",
}  # fmt: skip


class Step(NamedTuple):
    """A step is one command, in which LEFT stands for the seconds that it may take.

    until: the share of the time behind the build after which the step is stopped; 0 means no limit,
    and that a failure ends the run.
    """

    name: str
    until: float
    command: str
    environment: Sequence[str] = ()


class Outcome(NamedTuple):
    """Holds a step's verdict, such as "passed", its seconds, and the end of what it printed."""

    step: Step
    verdict: str
    seconds: float = 0.0
    output: str = ""


class Place(NamedTuple):
    """Says where a run goes: the device, its compute capability, and the folder of results.

    core: one that is built, or None. cuda: whether the core gets CUDA kernels. work: the folder of
    logs and rows, which `out` gets packed. tree: a copy of the sources, in which the steps run.
    """

    device: str
    capability: int
    core: Path | None
    cuda: bool
    out: Path
    build: Path

    @property
    def work(self) -> Path:
        return self.build / "work"

    @property
    def tree(self) -> Path:
        return self.build / "tree"


def steps(place: Place, quick: bool) -> list[Step]:
    """Returns the steps, with tiny layers and few tests in a rehearsal."""
    rehearsal, of, cores = place.device != "cuda", place.capability, os.cpu_count() or 1
    work, python = shlex.quote(str(place.work)), shlex.quote(sys.executable)
    device = f"--device {place.device}"
    small = " --few --sizes 2 1 3 5 6 7" if rehearsal else ""
    smoke = f"{python} -m benchmarks.gpu_smoke {device}{small} --algorithms"
    timed = f"{python} -m benchmarks.gpu_algorithms {device} --limit LEFT"
    timed += f" --layers {TINY}" if rehearsal else ""
    dtypes = DTYPES[max(known for known in DTYPES if known <= of)]
    bench = f"{python} -m benchmarks {device} --threads all --dtype {dtypes} --limit LEFT "
    bench += f"--shape {TINY} --seconds 0.2 " if rehearsal else ""
    shapes = "" if rehearsal else "--shapes mnist dvs column1 column3 eeg1 tiny mid --seconds 0.6 "
    beside = "snntorch snntorch-cudagraph snnlstm-step snnlstm snnlstm-cudagraph"
    at = (0.1, 0.2, 0.3, 0.6, 0.65, 0.97) if quick else (0.05, 0.08, 0.1, 0.2, 0.22, 0.4)
    # Whether GPU and driver run what was built, and what takes its place in a rehearsal.
    check = "import sys, snnlstm.native.cuda_check as of; sys.exit(of.trouble(0))"
    check = "from benchmarks.devices import emulator; emulator()" if rehearsal else check
    found = [
        *build(place),
        Step("kernels", 0, f"{python} -c '{check}'"),
        *(
            Step(f"smoke {name}", until, f"{smoke} {name}")
            for name, until in zip(("fused", "hybrid", "cudnn"), at, strict=False)
        ),
        Step("algorithms", at[3], f"{timed} --out {work}/algorithms.csv"),
        # Launches that do not overlap (programmatic dependent launch, from 9.0 on).
        Step("algorithms apart", at[4], f"{timed} --out {work}/apart.csv"
             + ("" if rehearsal else " --layers mnist dvs"), ("SNNLSTM_PDL=0",)),
        Step("layers", at[5], f"{bench}{shapes}--providers {beside} --out {work}/layers"),
    ]  # fmt: skip
    if quick:
        return found
    # pytest fails if it finds no test of the backend.
    workers = f"-n{min(8, max(1, cores // 2))}" if importlib.util.find_spec("xdist") else ""
    tests = "tests/cell tests/sequences tests/autograd tests/networks tests/torch tests/system"
    tests = "tests/cell/test_quant.py" if rehearsal else tests
    pytest = f"{python} -m pytest -q --maxfail=50 {workers} -p no:cacheprovider {tests}"
    shapes = "" if rehearsal else "--shapes audio dvs64 wide64 dvs128 wide128 big --seconds 1.5 "
    beside += " snnlstm:cudnn snnlstm:hybrid snnlstm:measure"
    # torch.compile takes a minute of one core for a layer.
    beside += " snntorch-compile snntorch-compile-graph" if cores >= 8 else ""
    found.append(Step("tests", 0.6, f"{pytest} --backend {place.device.split('-')[0]}"))
    if sanitizer := find("compute-sanitizer"):
        # It checks our own kernels alone, because torch's would take minutes.
        checked = f"{sanitizer} --error-exitcode=9 --launch-timeout=60 --kernel-name "
        checked += "kernel_substring=snnlstm --tool="
        uncached = ("PYTORCH_NO_CUDA_MEMORY_CACHING=1",)
        few = f"{smoke} fused --few"
        found.append(Step("memcheck", 0.7, f"{checked}memcheck {few}", uncached))
        found.append(Step("racecheck", 0.8, f"{checked}racecheck {few}"))
    large = f"{bench}{shapes}--providers {beside} --out {work}/large"
    return [*found, Step("large layers", 0.98, large)]


def build(place: Place) -> list[Step]:
    """Returns the steps that build the core; a build goes on where the last one stopped.

    It is built for one GPU, and of the CPU kernels it has the baseline alone: that takes a tenth of
    the time of a release. A core that was built elsewhere is copied.
    """
    if place.core:
        return [Step("core", 0, shlex.join(["cp", str(place.core), f"{place.tree}/snnlstm"]))]
    import pybind11

    objects = place.build / f"{sys.implementation.cache_tag}-{place.capability}"
    settings = {
        "Python_EXECUTABLE": sys.executable, "pybind11_DIR": pybind11.get_cmake_dir(),
        "SNNLSTM_INPLACE": "ON", "SNNLSTM_BASELINE_ALONE": "ON", "SNNLSTM_TESTING": "ON",
        "SNNLSTM_CUDA": "ON" if place.cuda else "OFF",
        "SNNLSTM_CUDA_ARCHS": place.capability if place.cuda else "",
    }  # fmt: skip
    words = ["cmake", "-S", f"{place.tree}/csrc", "-B", str(objects), "-G", "Ninja"]
    words += [f"-D{name}={value}" for name, value in settings.items()]
    make = shlex.join(["cmake", "--build", str(objects)])
    return [Step("configure", 0, shlex.join(words)), Step("build", 0, make)]


def run(place: Place, step: Step, left: float) -> Outcome:
    """Runs a step for at most `left` seconds; a log gets what the step prints.

    A step whose time is over is interrupted as by Ctrl-C, so that it may still print results. Ten
    seconds later it is killed with its children.
    """
    start = time.monotonic()
    if left <= 0:
        return Outcome(step, "not begun: no time was left")
    limit = ("timeout", "--signal=INT", "--kill-after=10", f"{left:.1f}") if step.until else ()
    command = step.command.replace("LEFT", f"{max(1.0, left - LAST):.0f}")
    environment = {
        "PYTHONPATH": f"{place.tree}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "SNNLSTM_SIMT_CACHE": str(place.build / "simt"),
        **dict(word.split("=", 1) for word in step.environment),
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
    verdict = "passed" if status == 0 else f"failed (exit status {status})"
    if status in (124, 137, -signal.SIGKILL):
        verdict = f"stopped: its time was over after {left:.0f} s"
    lines = log.read_text(errors="replace").splitlines()[-SHOWN:]
    return Outcome(step, verdict, time.monotonic() - start, "\n".join(lines))


def run_all(place: Place, planned: Sequence[Step], seconds: float) -> list[Outcome]:
    """Runs the steps and writes the report after each."""
    start = begin = time.monotonic()
    about, outcomes = facts(place), list[Outcome]()
    for step in planned:
        print(f"{step.name} ...", end=" ", flush=True)
        if any(not of.step.until and of.verdict != "passed" for of in outcomes):
            outcome = Outcome(step, "not begun: the kernels cannot run")
        else:
            left = begin + step.until * seconds - time.monotonic() if step.until else float("inf")
            outcome = run(place, step, left)
        if not step.until:
            begin = time.monotonic()
        outcomes.append(outcome)
        print(f"{outcome.verdict} ({outcome.seconds:.0f} s)", flush=True)
        taken = time.monotonic() - start
        (place.out / "report.md").write_text(report(about, outcomes, taken))
        shutil.make_archive(str(place.out / "results"), "zip", place.work)
    return outcomes


def facts(place: Place) -> dict[str, str]:
    """Returns what the report says of the machine and of versions."""
    import torch

    from benchmarks import devices, machine
    from benchmarks.providers import Setting

    cuda = place.device == "cuda"
    query = "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"
    return {
        **({} if cuda else {"REHEARSAL": "no GPU: no time below is a GPU's"}),
        "GPU": devices.name(place.device),
        "driver, highest clock, power": said("nvidia-smi", *query) if cuda else "none",
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
        command = [*outcome.step.environment, outcome.step.command]
        lines += ["", f"## {outcome.step.name}: {outcome.verdict}", "", f"`{' '.join(command)}`"]
        lines += ["", "````text", outcome.output or "(no output)", "````"]
    return "\n".join(lines) + "\n"


def summary(outcomes: Sequence[Outcome]) -> str:
    """Returns a text that says how many steps passed."""
    passed = sum(outcome.verdict == "passed" for outcome in outcomes)
    return f"{passed} of {len(outcomes)} passed"


def lacking(rehearsal: bool = False) -> str | None:
    """Returns why the steps cannot run here, or None. A rehearsal needs neither GPU nor nvcc."""
    if not importlib.util.find_spec("torch"):
        return f"no torch: {sys.executable} has none; make gpu PYTHON=... takes another Python"
    missing = [
        of for name, of in NEEDED.items() if not (importlib.util.find_spec(name) or find(name))
    ]
    if missing:
        return f"missing: {sys.executable} -m pip install " + " ".join(f'"{of}"' for of in missing)
    import torch

    if rehearsal or torch.cuda.is_available():
        return None
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return (
        f"no GPU: torch {torch.__version__} ({built}) of {sys.executable} sees none; "
        'ARGS="--rehearse" goes through the steps without one'
    )


def find(program: str) -> str | None:
    """Finds a program on PATH, beside this Python, or beside nvcc."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    folders = [f"{home}/bin" for home in [*homes, "/usr/local/cuda"] if home]
    path = [os.environ.get("PATH", ""), str(Path(sys.executable).parent), *folders]
    return shutil.which(program, path=os.pathsep.join(path))


def said(*command: str) -> str:
    """Returns the last line of what a program prints, or "unknown"."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (done.stdout.strip().splitlines() or ["unknown"])[-1]


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status, 1 if a step did not pass."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="right or wrong, and where time goes")
    parser.add_argument("--minutes", type=float, help="after the build (default: 9, --quick: 2)")
    parser.add_argument("--core", type=Path, metavar="PATH", help="take this core, and build none")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: out/gpu-DATE-TIME")
    parser.add_argument("--build", type=Path, metavar="DIR", default=BUILD, help="of the core")
    parser.add_argument("--steps", nargs="+", metavar="NAME", help="of the report; default: all")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, on an emulated one")
    options = parser.parse_args(arguments)
    if trouble := lacking(options.rehearse):
        print(trouble, file=sys.stderr)
        return 1
    from benchmarks import devices

    device = "simt-t4" if options.rehearse else "cuda"
    out = (options.out or Path("out") / f"gpu-{datetime.datetime.now():%Y%m%d-%H%M%S}").resolve()
    out.mkdir(parents=True, exist_ok=True)
    capability = devices.capability(device)
    # A rehearsal compiles what it finds a compiler for.
    off = os.environ.get("SNNLSTM_CUDA", "").strip().lower() == "off" or not find("nvcc")
    cuda, core = not (options.rehearse and off), options.core and options.core.resolve()
    place = Place(device, capability, core, cuda, out, options.build.resolve())
    planned = steps(place, options.quick)
    if unknown := set(options.steps or ()) - {step.name for step in planned}:
        parser.error(f"--steps: {unknown} are none of {[step.name for step in planned]}")
    planned = [step for step in planned if step.name in (options.steps or step.name)]
    for old in (place.tree, place.work):
        shutil.rmtree(old, ignore_errors=True)
    # The sources are copied with their times, but for what was built there.
    built = ".*", "__pycache__", "*.so", "build", "out", place.build.name
    shutil.copytree(ROOT, place.tree, ignore=shutil.ignore_patterns(*built))
    place.work.mkdir(parents=True)
    outcomes = run_all(place, planned, 60 * (options.minutes or (2 if options.quick else 9)))
    print(f"{summary(outcomes)}; to send: both files in {out}")
    return int(any(outcome.verdict != "passed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
