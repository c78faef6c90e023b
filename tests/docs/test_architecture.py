"""Compares the way of a call with the one that the documentation tells."""

import re
import sys
from pathlib import Path

import torch

import snnlstm

ROOT = Path(__file__).resolve().parents[2]


def entered(call) -> list[str]:
    """Returns the files of the package that a call enters, each once, in their order."""
    package, files = Path(snnlstm.__file__).parent, {}

    def note(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == "call" and package in path.parents:
            files[f"snnlstm/{path.relative_to(package)}"] = None

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return list(files)


def test_a_step_call_enters_the_files_that_the_architecture_lists():
    cell = snnlstm.SConv2dLSTM(2, 3, 3, threshold=0.1)
    x, syn, mem = torch.rand(1, 2, 5, 5), torch.zeros(1, 3, 5, 5), torch.zeros(1, 3, 5, 5)
    cell(x, syn, mem)
    page = (ROOT / "docs" / "architecture.md").read_text()
    way = page.partition("<!-- way:begin -->")[2].partition("<!-- way:end -->")[0]
    listed = re.findall(r"^\d+\. `([^`]+)`", way, re.MULTILINE)
    assert sorted(entered(lambda: cell(x, syn, mem))) == sorted(listed)
