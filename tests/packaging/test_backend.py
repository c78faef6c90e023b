"""The build asks for PyPI's CUDA compiler where it alone serves, and builds less if more fails."""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path

import pytest

from tests.shared.helpers import shell_program

pytest.importorskip("scikit_build_core")
TOOLS = str(Path(__file__).resolve().parents[2] / "tools")
sys.path.insert(0, TOOLS)  # as pip does, by backend-path
backend, local_version = map(importlib.import_module, ("backend", "local_version"))
sys.path.remove(TOOLS)


@pytest.fixture
def add(monkeypatch, tmp_path):
    """Adds programs and variables to a machine without CUDA, whose index has the compiler."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SNNLSTM", "CUDA"))}
    environment = kept | {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(local_version, "TOOLKIT", "/nowhere")
    monkeypatch.setattr(local_version, "can_be_fetched", lambda packages: True)
    monkeypatch.setattr(sys, "platform", "linux")

    def add(**programs: str) -> None:
        for name, says in programs.items():
            if name.isupper():
                environment[name] = says
            else:
                shell_program(tmp_path / name.replace("_", "-"), says)

    return add


DRIVER = "echo 580.65.06"
NVCC = "echo 'Cuda compilation tools, release {}, V{}.1'"


@pytest.mark.parametrize(
    ("programs", "asked"),
    [
        ({}, False),
        ({"nvidia_smi": DRIVER}, True),
        ({"nvidia_smi": "echo 575.51.03"}, False),
        ({"nvidia_smi": "echo 'No devices were found'; exit 6"}, False),
        ({"nvidia_smi": DRIVER, "nvcc": NVCC.format(12.4, 12.4)}, False),
        ({"nvidia_smi": DRIVER, "nvcc": NVCC.format(11.5, 11.5)}, True),  # too old for the kernels
        ({"nvidia_smi": DRIVER, "CUDACXX": "/home/me/nvcc"}, False),
        ({"nvidia_smi": DRIVER, "SNNLSTM_CORE": "on"}, True),
        ({"nvidia_smi": DRIVER, "SNNLSTM_CORE": "OFF"}, False),
        ({"nvidia_smi": DRIVER, "SNNLSTM_CUDA": "off"}, False),
        ({"nvidia_smi": DRIVER, "SNNLSTM_CUDA": "on"}, False),
        ({"nvidia_smi": DRIVER, "SNNLSTM_LOCAL_VERSION": "cpu"}, False),
        ({"SNNLSTM_CUDA": "pip", "SNNLSTM_LOCAL_VERSION": "cu13"}, True),
    ],
)
def test_pypis_compiler_is_asked_for_where_it_alone_serves_a_gpu(programs, asked, add):
    add(**programs)
    assert local_version.get_requires_for_dynamic_metadata({}) == [*local_version.PYPI_NVCC] * asked


def test_a_compiler_that_cannot_be_fetched_is_not_asked_for(add, monkeypatch, capsys):
    monkeypatch.undo()
    for name in ("PIP_FIND_LINKS", "CUDACXX", *filter(re.compile("SNNLSTM").match, os.environ)):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setattr(local_version, "runs_cuda_13", lambda: True)
    monkeypatch.setattr(local_version, "nvcc", lambda: None)
    assert local_version.get_requires_for_dynamic_metadata({}) == []
    assert "pip finds no package of their compiler" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("set_by_user", "has_nvcc", "fallbacks"),
    [
        ({}, True, [{"SNNLSTM_CUDA": "failed"}, {"SNNLSTM_CORE": "off"}]),
        ({}, False, [{"SNNLSTM_CORE": "off"}]),
        ({"SNNLSTM_CORE": "on"}, True, [{"SNNLSTM_CUDA": "failed"}]),
        ({"SNNLSTM_CORE": "on"}, False, []),
        ({"SNNLSTM_CUDA": "on"}, True, []),
        ({"SNNLSTM_CUDA": "off"}, True, []),
        ({"SNNLSTM_LOCAL_VERSION": "cu13"}, True, []),
    ],
)
def test_after_a_failure_fewer_parts_are_built(set_by_user, has_nvcc, fallbacks, add):
    add(**set_by_user, **({"nvcc": NVCC.format(13.0, 13.0)} if has_nvcc else {}))
    seen = []

    def build(*arguments):
        seen.append(
            {name: value for name, value in os.environ.items() if name.startswith("SNNLSTM")}
        )
        raise SystemExit(1)

    with pytest.raises(SystemExit):
        backend._built(build, "folder")
    tries = [set_by_user]
    for fallback in fallbacks:
        tries.append(tries[-1] | fallback)
    assert seen == tries
    assert backend._built(lambda folder: f"{folder}/wheel", "folder") == "folder/wheel"


def test_metadata_need_no_compiler_and_do_not_bind_a_smaller_wheel(monkeypatch, tmp_path):
    monkeypatch.chdir(Path(TOOLS).parent)
    monkeypatch.setenv("CXX", "false")
    folder = backend.prepare_metadata_for_build_wheel(str(tmp_path))
    assert "Name: snnlstm\n" in (tmp_path / folder / "METADATA").read_text()
    monkeypatch.setattr(backend.build, "build_wheel", lambda *arguments: arguments)
    assert str(tmp_path) not in backend.build_wheel("wheels", None, str(tmp_path))
