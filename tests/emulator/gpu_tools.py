"""Calls NVIDIA's command-line tools: compiles for every GPU, reads what ptxas says of registers and
local memory, and disassembles.

A CUDA toolkit or PyPI's nvidia-cuda-nvcc has nvcc, PyPI's nvidia-cuda-cuobjdump and
nvidia-cuda-nvdisasm have cuobjdump and the nvdisasm that it calls. None of them needs a GPU.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from functools import cache
from hashlib import sha1
from pathlib import Path

from tests.emulator.builder import CACHE, ROOT, run
from tools import local_version


@cache
def find(tool: str) -> str | None:
    """Path of nvcc, cuobjdump or nvdisasm, or None; nvcc is the one that a build takes."""
    if tool == "nvcc":
        return local_version.nvcc()
    return shutil.which(tool, path=os.pathsep.join(map(str, local_version.places())))


@cache
def compile_all(source: Path) -> tuple[Path, str]:
    """An object with the code of `source` for every GPU, as a build has it, and what ptxas said."""
    flags, _ = local_version.machine_code(find("nvcc"), local_version.ARCHS)
    return _compile(source, ["-Xptxas=-v", *flags, "-c"])


@cache
def compile_ptx(source: Path, arch: int, optimised: bool) -> str:
    """The PTX of `source` for an architecture; without ptxas a quarter of the time is saved.

    An nvcc that can leave optimisations out needs a sixth of the time without them.
    """
    fast = (
        [] if optimised or "--Ofast-compile" not in run([find("nvcc"), "--help"]) else ["-Ofc=max"]
    )
    return _compile(source, [f"-arch=compute_{arch}", *fast, "-ptx"])[0].read_text()


def reached_ptx(source: Path, arch: int, optimised: bool = False) -> dict[str, set[str]]:
    """The names of the PTX instructions of each kernel of `source`, and of all that it calls."""
    text = re.sub(r"\.func[^{};]*;", "", compile_ptx(source, arch, optimised))
    bodies = dict(
        re.findall(
            r"\.(?:entry|func)\s+(?:\([^()]*\)\s*)?(\w+)[^{]*\{\n(.*?)^\}", text, re.M | re.S
        )
    )

    def reached(name: str, found: dict[str, set[str]]) -> dict[str, set[str]]:
        if name not in found:
            found[name] = set(re.findall(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)", bodies[name], re.M))
            for callee in set(re.findall(r"\w+", bodies[name])) & bodies.keys():
                reached(callee, found)
        return found

    return {name: set().union(*reached(name, {}).values())
            for name in re.findall(r"\.entry (\w+)", text)}  # fmt: skip


def _compile(source: Path, what: list[str]) -> tuple[Path, str]:
    """What nvcc makes, and what it said. Both are kept under ``build/emulator`` until a file that
    `source` includes changes."""
    nvcc = find("nvcc")
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "--threads=1"]
    flags += [f"-I{ROOT / 'csrc' / 'cuda'}", f"-I{ROOT / 'csrc'}"]
    build = (ROOT / "csrc" / "CMakeLists.txt").read_text()
    flags += re.findall(rf"/{source.name} PROPERTIES COMPILE_OPTIONS (\S+)\)", build)
    listed = run([nvcc, *flags, "-M", str(source)]).replace("\\\n", " ").split(":", 1)[1].split()
    key = sha1(" ".join([nvcc, *flags, *what, str(source)]).encode())
    for name in sorted(set(listed)):
        if Path(name).resolve().is_relative_to(ROOT):
            key.update(Path(name).read_bytes())
    CACHE.mkdir(parents=True, exist_ok=True)
    binary = CACHE / f"{source.stem}-{key.hexdigest()[:16]}{what[-1].replace('-', '.')}"
    log = binary.with_suffix(".log")
    with binary.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test workers want the same machine code
        if not (binary.exists() and log.exists()):
            temporary = binary.with_name(f".{os.getpid()}-{binary.name}")
            said = run([nvcc, *flags, *what, str(source), "-o", str(temporary)], errors=True)
            log.write_text(said)
            os.replace(temporary, binary)
    return binary, log.read_text()


def disassemble(binary: Path, arch: int) -> dict[str, list[str]]:
    """The names of the instructions of each kernel, with their modifiers ("LDG.E.128")."""
    folders = [str(Path(tool).parent) for tool in [find("nvdisasm")] if tool]
    path = os.pathsep.join([*folders, os.environ["PATH"]])  # cuobjdump looks for nvdisasm there
    command = [find("cuobjdump"), "-sass", "-arch", f"sm_{arch}", binary]
    text = run(command, env=os.environ | {"PATH": path})
    name = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.M)
    kernels = dict(re.findall(r"Function : (\w+)(.*?)(?=Function : |\Z)", text, re.DOTALL))
    return dict(zip(demangle([*kernels]), map(name.findall, kernels.values()), strict=True))


def demangle(names: list[str]) -> list[str]:
    tool = shutil.which("c++filt")
    if not tool or not names:
        return names
    found = run([tool], input="\n".join(names))
    return [n.replace("(anonymous namespace)::", "") for n in found.splitlines()]
