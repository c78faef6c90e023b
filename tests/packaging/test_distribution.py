"""The source tree becomes an sdist, the sdist wheels that install and compute, and these a release.

A release is what the workflows build for each Python, and what .ci/index.py writes for pip.
"""

from __future__ import annotations

import hashlib
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import HANG

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = ROOT / ".github" / "workflows"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not in a source tree"),
]

OFFLINE = re.compile(r"name resolution|NewConnectionError|No matching distribution|timed out", re.I)


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "SNNLSTM_ISA")}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**kept, **environment},
        capture_output=True, text=True, timeout=HANG,
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


# pip builds the wheel from the sdist alone, isolated and without torch, as for a user. The wheel is
# named after its variant, as published wheels are. Without optimisation it is built in a tenth of
# the time.
COMPILED = {
    "SNNLSTM_CUDA": "off", "SNNLSTM_LOCAL_VERSION": "cpu",
    "CMAKE_ARGS": "-DCMAKE_CXX_FLAGS_RELEASE='-O0 -DNDEBUG'",
}  # fmt: skip
NO_COMPILER = {"PATH": "/nowhere", "CXX": ""}


def built(place: Path, sdist: Path, environment: dict[str, str]) -> Path:
    place.mkdir()
    run(
        sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", place, sdist,
        cwd=place, SOURCE_DATE_EPOCH="1700000000", **environment,
    )  # fmt: skip
    (path,) = place.glob("snnlstm-*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(folder, sdist) -> Path:
    return built(folder / "compiler", sdist, COMPILED)


@pytest.fixture(scope="module")
def pure(folder, sdist) -> Path:
    return built(folder / "no-compiler", sdist, NO_COMPILER)


@pytest.fixture(scope="module")
def python(folder, wheel) -> Path:
    """Installs the wheel in a fresh environment beside this one's torch; returns its Python."""
    return install(wheel, folder / "venv", folder)


@pytest.fixture(scope="module")
def pure_python(folder, pure) -> Path:
    return install(pure, folder / "pure-venv", folder)


def install(wheel: Path, place: Path, folder: Path) -> Path:
    run(sys.executable, "-m", "venv", "--without-pip", place, cwd=folder)
    executable = place / "bin" / "python"
    install = ["-m", "pip", "--python", executable, "install", "--no-deps", "--no-index", wheel]
    run(sys.executable, *install, cwd=folder)
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = run(executable, "-c", code, cwd=folder)
    # Python searches a folder of a .pth file last, and reads no .pth file in that folder, such as
    # that of an editable installation.
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


def test_the_wheel_holds_the_package_alone_and_needs_torch_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (name,) = (n for n in names if n.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"snnlstm"}
    assert tracked("snnlstm") <= set(names)
    assert len([name for name in names if name.endswith(".so")]) == 1
    assert [name for name in names if name.endswith((".cpp", ".h", ".cu"))] == []
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert any(name.endswith("licenses/LICENSE-THIRD-PARTY") for name in names)
    assert wheel.stat().st_size < 20e6
    needs = [n for n in re.findall(r"(?m)^Requires-Dist: (.+)$", metadata) if "extra ==" not in n]
    assert needs == ["torch>=2.4"]


def test_the_installed_wheel_computes(python, wheel, folder):
    """The wheel runs outside of the source tree, by the kernels, forward and backward."""
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
    names = "import torch; from snnlstm import _C; print(*dir(_C), *_C.isa_names())"
    assert not {"cpu_evaluate", "wide"} & set(run(python, "-c", names, cwd=folder).split())
    report = run(python, "-m", "snnlstm", cwd=folder)
    assert version.endswith("+cpu")
    assert wheel.name.startswith(f"snnlstm-{version}-")
    for name in ("snnlstm", "build version"):
        assert re.search(f"^{name} +{re.escape(version)}$", report, re.MULTILINE)
    assert "Nothing is wrong." in report


def test_the_wheel_without_a_core_is_for_every_python_and_system(pure):
    assert pure.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(pure) as archive:
        names = archive.namelist()
    assert tracked("snnlstm") <= set(names)
    assert [name for name in names if name.endswith(".so")] == []


@pytest.mark.parametrize(("first", "environment"), [("pure", NO_COMPILER), ("wheel", COMPILED)])
def test_two_builds_have_the_same_bytes(first, environment, request, sdist, tmp_path):
    """Each build has a temporary folder of its own, of which the wheel may hold no trace."""
    again = built(tmp_path / "again", sdist, environment)
    assert again.read_bytes() == request.getfixturevalue(first).read_bytes()


def test_without_a_core_the_first_call_says_so_once(pure_python, folder):
    code = """
import sys; sys.stderr = sys.stdout
import torch, snnlstm
for _ in range(2):
    cell = snnlstm.SConv2dLSTM(2, 4, 3, threshold=0.1)
    cell(torch.rand(5, 3, 2, 9, 7))[2].sum().backward()
print(cell.path)
"""
    said = run(pure_python, "-c", code, cwd=folder)
    assert said.endswith("reference (the compiled core is missing)\n")
    assert said.count("the compiled core is missing") == 2  # once in the log, once in the path
    *_, problem = run(pure_python, "-m", "snnlstm", cwd=folder).splitlines()
    start = "problem: this installation has no native core, so that every call runs in"
    assert problem.startswith(start)
    assert "C++17 compiler" in problem


def test_the_tests_pass_without_a_core(pure_python, folder):
    """The cell's tests pass with the reference as the only implementation."""
    tests = folder / "tests-only"
    unneeded = shutil.ignore_patterns("__pycache__", "simt")
    for part in ("tests", "tools"):
        shutil.copytree(ROOT / part, tests / part, ignore=unneeded)
    shutil.copy2(ROOT / "pyproject.toml", tests)
    names = ("constructor", "state", "arguments", "inhibition")
    files = [f"tests/cell/test_{name}.py" for name in names]
    said = run(pure_python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, cwd=tests)
    assert re.search(r"\d\d+ passed", said)


# ---- releases -------------------------------------------------------------------------------

repository = pytest.mark.skipif(not WORKFLOWS.exists(), reason="not in a repository")


@repository
def test_the_workflows_know_every_python_that_the_package_names():
    named = re.findall(r":: Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    assert len(named) >= 4
    # Wheels are tested where they are built.
    for name, later in (("ci.yml", []), ("wheels.yml", ["3.14", "3.15"])):
        for listed in re.findall(r"(?m)^ +python: \[(.+)\]", (WORKFLOWS / name).read_text()):
            wanted = [version.replace(".", "") for version in named + later]
            assert [text.strip('" ').replace(".", "") for text in listed.split(",")] == wanted


@repository
def test_the_wheels_are_those_that_make_wheel_builds():
    (listed,) = re.findall(r"(?m)^ +cuda: \[(.+)\]", (WORKFLOWS / "wheels.yml").read_text())
    makefile = (ROOT / "Makefile").read_text()
    assert listed.split(", ") == ["all", *re.findall(r"(?m)^LOCAL_\w+ +:= (\w+)", makefile)]


@repository
def test_every_action_is_pinned_by_its_commit():
    used = [
        (path.name, action)
        for path in WORKFLOWS.glob("*.yml")
        for action in re.findall(r"(?m)uses: (.+)$", path.read_text())
    ]
    assert used
    pinned = re.compile(r"[\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")
    assert [found for found in used if not pinned.fullmatch(found[1])] == []


def test_one_version_and_a_changelog():
    version = re.search(r'__version__ = "(.+)"', (ROOT / "snnlstm" / "version.py").read_text())[1]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    first = re.search(r"(?m)^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text())[1]
    assert first in ("Unreleased", version)


@repository
def test_a_release_without_an_owner_is_refused():
    """The workflow's command finds every file that still holds the placeholder."""
    (command,) = re.findall(r'run: "! (git grep .+)"', (WORKFLOWS / "wheels.yml").read_text())
    holding = {
        name for name in tracked()
        if (ROOT / name).exists() and re.search(rb"\bOWNER\b", (ROOT / name).read_bytes())
    }  # fmt: skip
    done = subprocess.run(
        command, shell=True, cwd=ROOT, capture_output=True, text=True, check=False
    )
    found = {line.partition(":")[0] for line in done.stdout.splitlines()}
    about_it = {
        "CONTRIBUTING.md",
        ".github/workflows/wheels.yml",
        "tests/packaging/test_distribution.py",
    }
    assert found == holding - about_it
    assert (done.returncode == 0) == bool(found)


def test_an_index_would_show_what_the_metadata_says(sdist, wheel, pure):
    pytest.importorskip("twine")
    said = run(
        sys.executable, "-m", "twine", "check", "--strict", sdist, wheel, pure, cwd=sdist.parent
    )
    assert said.count("PASSED") == 3


def stub(folder: Path, local: str) -> Path:
    """Writes a wheel that holds a name and a version alone."""
    path = folder / f"snnlstm-9.9+{local}-py3-none-any.whl"
    about = f"snnlstm-9.9+{local}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: snnlstm\nVersion: 9.9+{local}\n"
    form = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in (("METADATA", metadata), ("WHEEL", form), ("RECORD", "")):
            archive.writestr(f"{about}/{name}", text)
    return path


def asset(path: Path, digest: str = "") -> dict[str, str]:
    digest = digest or hashlib.sha256(path.read_bytes()).hexdigest()
    url = path.as_uri().replace("+", "%2B")  # as GitHub gives it
    return {"name": path.name, "browser_download_url": url, "digest": f"sha256:{digest}"}


@pytest.fixture
def publish(tmp_path):
    """Returns a function that writes the indexes of releases, and runs pip on one index."""
    write = runpy.run_path(str(ROOT / ".ci" / "index.py"))["write"]

    def publish(releases: list, index: str) -> subprocess.CompletedProcess:
        write(releases, tmp_path / "site")
        return subprocess.run(
            [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--isolated",
             "--index-url", (tmp_path / "site/whl" / index).as_uri(), "snnlstm", "-d", tmp_path],
            capture_output=True, text=True, timeout=HANG,
        )  # fmt: skip

    return publish


@repository
def test_pip_finds_each_wheel_in_its_own_index(publish, tmp_path):
    (tmp_path / "assets").mkdir()
    paths = [stub(tmp_path / "assets", local) for local in ("cpu", "cu12", "cu13")]
    source = {"name": "snnlstm-9.9.tar.gz", "browser_download_url": "https://x"}
    releases = [[{"assets": [source, *map(asset, paths)]}], [{"assets": [], "draft": False}]]
    for local in ("cpu", "cu12", "cu13"):
        done = publish(releases, local)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / f"snnlstm-9.9+{local}-py3-none-any.whl").exists()
        page = (tmp_path / f"site/whl/{local}/snnlstm/index.html").read_text()
        assert page.count("<a ") == 1


@repository
def test_a_wheel_that_was_changed_is_refused(publish, tmp_path):
    (tmp_path / "assets").mkdir()
    path = stub(tmp_path / "assets", "cu13")
    done = publish([{"assets": [asset(path, digest="0" * 64)]}], "cu13")
    assert done.returncode != 0
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in done.stderr


@repository
def test_drafts_are_not_published(tmp_path):
    (tmp_path / "assets").mkdir()
    links = runpy.run_path(str(ROOT / ".ci" / "index.py"))["links"]
    assert links([{"draft": True, "assets": [asset(stub(tmp_path / "assets", "cpu"))]}]) == {}


def test_a_wheel_that_is_too_large_or_missing_is_refused(tmp_path, capsys):
    check = runpy.run_path(str(ROOT / "tools" / "wheel.py"))
    big = tmp_path / "snnlstm-9.9-py3-none-any.whl"
    with big.open("wb") as file:
        file.truncate(int(check["LARGEST"]) + 1)
    with pytest.raises(SystemExit, match="more than 20 MB"):
        check["main"]([str(big)])
    with pytest.raises(SystemExit):
        check["main"]([str(tmp_path / "none.whl")])
    assert "make wheel builds one" in capsys.readouterr().err


def test_a_wheel_that_fits_no_manylinux_tag_is_refused(monkeypatch):
    check = runpy.run_path(str(ROOT / "tools" / "wheel.py"))["check_tag"]
    said = 'is consistent with the\nfollowing platform tag: "linux_x86_64".'
    monkeypatch.setitem(check.__globals__, "run", lambda *command: said)
    with pytest.raises(SystemExit, match="fits no manylinux tag"):
        check(Path("some.whl"), Path(sys.executable))
    said = 'is consistent with the following platform\ntag:\n"manylinux_2_28_x86_64".'
    check(Path("some.whl"), Path(sys.executable))
