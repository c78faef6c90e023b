"""Compares the way of a call with the one that the documentation tells."""

import re
import sys
from itertools import groupby
from pathlib import Path

import torch

import snnlstm

ROOT = Path(__file__).resolve().parents[2]


def stretches(call) -> list[str]:
    """Returns the file of the package that runs, for each stretch of a call within one file."""
    package, running, files = Path(snnlstm.__file__).parent, [], []

    def note(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if package in path.parents and event in ("call", "return"):
            if event == "call":
                running.append(f"snnlstm/{path.relative_to(package)}")
            else:
                running.pop()
            files.extend(running[-1:])

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return [file for file, _ in groupby(files)]


def test_a_step_call_goes_the_way_that_the_architecture_tells():
    cell = snnlstm.SConv2dLSTM(2, 3, 3, threshold=0.1)
    x, syn, mem = torch.rand(1, 2, 5, 5), torch.zeros(1, 3, 5, 5), torch.zeros(1, 3, 5, 5)
    cell(x, syn, mem)
    page = (ROOT / "docs" / "architecture.md").read_text()
    way = page.partition("<!-- way:begin -->")[2].partition("<!-- way:end -->")[0]
    entered = stretches(lambda: cell(x, syn, mem))
    assert list(dict.fromkeys(entered)) == re.findall(r"^\d+\. `([^`]+)`", way, re.MULTILINE)
    assert len(entered) <= 24, entered


def test_a_file_of_each_row_has_the_names_of_the_row():
    for row in re.findall(r"(?m)^\|.*", (ROOT / "docs" / "architecture.md").read_text()):
        names = re.findall(r"`([\w./-]+)`", row)
        text = "".join((ROOT / name).read_text() for name in names if (ROOT / name).is_file())
        for name in names:
            if text and name.isidentifier():
                assert re.search(rf"\b{name}\b", text), f"no {name} in the files of: {row}"
