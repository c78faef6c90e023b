"""The source tree becomes an sdist, and the sdist wheels that install and compute."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch

from tests.shared.fresh import HANG
from tests.shared.helpers import long, shell_program

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not in a source tree"),
]

OFFLINE = re.compile(r"name resolution|NewConnectionError|No matching distribution|timed out", re.I)
# The wheel is named after its variant, as published wheels are. One instruction set without
# optimisation is built in a fraction of the time.
COMPILED = {
    "SNNLSTM_CUDA": "off", "SNNLSTM_LOCAL_VERSION": "cpu",
    "CMAKE_ARGS": "-DCMAKE_CXX_FLAGS_RELEASE='-O0 -DNDEBUG' -DSNNLSTM_BASELINE_ALONE=ON",
}  # fmt: skip
NO_COMPILER = {"PATH": "/nowhere"}


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    settings = ("PYTHONPATH", "CXX", "CMAKE_ARGS", "CUDACXX")
    kept = {k: v for k, v in os.environ.items() if k not in settings and "SNNLSTM" not in k}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**kept, **environment}, text=True, timeout=HANG,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode and "pip" in command and OFFLINE.search(done.stdout):
        pytest.skip("the build requirements cannot be fetched: no package index")
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}"
    return done.stdout


def built(place: Path, sdist: Path, environment: dict[str, str]) -> tuple[Path, str]:
    """Returns the wheel that pip builds in isolation and without torch, and what pip prints."""
    place.mkdir()
    source = shutil.copy2(sdist, place)  # pip has a cache for each place
    pip = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--wheel-dir"]
    said = run(*pip, place, source, cwd=place, **environment)
    (path,) = place.glob("snnlstm-*.whl")
    return path, said


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("distribution")
    run(sys.executable, "-m", "build", "--sdist", "--outdir", folder, ROOT, cwd=folder)
    return next(folder.glob("snnlstm-*.tar.gz"))


def fresh(place: Path, torch_folder: Path, *options: str) -> Path:
    """Makes an environment beside the torch in a folder, and returns its Python."""
    run(sys.executable, "-m", "venv", *options, place, cwd=place.parent)
    python = place / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-c", code, cwd=place.parent).strip())
    # Python searches a folder of a .pth file last, and reads no .pth file in that folder, such as
    # that of an editable installation.
    (site / "torch.pth").write_text(str(torch_folder))
    return python


def installed(wheel: Path, folder: Path) -> Path:
    """Installs a wheel in a fresh environment beside this one's torch, and returns its Python."""
    here = Path(torch.__file__).parents[1]
    python = fresh(folder / f"venv-{wheel.name}", here, "--without-pip")
    install = ["-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel]
    run(sys.executable, *install, cwd=folder)
    return python


def tracked(*folders: str) -> set[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = run("git", "ls-files", *folders, cwd=ROOT).splitlines()
    return {name for name in names if (ROOT / name).exists()}


def test_the_sdist_holds_what_the_repository_does(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert tracked() - names == set()
    assert [name for name in names if re.search(r"\.(so|o|pyc)$|^(build|dist|\.venv)/", name)] == []


@long
def test_a_wheel_holds_the_package_alone_needs_torch_alone_and_computes(sdist, tmp_path):
    """The wheel runs outside of the source tree, by the kernels, forward and backward."""
    wheel, _ = built(tmp_path / "wheel", sdist, COMPILED)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(n for n in names if n.endswith("/METADATA"))).decode()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"snnlstm"}
    assert tracked("snnlstm") <= names
    assert len([name for name in names if re.search(r"\.so$|licenses/", name)]) == 3
    needs = [n for n in re.findall(r"(?m)^Requires-Dist: (.+)$", metadata) if "extra ==" not in n]
    assert needs == ["torch>=2.4"]
    code = """
import torch, snnlstm
cell = snnlstm.SConv2dLSTM(2, 4, 3, threshold=0.1)
spk, syn, mem = cell(torch.rand(5, 3, 2, 9, 7))
mem.sum().backward()
assert cell.conv.weight.grad.abs().sum() > 0
assert not hasattr(snnlstm._C, "cpu_evaluate")  # what tests alone need
print(snnlstm.__file__, snnlstm.__version__, cell.path.name)
"""
    python = installed(wheel, tmp_path)
    file, version, path = run(python, "-c", code, cwd=tmp_path).split()
    assert Path(file).is_relative_to(tmp_path)
    assert path.startswith("cpu-")
    report = run(python, "-m", "snnlstm", cwd=tmp_path)
    assert version.endswith("+cpu")
    assert wheel.name.startswith(f"snnlstm-{version}-cp")
    for name in ("snnlstm", "build version"):
        assert re.search(f"^{name} +{re.escape(version)}$", report, re.MULTILINE)
    assert "Nothing is wrong." in report


# The stand-in's answers: none, the version alone, and all but for the sources of the kernels.
NVCCS = {
    "nothing": "exit 1",
    "no GPU": 'test "$1" = --version && echo "release 13.0" || exit 1',
    "no program": "case $1 in --version) echo release 13.0 ;; --list*) echo compute_80 ;; "
    "*) exit 1 ;; esac",
    "no kernel": 'case "$*" in *csrc/cuda/*) exit 1 ;; esac; exec {} "$@"',
}


@long
@pytest.mark.parametrize("answers", NVCCS)
def test_where_nvcc_fails_the_cpu_core_is_built(answers, sdist, tmp_path):
    """Driver 550 keeps pip from fetching another compiler; SNNLSTM_CUDA is not set."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if answers == "no kernel" and not Path(nvcc).exists():
        pytest.skip("no nvcc")
    smi = 'case "$*" in *driver*) echo 550.54 ;; *) echo 8.0 ;; esac'
    for name, text in (("nvcc", NVCCS[answers].replace("{}", nvcc)), ("nvidia-smi", smi)):
        shell_program(tmp_path / name, text)
    settings = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "CUDACXX": str(tmp_path / "nvcc"),
        "CMAKE_ARGS": COMPILED["CMAKE_ARGS"],
    }  # fmt: skip
    wheel, said = built(tmp_path / "wheel", sdist, settings)
    assert ("WITHOUT its CUDA kernels" in said) == (answers == "no kernel")
    why = {
        "nothing": "says:",
        "no GPU": "knows none of the GPUs",
        "no program": "cannot compile a program",
        "no kernel": "building them failed",
    }
    assert re.search(f"CUDA kernels: not built: .*{why[answers]}", said)
    report = run(installed(wheel, tmp_path), "-m", "snnlstm", cwd=tmp_path)
    assert "Nothing is wrong." in report


@long
def test_without_a_compiler_everything_runs_in_torch(sdist, tmp_path):
    """pip says so, the first call, once, and the report; the wheel is for every Python."""
    wheel, said = built(tmp_path / "wheel", sdist, NO_COMPILER)
    assert "WITHOUT its native core" in said
    assert wheel.name.endswith("-py3-none-any.whl")
    code = """
import torch, snnlstm
for _ in range(2):
    cell = snnlstm.SConv2dLSTM(2, 4, 3, threshold=0.1)
    cell(torch.rand(5, 3, 2, 9, 7))[2].sum().backward()
print(cell.path)
"""
    python = installed(wheel, tmp_path)
    said = run(python, "-c", code, cwd=tmp_path)
    assert "reference (the compiled core is missing)\n" in said
    assert said.count("the compiled core is missing") == 2  # once in the log, once in the path
    *_, problem = run(python, "-m", "snnlstm", cwd=tmp_path).splitlines()
    start = "problem: this installation has no native core, so that every call takes"
    assert problem.startswith(start)


def torch_alone(folder: Path) -> Path:
    """Makes a folder that has this environment's torch, what torch requires, and no more."""
    folder.mkdir()
    wanted = ["torch"]
    for name in wanted:
        with suppress(PackageNotFoundError):  # what another platform requires
            found = distribution(name)
            required = [
                re.match(r"[\w.-]+", r)[0] for r in found.requires or () if "extra" not in r
            ]
            wanted += [one for one in required if one not in wanted]
            for top in {file.parts[0] for file in found.files} - {"..", "__pycache__"}:
                if not (folder / top).exists():
                    (folder / top).symlink_to(found.locate_file(top))
    return folder


@long
def test_readmes_code_runs_after_readmes_own_installation(tmp_path):
    """The environment has torch, and else only what README's command installs."""
    text = (ROOT / "README.md").read_text()
    command, code = (
        re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL) for kind in ("sh", "python")
    )
    clone, install, report = (shlex.split(line, comments=True) for line in command[0].splitlines())
    assert clone[:2] == ["git", "clone"]
    assert install[:2] == ["pip", "install"]
    assert report == ["python", "-m", "snnlstm"]
    run("git", "clone", "-q", ROOT, tmp_path / "snnlstm", cwd=tmp_path)
    python = fresh(tmp_path / "venv", torch_alone(tmp_path / "torch"))
    run(python, "-m", *install, cwd=tmp_path, **COMPILED)
    outside = tmp_path / "outside"
    outside.mkdir()
    assert "Nothing is wrong." in run(python, *report[1:], cwd=outside)
    (outside / "readme.py").write_text("".join(code))
    said = run(python, outside / "readme.py", cwd=outside)
    assert "accelerate: 2 swapped, 0 left\n" in said
    assert "(the native kernels cover this call)\n" in said


@long
@pytest.mark.parametrize("environment", [COMPILED, NO_COMPILER], ids=["compiler", "none"])
def test_two_builds_have_the_same_bytes(environment, sdist, tmp_path):
    """Each build has a temporary folder of its own, of which the wheel may hold no trace."""
    first, second = (built(tmp_path / name, sdist, environment)[0] for name in ("one", "other"))
    assert first.read_bytes() == second.read_bytes()


@long
@pytest.mark.parametrize("target", ["aarch64-macos", "x86_64-macos", "x86_64-windows-gnu"])
def test_the_core_compiles_for_other_systems(target, tmp_path):
    """zig is clang with their headers; bindings.cpp would need Python's headers for Windows."""
    pytest.importorskip("ziglang")
    core = ROOT / "csrc"
    zig = [sys.executable, "-m", "ziglang", "c++", "-target", target, "-std=gnu++17", "-O1", "-c"]
    for source in [core / "platform.cpp", *core.glob("cpu/*.cpp"), *core.glob("cpu/kernels/*.cpp")]:
        flags = [f"-I{core}", "-DSNNLSTM_ISA=baseline", "-Wno-psabi", "-o", tmp_path / "object.o"]
        run(*zig, *flags, source, cwd=tmp_path)
