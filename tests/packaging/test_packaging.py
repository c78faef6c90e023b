"""The built module links, exports and runs only what it should."""

from __future__ import annotations

import platform
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import snnlstm
from snnlstm import _C
from tests.shared.fresh import HANG, fresh

ROOT = Path(__file__).resolve().parents[2]
CORE = Path(_C.__file__)

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc and ELF files")


def output(program: str, *arguments: str | Path, **options) -> str:
    """Returns what a program prints: of binutils, which come with every C++ compiler, or Python."""
    command = [shutil.which(program) or pytest.skip(f"no {program}"), *map(str, arguments)]
    return subprocess.check_output(command, text=True, timeout=HANG, **options)


def test_settings_name_the_packages_and_files_that_exist(monkeypatch):
    settings = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["tool"]
    monkeypatch.chdir(ROOT)
    sources = list(Path("snnlstm").rglob("*.py"))
    folders = {path.parent for path in sources}
    wrapper, given = "scikit_build_core.setuptools.wrapper", {}
    monkeypatch.setitem(sys.modules, wrapper, SimpleNamespace(setup=given.update))
    runpy.run_path("setup.py")
    assert len(folders) > 1
    assert sorted(given["packages"]) == sorted(".".join(folder.parts) for folder in folders)

    (contract,) = settings["importlinter"]["contracts"]
    layers = [name for line in contract["layers"] for name in line.split(" | ")]
    modules = {path.parent if path.name == "__init__.py" else path for path in sources}
    top = {path.stem for path in modules if path.parent == Path("snnlstm")}
    assert sorted(layers) == sorted(f"snnlstm.{name}" for name in top)

    mutmut, wheels = settings["mutmut"], settings["cibuildwheel"]
    tests = mutmut["pytest_add_cli_args_test_selection"][0], *wheels["test-command"].split()[1:]
    named = *mutmut["source_paths"], *mutmut["only_mutate"], *mutmut["also_copy"], *tests
    assert [name for name in (*named, *wheels["test-sources"]) if not Path(name).exists()] == []


def test_no_source_includes_a_torch_header():
    for source in filter(Path.is_file, (ROOT / "csrc").rglob("*")):
        assert not re.search(r'#include\s*[<"](torch|ATen|c10|THC)/', source.read_text()), source


@linux
def test_links_the_language_runtime_alone_and_exports_its_entry_point_alone():
    """csrc/platform.cpp looks OpenMP's functions up; symbols of the CUDA runtime stay inside."""
    dynamic = output("readelf", "-d", CORE)
    needed = re.findall(r"NEEDED.*\[(.+)\]", dynamic)
    allowed = r"(libstdc\+\+|libgcc_s|libm|libc|libdl|libpthread|librt|ld-linux-[\w-]+)\.so\.\d+"
    assert needed
    assert [name for name in needed if not re.fullmatch(allowed, name)] == []
    assert "R(UN)?PATH" not in dynamic
    defined = output("nm", "-D", "--defined-only", CORE).splitlines()
    assert [line.split()[-1] for line in defined] == ["PyInit__C"]
    undefined = output("nm", "-D", "--undefined-only", CORE)
    assert re.findall(r"\b(?:GOMP_|omp_|__kmpc_|cuda|cu[A-Z])\w*", undefined) == []


@linux
@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86-64")
def test_wide_instructions_stay_in_their_namespace():
    """Code for a newer processor must not be linked into what every processor runs."""
    wide_ok, intruders, function, seen = re.compile(r"\b(avx2|avx512|wide)::"), set(), "", 0
    for line in output("objdump", "-d", "-C", "--no-show-raw-insn", CORE).split("\n"):
        if line.endswith(">:"):
            function = line[line.index("<") + 1 : -2]
        elif "%ymm" in line or "%zmm" in line:
            if wide_ok.search(function):
                seen += 1
            elif not function.startswith("cuda"):
                intruders.add(function)
    assert seen > 0
    assert intruders == set()


@linux
def test_one_openmp_runtime_in_the_process(tmp_path):
    """A process with the cell maps the libraries that a process with torch alone maps."""
    program = """
import re, torch
def runtimes():
    maps = open("/proc/self/maps").read()
    return sorted(set(re.findall(r"/\\S*/lib(?:gomp|iomp5|omp)[^/\\s]*\\.so[^/\\s]*", maps)))
before = runtimes()
import snnlstm
cell = snnlstm.SConv2dLSTM(2, 8, 3, threshold=0.1)
cell(torch.rand(2, 2, 16, 16))
assert cell.path.name.startswith("cpu-"), cell.path
from snnlstm import _C
print(before == runtimes(), len(before), _C.openmp_library() in before)
"""
    done = fresh(program, [Path(snnlstm.__file__).parents[1], tmp_path])
    assert done.stdout.split() == ["True", "1", "True"], done.stderr
