"""From the source tree to an sdist, to a wheel, to an environment of its own, to a result."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not in a source tree"),
]

OFFLINE = re.compile(r"name resolution|NewConnectionError|No matching distribution|timed out", re.I)


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "SNNLSTM_ISA")}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**kept, **environment},
        capture_output=True, text=True, timeout=590,
    )  # fmt: skip
    text = done.stdout + done.stderr
    if done.returncode and "pip" in command and OFFLINE.search(text):
        pytest.skip("the build requirements cannot be fetched: no package index")
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{text}"
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("distribution")


@pytest.fixture(scope="module")
def sdist(folder) -> Path:
    run(sys.executable, "-m", "build", "--sdist", "--outdir", folder, ROOT, cwd=folder)
    (path,) = folder.glob("snnlstm-*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(folder, sdist) -> Path:
    """Built as a user's pip does: from the sdist alone, isolated, with no torch in sight.

    It is named after the variant, as published wheels are. How fast the code is does not matter
    here: without optimisation it is built in a tenth of the time.
    """
    run(
        sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, sdist,
        cwd=folder, SNNLSTM_CUDA="off", SNNLSTM_LOCAL_VERSION="cpu",
        CMAKE_ARGS="-DCMAKE_CXX_FLAGS_RELEASE=-O0",
    )  # fmt: skip
    (path,) = folder.glob("snnlstm-*.whl")
    return path


@pytest.fixture(scope="module")
def python(folder, wheel) -> Path:
    """The interpreter of a fresh environment with the wheel and with this one's torch."""
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    executable = folder / "venv" / "bin" / "python"
    install = ["-m", "pip", "--python", executable, "install", "--no-deps", "--no-index", wheel]
    run(sys.executable, *install, cwd=folder)
    site = run(
        executable, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
    )
    # A folder named in a .pth file is searched last, and .pth files in it (those of an editable
    # installation) are not read.
    (Path(site.strip()) / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
    return executable


def tracked(*folders: str) -> set[str]:
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    return set(run("git", "ls-files", *folders, cwd=ROOT).splitlines())


def test_the_sdist_holds_what_the_repository_does(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    here = {name for name in tracked() if (ROOT / name).exists()}
    of_the_repository_alone = (".ci", ".github", ".gitignore")
    assert {n for n in here - names if not n.startswith(of_the_repository_alone)} == set()
    assert [name for name in names if name.endswith((".so", ".o", ".pyc"))] == []
    assert [name for name in names if name.startswith(("build/", ".venv/", "dist/"))] == []


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"snnlstm"}
    assert tracked("snnlstm") <= set(names)
    assert len([name for name in names if name.endswith(".so")]) == 1
    assert [name for name in names if name.endswith((".cpp", ".h", ".cu"))] == []
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert wheel.stat().st_size < 20e6


def test_the_wheel_needs_torch_and_numpy_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    needs = [n for n in re.findall(r"(?m)^Requires-Dist: (.+)$", metadata) if "extra ==" not in n]
    assert sorted(needs) == ["numpy", "torch>=2.4"]


def test_the_installed_wheel_computes(python, wheel, folder):
    """From a folder outside the source tree, on the native path, forward and backward."""
    code = """
import torch, snnlstm
cell = snnlstm.SConv2dLSTM(2, 4, 3, threshold=0.1)
x = torch.rand(5, 3, 2, 9, 7)
spk, syn, mem = cell(x)
mem.sum().backward()
assert cell.conv.weight.grad.abs().sum() > 0
print(snnlstm.__file__, snnlstm.__version__, cell.path.name)
"""
    file, version, path = run(python, "-c", code, cwd=folder).split()
    assert Path(file).is_relative_to(folder)
    assert path.startswith("cpu-")
    facts = json.loads(run(python, "-m", "snnlstm", "--json", cwd=folder))
    assert version.endswith("+cpu")
    assert wheel.name.startswith(f"snnlstm-{version}-")
    assert facts["version"] == version
    assert facts["native"]["build"]["version"] == version
    assert facts["problems"] == []
