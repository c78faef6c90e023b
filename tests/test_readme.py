"""What README.md says is true: its Python runs, and the commands and files that it names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"

pytestmark = pytest.mark.skipif(not README.exists(), reason="not in a source tree")


def blocks(language: str) -> list[str]:
    """Fenced code blocks, those inside quotations included."""
    text = re.sub(r"(?m)^> ?", "", README.read_text())
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_python_blocks_run_in_order(recwarn, capsys):
    """One session: later blocks use the names of earlier ones."""
    pytest.importorskip("snntorch")
    session: dict[str, object] = {}
    code = blocks("python")
    assert len(code) >= 5
    for block in code:
        exec(compile(block, "README.md", "exec"), session)
    assert [str(w.message) for w in recwarn if "snnlstm" in str(w.filename)] == []
    printed = capsys.readouterr().out.split("\n")
    assert re.match(r"cpu-\w+-\w+ \(.+\)", printed[0])
    assert printed[1] == "reference (conv is a ParametrizedConv2d, not a plain nn.Conv2d)"


def test_the_warning_about_the_state_is_true():
    import torch

    import snnlstm

    cell = snnlstm.SConv2dLSTM(2, 4, 3, threshold=0.1)
    x = torch.rand(3, 1, 2, 8, 8)
    first = cell(x)
    assert not torch.equal(cell(x)[2], first[2])
    cell.reset_mem()
    assert all(torch.equal(a, b) for a, b in zip(cell(x), first, strict=True))


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    wanted = set(re.findall(r"\bmake (\w+)", "\n".join([*blocks("sh"), README.read_text()])))
    assert wanted >= {"demo", "test", "bench"}
    for target in wanted:
        assert re.search(rf"(?m)^{target}:", makefile), f"no target {target} in the Makefile"


def test_files_exist():
    text = README.read_text()
    links = {link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link}
    layout = text[text.index("## Layout") :]
    rows = re.findall(r"(?m)^\| (`[^|]+) \|", layout)
    assert links
    assert rows
    named = set(links)
    for row in rows:
        folder = ""
        for name in re.findall(r"`([^`]+)`", row):
            if "/" in name:
                folder = name[: name.rindex("/") + 1] if not name.endswith("/") else ""
                named.add(name)
            else:
                named.add(folder + name)
    for name in sorted(named):
        assert (ROOT / name).exists(), f"README.md names {name}, which is not there"
