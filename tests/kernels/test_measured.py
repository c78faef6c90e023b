"""Measured choices are kept in memory and in a file, and set_algorithm checks the file."""

from __future__ import annotations

import json
import logging

import pytest

import snnlstm
from snnlstm import measured, settings
from snnlstm.measured import Choices, choices


def test_the_first_choice_is_kept():
    kept = Choices()
    assert kept.find("layer") is None
    assert kept.keep("layer", "one") == "one"
    assert kept.keep("layer", "other") == "one"
    assert kept.find("layer") == "one"


def test_a_file_gathers_the_choices_of_several_processes(tmp_path):
    file = tmp_path / "choices.json"
    first, second = Choices(), Choices()
    first.keep_in(file)
    second.keep_in(file)
    first.keep("a", "one")
    second.keep("b", "two")
    assert json.loads(file.read_text()) == {"a": "one", "b": "two"}
    third = Choices()
    third.keep("a", "mine")
    third.keep_in(file)
    assert (third.find("a"), third.find("b")) == ("mine", "two")
    assert [path.name for path in tmp_path.iterdir()] == ["choices.json"]


def test_a_file_that_cannot_be_written_is_given_up(tmp_path, caplog):
    kept = Choices()
    kept.keep_in(tmp_path / "missing" / "choices.json")
    with caplog.at_level(logging.WARNING, "snnlstm"):
        assert kept.keep("a", "one") == "one"
        kept.keep("b", "two")
    assert len(caplog.records) == 1
    assert "gets no further measured choices" in caplog.text
    assert kept.find("b") == "two"


def test_the_least_recently_used_choices_go_first(tmp_path, monkeypatch):
    """Memory keeps the choices used last, and a file those written last."""
    monkeypatch.setattr(measured, "_MOST", 3)
    file, kept = tmp_path / "choices.json", Choices()
    kept.keep_in(file)
    for key in "abc":
        kept.keep(key, "one")
    assert kept.find("a") == "one"
    kept.keep("d", "two")
    assert [kept.find(key) for key in "abcd"] == ["one", None, "one", "two"]
    assert list(json.loads(file.read_text())) == ["b", "c", "d"]
    file.write_text(json.dumps(dict.fromkeys("efghi", "three")))
    kept.keep_in(file)
    assert [key for key in "abcdefghi" if kept.find(key)] == ["g", "h", "i"]


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', "{"])
def test_a_file_of_something_else_is_refused(tmp_path, text):
    file = tmp_path / "notes"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"file must hold choices .* got .*notes"):
        snnlstm.set_algorithm("measure", file)
    assert settings.get_algorithm() == "auto"
    assert file.read_text() == text


def test_the_file_belongs_to_measure(tmp_path):
    with snnlstm.algorithm("measure", tmp_path / "choices.json"):
        assert choices.file == tmp_path / "choices.json"
        with snnlstm.algorithm("direct"):
            assert choices.file is None
        assert choices.file == tmp_path / "choices.json"
    assert choices.file is None
