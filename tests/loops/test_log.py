"""The log says what became of each layer's steps, and warns where a loop stays one."""

import logging
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple

import pytest
import snntorch.utils
import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

import snnlstm
from snnlstm.calls.entries import BoundedDict
from snnlstm.loops import backend
from tests.loops.compiled import BACKEND, Calls, merges, numbers
from tests.loops.networks import Documentation, Recurrent, leaky
from tests.loops.parts import N, T, looped
from tests.loops.test_norms import Normed, plain
from tests.loops.test_rules import feedback

pytestmark = [merges, pytest.mark.usefixtures("fresh_compiler")]


@pytest.fixture(autouse=True)
def _nothing_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_told", "_graphs"):
        monkeypatch.setattr(backend, name, BoundedDict())


# ---- networks ------------------------------------------------------------------------------------


def loop(
    change: Callable[[int, Tensor], Tensor] = lambda t, mem: mem, layer: str = "fc1"
) -> Callable[[Any, Tensor], Tensor]:
    """Returns a forward over steps of x, (T, ...); `change(t, mem)` comes before each step."""

    def forward(net: Any, x: Tensor) -> Tensor:
        mem, out = net.lif1.reset_mem(), []
        for t, x_t in enumerate(x):
            spk, mem = net.lif1(getattr(net, layer)(x_t), change(t, mem))
            out.append(net.drop(spk))
        return torch.stack(out)

    return forward


ALL_STEPS = looped(loop())


def summed(net: Any, x: Tensor) -> Tensor:
    mem, total = net.lif1.reset_mem(), 0
    for t in range(x.shape[1]):
        spk, mem = net.lif1(net.fc1(x[:, t]), mem)
        total = total + spk
    return total


def of_an_image(net: Any, x: Tensor) -> Tensor:
    mem, out = net.lif1.reset_mem(), []
    for _ in range(1):
        spk, mem = net.lif1(net.fc1(x), mem)
        out.append(spk)
    return torch.stack(out)


def at_two_places(net: Any, x: Tensor) -> Tensor:
    """Calls a Linear, a Leaky and a batch norm at two places of each step."""
    first, second, out = net.lif1.reset_mem(), net.lif1.reset_mem(), []
    for x_t in x:
        spk, first = net.lif1(net.fc1(x_t), first)
        spk, second = net.lif1(net.fc1(spk), second)
        out.append(net.bn(spk) + net.bn(x_t))
    return torch.stack(out)


def alone(net: Any, x: Tensor) -> Tensor:
    return torch.stack([net.lif1(x_t)[0] for x_t in x])


def cut_by(how: str) -> Callable[[Any, Tensor], None]:
    """Returns a forward whose loop a graph break cuts; each layer is compiled alone then."""

    def forward(net: Any, x: Tensor) -> None:
        mem, other = net.lif1.reset_mem(), net.lif2.reset_mem()
        for x_t in x:
            spk, mem = net.lif1(net.fc1(x_t), mem)
            spk, other = net.lif2(net.fc2(spk), other)
            loss = spk.sum()
            if how == "backward" and loss.requires_grad:
                loss.backward()
                mem, other = mem.detach(), other.detach()
            elif how == "item":
                loss.item()
            elif how == "print":
                print(end="")

    return forward


def in_halves() -> nn.Module:
    """Makes an accelerated network of half types."""
    net = Documentation()
    snnlstm.accelerate(net)
    return net.bfloat16()


def normed() -> nn.Module:
    """Makes an accelerated network of convolutions, each with a batch norm."""
    net = Normed(plain)
    snnlstm.accelerate(net)
    return net


def patched() -> nn.Module:
    """Makes a network of snnTorch's layers that are ours by patch."""
    with snnlstm.patch():
        return Documentation()


def one_of_theirs() -> nn.Module:
    """Makes an accelerated network, of which one Leaky became snnTorch's again."""
    net = ALL_STEPS()
    net.lif1 = leaky()
    return net


class Residual(nn.Module):
    """Adds the input of its Linear to the result, which is an operation of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + x


def with_blocks(net: Any) -> None:
    net.blocks = nn.Sequential(Residual(), Residual())


def with_layers(net: Any) -> None:
    net.layers = nn.ModuleList((net.fc1, net.hidden, nn.ReLU()))


def sliced(net: Any, x: Tensor) -> Tensor:
    """Takes some layers by a slice, which makes a module in each step."""
    net.hidden.reset_mem()
    out = []
    for x_t in x:
        for layer in net.layers[:2]:
            x_t = layer(x_t)
        out.append(x_t)
    return torch.stack(out)


# ---- what is said of a loop ----------------------------------------------------------------------


class Case(NamedTuple):
    """Is a network, the shapes of x in its calls, and what the log says of them.

    warnings: the words of each warning, in order. lines: how each line of the last message at INFO
    begins. gradients: whether they are recorded in each of the calls that every shape has.
    """

    make: Callable[[], Any]
    shapes: tuple[tuple[int, ...], ...]
    warnings: Sequence[Sequence[str]] = ()
    lines: Sequence[str] | None = None
    gradients: Sequence[bool] = (True,)


STEPS, IMAGES, NORMED = ((T, N, 6),), ((N, T, 1, 8, 8),), ((T, N, 2, 5, 5),)
FC, LIF = "fc1 Linear: fold (one call", "lif1 Leaky: sequence (one call for all steps)"
RANDOM = "drop Dropout: step (it draws new random numbers for every step)"
WHOLE = "conv{0} Conv2d: fold (one call", "bn{0} BatchNorm2d: sequence (one call for all steps)"
FOLDED = "conv{0} Conv2d: fold (one call", "bn{0} BatchNorm2d: fold (part of conv{0})"
OUTSIDE = (
    "one step of layer lif1: the loop lies outside",
    ".backward()",
    ".item()",
    "print",
    "graph_breaks",
)
ACCELERATE = "runs as plain operations: call snnlstm.accelerate"
FEW = ["of T=1 small steps"]
CASES = {
    "a line for each layer": Case(ALL_STEPS, STEPS, lines=[FC, LIF, RANDOM]),
    "a dropout that does nothing": Case(
        looped(loop(), lambda net: net.drop.eval()), STEPS,
        lines=[FC, LIF, "drop Dropout: fold (it does nothing and returns its input)"],
    ),
    "layers at two places of a step": Case(
        looped(at_two_places), STEPS, lines=[
            "fc1 Linear: fold (one call for all steps at each of 2 places of a step)",
            "lif1 Leaky: sequence (one call for all steps at each of 2 places of a step)",
            "bn BatchNorm1d: step (its input, or its state, depends on its last result)",
        ],
    ),
    "norms": Case(
        normed, NORMED, lines=[line.format(k) for k in (1, 2) for line in WHOLE] + ["lif2"]
    ),
    "norms in evaluation": Case(
        lambda: normed().eval(), NORMED, gradients=[False],
        lines=[line.format(k) for k in (1, 2) for line in FOLDED] + ["lif2"],
    ),
    "a block, whose layers alone are listed": Case(
        looped(loop(layer="blocks"), with_blocks), STEPS,
        lines=["blocks.0.fc Linear: fold", "blocks.1.fc Linear: fold", LIF, RANDOM],
    ),
    "a slice of layers": Case(
        looped(sliced, with_layers), STEPS,
        lines=["layers.0 Linear: fold", "layers.1 Leaky: sequence"],
    ),
    "steps that are numbers": Case(looped(alone), ((T,),), lines=[LIF]),
    "feedback": Case(
        looped(feedback), STEPS, [["lif1 (Leaky)", "last result"], ["lif2 (Leaky)", "last result"]]
    ),
    "a neuron of snnTorch's with a Linear, for which accelerate has nothing": Case(
        Recurrent, STEPS,
        lines=["fc Linear: step (its input is ano", "lif.recurrent Linear: step (its input, or"],
    ),
    "a detach in each step": Case(
        looped(loop(lambda t, mem: mem.detach())), STEPS, [["lif1 (Leaky)", "detached"]]
    ),
    "detached at times": Case(
        looped(loop(lambda t, mem: mem if t % 2 else mem.detach())), STEPS,
        lines=[FC, "lif1 Leaky: sequence (4 steps in 2 calls: its states are reset, det", RANDOM],
    ),
    "states of half types": Case(
        in_halves, IMAGES, [[f"sclstm{k} (SConv2dLSTM)", "half type"] for k in (1, 2)]
    ),
    "a single step": Case(looped(lambda net, x: net.lif1(net.fc1(x))), ((N, 6),), [OUTSIDE]),
    "a layer that is compiled alone": Case(
        lambda: snnlstm.SConv2dLSTM(2, 3, 3, threshold=0.1), ((N, 2, 6, 6),),
        [["one step of layer SConv2dLSTM: "]],
    ),
    **{
        f"a loop that {how} cuts": Case(
            looped(cut_by(how)), STEPS, [OUTSIDE], gradients=(True, False)
        )
        for how in ("backward", "item", "print")
    },
    **{
        f"one step of {shape}": Case(looped(forward), (shape,), [FEW], gradients=(True, False))
        for forward, shape in (
            (loop(), (1, N, 6)), (summed, (N, 1, 6)), (of_an_image, (N, 6)),
        )
    },
    "few small steps": Case(
        looped(alone), ((3, N, 6),), [["of T=3 small steps"]], gradients=[False]
    ),
    "small steps": Case(looped(alone), ((4, N, 6),), gradients=[False]),
    "few wide steps": Case(looped(alone), ((3, N, 500),), gradients=[False]),
    "snnTorch's layers": Case(
        Documentation, IMAGES,
        [["sclstm1", "SConv2dLSTM", ACCELERATE], ["sclstm2", ACCELERATE], ["lif1", ACCELERATE]],
    ),
    "one of snnTorch's": Case(one_of_theirs, STEPS, [["lif1", "Leaky", ACCELERATE]]),
    "layers that are ours by patch": Case(patched, IMAGES),
    "further numbers of steps": Case(
        ALL_STEPS, ((T, N, 6), (T - 1, N, 6), (T + 1, N, 6)),
        [["lif1", f"{T - 1} and {T}", "unroll"]],
    ),
}  # fmt: skip


def compiled(make: Any, *shapes: tuple[int, ...], gradients: Sequence[bool] = (True,), **options):
    """Compiles a network and calls it with x of these shapes."""
    net = make()
    dtype = next((p.dtype for p in net.parameters()), torch.float32)
    net = torch.compile(net, backend=BACKEND, **options)
    for shape, recorded in product(shapes, gradients):
        with torch.set_grad_enabled(recorded):
            net(numbers(*shape, dtype=dtype))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    records = [record for record in caplog.records if record.name == "snnlstm"]
    return [record.getMessage() for record in records if record.levelno == logging.WARNING]


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Returns the lines of the last message that lists layers."""
    messages = [record.getMessage() for record in caplog.records if record.name == "snnlstm"]
    return [text for text in messages if text.startswith("torch.compile:\n")][-1].split("\n  ")[1:]


@pytest.mark.parametrize("name", CASES)
def test_what_is_said_of_a_loop(name, caplog):
    case = CASES[name]
    with caplog.at_level(logging.INFO, "snnlstm"):
        compiled(case.make, *case.shapes, gradients=case.gradients)
    for message, words in zip(warnings(caplog), case.warnings, strict=True):
        assert all(word in message for word in words), message
    if case.lines is not None:
        for line, begin in zip(lines(caplog), case.lines, strict=True):
            assert line.startswith(begin)


def test_a_layer_has_its_name_in_the_network(caplog, monkeypatch):
    """Wherever the compiled function finds the network: here among the global variables."""
    monkeypatch.setitem(globals(), "GLOBAL", ALL_STEPS())
    with caplog.at_level(logging.INFO, "snnlstm"):
        torch.compile(lambda x: GLOBAL(x), backend=BACKEND)(numbers(*STEPS[0]))  # noqa: F821
    assert [line.split()[0] for line in lines(caplog)] == ["fc1", "lif1", "drop"]


STEPWISE = {
    "the network": lambda net: torch.compile(net, backend=BACKEND),
    "the network, in place": lambda net: net.compile(backend=BACKEND) or net,
    "a function": lambda net: torch.compile(lambda x: net(x), backend=BACKEND),
    "the layer": lambda net: net[0].compile(backend=BACKEND) or net,
    "the layer, wrapped": lambda net: nn.Sequential(
        torch.compile(net[0], backend=BACKEND), *net[1:]
    ),
}


@pytest.mark.parametrize("how", STEPWISE)
@pytest.mark.parametrize("kind", ["cell", "Leaky"])
def test_a_compiled_step_is_told_once_by_the_layers_name(kind, how, caplog):
    """The first call starts from empty states, for which the next one has another graph."""
    options = {"threshold": 0.3, "init_hidden": True}
    first = {
        "cell": lambda: snnlstm.SConv2dLSTM(2, 3, 3, **options),
        "Leaky": lambda: snnlstm.Leaky(0.9, **options),
    }
    net = nn.Sequential(first[kind](), nn.Flatten(), snnlstm.Leaky(0.9, **options))
    run = STEPWISE[how](net)
    with caplog.at_level(logging.WARNING, "snnlstm"):
        for _ in range(2):
            snnlstm.reset(net)
            for x in numbers(T, N, 2, 6, 6):
                run(x)
    (message,) = warnings(caplog)
    assert "the graph has one step of layer 0: the loop lies outside" in message


class Wide(nn.Module):
    """A network of a sweep over widths."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc, self.cell = nn.Linear(6, 25), snnlstm.SConv2dLSTM(1, width, 3, threshold=0.05)

    def forward(self, x: Tensor) -> Tensor:
        self.cell.reset_mem()
        return torch.stack([self.cell(self.fc(x_t).view(-1, 1, 5, 5))[0] for x_t in x])


def in_parts(net: nn.Module, batches: list[int], training: bool, run: Any) -> None:
    """Runs parts of a sequence, between which states stay: truncated backpropagation."""
    for batch in batches:
        snntorch.utils.reset(net)
        for x in numbers(6, batch, 1, 8, 8).split(3):
            with torch.set_grad_enabled(training):
                out = run(x)
            if training:
                out.mean().backward()
                snnlstm.SConv2dLSTM.detach_hidden()
                snnlstm.Leaky.detach_hidden()


def truncated() -> tuple[nn.Module, Any, Calls]:
    """Makes a network of stored states, and a compiled part of its loop, with its graphs."""
    cell = snnlstm.SConv2dLSTM(1, 2, 3, threshold=0.05, init_hidden=True)
    lif = snnlstm.Leaky(0.5, threshold=0.1, init_hidden=True)
    net, calls = nn.Sequential(cell, nn.Flatten(), nn.Linear(128, 4), lif), Calls()
    with calls.counted() as backend:
        part = torch.compile(lambda x: torch.stack([net(x_t) for x_t in x]), backend=backend)
    return net, part, calls


def test_truncated_backpropagation_needs_six_graphs_for_all_batch_sizes():
    """States are empty or stored, sizes one or any, and gradients wanted or not."""
    net, part, calls = truncated()
    in_parts(net, [8, 8, 5], True, part)
    in_parts(net, [16, 16, 3], False, part)
    assert calls.graphs <= 6
    made = calls.graphs
    in_parts(net, [7, 6, 4], True, part)
    in_parts(net, [11, 2], False, part)
    assert calls.graphs == made


@pytest.mark.parametrize("cause", ["the batch size", "the layers' sizes"])
def test_the_last_graph_that_torch_makes_has_a_warning(cause, caplog):
    """It names what differs, and what helps."""
    with caplog.at_level(logging.WARNING, "snnlstm"), torch._dynamo.config.patch(recompile_limit=4):
        if cause == "the batch size":
            net, part, _ = truncated()
            in_parts(net, [4, 3], True, part)
        else:
            for width in range(2, 6):
                assert not any("limit" in message for message in warnings(caplog))
                compiled(lambda w=width: Wide(w), *STEPS)
    (message,) = [message for message in warnings(caplog) if "limit" in message]
    assert all(word in message for word in ("4 graphs", cause, "drop_last", "torch.compiler.reset"))
    assert "number of steps" not in message


def test_an_older_torch_is_refused_by_its_version(monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.9.1"))
    with pytest.raises(RuntimeError, match=r"torch 2\.13.*got 2\.9\.1"):
        compiled(ALL_STEPS, *STEPS)


@pytest.mark.parametrize("options", [{"options": {"inner": "eager"}}, {"mode": "fastest"}], ids=str)
def test_unknown_options_are_refused(options):
    with pytest.raises(Exception, match=r"neither options nor a mode, got.*(inner|fastest)"):
        compiled(ALL_STEPS, *STEPS, **options)
