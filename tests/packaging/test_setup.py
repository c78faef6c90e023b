"""setup.py decides rightly whether and how it builds the core and CUDA, and says why."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

setuptools = pytest.importorskip("setuptools")

SETUP = Path(__file__).resolve().parents[2] / "setup.py"
pytestmark = pytest.mark.skipif(not SETUP.exists(), reason="not in a source tree")

NVCC = "#!/bin/sh\n[ \"$1\" = --version ] && echo 'release 13.0' && exit 0\nexit 1\n"
BROKEN = "#!/bin/sh\necho 'cannot execute cicc' >&2\nexit 1\n"


@pytest.fixture
def build(monkeypatch, tmp_path):
    """Runs setup.py without any CUDA compiler, driver and GPU, and returns its names."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    names = runpy.run_path(str(SETUP))
    for variable in (
        "SNNLSTM_CORE", "SNNLSTM_CUDA", "SNNLSTM_CUDA_ARCHS", "CUDACXX", "CUDA_HOME", "CUDA_PATH",
        "SNNLSTM_LOCAL_VERSION", "CMAKE_ARGS", "CXX",
    ):  # fmt: skip
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    # setup.py must find neither the interpreter's own packages nor /usr/local/cuda.
    candidates = names["nvcc_candidates"]
    variables = candidates.__globals__
    monkeypatch.setattr(variables["sysconfig"], "get_path", lambda name: str(tmp_path / "site"))
    monkeypatch.setattr(variables["sys"], "path", [])
    monkeypatch.setitem(variables, "DEFAULT_CUDA", tmp_path / "default")
    monkeypatch.setitem(variables, "DRIVER", str(tmp_path / "libcuda.so.1"))
    return names


def program(path: Path, text: str = NVCC) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def test_a_compiler_builds_the_core(build, monkeypatch, tmp_path):
    compiler = shutil.which("g++", path=os.defpath) or pytest.skip("no g++")
    monkeypatch.setenv("PATH", os.path.dirname(compiler))
    assert build["core_plan"]() == (True, "")
    monkeypatch.setenv("CXX", f"{compiler} -O1")
    assert build["core_plan"]() == (True, "")
    monkeypatch.setenv("CXX", f"{compiler} -D__cplusplus=201402L")
    assert "compiles no C++17" in build["core_plan"]()[1]


def test_without_a_compiler_the_package_is_installed_all_the_same(
    build, monkeypatch, tmp_path, capsys
):
    assert build["core_plan"]() == (False, "no C++ compiler found: c++, g++, clang++")
    assert build["core"]() == []
    said = capsys.readouterr().err
    assert "WITHOUT the native core (no C++ compiler found" in said
    assert "plain torch" in said
    program(tmp_path / "empty/c++", BROKEN)
    assert "compiles no C++17 with vectors: cannot execute cicc" in build["core_plan"]()[1]
    monkeypatch.setattr(sys, "platform", "sunos5")
    assert "built on Linux, macOS and Windows, and this is sunos5" in build["core_plan"]()[1]
    monkeypatch.setenv("SNNLSTM_CORE", "off")
    assert build["core_plan"]() == (False, "SNNLSTM_CORE=off")


@pytest.mark.parametrize(
    ("system", "optional"), [("linux", False), ("darwin", True), ("win32", True)]
)
def test_a_failed_build_ends_the_installation_on_linux_or_where_the_core_was_asked_for(
    build, monkeypatch, system, optional
):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setenv("CMAKE_ARGS", "-DCMAKE_CXX_COMPILER=c++")  # not looked for
    assert [bool(extension.optional) for extension in build["core"]()] == [optional]
    assert build["cuda_plan"]()[2] == (
        "no CUDA compiler found" if system == "linux" else "it is built on Linux alone"
    )
    monkeypatch.setenv("SNNLSTM_CORE", "on")
    assert [bool(extension.optional) for extension in build["core"]()] == [False]


@pytest.mark.parametrize("has_zig", [False, True])
def test_windows_is_built_for_by_clang_alone(monkeypatch, tmp_path, has_zig):
    """GCC's vectors lie at wrong addresses there, and MSVC has none."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(platform, "machine", lambda: "AMD64")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if has_zig else None)
    *zig, clang = runpy.run_path(str(SETUP))["COMPILERS"]
    assert clang == ["clang++"]
    target = ["-target", "x86_64-windows-gnu"]
    assert zig == ([[sys.executable, "-m", "ziglang", "c++", *target]] if has_zig else [])


NO_CORE = r"needs the native core, which cannot be built: no C\+\+ compiler"


@pytest.mark.parametrize(
    ("plan", "name", "value", "message"),
    [
        ("core_plan", "SNNLSTM_CORE", "on", f"SNNLSTM_CORE=on {NO_CORE}"),
        ("core_plan", "SNNLSTM_CUDA", "on", f"SNNLSTM_CUDA=on {NO_CORE}"),
        ("core_plan", "SNNLSTM_LOCAL_VERSION", "cpu", f"SNNLSTM_LOCAL_VERSION=cpu {NO_CORE}"),
        ("core_plan", "SNNLSTM_CORE", "maybe", "SNNLSTM_CORE is 'maybe'; accepted: on, off"),
        (
            "find_nvcc", "SNNLSTM_CUDA", "on",
            "(?s)SNNLSTM_CUDA=on, but no CUDA compiler found.*CUDACXX=.*SNNLSTM_CUDA=pip",
        ),
        ("find_nvcc", "SNNLSTM_CUDA", "maybe", "'maybe'; accepted: on, off, pip"),
        ("find_nvcc", "CUDACXX", "/no/such/nvcc", "CUDACXX"),
    ],
)  # fmt: skip
def test_a_wish_that_cannot_be_met_is_an_error(build, monkeypatch, plan, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(Exception, match=message):
        build[plan]()


def test_pip_means_the_pip_package_and_no_other(build, monkeypatch, tmp_path):
    monkeypatch.setenv("SNNLSTM_CUDA", "pip")
    monkeypatch.setenv("CUDACXX", program(tmp_path / "named/nvcc"))
    with pytest.raises(Exception, match="SNNLSTM_CUDA=pip, but no CUDA compiler found"):
        build["find_nvcc"]()
    path = program(tmp_path / "site/nvidia/cu13/bin/nvcc")
    assert build["find_nvcc"]()[0] == path


def test_the_order_of_preference(build, monkeypatch, tmp_path):
    """Of CUDACXX, CUDA_HOME, PATH, the pip package and the default place, the first counts."""
    found = []

    def note(path: str) -> None:
        nvcc, why = build["find_nvcc"]()
        assert nvcc == path
        found.append(why)

    note(program(tmp_path / "default/bin/nvcc"))
    note(program(tmp_path / "site/nvidia/cu13/bin/nvcc"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    note(program(tmp_path / "path/nvcc"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    note(program(tmp_path / "home/bin/nvcc"))
    monkeypatch.setenv("CUDACXX", str(tmp_path / "named/nvcc"))
    note(program(tmp_path / "named/nvcc"))
    assert [why.split()[-1] for why in found[1:]] == [
        "nvidia-cuda-nvcc", "PATH", "CUDA_HOME", "CUDACXX"
    ]  # fmt: skip


def test_what_is_no_compiler_is_passed_over_unless_it_is_named(build, monkeypatch, tmp_path):
    """Images without a compiler set CUDA_HOME all the same."""
    assert build["find_nvcc"]() == (None, "no CUDA compiler found")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert "CUDA_HOME" in build["find_nvcc"]()[1]
    path = program(tmp_path / "default/bin/nvcc", BROKEN)
    nvcc, why = build["find_nvcc"]()
    assert nvcc is None
    assert "cannot execute cicc" in why
    program(Path(path))
    assert build["find_nvcc"]()[0] == path
    monkeypatch.setenv("CUDACXX", program(tmp_path / "nvcc", BROKEN))
    with pytest.raises(Exception, match="CUDACXX"):
        build["find_nvcc"]()
    monkeypatch.setenv("SNNLSTM_CUDA", "off")  # SNNLSTM_CUDA=off overrides all other variables
    assert build["find_nvcc"]() == (None, "SNNLSTM_CUDA=off")


def test_the_local_version(build, monkeypatch):
    plain = build["version"]()
    monkeypatch.setenv("SNNLSTM_LOCAL_VERSION", "cu13")
    assert build["version"]() == plain + "+cu13"


def test_the_compiler_is_of_the_cuda_that_the_wheel_is_named_after(build, monkeypatch, tmp_path):
    """A compiler of another CUDA is passed over on PATH, and is an error in CUDACXX."""
    monkeypatch.setenv("SNNLSTM_LOCAL_VERSION", "cu12")
    monkeypatch.setenv("PATH", os.pathsep.join(str(tmp_path / name) for name in ("new", "old")))
    newer = program(tmp_path / "new/nvcc")
    assert "of CUDA 13.0" in build["find_nvcc"]()[1]
    older = program(tmp_path / "old/nvcc", NVCC.replace("13.0", "12.4"))
    assert build["find_nvcc"]()[0] == older
    monkeypatch.setenv("CUDACXX", newer)
    with pytest.raises(Exception, match=r"CUDACXX.*13\.0.*cu12"):
        build["find_nvcc"]()


DRIVER = """
static const int capabilities[][2] = {%s};
static const int count = %d;
int cuInit(unsigned flags) { return flags ? 1 : %d; }
int cuDeviceGetCount(int* n) { *n = count; return 0; }
int cuDeviceGet(int* device, int index) { *device = 40 + index; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = capabilities[device - 40][attribute - 75];
  return 0;
}
"""


@pytest.fixture
def install_gpus(build, tmp_path):
    """Returns a function that installs a driver with GPUs, or one that fails to start."""
    if not shutil.which("gcc", path=os.defpath):
        pytest.skip("no C compiler")

    def install(*capabilities: tuple[int, int], status: int = 0) -> None:
        rows = ", ".join(f"{{{major}, {minor}}}" for major, minor in capabilities) or "{0, 0}"
        (tmp_path / "driver.c").write_text(DRIVER % (rows, len(capabilities), status))
        subprocess.run(
            ["gcc", "-shared", "-fPIC", "driver.c", "-o", "libcuda.so.1"],
            cwd=tmp_path, check=True, env={"PATH": os.defpath},
        )  # fmt: skip

    return install


NATIVE = {"SNNLSTM_CUDA_ARCHS": "native"}
NAMED = {"SNNLSTM_CUDA_ARCHS": "80;86"}
ON = {"SNNLSTM_CUDA": "on"}


@pytest.mark.parametrize(
    ("gpus", "environment", "archs", "why"),
    [
        ([], {}, "", "no GPU here.*nvcc.*SNNLSTM_CUDA=on|no GPU here.*SNNLSTM_CUDA=on.*nvcc"),
        ([(9, 0), (12, 0), (9, 0), (7, 0)], {}, "90;120", "the GPUs found here"),
        ([(6, 1)], {}, "", "older than 7.5"),
        ([(9, 0)], ON, "all", ""),
        ([(9, 0)], NAMED, "80;86", ""),
        ([(9, 0)], ON | NAMED, "80;86", ""),
        ([(8, 9)], NATIVE, "89", ""),
        ([(8, 9)], ON | NATIVE, "89", ""),
    ],
    ids=str,
)
def test_a_build_is_for_these_gpus(
    build, tmp_path, install_gpus, monkeypatch, gpus, environment, archs, why
):
    nvcc = program(tmp_path / "default/bin/nvcc")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if "native" in environment.values():
        with pytest.raises(Exception, match="native, but no GPU found"):
            build["cuda_plan"]()
    if gpus:
        install_gpus(*gpus)
    found, planned, reason = build["cuda_plan"]()
    assert planned == (build["ALL_ARCHS"] if archs == "all" else archs)
    assert found == (nvcc if archs else None)
    assert re.search(why, reason, re.DOTALL)


def test_a_gpu_without_a_compiler_and_a_driver_that_does_not_start(build, install_gpus, tmp_path):
    install_gpus((9, 0))
    assert build["cuda_plan"]() == (None, "", "no CUDA compiler found")
    program(tmp_path / "default/bin/nvcc")
    install_gpus((9, 0), status=100)
    assert build["cuda_plan"]()[0] is None


def test_the_pip_package_is_built_with_for_every_gpu(build, install_gpus, monkeypatch, tmp_path):
    nvcc = program(tmp_path / "site/nvidia/cu13/bin/nvcc")
    install_gpus((9, 0))
    monkeypatch.setenv("SNNLSTM_CUDA", "pip")
    assert build["cuda_plan"]()[:2] == (nvcc, build["ALL_ARCHS"])
