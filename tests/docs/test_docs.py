"""The Python of the README and of docs/ runs, and the files, links and targets they name exist."""

from __future__ import annotations

import doctest
import functools
import importlib
import importlib.util
import itertools
import json
import logging
import operator
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import snnlstm
from snnlstm import SpikeCount
from tools.dead_links import dead_links

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
TUTORIAL = DOCS / "tutorial.ipynb"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "NOTES.md",
    ROOT / "examples" / "README.md",
    ROOT / "tests" / "emulator" / "README.md",
    *sorted(DOCS.glob("*.md")),
]

pytestmark = pytest.mark.skipif(not README.exists(), reason="not in a source tree")
every_page = pytest.mark.parametrize(
    "page", [page for page in PAGES if page.exists()], ids=lambda page: str(page.relative_to(ROOT))
)


# The numbers of steps, epochs and digits that a test has time for.
SHORT = {
    README: {"torch.rand(20, 10, 2": "torch.rand(20, 3, 2"},
    TUTORIAL: {
        "EPOCHS = 6": "EPOCHS = 1",
        "DIGITS = 1600": "DIGITS = 64",
        "digits.images)": "digits.images[:96])",
        "(figure, draw, STEPS)": "(figure, draw, 2)",
    },
}


@functools.cache
def text_of(page: Path) -> str:
    """Returns the text of the page, without the marks of quotations, and with short runs."""
    text = re.sub(r"(?m)^> ?", "", page.read_text())
    for long, short in SHORT.get(page, {}).items():
        assert long in text
        text = text.replace(long, short)
    return text


def blocks(page: Path, language: str) -> list[str]:
    """Returns the page's fenced code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", text_of(page), re.DOTALL)


@pytest.fixture
def _settings() -> Iterator[None]:
    """Restores the settings of the process that examples change."""
    level = logging.getLogger("snnlstm").level
    paths = list(sys.path)
    yield
    logging.getLogger("snnlstm").setLevel(level)
    snnlstm.set_algorithm("auto")
    sys.path[:] = paths
    if "tests.emulator.backend" in sys.modules:
        sys.modules["tests.emulator.backend"].emulated_core().reset()


def run(page: Path, seed: int) -> None:
    """Runs a page's blocks in order, as one session; the seed is set before each of them."""
    session: dict[str, object] = {"__name__": page.stem}
    for block in blocks(page, "python"):
        torch.manual_seed(seed)
        exec(compile(block, page.name, "exec"), session)


NEEDED = {
    "ecosystem.md": ["lightning", "onnxscript", "onnxruntime"],
}
WITH_PYTHON = [page for page in PAGES if page.exists() and blocks(page, "python")]


@pytest.fixture
def counted(monkeypatch) -> list[tuple[torch.nn.Module, SpikeCount]]:
    """Counts the spikes of each cell and each Leaky that is made, in what is not compiled."""
    snntorch, made = pytest.importorskip("snntorch"), []

    def counting(first):
        def init(self, *args, **kwargs):
            first(self, *args, **kwargs)
            count = SpikeCount(type(self).__name__, None)

            def hook(*call):
                if not torch.compiler.is_compiling():  # a graph is compiled anew for each count
                    count(*call)

            if not self._forward_hooks:  # a subclass's constructor comes here twice
                made.append((self, count))
                self.register_forward_hook(hook)

        return init

    for kind in (snntorch.SpikingNeuron, snnlstm.SConv2dLSTM):
        monkeypatch.setattr(kind, "__init__", counting(kind.__init__))
    return made


def check_rates(counted) -> None:
    """Asserts that each cell and each Leaky that was called spiked."""
    # The cell without surrogate is for exports, whose calls have no numbers.
    rates = [c.rate for m, c in counted if c.chances and not m.surrogate_disable]
    assert rates
    assert all(0.005 <= rate <= 0.7 for rate in rates), rates


@pytest.mark.usefixtures("_settings")
@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run_in_order_and_every_cell_spikes(
    page, recwarn, capsys, monkeypatch, tmp_path, counted
):
    for needed in NEEDED.get(page.name, ()):
        pytest.importorskip(needed, reason=f"pip install {needed}")
    if page.parent.name == "emulator" and not (
        snnlstm.dispatch.reasons.backends and shutil.which("g++")
    ):
        pytest.skip("no compiler, or no core")
    monkeypatch.chdir(tmp_path)  # where examples write
    code = "".join(blocks(page, "python"))
    for seed in range(1 if "torch.compile" in code else 2):  # compiling takes long
        run(page, seed)
        if "SConv2dLSTM(" in code:
            check_rates(counted)
        counted.clear()
    own = [w for w in recwarn if "snnlstm" in str(w.filename) or str(w.filename) == page.name]
    assert [str(w.message) for w in own] == []
    if page == README:
        printed = capsys.readouterr().out.split("\n")
        swapped = [f"  {name}  swapped" for name in "023"]
        assert printed[:4] == ["accelerate: 3 swapped, 0 left", *swapped]
        assert "products=False" in printed[4]
        assert printed[5].startswith("epoch 0: ")
        assert printed[6].endswith("% correct")
        assert re.match(r"cpu-\w+-\w+ \(.+\)", printed[7])


def test_examples_of_docstrings(counted):
    names, tried = {"snnlstm": snnlstm, "torch": torch, "nn": torch.nn}, set()
    for module in pkgutil.walk_packages(snnlstm.__path__, "snnlstm."):
        if module.name not in ("snnlstm.__main__", "snnlstm._C"):
            torch.manual_seed(0)
            found = doctest.testmod(importlib.import_module(module.name), extraglobs=names)
            assert found.failed == 0, module.name
            if found.attempted:
                tried.add(module.name)
            if module.name == "snnlstm.networks.sequential":
                check_rates(counted)
            counted.clear()
    package = Path(snnlstm.__file__).parent
    have = [path for path in package.rglob("*.py") if ">>> " in path.read_text()]
    assert have
    assert tried == {
        ".".join(path.relative_to(package.parent).with_suffix("").parts) for path in have
    }


def test_the_tutorial_runs(monkeypatch, capsys):
    """Its cells run here one after the other: a kernel would import all packages anew."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    matplotlib, *_ = map(pytest.importorskip, ("matplotlib", "sklearn", "IPython"))
    session = {"__name__": "tutorial"}
    with matplotlib.rc_context():
        for cell in json.loads(text_of(TUTORIAL))["cells"]:
            if cell["cell_type"] == "code":
                capsys.readouterr()
                exec("".join(cell["source"]), session)
    said = capsys.readouterr().out
    assert "3 swapped, 0 left" in said
    equal = re.search(r"([\d.]+)% of the spikes are equal", said)
    assert float(equal[1]) > 99.9


def commands(page: Path) -> list[list[str]]:
    """Returns the words of each line of the shell blocks, and of each command in the text."""
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").split("\n")
    lines += re.findall(r"(?<!`)`((?:make|python|pytest) [^`\n]+)`", text_of(page))
    return [shlex.split(line, comments=True) for line in lines]


@every_page
def test_what_a_page_names_exists(page):
    """A page names targets, links, and paths such as `csrc/cell.h`.

    Other names in a row of a table lie in the folder that the row's first path names, or lies in.
    """
    makefile = (ROOT / "Makefile").read_text()
    for words in commands(page):
        for before, target in itertools.pairwise(words):
            if before == "make" and re.fullmatch(r"[a-z][\w-]*", target):
                assert re.search(rf"(?m)^{target}:", makefile), f"no target {target}"
    for link in re.findall(r"\]\(([^)#\s]+)|```\{include\} (\S+)", text_of(page)):
        link = "".join(link)
        if "://" not in link:
            assert (page.parent / link).exists(), f"no file {link}"
    for name in re.findall(r"\]\(api\.md#snnlstm\.([\w.]+)\)", text_of(page)):
        assert operator.attrgetter(name)(snnlstm), f"no snnlstm.{name}"
    top = {path.name for path in ROOT.iterdir()} - {"build", "dist", "out"}
    for line in text_of(page).split("\n"):
        folder = ROOT
        for name in re.findall(r"(?<!`)`([\w./-]+)`", line):
            first, slash, _ = name.partition("/")
            if slash and first in top:
                assert (ROOT / name).exists(), f"no file {name}"
                folder = ROOT / name if name.endswith("/") else (ROOT / name).parent
            elif line.startswith("| `") and folder != ROOT and re.search(r"\.(py|h|cpp|cu)$", name):
                assert (folder / name).exists(), f"no file {folder / name}"


def test_commits_that_a_page_names_exist():
    git = functools.partial(subprocess.run, capture_output=True, text=True, cwd=ROOT)
    shallow = ["git", "rev-parse", "--is-shallow-repository"]
    if not shutil.which("git") or git(shallow).stdout.strip() != "false":
        pytest.skip("no whole history")
    for commit in re.findall(r"`git show (\w+)`", (ROOT / "CONTRIBUTING.md").read_text()):
        assert git(["git", "cat-file", "-e", f"{commit}^{{commit}}"]).returncode == 0, commit


def test_every_public_name_is_in_the_reference():
    api = (DOCS / "api.md").read_text()
    for name in snnlstm.__all__:
        assert re.search(rf"\b{re.escape(name)}\b", api), f"docs/api.md does not name {name}"


def run_in(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    if not shutil.which(command[0]):
        pytest.skip(f"there is no {command[0]}")
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_one_command_puts_the_owner_everywhere(tmp_path):
    named = run_in(ROOT, "git", "grep", "-lw", "OWNER", "--", ":!tests").stdout.split()
    if not named:
        pytest.skip("the repository has an owner, or is no git checkout")
    for name in named:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    run_in(tmp_path, "git", "init", "-q")
    run_in(tmp_path, "git", "add", ".")
    done = run_in(tmp_path, "make", "owner", "NAME=some-one")
    assert done.returncode == 0, done.stderr
    left = [name for name in named if "OWNER" in (tmp_path / name).read_text()]
    assert sorted(left) == [".github/workflows/wheels.yml", "Makefile"]
    readme = (tmp_path / "README.md").read_text()
    for address in (
        "github/some-one/snnlstm/blob/main/benchmarks/gpu",
        "clone https://github.com/some-one/",
    ):
        assert address in readme
    assert "stands for the account" in README.read_text()
    assert "stands for the account" not in readme
    assert "NAME=...: the owner" in run_in(tmp_path, "make", "owner").stderr


def test_dead_links_are_found_in_built_pages(tmp_path):
    (tmp_path / "_modules").mkdir()
    page = (
        '<a id="top" href="#top"></a><a href="https://example.org/none"></a><img src="a%20b.svg">'
    )
    (tmp_path / "index.html").write_text(page)
    (tmp_path / "a b.svg").touch()
    links = "../index.html#top", "../index.html#accelerate", "none.html", "../index.html"
    source = "".join(f'<a href="{link}">[docs]</a>' for link in links)
    (tmp_path / "_modules" / "swap.html").write_text(source)
    assert dead_links(tmp_path) == [f"_modules/swap.html: {link}" for link in links[1:3]]


def test_tables_show_the_last_run_of_the_history():
    """README and docs/performance.md; `python -m benchmarks.report` writes both."""
    from benchmarks import report

    for page, text in report.published().items():
        assert page.read_text() == text
