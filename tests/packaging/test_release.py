"""The workflows' matrix and the package indexes of a release are right."""

from __future__ import annotations

import hashlib
import re
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import HANG

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = ROOT / ".github" / "workflows"

pytestmark = pytest.mark.skipif(not WORKFLOWS.exists(), reason="not in a source tree")


@pytest.mark.parametrize("name", ["ci.yml", "wheels.yml"])
def test_the_workflows_know_every_python_that_the_package_names(name):
    named = re.findall(r":: Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    (listed,) = re.findall(r"(?m)^ +python: \[(.+)\]", (WORKFLOWS / name).read_text())
    assert len(named) >= 4
    assert [text.strip('" ').replace(".", "") for text in listed.split(",")] == [
        version.replace(".", "") for version in named
    ]


def test_the_wheels_are_those_that_make_wheel_builds():
    (listed,) = re.findall(r"(?m)^ +cuda: \[(.+)\]", (WORKFLOWS / "wheels.yml").read_text())
    makefile = (ROOT / "Makefile").read_text()
    assert listed.split(", ") == re.findall(r"(?m)^LOCAL_\w+ +:= (\w+)", makefile)


def wheel(folder: Path, local: str) -> Path:
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


def test_pip_finds_each_wheel_in_its_own_index(publish, tmp_path):
    (tmp_path / "assets").mkdir()
    paths = [wheel(tmp_path / "assets", local) for local in ("cpu", "cu12", "cu13")]
    source = {"name": "snnlstm-9.9.tar.gz", "browser_download_url": "https://x"}
    releases = [[{"assets": [source, *map(asset, paths)]}], [{"assets": [], "draft": False}]]
    for local in ("cpu", "cu12", "cu13"):
        done = publish(releases, local)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / f"snnlstm-9.9+{local}-py3-none-any.whl").exists()
        page = (tmp_path / f"site/whl/{local}/snnlstm/index.html").read_text()
        assert page.count("<a ") == 1


def test_a_wheel_that_was_changed_is_refused(publish, tmp_path):
    (tmp_path / "assets").mkdir()
    path = wheel(tmp_path / "assets", "cu13")
    done = publish([{"assets": [asset(path, digest="0" * 64)]}], "cu13")
    assert done.returncode != 0
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in done.stderr


def test_drafts_are_not_published(tmp_path):
    (tmp_path / "assets").mkdir()
    links = runpy.run_path(str(ROOT / ".ci" / "index.py"))["links"]
    assert links([{"draft": True, "assets": [asset(wheel(tmp_path / "assets", "cpu"))]}]) == {}


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
