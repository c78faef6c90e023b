"""The built module links, exports and runs only what it should."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import snnlstm
from snnlstm import _C
from tests.shared.helpers import HANG

ROOT = Path(__file__).resolve().parents[2]
CORE = Path(_C.__file__)

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc and ELF files")


def output(*command: str | Path, **options) -> str:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=HANG, **options
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def tool(name: str) -> str:
    """Finds a program of binutils, which come with every C++ compiler on Linux."""
    return shutil.which(name) or pytest.skip(f"{name} is not installed")


def test_one_version_everywhere():
    assert importlib.metadata.version("snnlstm") == snnlstm.__version__
    assert _C.build_info()["version"] == snnlstm.__version__


def test_no_source_includes_a_torch_header():
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".cpp", ".h", ".cu", ".cuh"}]
    if not sources:
        pytest.skip("an installed package without its sources")
    for source in sources:
        assert not re.search(r'#include\s*[<"](torch|ATen|c10|THC)/', source.read_text()), source


@linux
def test_no_instruction_set_shares_a_function_with_another():
    """Of several weak functions of one name the linker keeps any one, which may be AVX-512's."""
    objects = sorted((ROOT / "build").glob("*/CMakeFiles/kernels_*.dir/**/*.o"))
    if not objects:
        pytest.skip("the module was not built here")
    for path in objects:
        symbols = output(tool("readelf"), "--symbols", "--wide", "--demangle", path)
        weak = re.findall(r" FUNC +WEAK +\w+ +\d+ (.+)", symbols)
        own = re.search(r"kernels_(\w+)\.dir", str(path))[1]
        shared = {name.split(" [")[0] for name in weak if f"snnlstm::{own}" not in name}
        # Clang's own function ends the process by two calls, without a vector.
        assert shared <= {"__clang_call_terminate"}, path


@linux
def test_links_nothing_but_the_language_runtime():
    needed = re.findall(r"NEEDED.*\[(.+)\]", output(tool("readelf"), "-d", CORE))
    allowed = r"(libstdc\+\+|libgcc_s|libm|libc|libdl|libpthread|librt|ld-linux-[\w-]+)\.so\.\d+"
    assert needed
    assert [name for name in needed if not re.fullmatch(allowed, name)] == []
    assert "R(UN)?PATH" not in output(tool("readelf"), "-d", CORE)


@linux
def test_exports_its_entry_point_alone():
    """Symbols of ours, of the C++ library's templates and of the CUDA runtime stay inside."""
    defined = output(tool("nm"), "-D", "--defined-only", CORE).splitlines()
    assert [line.split()[-1] for line in defined] == ["PyInit__C"]


@linux
def test_leaves_no_openmp_or_cuda_symbol_to_the_loader():
    """csrc/platform.cpp looks OpenMP's functions up; an import would fail if it linked one."""
    undefined = output(tool("nm"), "-D", "--undefined-only", CORE)
    assert re.findall(r"\b(?:GOMP_|omp_|__kmpc_|cuda|cu[A-Z])\w*", undefined) == []


def wide_instructions_outside(disassembly: str) -> tuple[int, set[str]]:
    """Counts the lines with registers of 32 and 64 bytes, and names the functions of others' code.

    The lines counted lie in the namespaces of instruction sets that have such registers.
    """
    wide_ok = re.compile(r"\b(avx2|avx512|wide)::")
    intruders, function, seen = set(), "", 0
    for line in disassembly.split("\n"):
        if line.endswith(">:"):
            function = line[line.index("<") + 1 : -2]
        elif "%ymm" in line or "%zmm" in line:
            if wide_ok.search(function):
                seen += 1
            elif not function.startswith("cuda"):
                intruders.add(function)
    return seen, intruders


@linux
@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86-64")
def test_wide_instructions_stay_in_their_namespace():
    """Code for a newer processor must not be linked into what every processor runs."""
    seen, intruders = wide_instructions_outside(
        output(tool("objdump"), "-d", "-C", "--no-show-raw-insn", CORE)
    )
    assert seen > 0
    assert intruders == set()


def fatbin_contents(data: bytes) -> set[tuple[str, int]]:
    """Returns the images of fat binaries in a file: ("ptx" or "elf", compute capability).

    nvcc 12 and 13 write a header of 16 bytes (magic, version, header size, size of all images), and
    then images, each with a header (kind, -, header size, size, ..., capability).
    """
    contents = set()
    for found in re.finditer(re.escape(b"\x50\xed\x55\xba\x01\x00\x10\x00"), data):
        place, end = found.end() + 8, found.end() + 8
        end += struct.unpack_from("<Q", data, found.end())[0]
        while place < end:
            kind, _, header, size = struct.unpack_from("<HHIQ", data, place)
            (capability,) = struct.unpack_from("<I", data, place + 28)
            contents.add(({1: "ptx", 2: "elf"}.get(kind, str(kind)), capability))
            place += header + size
    return contents


def test_holds_code_for_every_gpu_that_it_claims():
    archs = _C.build_info()["cuda_archs"]
    if not archs:
        pytest.skip(f"CUDA backend {_C.build_info()['cuda']}")
    claimed = {
        ("ptx" if arch.endswith("+ptx") else "elf", int(arch.removesuffix("+ptx")))
        for arch in archs.split()
    }
    assert fatbin_contents(CORE.read_bytes()) == claimed
    assert CORE.stat().st_size < 20e6


def python(code: str, folder: Path) -> str:
    """Runs code in an interpreter of its own, outside of the source tree."""
    environment = os.environ | {"PYTHONPATH": str(Path(snnlstm.__file__).parents[1])}
    return output(sys.executable, "-c", code, cwd=folder, env=environment)


@linux
def test_one_openmp_runtime_in_the_process(tmp_path):
    """A process with the cell maps the libraries that a process with torch alone maps."""
    printed = python(
        """
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
""",
        tmp_path,
    )
    assert printed.split() == ["True", "1", "True"]


# LLVM's runtime, which macOS and Windows have, but with teams that run one thread after the other.
LLVM = """
#include <stdarg.h>
static int wanted, teams;
int count_teams(void) { return teams; }
int __kmpc_global_thread_num(void* place) { return 7; }
void __kmpc_push_num_threads(void* place, int global, int threads) {
  wanted = global == 7 ? threads : 0;
}
void __kmpc_fork_call(void* place, int count, void (*task)(int*, int*, void*), ...) {
  va_list rest;
  va_start(rest, task);
  void* data = va_arg(rest, void*);
  ++teams;
  for (int k = 0, global = 7; count == 1 && k < wanted; ++k) task(&global, &k, data);
  va_end(rest);
}
int omp_get_max_threads(void) { return 3; }
"""

# The core copies numbers by a team of threads.
LOADS_CORE = f"""
import ctypes, importlib.util, sys
spec = importlib.util.spec_from_file_location("snnlstm._C", {str(CORE)!r})
core = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
count = 10**6
weight, copy = (ctypes.c_float * count)(*range(8)), (ctypes.c_float * count)()
squares = core.copy_weight(ctypes.addressof(weight), ctypes.addressof(copy), 0, count)
assert squares == 140 and bytes(copy) == bytes(weight)
"""


def compile_library(path: Path, code: str, *options: str | Path) -> None:
    if not shutil.which("gcc"):
        pytest.skip("no C compiler")
    source = path.with_suffix(".c")
    source.write_text(code)
    output("gcc", "-shared", "-fPIC", f"-Wl,-soname,{path.name}", source, *options, "-o", path)


@linux
def test_computes_on_the_runtime_of_a_torch_that_renamed_it(tmp_path):
    """In a repaired wheel torch's copy of the runtime has a name and a SONAME of its own."""
    openmp, torch_cpu = tmp_path / "libomp-0123abcd.so.1.0.0", tmp_path / "libtorch_cpu.so"
    compile_library(openmp, LLVM)
    calls_it = "void __kmpc_fork_call(); void f() { __kmpc_fork_call(); }"
    compile_library(torch_cpu, calls_it, "-Wl,-rpath,$ORIGIN", openmp)
    printed = python(
        f"""
import ctypes
torch_cpu = ctypes.CDLL({str(torch_cpu)!r})
{LOADS_CORE}
print(core.openmp_library(), ctypes.CDLL({str(openmp)!r}).count_teams())
""",
        tmp_path,
    )
    assert printed.split() == [str(openmp), "1"]


@linux
def test_a_process_without_an_openmp_runtime_computes_on_one_thread(tmp_path):
    """The core is loaded before torch, beside an empty library in the place of libgomp."""
    empty = tmp_path / "libgomp.so.1"
    compile_library(empty, "")
    printed = python(
        f"""
import _ctypes, ctypes
empty = ctypes.CDLL({str(empty)!r})
{LOADS_CORE}
assert core.openmp_library() == ""
for _ in range(2):  # the core has opened it, too; torch needs its own in its place
    _ctypes.dlclose(empty._handle)
import torch, snnlstm
from snnlstm import __main__ as report
from snnlstm.native import cpu
torch.set_num_threads(2)
cell = snnlstm.SConv2dLSTM(2, 8, 3, threshold=0.1)
x = torch.rand(4, 2, 2, 16, 16, requires_grad=True)
spk, _, mem = cell(x)
(spk.sum() + mem.square().sum()).backward()
print(cell.path)
print(2 in cpu.Backend().settings("auto"))
print(*report.collect()["problems"])
""",
        tmp_path,
    )
    path, two_threads, problem = printed.splitlines()
    assert path.startswith("cpu-")
    assert two_threads == "False"
    assert problem.startswith("no OpenMP runtime of torch's was found")
    assert problem.endswith("every call on the CPU runs on one thread")


def test_files_know_only_those_below_them():
    """The contracts in pyproject.toml hold."""
    pytest.importorskip("importlinter")
    if not (ROOT / "snnlstm").exists():
        pytest.skip("the tests of a wheel have no source tree")
    program = "from importlinter.cli import lint_imports; exit(lint_imports(no_cache=True))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
