"""The core compiles for other systems and processors, and computes there what it computes here."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_packaging import wide_instructions_outside

from tools import cross
from tools.sanitizers.run import CSRC, isas_here, run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CSRC.exists(), reason="not in a source tree"),
]

HAS_ZIG = importlib.util.find_spec("ziglang") is not None
# The system's name, its compiler, and the emulator that runs its programs here.
SYSTEMS = {
    "arm": ("aarch64-linux-gnu-g++", "qemu-aarch64 -L /usr/aarch64-linux-gnu"),
    "windows": (f"{sys.executable} -m ziglang c++ -target x86_64-windows-gnu", "wine"),
}


def available(system: str) -> bool:
    compiler, emulator = (command.split()[0] for command in SYSTEMS[system])
    has_compiler = HAS_ZIG if system == "windows" else shutil.which(compiler)
    return bool(has_compiler and shutil.which(emulator) and shutil.which("g++"))


@pytest.mark.parametrize(
    ("system", "isa"), [("arm", "baseline"), ("windows", "baseline"), ("windows", "avx2")]
)
def test_random_calls_give_there_what_they_give_here(monkeypatch, tmp_path, system, isa):
    """The driver prints the sum of all numbers that a hundred calls computed, to six digits."""
    if not available(system):
        pytest.skip("apt install g++ g++-aarch64-linux-gnu qemu-user wine; pip install ziglang")
    if isa not in isas_here():
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setenv("WINEPREFIX", str(tmp_path / "wine"))
    monkeypatch.setenv("WINEDEBUG", "-all")
    printed = []
    for compiler, under in (("g++", ""), SYSTEMS[system]):
        monkeypatch.setenv("CXX", compiler)
        done = run("none", isa, cases=100, under=under)
        assert done.returncode == 0, done.stderr
        printed.append(re.fullmatch(r"(100 cases; .*); sum (\S+)\n", done.stdout))
    here, there = printed
    assert there[1] == here[1]  # the same calls
    assert float(there[2]) == pytest.approx(float(here[2]), rel=2e-5)
    assert float(here[2]) > 1e4


def output(*command: str | Path) -> str:
    return subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout


@pytest.mark.skipif(
    os.environ.get("SNNLSTM_LONG") != "1", reason="takes minutes, and PyPI: make test-long"
)
@pytest.mark.skipif(
    not (HAS_ZIG and shutil.which("llvm-objdump")), reason="pip install ziglang; apt install llvm"
)
@pytest.mark.parametrize("target", ["aarch64-macos", "x86_64-macos", "x86_64-windows-gnu"])
def test_a_module_for_another_system_needs_its_runtime_and_python_alone(target):
    module = cross.build(target)
    if "windows" in target:
        headers = output("llvm-objdump", "-p", module)
        used = re.findall(r"DLL Name: (\S+)", headers)
        allowed = r"(?i)python3\d+\.dll|KERNEL32\.dll|ntdll\.dll|api-ms-win-crt-[a-z]+-l1-1-0\.dll"
        exported = re.findall(r"^ +\d+ +0x[0-9a-f]+ +(\S+)", headers.split("Export Table")[1], re.M)
    else:
        used = output("llvm-objdump", "--macho", "--dylibs-used", module).splitlines()[1:]
        used = [line.split()[0] for line in used if not line.startswith(f"\t{module.name} ")]
        allowed = r"/usr/lib/libSystem\.B\.dylib|/usr/lib/libc\+\+\.1\.dylib"
        # zig links its C++ library, and hides neither its new and delete nor the types of
        # exceptions. Apple's linker is told to show the entry point alone.
        exported = output("llvm-nm", "-gUj", module).split()
        exported = [
            n for n in exported if not re.match("__Z[nd][al]|__Znw|__ZT[IS]|___dso_|__mh_", n)
        ]
        # What Python gives is bound when the module is loaded, and comes from no library.
        missing = output("llvm-nm", "-uj", module).split()
        assert [n for n in missing if re.match("_(GOMP|omp|__kmpc|cu[A-Z]|cuda)", n)] == []
        assert "_PyModule_Create2" in missing or "_PyModuleDef_Init" in missing
    assert used
    assert [name for name in used if not re.fullmatch(allowed, name)] == []
    assert [name.lstrip("_") for name in exported] == ["PyInit__C"]
    if target == "x86_64-macos":
        seen, intruders = wide_instructions_outside(
            output("llvm-objdump", "-d", "-C", "--no-show-raw-insn", module)
        )
        assert seen > 0
        assert intruders == set()
