"""Checkpoints of earlier releases of snnTorch and snnlstm load, and compute what they computed.

tests/shared/data/make_checkpoints.py wrote the files.
"""

from pathlib import Path

import pytest
import snntorch
import torch
from helpers import close, quietly

import snnlstm

DATA = Path(__file__).parents[1] / "shared" / "data"
FILES = ("snntorch-0.9.4.pt", "snntorch-1.0.0.pt", "snnlstm-0.1.0.pt")


def last_step(cell, x):
    with torch.no_grad():
        return [cell(step) for step in x][-1]


def test_every_file_is_tested():
    assert sorted(path.name for path in DATA.glob("*.pt")) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("library", [snnlstm, snntorch], ids=lambda library: library.__name__)
def test_a_checkpoint_loads_and_computes_what_it_did(name, library):
    """snnTorch's cell loads the files too: keys, shapes and dtypes are those of its state_dict."""
    saved = torch.load(DATA / name, weights_only=True)
    assert len(saved) >= 5
    for key, cell in saved.items():
        threshold = cell["state_dict"]["threshold"]
        arguments = cell["arguments"] | {"threshold": torch.zeros_like(threshold)}
        made = quietly(library.SConv2dLSTM, 2, 3, 3, **arguments)
        made.load_state_dict(cell["state_dict"], strict=True)
        close(last_step(made, cell["x"]), cell["out"])
        assert cell["out"][0].any(), key


def test_what_is_saved_now_loads_as_weights_only(tmp_path):
    cell = quietly(snnlstm.SConv2dLSTM, 2, 3, 3, learn_threshold=True)
    cell(torch.rand(4, 2, 2, 5, 6))
    torch.save(cell.state_dict(), tmp_path / "now.pt")
    loaded = torch.load(tmp_path / "now.pt", weights_only=True)
    assert list(loaded) == list(cell.state_dict())
    close(loaded, cell.state_dict())
