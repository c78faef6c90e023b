"""Builds snnlstm._C with CMake and Ninja; the metadata is in pyproject.toml.

If _C cannot be built, the package is installed without it, and runs in plain torch. CONTRIBUTING.md
lists the environment variables that this file reads.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
VERSION_FILE = ROOT / "snnlstm" / "version.py"
DEFAULT_CUDA = Path("/usr/local/cuda")
DRIVER = "libcuda.so.1"
ALL_ARCHS = "75;80;86;89;90;100;120"
OLDEST_ARCH = 75
COMPILERS = [["c++"], ["g++"], ["clang++"]]  # in CMake's order
if sys.platform == "win32":
    # Not GCC, which keeps vectors of 32 bytes at addresses of 16 there and then faults (its bug
    # 54412), nor MSVC, which has no vector extensions. ziglang is clang with Windows' headers and
    # libraries, from PyPI: pyproject.toml has pip fetch it for the build.
    MACHINE = {"AMD64": "x86_64", "ARM64": "aarch64"}.get(platform.machine(), platform.machine())
    ZIG = [sys.executable, "-m", "ziglang", "c++", "-target", f"{MACHINE}-windows-gnu"]
    COMPILERS = [*([ZIG] if find_spec("ziglang") else []), ["clang++"]]
CUDA_FROM_PIP = ["nvidia-cuda-nvcc==13.*", "nvidia-cuda-runtime==13.*", "nvidia-cuda-cccl==13.*"]


def version() -> str:
    found = re.search(r'^__version__ = "(.+)"$', VERSION_FILE.read_text(), re.MULTILINE)
    assert found, f"{VERSION_FILE} has no __version__"
    local = os.environ.get("SNNLSTM_LOCAL_VERSION", "")
    return f"{found[1]}+{local}" if local and "+" not in found[1] else found[1]


def say(text: str) -> None:
    print(f"snnlstm: {text}", file=sys.stderr, flush=True)


# ---- the core, or plain torch -------------------------------------------------------------------

PROBE = """
#include <algorithm>
#include <vector>
#if __cplusplus < 201703L
#error no C++17
#endif
typedef float lanes __attribute__((vector_size(16)));
typedef int mask __attribute__((vector_size(16)));
lanes larger(lanes x, lanes y) { mask m = x < y; return m ? y : x; }
"""


def cxx() -> list[str] | None:
    """The C++ compiler's command: CXX, or the first that is there."""
    named = os.environ.get("CXX", "").strip()
    commands = [shlex.split(named)] if named else COMPILERS
    return next((command for command in commands if shutil.which(command[0])), None)


def compiler_trouble() -> str | None:
    """Why no C++ compiler here can build the core, or None where one can."""
    if "CMAKE_CXX_COMPILER" in os.environ.get("CMAKE_ARGS", ""):
        return None
    command = cxx()
    if command is None:
        tried = os.environ.get("CXX") or ", ".join(name[0] for name in COMPILERS)
        return f"no C++ compiler found: {tried}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text(PROBE)
        done = subprocess.run(
            [*command, "-std=c++17", "-c", str(source), "-o", str(Path(folder) / "probe.o")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[:200]
        return f"{shlex.join(command)} compiles no C++17 with vectors: {said}"
    return None


def asked_for() -> list[str]:
    """The settings that ask for the core by name."""
    wish, tag = os.environ.get("SNNLSTM_CORE", ""), os.environ.get("SNNLSTM_LOCAL_VERSION", "")
    needed = [f"SNNLSTM_CORE={wish}"] if wish.strip().lower() == "on" else []
    needed += [f"SNNLSTM_CUDA={cuda_wish()}"] if cuda_wish() in ("on", "pip") else []
    return needed + ([f"SNNLSTM_LOCAL_VERSION={tag}"] if tag else [])


def core_plan() -> tuple[bool, str]:
    """Whether to build the core; and why not, in words."""
    wish = os.environ.get("SNNLSTM_CORE", "").strip().lower()
    if wish not in ("", "on", "off"):
        raise CompileError(f"SNNLSTM_CORE is {wish!r}; accepted: on, off, or unset (automatic)")
    needed = asked_for()
    if wish == "off":
        why: str | None = "SNNLSTM_CORE=off"
    elif sys.platform not in ("linux", "darwin", "win32") and wish != "on":
        why = f"it is built on Linux, macOS and Windows, and this is {sys.platform}"
    else:
        why = compiler_trouble()
    if why and needed:
        raise CompileError(f"{needed[0]} needs the native core, which cannot be built: {why}")
    return not why, why or ""


def core() -> list[Extension]:
    """The extension modules: one, or none where it cannot be built."""
    build, why = core_plan()
    if build:
        # Elsewhere than on Linux a build that fails leaves an installation in plain torch.
        may_fail = sys.platform != "linux" and not asked_for()
        return [Extension("snnlstm._C", sources=[], optional=may_fail)]
    say(f"WITHOUT the native core ({why}): everything runs in plain torch, and slower")
    return []


# ---- CUDA ----------------------------------------------------------------------------------------


def cuda_wish() -> str:
    return os.environ.get("SNNLSTM_CUDA", "").strip().lower()


def nvcc_from_pip():
    """(what it is, path) of each nvcc that is installed as a pip package."""
    for folder in dict.fromkeys([sysconfig.get_path("purelib"), *sys.path]):
        for path in sorted(Path(folder or ".").glob("nvidia/cu*/bin/nvcc"), reverse=True):
            yield "pip package nvidia-cuda-nvcc", str(path)


def nvcc_candidates():
    """(where it was named, path) in order of preference."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            yield name, str(Path(os.environ[name]) / "bin" / "nvcc")
    for folder in os.environ.get("PATH", os.defpath).split(os.pathsep):
        if on_path := shutil.which("nvcc", path=folder):
            yield "PATH", on_path
    yield from nvcc_from_pip()
    if (DEFAULT_CUDA / "bin" / "nvcc").exists():
        yield str(DEFAULT_CUDA), str(DEFAULT_CUDA / "bin" / "nvcc")


def trouble_with(nvcc: str) -> str | None:
    """Why that compiler cannot be used, or None where it can."""
    try:
        done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60)
    except OSError as error:
        return f"{nvcc}: {error.strerror}"
    except subprocess.TimeoutExpired:
        return f"{nvcc} --version: no answer within 60 s"
    if done.returncode:
        return f"{nvcc} --version: {done.stderr.strip()[:200]}"
    release = re.search(r"release (\d+)\.(\d+)", done.stdout)
    tag = re.fullmatch(r"cu(\d+)", os.environ.get("SNNLSTM_LOCAL_VERSION", ""))
    if tag and release and tag[1] != release[1]:
        return f"{nvcc}: of CUDA {release[1]}.{release[2]}, and the wheel is to be named {tag[0]}"
    return None


def find_nvcc() -> tuple[str | None, str]:
    """The CUDA compiler to use, or None; and why, in words."""
    wish = cuda_wish()
    if wish not in ("", "on", "off", "pip"):
        raise CompileError(
            f"SNNLSTM_CUDA is {wish!r}; accepted: on, off, pip, or unset (automatic)"
        )
    if wish == "off":
        return None, "SNNLSTM_CUDA=off"
    if sys.platform != "linux":
        if wish:
            raise CompileError(f"SNNLSTM_CUDA={wish}, but the CUDA backend is built on Linux alone")
        return None, "it is built on Linux alone"
    named = os.environ.get("CUDACXX")
    if named and wish != "pip":  # named by hand: another one would be a surprise
        nvcc = shutil.which(named) or named
        if trouble := trouble_with(nvcc):
            raise CompileError(f"CUDACXX is {named!r}, which cannot be used: {trouble}")
        return nvcc, "named by CUDACXX"
    tried = []
    for where, nvcc in nvcc_from_pip() if wish == "pip" else nvcc_candidates():
        trouble = trouble_with(nvcc)
        if not trouble:
            return nvcc, f"found through {where}"
        tried.append(f"{where}: {trouble}")
    reason = "no CUDA compiler found" + (f" ({'; '.join(tried)})" if tried else "")
    if wish:
        raise CompileError(
            f"SNNLSTM_CUDA={wish}, but {reason}.\n"
            "Looked at CUDACXX, CUDA_HOME, PATH and the pip package nvidia-cuda-nvcc. Set "
            "CUDACXX=/path/to/nvcc, or SNNLSTM_CUDA=pip to have pip fetch CUDA 13's compiler for "
            "the build (not with --no-build-isolation), or unset SNNLSTM_CUDA to build the CPU "
            "backend alone."
        )
    return None, reason


def gpus() -> list[int]:
    """Compute capabilities (10 * major + minor) of the GPUs that the driver shows, if any."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return []
    count, device, value = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    found = set()
    for index in range(count.value):
        driver.cuDeviceGet(ctypes.byref(device), index)
        numbers = []
        for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
            driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
            numbers.append(value.value)
        found.add(10 * numbers[0] + numbers[1])
    return sorted(found)


def cuda_plan() -> tuple[str | None, str, str]:
    """The CUDA compiler or None, the compute capabilities to build for, and why, in words.

    A plain `pip install .` builds for the GPUs of this machine alone, and nothing where there are
    none: code for every GPU takes a multiple of the time.
    """
    nvcc, why = find_nvcc()
    archs = os.environ.get("SNNLSTM_CUDA_ARCHS", "").strip()
    if not nvcc:
        return None, "", why
    if archs and archs != "native":
        return nvcc, archs, why
    if cuda_wish() and not archs:
        return nvcc, ALL_ARCHS, why
    here = gpus()
    usable = [arch for arch in here if arch >= OLDEST_ARCH]
    if usable:
        return nvcc, ";".join(map(str, usable)), f"{why}, for the GPUs found here"
    lack = f"only GPUs older than {OLDEST_ARCH / 10}" if here else "no GPU"
    if archs:
        raise CompileError(
            f"SNNLSTM_CUDA_ARCHS=native, but {lack} found; name compute capabilities, such as "
            f"{ALL_ARCHS!r}"
        )
    return None, "", f"{lack} here; SNNLSTM_CUDA=on builds it for all GPUs, with {nvcc}"


# ---- the build -----------------------------------------------------------------------------------


class CMakeBuild(build_ext):
    """One extension, snnlstm._C, by way of csrc/CMakeLists.txt."""

    for_tests = False

    def run(self) -> None:
        # Asked now: setuptools clears `inplace` while it builds.
        self.for_tests = bool(self.inplace or self.editable_mode)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        nvcc, archs, why = cuda_plan()
        tag = os.environ.get("SNNLSTM_LOCAL_VERSION", "")
        if (tag == "cpu" and nvcc) or (tag.startswith("cu") and not nvcc):
            half = "with" if nvcc else "without"
            raise CompileError(
                f"SNNLSTM_LOCAL_VERSION is {tag}, but this build is {half} the CUDA backend ({why})"
            )
        say(f"CUDA backend: {nvcc or 'left out'} ({why})")

        # Not setuptools' temporary folder: kept, so that `pip install -e .` again is incremental.
        # CMake can change neither compilers nor the source's place in one that it has configured.
        fixed = [ROOT, os.environ.get("CC"), os.environ.get("CXX"), nvcc, self.debug]
        key = hashlib.sha1(repr(fixed).encode()).hexdigest()[:6]
        build = ROOT / "build" / f"{sys.implementation.cache_tag}-{self.plat_name}-{key}"
        build.mkdir(parents=True, exist_ok=True)
        target = Path.cwd() / self.get_ext_fullpath(ext.name)
        arguments = [
            "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={ninja()}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DSNNLSTM_VERSION={version()}",
            f"-DSNNLSTM_CUDA={'ON' if nvcc else 'OFF'}",
            f"-DSNNLSTM_CUDA_WHY={why}",
            f"-DSNNLSTM_MODULE={target.name}",
            f"-DSNNLSTM_TESTING={'ON' if self.for_tests else 'OFF'}",  # not in a wheel
        ]  # fmt: skip
        if sys.platform == "win32" and not os.environ.get("CXX"):
            command = ";".join(cxx() or COMPILERS[0]).replace("\\", "/")
            arguments.append(f"-DCMAKE_CXX_COMPILER={command}")
        if machine := re.findall(r"-arch (\S+)", os.environ.get("ARCHFLAGS", "")):
            if len(set(machine)) > 1:
                raise CompileError(f"ARCHFLAGS names {machine}; the core is built for one of them")
            arguments.append(f"-DCMAKE_OSX_ARCHITECTURES={machine[0]}")
        if nvcc:
            arguments.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
            arguments.append(f"-DSNNLSTM_CUDA_ARCHS={archs}")
        arguments += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        half = "SNNLSTM_CUDA=off builds the CPU backend alone" if nvcc else ""
        half = half or "SNNLSTM_CORE=off installs the package without it, in plain torch"
        hint = f"\n{half}."
        run("configuring", ["cmake", "-S", str(ROOT / "csrc"), "-B", str(build), *arguments], hint)
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or os.environ.get("MAX_JOBS")
        jobs = jobs or str(os.cpu_count() or 1)
        run("compiling", ["cmake", "--build", str(build), "-j", jobs], hint)

        target.parent.mkdir(parents=True, exist_ok=True)
        # A process may have the old file mapped, so nothing is written into it.
        target.unlink(missing_ok=True)
        shutil.copy2(build / target.name, target)
        facts = dict(re.findall(r'\{"(\w+)", "(.*)"\}', (build / "build_info.h").read_text()))
        say(f"built {target.name}, version {version()}, with {facts['compiler']}")
        say(f"CUDA backend {facts['cuda']}")


class BuildPy(build_py):
    """Writes the local version (such as +cu13) into the wheel's copy of version.py."""

    def run(self) -> None:
        super().run()
        if os.environ.get("SNNLSTM_LOCAL_VERSION") and not self.editable_mode:
            copy = Path(self.build_lib) / "snnlstm" / "version.py"
            text = re.sub(
                r'(?m)^__version__ = ".+"$', f'__version__ = "{version()}"', copy.read_text()
            )
            copy.unlink()
            copy.write_text(text)


def ninja() -> str:
    found = shutil.which("ninja")
    if not found:
        raise CompileError("ninja not found: pip install ninja")
    return found


def run(what: str, command: list[str], hint: str = "") -> None:
    try:
        subprocess.run(command, check=True)
    except FileNotFoundError:
        raise CompileError(f"{command[0]} not found: pip install {command[0]}") from None
    except subprocess.CalledProcessError as error:
        raise CompileError(
            f"{what} snnlstm._C failed (exit status {error.returncode}); the cause is above.\n"
            f"The command was: {shlex.join(command)}{hint}"
        ) from None


setup(
    version=version(),
    # Asked for by pip as further build requirements; nothing else uses it.
    setup_requires=CUDA_FROM_PIP if cuda_wish() == "pip" else [],
    ext_modules=core(),
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPy},
)
