"""Draws the pictures of docs/architecture.md into docs/images/.

    python docs/diagrams.py [--times]

This needs the compiled core and torch 2.13 or newer. --times prints the microseconds of the parts
of a call, as this machine has them, and draws nothing: MICROSECONDS are set by hand.
"""

from __future__ import annotations

import operator
import re
import sys
import timeit
from collections import Counter
from collections.abc import Callable
from functools import partial
from html import escape
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.fx import Graph, Node

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import snnlstm  # noqa: E402
from snnlstm import _C  # noqa: E402
from snnlstm.calls import entries  # noqa: E402
from snnlstm.calls.call import Call  # noqa: E402
from snnlstm.dispatch.run import run_call  # noqa: E402
from snnlstm.loops import backend, rules  # noqa: E402

IMAGES = ROOT / "docs" / "images"
# Of the call that `times` makes, on one thread of a Zen 5 (AVX-512). The kernels take part of run.
MICROSECONDS = {
    "arguments": "3.3",
    "other code": "1.0",
    "as it came": "0.9",
    "guard": "2.0",
    "checked": "16",
    "key": "4.5",
    "made": "105",
    "run": "11",
    "kernels": "4.9",
    "reference": "42",
    "kept": "0.5",
    "whole": "18",
}


class Picture:
    """An SVG, 480 wide, in the style of docs/images/step.svg.

    Boxes bring their own background, lines and loose text are grey, so that it is readable on white
    and on black.
    """

    def __init__(self, title: str, height: int) -> None:
        self._parts = [_HEAD.format(title=escape(title), height=height)]

    def box(
        self, kind: str, x: int, y: int, width: int, *lines: str, right: str = "", pitch: int = 20
    ) -> None:
        """Draw a box of a kind, with lines of text: the first one larger, with `right` beside it.

        A line in backquotes is code; `pitch` is the height of a line.
        """
        height, middle = 14 + pitch * len(lines), x + width // 2
        self._add(
            f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="7"/>'
        )
        for number, line in enumerate(lines):
            at = y + 2 + pitch * (number + 1)
            kind = "left " * bool(right) + "small" * bool(number)
            self.text(kind.strip(), x + 12 if right else middle, at, line)
        if right:
            self.text("right", x + width - 10, y + 2 + pitch, right)

    def text(self, kind: str, x: int, y: int, line: str) -> None:
        """Write a line of text; in backquotes it is code."""
        code = line.strip("`")
        kind = f"{kind} code".strip() if code != line else kind
        self._add(f'<text class="{kind}" x="{x}" y="{y}">{escape(code)}</text>')

    def way(self, path: str) -> None:
        """Draw an arrow."""
        self._add(f'<path class="way" d="{path}"/>')

    def _add(self, part: str) -> None:
        self._parts.append(f"  {part}\n")

    def svg(self) -> str:
        """Return the file."""
        return "".join([*self._parts, "</svg>\n"])


_HEAD = """\
<svg xmlns="http://www.w3.org/2000/svg" width="480" height="{height}" viewBox="0 0 480 {height}" \
font-family="system-ui, sans-serif" font-size="15" role="img" aria-label="{title}">
  <defs>
    <marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" \
orient="auto-start-reverse">
      <path d="M0 0 L10 5 L0 10 z" fill="#808890"/>
    </marker>
    <style>
      .core {{ fill: #f6e3c5; stroke: #b08436; }}
      .plain {{ fill: #e3e3e3; stroke: #808890; }}
      .python {{ fill: #dbe7f5; stroke: #5b7ea6; }}
      .core, .plain, .python {{ stroke-width: 1.5; }}
      .way {{ fill: none; stroke: #808890; stroke-width: 1.8; marker-end: url(#tip); }}
      text {{ fill: #1b1f24; text-anchor: middle; }}
      .small {{ font-size: 13px; }}
      .left {{ text-anchor: start; }}
      .right {{ text-anchor: end; font-weight: 600; }}
      .loose {{ fill: #808890; font-size: 13px; text-anchor: start; }}
      .code {{ font-family: ui-monospace, monospace; font-size: 13px; font-weight: normal; }}
    </style>
  </defs>
"""


# ---- a call of a cell ----------------------------------------------------------------------------


def draw_call() -> str:
    """Draw the way of a call through the package, with the microseconds of its parts."""
    time = {part: f"{number} µs" for part, number in MICROSECONDS.items()}
    picture = Picture("The way of a call of a cell", 712)
    box, way, note = picture.box, picture.way, partial(picture.text, "loose")
    x, width, middle = 8, 268, 142
    box("plain", x, 8, width, "`cell(x)`", right=time["whole"])
    box("python", x, 64, width, "which arguments came?", right=time["arguments"])
    box("python", x, 120, width, "does torch.compile trace?")
    box("python", x, 176, width, "other code in the call?", "hooks, replaced methods, exports",
        right=time["other code"])  # fmt: skip
    box("python", x, 256, width, "arguments as they came", "tensors that need no conversion",
        right=time["as it came"])  # fmt: skip
    box("python", x, 336, width, "the cell's last two entries", "is one of its guards true?",
        right=time["guard"])  # fmt: skip
    box("core", x, 472, width, "run the plan", f"the kernels take {time['kernels']} of it",
        right=time["run"])  # fmt: skip
    box("python", x, 614, width, "keep states, spikes, path", right=time["kept"])
    box("plain", x, 670, width, "`spk, syn, mem`")
    for top, bottom in (
        (42, 62), (98, 118), (154, 174), (230, 254), (310, 334), (390, 470), (526, 612), (648, 668)
    ):  # fmt: skip
        way(f"M{middle} {top} V{bottom}")
    note(152, 434, "yes, almost always")

    x, width, middle = 312, 160, 392
    way("M276 81 H310")
    note(316, 86, "TypeError")
    way("M276 137 H310")
    box("plain", x, 110, width, "recorded", "as one operator")
    way(f"M276 203 H{middle} V254")
    note(288, 196, "yes: it runs in plain torch")
    way("M276 283 H310")
    box("python", x, 256, width, "check all", "or raise an error", right=time["checked"])
    way("M276 363 H294 V298 H310")
    note(299, 330, "no")
    way(f"M{middle} 310 V334")
    box("python", x, 336, width, "the key", right=time["key"])
    way(f"M{middle} 370 V390")
    box("python", x, 392, width, "entry of the table", f"made once, in {time['made']}")
    way(f"M{middle} 446 V532")
    way(f"M{middle} 499 H278")
    note(300, 492, "has a plan")
    note(400, 520, "a reason")
    box("plain", x, 534, width, "plain torch", f"reference path: {time['reference']}")
    way(f"M{middle} 588 V631 H278")
    return picture.svg()


# ---- a loop before and after ---------------------------------------------------------------------


class Net(nn.Module):
    """The network whose loop is drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.lif = nn.Conv2d(2, 4, 3), snnlstm.Leaky(beta=0.9, threshold=0.3)
        self.fc = nn.Linear(4 * 6 * 6, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the loop over the steps of x (T, N, 2, 8, 8)."""
        mem, out = self.lif.reset_mem(), []
        for x_t in x:
            spk, mem = self.lif(self.conv(x_t), mem)
            out.append(self.fc(spk.flatten(1)))
        return torch.stack(out)


def recorded() -> tuple[list[Node], list[Node]]:
    """Return the nodes that torch.compile records of three steps, and those of the new graph."""
    graphs: list[list[Node]] = []

    class Kept(backend.Writer):
        def write(self) -> Graph:
            before, graph = self._loop.nodes, super().write()
            graphs.extend((before, list(graph.nodes)))
            return graph

    with mock.patch.object(backend, "Writer", Kept), torch.no_grad():
        torch.compiler.reset()
        torch.compile(Net(), backend="snnlstm")(torch.rand(3, 1, 2, 8, 8))
    before, after = graphs
    return before, after


def function_of(node: Node) -> str:
    """Return what a node calls; of a method, with the arguments behind its tensor."""
    args = ", ".join(map(str, node.args[1:]))
    if node.op == "placeholder":
        return "all steps"
    if node.op == "output":
        return f"return {', '.join(map(str, node.all_input_nodes))}"
    if node.target is operator.getitem:
        return f"{node.args[0]}[{args}]"
    if node.op == "call_method":
        return f".{node.target}({args})"
    return (rules.name_of(node) or type(node.target).__name__).partition(".")[0]


def _kind(node: Node) -> str:
    """Return the kind of a node's box: that of this package, of torch's layers, or of views."""
    if node.op != "call_function" or node.target in (operator.getitem, torch.stack):
        return "plain"
    return "python" if function_of(node) in ("conv2d", "linear") else "core"


WIDE = 464
Boxes = dict[Node, tuple[int, int, int, list[str]]]
"""Left, top, width and lines of the box of each node."""


def _boxes_of_steps(nodes: list[Node], top: int) -> tuple[Boxes, int]:
    """Place the nodes of a loop in a column for each step; the second result is the last top."""
    tops = {"conv2d": 110, "leaky": 170, "flatten": 290, "linear": 350, "stack": 410, "return": 456}
    boxes: Boxes = {}
    seen: Counter[Any] = Counter()
    for node in nodes:
        function = function_of(node)
        name = re.sub(r"^\.?(\w+).*", r"\1", function)
        if node.op in ("placeholder", "output") or name == "stack":
            width = 446 if name == "stack" else WIDE  # the last state passes it
            boxes[node] = 8, top + tops.get(name, 0), width, [node.name, function]
            continue
        row, item = tops.get(name), None
        if row is None and node.args[0] in boxes and node.args[0].op == "placeholder":
            row = 50
        elif row is None:
            row, item, function = 230, node.args[1], f"[{node.args[1]}]"
        left = 8 + 156 * seen[row, item] + (70 if item else 0)
        seen[row, item] += 1
        boxes[node] = left, top + row, 134 if item is None else 64, [node.name, function]
    return boxes, top + tops["return"]


def _boxes_of_calls(nodes: list[Node], top: int) -> Boxes:
    """Place the nodes of a new graph one below the other, and the states at their right."""
    boxes: Boxes = {}
    states: list[Node] = []
    for node in nodes:
        function, row = function_of(node), len(boxes) - len(states)
        called = f"{function}({node.args[0]}, …)" if function.isidentifier() else function
        lines = [node.name, called]
        if function.endswith("[1]") or node.all_input_nodes[:1] == states[-1:] != []:
            boxes[node] = 316, top + 44 * (row - 1 + 2 * len(states)), 156, lines
            states.append(node)
        else:
            width = WIDE if node.op in ("placeholder", "output") else 290
            boxes[node] = 8, top + 44 * row, width, lines
    return boxes


def _draw_boxes(picture: Picture, boxes: Boxes) -> None:
    """Draw nodes, and an arrow from each one to those that need it."""
    for node, (left, top, width, lines) in boxes.items():
        lines = [f"`{line}`" for line in lines]
        right = lines.pop() if width > 156 else ""
        picture.box(_kind(node), left, top, width, *lines, right=right, pitch=16)
        for arg in node.all_input_nodes:
            if arg in boxes:
                picture.way(_way(boxes[arg], boxes[node]))


def _way(start: Any, end: Any) -> str:
    """Return the way from one box to another."""
    (x0, y0, w0, _), (x1, y1, w1, _) = start, end
    bottom = y0 + (30 if w0 > 156 else 46)
    low, high = max(x0, x1), min(x0 + w0, x1 + w1)
    if y1 < y0:  # a state, handed to the next step
        return f"M{x0 + w0} {y0 + 23} H{x1 - 15} V{y1 + 23} H{x1 - 2}"
    if y1 - y0 > 200:  # past the boxes between them
        return f"M{x0 + w0} {y0 + 23} H464 V{y1 - 2}"
    if low < high:
        return f"M{(low + high) // 2} {bottom} V{y1 - 2}"
    return f"M{x0 + w0} {y0 + 15} H{x1 + w1 // 2} V{y1 - 2}"


def draw_loop() -> str:
    """Draw the graph of a loop as torch.compile records it, and as the backend writes it."""
    before, after = ([node for node in nodes if _is_drawn(node)] for nodes in recorded())
    boxes, last = _boxes_of_steps(before, 32)
    new = _boxes_of_calls(after, last + 76)
    torch_of = ".".join(torch.__version__.split(".")[:2])
    height = 38 + max(top for _, top, *_ in new.values())
    picture = Picture(f"A loop as torch {torch_of} records it, and the new graph", height)
    picture.text("loose", 8, 20, "As torch.compile records it: a call for each of three steps")
    _draw_boxes(picture, boxes)
    picture.text("loose", 8, last + 64, "As the backend writes it: one call for all steps")
    _draw_boxes(picture, new)
    return picture.svg()


def _is_drawn(node: Node) -> bool:
    """Whether a node is neither a parameter nor the first state, which is empty."""
    is_parameter = node.op == "placeholder" and node.name != "l_x_"
    return not is_parameter and node.target not in ("detach", "new_zeros")


PICTURES = {"call.svg": draw_call, "loop.svg": draw_loop}


# ---- the microseconds ----------------------------------------------------------------------------


@torch.no_grad()
def times() -> dict[str, float]:
    """Return MICROSECONDS of this machine: the shortest of many rounds, because others load it."""
    torch.set_num_threads(1)
    cell: Any = snnlstm.SConv2dLSTM(2, 8, 3, threshold=0.1)
    x = torch.rand(1, 2, 8, 8)
    cell(x), cell(x)
    spec, call = cell._spec, Call._make(cell._as_it_came(x, None, None, False, None, False))
    shared = spec, *entries.backend_of(x, "auto"), None
    known = entries.entry_of(call, *shared)
    results = run_call(known, call, None)

    def make() -> None:
        entries.table.clear()
        run_call(entries.entry_of(call, *shared), call, None)

    parts = {
        "whole": partial(cell, x),
        "other code": partial(cell._recording_and_overrides, spec, False),
        "as it came": partial(cell._as_it_came, x, None, None, False, None, False),
        "guard": partial(entries.find_entry, cell._entries, call, spec, False),
        "checked": partial(cell._checked, x, None, None, False, None, spec, False, "x"),
        "key": partial(entries.entry_of, call, *shared),
        "run": partial(run_call, known, call, None),
        "kept": partial(cell._return, call, results, None, False),
    }
    found: dict[str, list[float]] = {part: [] for part in (*parts, "idle", "reference", "made")}
    for _ in range(100):
        for part, function in parts.items():
            found[part].append(_each(function))
        with mock.patch.object(_C.CpuPass, "run", _idle):
            found["idle"].append(_each(parts["whole"]))
        with snnlstm.algorithm("reference"):
            found["reference"].append(_each(parts["whole"]))
        found["made"].append(_each(make, 5))
    out = {part: min(values) for part, values in found.items()}
    out["kernels"] = out["whole"] - out.pop("idle")
    out["made"] -= out["run"]
    out["reference"] -= out["whole"] - out["run"]
    straight = ("other code", "as it came", "guard", "run", "kept")
    return out | {"arguments": out["whole"] - sum(out[part] for part in straight)}


def _idle(*_: Any) -> None:
    """Take the place of the kernels."""


def _each(function: Callable[[], Any], times: int = 100) -> float:
    """Return the microseconds that a call of a function takes."""
    return timeit.timeit(function, number=times) / times * 1e6


if __name__ == "__main__":
    if "--times" in sys.argv:
        for part, found in times().items():
            print(f"{part:12} {found:7.1f}")
    else:
        for name, draw in PICTURES.items():
            (IMAGES / name).write_text(draw())
