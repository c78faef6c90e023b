"""messages.txt shows every error and warning as a person reads it, below the code that causes it.

After a message has changed, or a line ``>>> code`` was added to shared/messages.txt, ``python -m
tests.docs.test_messages`` writes the file anew. Read the difference by ``git diff``.
"""

import ast
import contextlib
import io
import itertools
import logging
import traceback
import warnings
from pathlib import Path
from unittest import mock

import pytest
import snntorch
import torch
import torch.utils.checkpoint
from torch import nn

import snnlstm
import snnlstm.native.cuda_check

SNAPSHOT = Path(__file__).parents[1] / "shared" / "messages.txt"
PACKAGE = Path(snnlstm.__file__).parent


class Says(nn.Module):
    def forward(self, x):
        return "spikes"


class Grows(nn.Module):
    steps = 0

    def forward(self, x):
        self.steps += 1
        return x.expand(self.steps, *x.shape)


class Own(nn.Module):
    def forward(self, x):
        return x


class Mine(snntorch.SConv2dLSTM):
    pass


def without_snntorch(function, *args):
    with mock.patch.object(snnlstm.swap, "Base", nn.Module):
        return function(*args)


def names():
    """Returns the names that a line may use; each line gets new objects."""
    torch.manual_seed(0)
    theirs = snntorch.SConv2dLSTM(2, 3, 3, threshold=0.1)
    return {
        "torch": torch, "nn": nn, "snnlstm": snnlstm, "Sequential": snnlstm.Sequential,
        "ConvLSTM": snnlstm.ConvLSTM, "ConvLSTMCell": snnlstm.ConvLSTMCell,
        "SConv1dLSTM": snnlstm.SConv1dLSTM,
        "SConv2dLSTM": snnlstm.SConv2dLSTM, "sconv2dlstm": snnlstm.functional.sconv2dlstm,
        "surrogate": snnlstm.surrogate, "quant": snnlstm.quant,
        "cuda_check": snnlstm.native.cuda_check,
        "weight_norm": nn.utils.parametrizations.weight_norm, "Says": Says, "Own": Own,
        "Grows": Grows, "LeakyParallel": snntorch.LeakyParallel,
        "checkpoint": torch.utils.checkpoint.checkpoint,
        "print_nothing": lambda *_: None, "without_snntorch": without_snntorch,
        "report": lambda stack: print(*stack.report, sep="\n"),
        "cell": snnlstm.SConv2dLSTM(2, 3, 3, threshold=0.1), "theirs": theirs,
        "x": torch.zeros(1, 2, 5, 5), "events": torch.zeros(4, 1, 2, 5, 5),
        "syn": torch.zeros(1, 3, 5, 5), "mem": torch.zeros(1, 3, 5, 5),
        "weight": torch.zeros(12, 5, 3, 3),
        "net": nn.ModuleDict(
            {
                "first": theirs,
                "again": theirs,
                "even": snntorch.SConv2dLSTM(2, 3, 2),
                "mine": Mine(2, 3, 3),
                "leaky": snntorch.Leaky(0.9),
            }
        ),
    }  # fmt: skip


class Lines(logging.Handler):
    def __init__(self, lines):
        super().__init__()
        self.lines = lines

    def emit(self, record):
        self.lines.append(f"log, {record.levelname}: {record.getMessage()}")


def said(code):
    """Returns what a line prints, warns, logs and raises, and where it was raised."""
    lines, where, printed = [], None, io.StringIO()
    log, handler = logging.getLogger("snnlstm"), Lines(lines)
    log.addHandler(handler)
    session = names()
    try:
        with (
            warnings.catch_warnings(record=True) as caught,
            contextlib.redirect_stdout(printed),
            mock.patch.object(log, "propagate", False),
            mock.patch.object(snnlstm.path, "_logged", set()),
        ):
            warnings.simplefilter("always")
            exec(code, session)
    except Exception as error:
        lines.append(f"{type(error).__name__}: {error}")
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = Path(frame.filename).name, frame.lineno
    finally:
        log.removeHandler(handler)
    lines[:0] = [f"{w.category.__name__}: {w.message}" for w in caught]
    return [*printed.getvalue().splitlines(), *lines], where


def gallery():
    """Returns the snapshot with what its lines say now, and all places that raised something."""
    head, *entries = SNAPSHOT.read_text().split(">>> ")
    parts, places = [head], set()
    for entry in entries:
        before, *title = entry.partition("\n\n# ")
        code = before.partition("\n")[0]
        lines, where = said(code)
        assert lines, f"{code!r} says nothing"
        places.add(where)
        parts.append("\n".join([code, *lines]) + ("".join(title) if title[0] else "\n"))
    return ">>> ".join(parts), places


@pytest.fixture(scope="module")
def shown():
    if snnlstm.path._native is None:
        pytest.skip("without the core, the first line of the log reports that the core is missing")
    return gallery()


def test_messages_are_those_of_the_snapshot(shown):
    actual, expected = shown[0].split(">>> "), SNAPSHOT.read_text().split(">>> ")
    for one, other in itertools.zip_longest(actual, expected):
        assert one == other, "a message changed: see the head of this file, and read git diff"


# messages.txt shows every `raise` of these modules.
SHOWN = (
    "call", "convlstm", "path", "quant", "sconv2dlstm", "sequential", "settings", "spec", "state",
    "surrogate", "swap",
)  # fmt: skip


def test_every_error_is_shown(shown):
    for name in SHOWN:
        tree = ast.parse((PACKAGE / f"{name}.py").read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and node.exc is not None:
                lines = range(node.lineno, node.end_lineno + 1)
                assert any((f"{name}.py", line) in shown[1] for line in lines), (
                    f"{name}.py:{node.lineno} raises what messages.txt does not show"
                )


if __name__ == "__main__":
    SNAPSHOT.write_text(gallery()[0])
