"""Measured choices are kept in memory, those used last."""

from __future__ import annotations

from snnlstm import measured
from snnlstm.measured import Choices


def test_the_first_choice_is_kept():
    kept = Choices()
    assert kept.find("layer") is None
    assert kept.keep("layer", "one") == "one"
    assert kept.keep("layer", "other") == "one"
    assert kept.find("layer") == "one"


def test_the_least_recently_used_choices_go_first(monkeypatch):
    monkeypatch.setattr(measured, "_MOST", 3)
    kept = Choices()
    for key in "abc":
        kept.keep(key, "one")
    assert kept.find("a") == "one"
    kept.keep("d", "two")
    assert [kept.find(key) for key in "abcd"] == ["one", None, "one", "two"]
