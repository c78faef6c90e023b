"""Every error and warning, as a person reads it: messages.txt shows them all.

After a change of a message: ``python -m tests.test_messages`` writes the file again; read what
``git diff`` shows.
"""

import ast
import contextlib
import io
import itertools
import logging
import textwrap
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

SNAPSHOT = Path(__file__).with_name("messages.txt")
PACKAGE = Path(snnlstm.__file__).parent

GALLERY = {
    "The constructor": """
        SConv2dLSTM(2.0, 3, 3)
        SConv2dLSTM(2, 0, 3)
        SConv2dLSTM(2, 3, "3")
        SConv2dLSTM(2, 3, (3, 3, 3))
        SConv2dLSTM(2, 3, 4)
        SConv2dLSTM(2, 3, 3, bias="yes")
        SConv2dLSTM(2, 3, 3, max_pool=2, avg_pool=2)
        SConv2dLSTM(2, 3, 3, max_pool=-2)
        SConv2dLSTM(2, 3, 3)
        SConv2dLSTM(2, 3, 3, threshold="0.1")
        SConv2dLSTM(2, 3, 3, threshold=[0.1, "a"])
        SConv2dLSTM(2, 3, 3, threshold=1j)
        SConv2dLSTM(2, 3, 3, threshold=torch.zeros(0))
        SConv2dLSTM(2, 3, 3, threshold=torch.zeros(2, 1, 1))
        SConv2dLSTM(2, 3, 3, spike_grad="atan")
        SConv2dLSTM(2, 3, 3, reset_mechanism="sub")
        SConv2dLSTM(2, 3, 3, state_quant=8)
        SConv2dLSTM(2, 3, 3, device=3.5)
        SConv2dLSTM(2, 3, 3, device="gpu")
        SConv2dLSTM(2, 3, 3, dtype="float32")
        SConv2dLSTM(2, 3, 3, dtype=torch.int32)
    """,
    "A call": """
        cell([[1.0]])
        cell(torch.zeros(2, 5, 5))
        cell(torch.zeros(1, 3, 5, 5))
        cell(torch.zeros(1, 2, 0, 5))
        cell(x.double())
        cell(x.to("meta"))
        cell(x, syn=0)
        cell(x, torch.ones(1, 3, 4, 5), mem)
        cell(x, syn, mem.double())
        cell(x, record=True)
        cell(x, syn, mem, True)
        cell.init_hidden = True; cell(x, syn, mem)
        cell.max_pool = 6; cell(x)
        cell.threshold = torch.zeros(3, 4, 4); cell(x)
        cell.threshold = torch.zeros(3, 1, 1, device="meta"); cell(x)
        cell.stride = 2; cell.conv = weight_norm(cell.conv); cell(x)
        cell(x, syn, mem); mem.add_(1); cell.reset
        cell(x); cell.threshold.data.add_(1); cell.reset
        type("Wrong", (SConv2dLSTM,), {"_base_sub": None})
        checkpoint(cell, x, use_reentrant=False)[2].sum().backward()
    """,
    "Attributes": """
        cell.mem = None
        cell.max_pool = -1
        cell.reset_mechanism = "both"
        cell.reset_mechanism_val = torch.tensor(7)
        cell.load_state_dict({**cell.state_dict(), "reset_mechanism_val": torch.tensor(7)})
    """,
    "The functional form": """
        sconv2dlstm(x)
        sconv2dlstm(x, weight=weight.int())
        sconv2dlstm(x, weight=torch.zeros(10, 5, 3, 3))
        sconv2dlstm(x, weight=weight, bias=0)
        sconv2dlstm(x, weight=weight, bias=torch.zeros(3))
        sconv2dlstm(x, weight=weight, bias=torch.zeros(12).double())
        sconv2dlstm(x, weight=weight, bias=torch.zeros(12, device="meta"))
    """,
    "Surrogates, quantisers, algorithms": """
        surrogate.atan("2")
        surrogate.atan(float("inf"))
        surrogate.custom_surrogate(3)
        quant.StateQuant([0.0, 1.0])
        quant.StateQuant(torch.zeros(2, 2))
        quant.StateQuant(torch.tensor([0.0, float("nan")]))
        quant.state_quant(8.0)
        quant.state_quant(32)
        quant.state_quant(4, threshold="1")
        quant.state_quant(4, threshold=float("nan"))
        quant.state_quant(4, uniform=False, threshold=0)
        snnlstm.set_algorithm("fft")
        snnlstm.set_algorithm("direct", file="choices.json")
        snnlstm.set_algorithm("measure", file=3)
    """,
    "What runs, and why": """
        cell(x); print(cell.path.reason)
        cell.spike_grad = torch.sigmoid; cell(x); cell(x)
        cell.state_quant = torch.round; cell(x)
        cell.state_quant = quant.StateQuant(torch.tensor([1.0, 0.0])); cell(x)
        cell.state_quant = quant.StateQuant(torch.zeros(1).double()); cell(x)
        cell.conv = weight_norm(cell.conv); cell(x)
        cell.conv.register_forward_hook(print_nothing); cell(x)
        cell.conv.forward = cell.conv.forward; cell(x)
        cell.conv.padding = (0, 0); cell.conv.padding_mode = "circular"; cell(x)
        cell.threshold = torch.zeros(3, 5, 5); cell(x)
        cell.graded_spikes_factor = torch.zeros(3, 1, 1); cell(x)
        cell.graded_spikes_factor.requires_grad_(); cell(x)
        cell.fire = cell.fire; cell(x)
        cell(x[:0]); print(cell.path)
        print(cuda_check.without_kernels({"cuda": "not built: no CUDA compiler was found"}))
        print(cuda_check.driver_trouble({"cuda_version": "13.0"}, 12040))
        print(cuda_check.device_trouble({"cuda_archs": "80 90"}, "Old GPU", (6, 1)))
        print(cuda_check.device_trouble({"cuda_archs": "80 90"}, "New GPU", (12, 0)))
    """,
    "In the place of snnTorch's cell": """
        snnlstm.accelerate([theirs])
        print(snnlstm.accelerate(net))
        print(snnlstm.accelerate(theirs))
        snnlstm.accelerate(nn.ReLU())
        without_snntorch(snnlstm.accelerate, net)
        snnlstm.restore(3)
        print(snnlstm.restore(nn.ModuleList([SConv2dLSTM(2, 3, 3, threshold=0.1, stride=2), cell])))
        without_snntorch(snnlstm.restore, net)
        without_snntorch(snnlstm.patch)
    """,
    "Sequential": """
        Sequential.of([cell])
        Sequential(cell)([x])
        Sequential(cell)(x[0, 0, 0])
        Sequential(cell)(x.expand(0, 1, 2, 5, 5))
        Sequential(cell, batch_first=True)(x.expand(1, 0, 2, 5, 5))
        snnlstm.unroll(events, cell, 3)
        Sequential(nn.ReLU(), cell)(x)
        Sequential(Says(), cell)(events)
        Sequential(theirs, nn.Flatten())(events)
        tied = SConv2dLSTM(2, 2, 3, threshold=0.1); Sequential(tied, tied)(events)
        stack = Sequential(nn.BatchNorm2d(2), cell, nn.ReLU(), Own()); stack(events); plan(stack)
    """,
}


class Says(nn.Module):
    def forward(self, x):
        return "spikes"


class Own(nn.Module):
    def forward(self, x):
        return x


class Mine(snntorch.SConv2dLSTM):
    pass


def without_snntorch(function, *args):
    with mock.patch.object(snnlstm.swap, "Base", nn.Module):
        return function(*args)


def names():
    """What a line may use, made anew for each."""
    torch.manual_seed(0)
    theirs = snntorch.SConv2dLSTM(2, 3, 3, threshold=0.1)
    return {
        "torch": torch, "nn": nn, "snnlstm": snnlstm, "Sequential": snnlstm.Sequential,
        "SConv2dLSTM": snnlstm.SConv2dLSTM, "sconv2dlstm": snnlstm.functional.sconv2dlstm,
        "surrogate": snnlstm.surrogate, "quant": snnlstm.quant,
        "cuda_check": snnlstm.native.cuda_check,
        "weight_norm": nn.utils.parametrizations.weight_norm, "Says": Says, "Own": Own,
        "checkpoint": torch.utils.checkpoint.checkpoint,
        "print_nothing": lambda *_: None, "without_snntorch": without_snntorch,
        "plan": lambda stack: print(*stack.plan, sep="\n"),
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
    """What is printed, warned, logged and raised by a line; and where it was raised."""
    lines, where, printed = [], None, io.StringIO()
    log, handler = logging.getLogger("snnlstm"), Lines(lines)
    log.addHandler(handler)
    session = names()
    try:
        with (
            warnings.catch_warnings(record=True) as caught,
            contextlib.redirect_stdout(printed),
            mock.patch.object(log, "propagate", False),
            mock.patch.object(snnlstm.run, "_logged", set()),
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
    """The text of the snapshot, and all places in which something was raised."""
    text, places = ["What snnlstm says. Written by `python -m tests.test_messages`."], set()
    for title, block in GALLERY.items():
        text += ["", "", f"# {title}"]
        for code in textwrap.dedent(block).strip().splitlines():
            lines, where = said(code)
            places.add(where)
            text += ["", f">>> {code}", *lines]
    return "\n".join(text) + "\n", places


@pytest.fixture(scope="module")
def shown():
    if snnlstm.run._native is None:
        pytest.skip("without the core, the log says so at first")
    return gallery()


def test_messages_are_those_of_the_snapshot(shown):
    actual = shown[0].split("\n\n>>> ")
    expected = SNAPSHOT.read_text().split("\n\n>>> ")
    for one, other in itertools.zip_longest(actual, expected):
        assert one == other, "a message changed: python -m tests.test_messages, and read git diff"


# Modules whose every `raise` is to be shown.
SHOWN = (
    "arguments", "quant", "sconv2dlstm", "sequential", "settings", "state", "surrogate", "swap"
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


def test_every_line_says_something(shown):
    for entry in shown[0].split("\n\n>>> ")[1:]:
        code, *lines = entry.strip().split("\n")
        assert [line for line in lines if not line.startswith("#")], code


if __name__ == "__main__":
    SNAPSHOT.write_text(gallery()[0])
