"""Draws networks with a loop over steps: layers in any order, and all that users do to results.

A stack, which calls one layer after the other, also runs by snnlstm.unroll.

A program is made of lines of Python. Its text, which a failure shows, can be called again:
``check(Program(...), training=True)`` of tests/loops/test_programs.py.

Most programs are exact: weights and inputs are dyadic, so that all sums are, and results are equal
by bits. Cells, and batch norm in training, are compared in float64 with a tolerance.
"""

from dataclasses import dataclass, field
from textwrap import indent
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from snntorch import utils
from torch import Tensor, nn

import snnlstm
from tests.loops import networks
from tests.loops.compiled import dyadic_, numbers
from tests.loops.networks import Scale

BATCH = 3
SHAPES = {"flat": (BATCH, 6), "image": (BATCH, 2, 4, 4)}


@dataclass(frozen=True)
class Program:
    """Is a network: the layers by their names, and the parts of its forward, line by line.

    kind: of a step of x, "flat" or "image". one: x is one step, which all steps take; otherwise
    time is the dimension `axis` of x. times: the calls of the network. chain: the layers that a
    stack calls one after the other.
    """

    kind: str
    time: int
    layers: tuple[tuple[str, str], ...]
    start: tuple[str, ...]
    head: str
    body: tuple[str, ...]
    end: tuple[str, ...]
    result: str
    one: bool = False
    axis: int = 0
    times: int = 1
    chain: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """Returns the program's forward."""
        body = indent("\n".join(self.body), " " * 8)
        start, end = (indent("\n".join(lines), " " * 4) for lines in (self.start, self.end))
        return (
            f"def forward(self, x):\n{start}\n    {self.head}\n{body}\n{end}\n"
            f"    return {self.result}\n"
        )

    @property
    def graph_breaks(self) -> bool:
        return "graph_break()" in self.source

    @property
    def exact(self) -> bool:
        text = repr(self)
        return "cell(" not in text and "F.batch_norm(" not in text and not self._normalises

    @property
    def _normalises(self) -> bool:
        return any("BatchNorm" in made and "eval" not in made for _, made in self.layers)

    def made(self, dtype: torch.dtype) -> nn.Module:
        """Makes the network, with equal weights at every call."""
        names: dict[str, Any] = {
            "torch": torch, "F": F, "nn": nn, "utils": utils, "Scale": Scale,
            "leaky": networks.exact_leaky if self.exact else _inexact_leaky, "cell": networks.cell,
        }  # fmt: skip
        exec(compile(self.source, "<program>", "exec"), names)
        net = type("Net", (nn.Module,), {"forward": names["forward"]})()
        for name, text in self.layers:
            setattr(net, name, eval(text, names))
        snnlstm.accelerate(dyadic_(net))
        return net.to(dtype)

    def x(self, dtype: torch.dtype) -> Tensor:
        shape = SHAPES[self.kind]
        x = numbers(*shape, dtype=dtype) if self.one else numbers(self.time, *shape, dtype=dtype)
        return x.transpose(0, self.axis)

    def unrolled(self, net: nn.Module, x: Tensor) -> Tensor:
        """Runs a stack by snnlstm.unroll."""
        utils.reset(net)
        x = x.expand(self.time, *x.shape) if self.one else x.transpose(0, self.axis)
        return snnlstm.unroll(x, *(getattr(net, name) for name in self.chain))

    def __str__(self) -> str:
        made = "\n".join(f"self.{name} = {text}" for name, text in self.layers)
        return f"{self!r}\n\n{made}\n\n{self.source}"


def _inexact_leaky(threshold: float, **options: Any) -> nn.Module:
    """Makes a Leaky with a threshold that no dyadic mem equals."""
    return networks.exact_leaky(threshold=threshold + 0.0071, **options)


@dataclass
class _Draft:
    """Collects the lines of a program while it is drawn."""

    draw: Any
    training: bool
    time: int
    values: list[tuple[str, str]]  # the name and the kind of what this step has computed
    layers: list[tuple[str, str]] = field(default_factory=list)
    start: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    end: list[str] = field(default_factory=list)  # what follows the loop
    results: list[str] = field(default_factory=list)
    states: list[tuple[str, str]] = field(default_factory=list)  # names of a state and its layer
    stored: list[str] = field(default_factory=list)  # layers that keep their states
    random: bool = False  # whether a layer draws numbers
    count: int = 0

    def one_of(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def perhaps(self, share: int = 3) -> bool:
        """Returns True for one draw of `share`; False is simpler."""
        return self.draw(st.integers(0, share - 1)) == share - 1

    def name(self, begin: str) -> str:
        self.count += 1
        return f"{begin}{self.count}"

    def value(self, kind: str | None = None) -> tuple[str, str]:
        """Returns a value of this step, every second time the last one."""
        fitting = [v for v in self.values if kind in (None, v[1])]
        return self.draw(st.sampled_from(fitting[::-1])) if self.perhaps(2) else fitting[-1]

    def layer(self, begin: str, made: str) -> str:
        """Returns the name of a new layer, or of one that is called once more."""
        same = [name for name, text in self.layers if text == made]
        if same and self.perhaps():
            return self.draw(st.sampled_from(same))
        name = self.name(begin)
        self.layers.append((name, made))
        return name

    def keep(self, kind: str, *lines: str) -> str:
        """Adds lines that compute the value "{v}"."""
        name = self.name("v")
        self.body += [line.format(v=name) for line in lines]
        self.values.append((name, kind))
        return name


def _product(p: _Draft) -> None:
    """A linear layer or a convolution, of one value or of two joined, and perhaps changed."""
    source, kind = p.value()
    joined = p.perhaps(4)
    if joined:
        source = f"torch.cat([{source}, {p.value(kind)[0]}], dim=1)"
    if kind == "flat":
        call = f"self.{p.layer('fc', f'nn.Linear({12 if joined else 6}, 6)')}({source})"
    elif p.perhaps(4):
        reshaped = p.one_of("{}.flatten(1)", "{}.view(3, -1)", "{}.reshape(len({}), -1)")
        features = reshaped.format(source, source)
        kind = "flat"
        call = f"self.{p.layer('fc', f'nn.Linear({64 if joined else 32}, 6)')}({features})"
    else:
        conv = f"nn.Conv2d({4 if joined else 2}, 2, 3, padding=1)"
        call = f"self.{p.layer('conv', conv)}({source})"
    lines = ["{v} = " + call]
    if p.perhaps(5):  # nothing has read the result yet, so that autograd allows it
        lines.append(p.one_of("{v} += 0.25", "{v}.mul_(0.5)", "F.relu({v}, inplace=True)"))
    p.keep(kind, *lines)


def _leaky(p: _Draft) -> None:
    source, kind = p.value()
    feedback = [name for name, of in p.values if name.startswith("back") and of == kind]
    if feedback and p.perhaps(2):
        source = f"{source} + {feedback[0]}"
    options = f"beta={p.one_of(0.5, 0.25, 0.75)}, threshold={p.one_of(0.625, 0.375, 1.0)}"
    options += p.one_of("", ", reset_mechanism='zero'", ", reset_mechanism='none'")
    options += p.one_of("", "", ", learn_beta=True", ", learn_threshold=True")
    style = p.one_of("passed", "stored", "implicit")
    if style == "stored":
        name = p.layer("lif", f"leaky({options}, init_hidden=True)")
        p.keep(kind, f"{{v}} = self.{name}({source})")
        p.stored.append(name)
        return
    name = p.layer("lif", f"leaky({options})")
    if style == "implicit":
        p.keep(kind, f"{{v}}, _ = self.{name}({source})")
        p.stored.append(name)
        return
    known = [state for state, layer in p.states if layer == name]
    mem = p.one_of(*known) if known and p.perhaps(2) else _new_state(p, name, "mem")
    spk = p.keep(kind, f"{{v}}, {mem} = self.{name}({source}, {mem})")
    if p.perhaps(4):  # what comes behind reads mem
        p.values[-1] = (mem, kind) if p.perhaps(2) else (spk, kind)


def _new_state(p: _Draft, layer: str, what: str) -> str:
    state = p.name(what)
    p.start.append(f"{state} = self.{layer}.reset_mem()" + ("[0]" if what == "syn" else ""))
    if "cell" in layer and what == "mem":
        p.start[-1] += "[1]"
    p.states.append((state, layer))
    return state


def _cell(p: _Draft) -> None:
    if all(kind != "image" for _, kind in p.values):
        return _leaky(p)
    source, _ = p.value("image")
    options = p.one_of("", ", reset_mechanism='subtract'", ", reset_mechanism='zero'")
    options += p.one_of("", "", ", learn_threshold=True")
    if p.perhaps(2):
        name = p.layer("cell", f"cell(2, 2, 3{options}, init_hidden=True)")
        p.keep("image", f"{{v}} = self.{name}({source})")
        p.stored.append(name)
        return None
    name = p.layer("cell", f"cell(2, 2, 3{options})")
    syn, mem = _new_state(p, name, "syn"), _new_state(p, name, "mem")
    p.keep("image", f"{{v}}, {syn}, {mem} = self.{name}({source}, {syn}, {mem})")
    return None


def _plain(p: _Draft) -> None:
    """A function without parameters, or batch norm."""
    source, kind = p.value()
    other, _ = p.value(kind)
    choices = [
        "{v} = {0} + {1}", "{v} = {0} - 0.5 * {1}", "{v} = torch.relu({0})", "{v} = {0} * 0.5",
        "{v} = Scale.apply({0})", "{v} = {0}.clamp(-1, 1)", "norm", "norm", "no_grad",
    ]  # fmt: skip
    if kind == "image":
        choices += ["{v} = F.max_pool2d({0}, 3, 1, 1)"]
        choices += ["{v} = F.avg_pool2d(F.pad({0}, (0, 1, 0, 1)), 2, 1)"]
    if not p.random:
        choices += [
            "dropout",
            "{v} = F.dropout({0}, 0.5)",
            "{v} = {0} * (torch.rand_like({0}) < 0.5)",
        ]
    line = p.one_of(*choices)
    if line == "norm":
        made = "nn.BatchNorm2d(2)" if kind == "image" else "nn.BatchNorm1d(6)"
        name = p.layer("bn", made + p.one_of(".eval()", ".eval()", ""))
        read = source
        if kind == "image" and p.perhaps(2):  # nobody else reads what the convolution returns
            read = f"self.{p.layer('conv', 'nn.Conv2d(2, 2, 3, padding=1)')}({source})"
        line = f"{{v}} = self.{name}({read})" + p.one_of("", f" + {other}")
        if "eval" not in dict(p.layers)[name] and p.perhaps(3):
            numbers = f"self.{name}.running_mean, self.{name}.running_var"
            line = f"{{v}} = F.batch_norm({source}, {numbers}, None, None, True, 0.5)"
    elif line == "no_grad":
        p.keep(kind, "with torch.no_grad():", f"    {{v}} = {source} * 0.5")
        return
    elif line == "dropout":
        line = f"{{v}} = self.{p.layer('drop', 'nn.Dropout(0.5)')}({source})"
    p.random = p.random or "drop" in line or "rand" in line
    p.keep(kind, line.replace("{0}", source).replace("{1}", other))


def _idle(p: _Draft) -> None:
    """A dropout that does nothing, and perhaps a function in place behind it."""
    source, kind = p.value()
    layers = "nn.Dropout(0.5).eval()", "nn.Dropout(0.0)", "nn.Dropout(0.5, inplace=True).eval()"
    functions = "F.dropout({0}, p=0.0)", "torch.dropout({0}, 0.5, False)"
    made = p.one_of(*layers, *functions)
    call = made if made in functions else f"self.{p.layer('idle', made)}({{0}})"
    lines = ["{v} = " + call.replace("{0}", source)]
    if p.perhaps(3):
        choices = ["{v} += 0.25", "{v}.mul_(0.5)", "F.relu({v}, inplace=True)", "{v} += {1}"]
        lines.append(p.one_of(*choices).replace("{1}", p.value(kind)[0]))
    p.keep(kind, *lines)


def _when(p: _Draft, *lines: str) -> None:
    """Adds lines to the end of a step, which all steps, every second or one of them run."""
    when = p.one_of("", "if t % 2 == 1:", f"if t == {p.draw(st.integers(0, p.time - 1))}:")
    p.ends += [when, *(f"    {line}" for line in lines)] if when else lines


def _state(p: _Draft) -> None:
    """Resets, changes or detaches a state."""
    if p.states and p.perhaps(2):
        state, layer = p.one_of(*p.states)
        lines = ["{0} = {0}.detach()", "{0} = {0} * 0.5", "{0} = torch.zeros_like({0})"]
        if not p.training:
            lines.append("{0}.mul_(0.5)")
        if layer.startswith("lif"):
            lines += ["{0} = self.{1}.reset_mem()"]
        _when(p, p.one_of(*lines).format(state, layer))
    elif p.stored:
        layer = p.one_of(*p.stored)
        lines = ["self.{0}.reset_mem()", "self.{0}.mem = self.{0}.mem.detach()"]
        lines += ["self.{0}.mem = self.{0}.mem * 0.5"]
        _when(p, p.one_of(*lines).format(layer))


def _record(p: _Draft) -> None:
    """Keeps a value of each step, or a sum of them."""
    source, kind = p.value()
    name, shape = p.name("kept"), SHAPES[kind]
    begin, line = p.one_of(
        ("[]", "{0}.append({1})"),
        ("0", "{0} += {1}"),
        ("0", "{0} = {0} + {1}"),
        (f"x.new_zeros({shape})", "{0}.add_({1})"),
        (f"x.new_zeros({(p.time, *shape)})", "{0}[t] = {1}"),
        (f"x.new_zeros({(shape[0], p.time, *shape[1:])})", "{0}[:, t] = {1}"),
        ("None", "if t == 0:\n    {0} = {1}"),
    )
    p.start.append(f"{name} = {begin}")
    p.ends += line.format(name, source).split("\n")
    if begin == "[]" and p.perhaps(2):
        p.end.append(f"{name} = torch.stack({name})")
        begin = "stack"
    p.results.append(name)
    if begin not in ("[]", "None") and p.perhaps(2):
        related = (
            "{0}[-1]",
            "{0}.view(-1)",
            "{0}.flatten()",
            "{0}.detach()",
            "{0} * 1",
            "{0}.to({0})",
        )
        columns = "torch.stack([{0}[:, k] for k in range(2)])", "{0}[:, 1:].as_strided((2,), (3,))"
        name, source = p.name("more"), name
        p.end.append(f"{name} = {p.one_of(*related, *columns).format(source)}")
        p.results.append(name)
    if begin not in ("[]", "None") and p.perhaps(4):
        p.end += ["torch._dynamo.graph_break()"] * p.perhaps(2) + [f"{name}.mul_(0.5)"]


def _number(p: _Draft) -> None:
    """Keeps a number of each step, (), which meets one of another dtype or of its own."""
    source, _ = p.value()
    name, number, dtype = p.name("kept"), p.name("number"), p.one_of("float64", "float32", "int64")
    p.start += [f"{name} = []", f"{number} = torch.tensor(2, dtype=torch.{dtype})"]
    p.ends.append(f"{name}.append({source}.sum() * {number})")
    p.results.append(name)


def _written(p: _Draft) -> None:
    """Writes into what a step has computed, which without gradients is allowed late, too."""
    if p.training:
        return _record(p)
    source, kind = p.value()
    line = p.one_of("{0} += 0.25", "{0}.mul_(0.5)", "torch.add({0}, {1}, out={0})", "{0}[0] = 0")
    p.body.append(line.format(source, p.value(kind)[0]))
    return None


# Loops over x, each with whether x is one step, and with the dimension of time.
_HEADS = [
    ("for t in range({}):", "x_t = x[t]", False, 0),
    ("for t, x_t in enumerate(x):", "", False, 0),
    ("for t, x_t in enumerate(x.unbind(0)):", "", False, 0),
    ("for t in range({}):", "x_t = x[:, t]", False, 1),
    ("for t in range({}):", "x_t = x", True, 0),
]
_LAYERS = (_product, _product, _leaky, _leaky, _leaky, _cell, _plain, _plain, _idle)
_OTHERS = (_record, _record, _number, _state, _state, _written)


@st.composite
def programs(draw: Any, training: bool) -> Program:
    """Draws a program of two to five layers with neurons, in three to six steps."""
    time = draw(st.integers(3, 6))
    kind = draw(st.sampled_from(["flat", "image"]))
    p = _Draft(draw, training, time, [("x_t", kind)])
    head, line, one, axis = draw(st.sampled_from(_HEADS))
    p.body += [line] if line else []
    if p.perhaps(3):
        back = p.name("back")
        p.start.append(f"{back} = x.new_zeros({SHAPES[kind]})")
        p.values.insert(0, (back, kind))
    else:
        back = ""
    neurons, most = 0, draw(st.integers(2, 4))
    while neurons < most:
        add = p.one_of(*_LAYERS)
        add(p)
        neurons += add in (_leaky, _cell)
        while p.perhaps(2):
            p.one_of(*_OTHERS)(p)
        if len(p.body) > 9:
            break
    if not neurons:
        _leaky(p)
    _record(p)
    if back:
        p.ends.append(f"{back} = {p.value(kind)[0]}")
    begin = p.one_of(
        "utils.reset(self)",
        *(["\n".join(f"self.{name}.reset_mem()" for name in p.stored)] if p.stored else []),
    )
    times = 1 if training else draw(st.sampled_from([1, 1, 2]))
    if times > 1:  # the second call goes on with the states of the first
        begin = ""
    states = [state for state, _ in p.states]
    return Program(
        kind, time, tuple(p.layers), tuple(filter(None, [*begin.split("\n"), *p.start])),
        head.format(time), (*p.body, *p.ends), tuple(p.end),
        f"[{', '.join([*p.results, *states])}]", one, axis, times,
    )  # fmt: skip


# The layers of a stack: of steps (N, 6), and of images.
_IN_STACKS = {
    "flat": [("fc", "nn.Linear(6, 6)"), ("bn", "nn.BatchNorm1d(6)"),
        ("bn", "nn.BatchNorm1d(6).eval()"),
    ],
    "image": [
        ("conv", "nn.Conv2d(2, 2, 3, padding=1)"), ("cell", "cell(2, 2, 3, init_hidden=True)"),
        ("cell", "cell(2, 2, 3, reset_mechanism='zero', init_hidden=True)"),
        ("bn", "nn.BatchNorm2d(2)"), ("bn", "nn.BatchNorm2d(2).eval()"),
        ("pool", "nn.MaxPool2d(3, 1, 1)"),
        ("flat", "nn.Sequential(nn.Flatten(), nn.Linear(32, 6))"),
    ],
}  # fmt: skip
_IN_BOTH = [
    ("lif", "leaky(beta=0.5, threshold=0.625, init_hidden=True)"),
    ("lif", "leaky(beta=0.25, threshold=0.375, learn_threshold=True, init_hidden=True)"),
    ("idle", "nn.Dropout(0.5).eval()"), ("idle", "nn.Dropout(0.0)"),
    ("relu", "nn.ReLU()"), ("relu", "nn.ReLU(inplace=True)"),
]  # fmt: skip


@st.composite
def stacks(draw: Any, training: bool) -> Program:
    """Draws a program that calls one layer after the other, some of them twice."""
    time, kind = draw(st.integers(3, 5)), draw(st.sampled_from([*SHAPES]))
    p, chain, shape = _Draft(draw, training, time, []), [], kind
    head, line, one, axis = draw(st.sampled_from(_HEADS))
    for _ in range(draw(st.integers(2, 6))):
        choices = [*_IN_STACKS[shape], *_IN_BOTH[: None if chain else -1]]  # x is not written to
        choices += [("drop", "nn.Dropout(0.5)")] * (not p.random)
        begin, made = p.one_of(*choices)
        chain.append(p.layer(begin, made))
        p.random = p.random or begin == "drop"
        shape = "flat" if begin == "flat" else shape
    body = [*filter(None, [line]), *(f"x_t = self.{name}(x_t)" for name in chain)]
    return Program(
        kind, time, tuple(p.layers), ("utils.reset(self)", "out = []"), head.format(time),
        (*body, "out.append(x_t)"), (), "torch.stack(out)", one, axis, chain=tuple(chain),
    )  # fmt: skip
