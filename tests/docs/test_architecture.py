"""The architecture names files that exist, and its pictures are up to date."""

import inspect
import re
import runpy
from collections import Counter
from itertools import product
from pathlib import Path

import pytest
import snntorch
import torch

import snnlstm

ROOT = Path(__file__).resolve().parents[2]


def test_the_pictures_are_those_that_their_generator_draws():
    """`python docs/diagrams.py` draws them, with the names that torch gives to the nodes."""
    pytest.importorskip("snnlstm.loops.backend", exc_type=ImportError)
    pictures = runpy.run_path(str(ROOT / "docs" / "diagrams.py"))["PICTURES"]
    for name, draw in pictures.items():
        drawn = (ROOT / "docs" / "images" / name).read_text()
        recorded = re.search(r"torch (\d+\.\d+) records", drawn)
        if not recorded or torch.__version__.startswith(f"{recorded[1]}."):
            assert drawn == draw(), f"run docs/diagrams.py: {name} is older"


def test_the_table_of_folders_has_each_file():
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = dict(re.findall(r"(?m)^\| `snnlstm/((?:\w+/)?)` \| (.*) \|$", page))
    files = {path.relative_to(ROOT / "snnlstm") for path in (ROOT / "snnlstm").rglob("*.py")}
    assert len(rows) > 1
    for file in files:
        folder = "" if len(file.parts) == 1 else f"{file.parent}/"
        if file.name not in ("__init__.py", "version.py"):
            assert f"`{file.name}`" in rows[folder], file
    sizes = Counter(file.parent.name for file in files if file.name != "__init__.py")
    assert [name for name, count in sizes.items() if count > 8 and name != "native"] == []
    lines = {file: (ROOT / "snnlstm" / file).read_text().count("\n") for file in files}
    assert [file for file, count in lines.items() if count > 600] == []


def test_a_file_of_each_row_or_step_has_the_names_of_it():
    page = (ROOT / "docs" / "architecture.md").read_text()
    for row in re.findall(r"(?m)^\|.*|^\d+\. .*(?:\n   .*)*", page):
        names = re.findall(r"`([\w./-]+)`", row)
        folder = ROOT / "".join(name for name in names[:1] if name.endswith("/"))
        paths = [folder / name for name in names] + [ROOT / name for name in names]
        text = "".join(path.read_text() for path in {*filter(Path.is_file, paths)})
        for name in names:
            if text and name.isidentifier():
                assert re.search(rf"\b{name}\b", text), f"no {name} in the files of: {row}"


def added_options() -> list[str]:
    """Returns the arguments of the cell that snnTorch's does not have, but for torch's own two."""
    mine, reference = (
        inspect.signature(kind).parameters for kind in (snnlstm.SConv2dLSTM, snntorch.SConv2dLSTM)
    )
    return [name for name in mine if name not in (*reference, "device", "dtype")]


@pytest.mark.parametrize(
    ("heading", "names"),
    [
        ("Add an option", added_options()),
        ("Add a surrogate", sorted(snnlstm.surrogate.MAKERS - {"none"})),
    ],
)
def test_the_documents_that_the_steps_list_name_each_option_and_surrogate(heading, names):
    steps = (ROOT / "docs" / "architecture.md").read_text().partition(f"## {heading}\n")[2]
    sentence = re.search(r"\*\*The documents\.\*\* (.*?)\.\s", steps)[1]
    files = re.findall(r"`([\w/]+\.md)`", sentence)
    assert files
    for file, name in product(files, names):
        text = (ROOT / file).read_text()
        assert re.search(rf"\b{name}\b", text), f"edit {file}: it does not name {name}"
