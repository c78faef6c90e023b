"""The tutorial's notebook runs from the first cell to the last."""

import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "tutorial.ipynb"
# The numbers of epochs and of digits that a test has time for.
SHORT = {"EPOCHS = 4": "EPOCHS = 1", "DIGITS = 1600": "DIGITS = 160", "slice(1600,": "slice(1700,"}

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")


@pytest.mark.slow
def test_the_tutorial_runs():
    text = NOTEBOOK.read_text()
    for long, short in SHORT.items():
        assert long in text
        text = text.replace(long, short)
    notebook = nbformat.reads(text, 4)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    last = [cell for cell in notebook.cells if cell.cell_type == "code"][-1]
    said = "".join(output["text"] for output in last.outputs)  # in pieces, as the kernel sends it
    assert "2 swapped, 0 left" in said
    equal = re.search(r"([\d.]+)% of the spikes are equal", said)
    assert float(equal[1]) > 99.9
