"""The log says what became of each layer's steps, and warns where a loop stays one."""

import logging
from typing import Any

import pytest
import snntorch as snn
import snntorch.utils
import torch
from torch import nn
from torch.torch_version import TorchVersion

import snnlstm
from snnlstm.calls.entries import BoundedDict
from snnlstm.loops import backend
from tests.loops.compiled import BACKEND, Calls, merges, numbers
from tests.loops.networks import Documentation, Recurrent, leaky
from tests.loops.parts import N, T, looped
from tests.loops.test_rules import feedback

pytestmark = [merges, pytest.mark.usefixtures("fresh_compiler")]

INFO, WARNING = logging.INFO, logging.WARNING


@pytest.fixture(autouse=True)
def _nothing_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_told", "_graphs"):
        monkeypatch.setattr(backend, name, BoundedDict())


def all_steps(net: Any, x: torch.Tensor) -> Any:
    mem, out = net.lif1.reset_mem(), []
    for x_t in x:
        spk, mem = net.lif1(net.fc1(x_t), mem)
        out.append(net.drop(spk))
    return torch.stack(out)


def one_step(net: Any, x: torch.Tensor) -> Any:
    return net.lif1(net.fc1(x))


def broken(net: Any, x: torch.Tensor) -> Any:
    """Breaks the graph in each step, behind a Leaky."""
    mem, out = net.lif1.reset_mem(), []
    for x_t in x:
        spk, mem = net.lif1(net.fc1(x_t), mem)
        torch._dynamo.graph_break()
        out.append(spk)
    return torch.stack(out)


def detached(net: Any, x: torch.Tensor) -> Any:
    mem, out = net.lif1.reset_mem(), []
    for x_t in x:
        spk, mem = net.lif1(net.fc1(x_t), mem)
        mem = mem.detach()
        out.append(spk)
    return torch.stack(out)


def cut(net: Any, x: torch.Tensor) -> Any:
    """Detaches the state at every second step."""
    mem, out = net.lif1.reset_mem(), []
    for t, x_t in enumerate(x):
        spk, mem = net.lif1(net.fc1(x_t), mem if t % 2 else mem.detach())
        out.append(spk)
    return torch.stack(out)


def in_halves() -> nn.Module:
    """Makes an accelerated network of half types."""
    net = Documentation()
    snnlstm.accelerate(net)
    return net.bfloat16()


def theirs() -> nn.Module:
    """Makes a network of snnTorch's layers that nobody has accelerated."""
    return Documentation()


def one_of_theirs() -> nn.Module:
    """Makes an accelerated network, of which one Leaky became snnTorch's again."""
    net = looped(all_steps)()
    net.lif1 = leaky()
    return net


def at_two_places(net: Any, x: torch.Tensor) -> Any:
    """Calls a Linear, a Leaky and a batch norm at two places of each step."""
    first, second, out = net.lif1.reset_mem(), net.lif1.reset_mem(), []
    for x_t in x:
        spk, first = net.lif1(net.fc1(x_t), first)
        spk, second = net.lif1(net.fc1(spk), second)
        out.append(net.bn(spk) + net.bn(x_t))
    return torch.stack(out)


class Residual(nn.Module):
    """Adds the input of its Linear to the result, which is an operation of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + x


def blocks(net: Any, x: torch.Tensor) -> Any:
    mem, out = net.lif1.reset_mem(), []
    for x_t in x:
        spk, mem = net.lif1(net.blocks(x_t), mem)
        out.append(spk)
    return torch.stack(out)


def with_blocks(net: Any) -> None:
    net.blocks = nn.Sequential(Residual(), Residual())


STEPS, IMAGES = (T, N, 6), (N, T, 1, 8, 8)
# What is compiled; the shape of x; the level; and the words of one message of that level, or of
# several.
MESSAGES = {
    "a line for each layer": (
        looped(all_steps), STEPS, INFO,
        ["\n  fc1 Linear: fold (", "\n  lif1 Leaky: sequence (",
         "\n  drop Dropout: step (it draws new random numbers for every step)"],
    ),
    "a dropout that does nothing": (
        looped(all_steps, lambda net: net.drop.eval()), STEPS, INFO,
        ["lif1 Leaky: sequence"], ["drop Dropout: fold (it does nothing and returns its input)"],
    ),
    "layers at two places of a step": (
        looped(at_two_places), STEPS, INFO,
        ["fc1 Linear: fold (one call for all steps at each of 2 places of a step)",
         "lif1 Leaky: sequence (one call for all steps at each of 2 places of a step)",
         "bn BatchNorm1d: step (its input, or its state, depends on its last result)"],
    ),
    "feedback": (
        looped(feedback), STEPS, WARNING,
        ["lif1", "Leaky", "last result"], ["lif2", "Leaky", "last result"],
    ),
    "a neuron with a Linear": (
        Recurrent, STEPS, INFO,
        ["lif.recurrent Linear: step (its input, or"], ["fc Linear: step (its input is another"],
    ),
    "a detach in each step": (looped(detached), STEPS, WARNING, ["lif1", "detach"]),
    "detached at times": (looped(cut), STEPS, INFO, ["lif1", "in 2 calls", "detached"]),
    "states of half types": (in_halves, IMAGES, WARNING, ["sclstm1", "half type"]),
    "a graph break": (looped(broken), STEPS, WARNING, ["one step", "lif1", "graph_breaks"]),
    "a single step": (looped(one_step), (N, 6), WARNING, ["one step", "lif1", "outside"]),
    "snnTorch's layers": (
        theirs, IMAGES, WARNING,
        ["sclstm1", "SConv2dLSTM", "accelerate"], ["lif1", "Leaky", "accelerate"],
    ),
    "one of snnTorch's": (one_of_theirs, STEPS, WARNING, ["lif1", "Leaky", "accelerate"]),
}  # fmt: skip
SECOND = ["lif1", f"{T - 1} and {T}", "unroll"]  # the second number of steps
UNKNOWN = r"neither options nor a mode, got.*(inner|fastest)"
OLDER = r"torch 2\.13.*got 2\.9\.1"


def compiled(make: Any, *shapes: tuple[int, ...], **options: Any) -> None:
    """Compiles a network and calls it with x of these shapes."""
    net = make()
    dtype = next((p.dtype for p in net.parameters()), torch.float32)
    net = torch.compile(net, backend=BACKEND, **options)
    for shape in shapes:
        net(numbers(*shape, dtype=dtype))


def said(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "snnlstm" and record.levelno == level
        and "accelerate(): " not in record.getMessage()
    ]  # fmt: skip


@pytest.mark.parametrize("name", MESSAGES)
def test_messages(name, caplog):
    make, shape, level, *expected = MESSAGES[name]
    with caplog.at_level(INFO, "snnlstm"):
        compiled(make, shape)
    messages = said(caplog, level)
    for words in expected:
        assert any(all(word in message for word in words) for message in messages), messages


def test_a_loop_that_is_merged_has_no_warning_and_one_message(caplog):
    with caplog.at_level(INFO, "snnlstm"):
        net = looped(all_steps)()
        caplog.clear()  # what accelerate said
        compiled(lambda: net, STEPS)
    assert not said(caplog, WARNING)
    assert len(said(caplog, INFO)) == 1


class Sliced(nn.Module):
    """Takes some of its layers by a slice, which makes a module in each step."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.Linear(6, 6), snnlstm.Leaky(0.5, threshold=0.1, init_hidden=True), nn.ReLU()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.layers[1].reset_mem()
        out = []
        for x_t in x:
            for layer in self.layers[:2]:
                x_t = layer(x_t)
            out.append(x_t)
        return torch.stack(out)


def test_a_loop_over_numbers_compiles():
    """Each step of (T,) is a number, which has no batch."""
    lif = snnlstm.Leaky(0.5, threshold=0.25)
    x = numbers(T)
    run = torch.compile(lambda x: [lif(x_t)[0] for x_t in x], backend=BACKEND)
    found = run(x)
    lif.reset_mem()
    assert found == [lif(x_t)[0] for x_t in x]


def test_a_slice_of_layers_leaves_a_loop_whole(caplog):
    with caplog.at_level(INFO, "snnlstm"):
        compiled(Sliced, STEPS)
    assert not said(caplog, WARNING)
    assert any("layers.1 Leaky: sequence" in message for message in said(caplog, INFO))


def test_a_layer_has_its_name_in_the_network(caplog, monkeypatch):
    """Wherever the compiled function finds the network: here among the global variables."""
    monkeypatch.setitem(globals(), "GLOBAL", looped(all_steps)())
    with caplog.at_level(INFO, "snnlstm"):
        torch.compile(lambda x: GLOBAL(x), backend=BACKEND)(numbers(*STEPS))  # noqa: F821
    assert names_told(caplog) == ["fc1", "lif1", "drop"]


def test_a_block_is_not_listed_beside_its_layers(caplog):
    net = looped(blocks, with_blocks)()
    with caplog.at_level(INFO, "snnlstm"):
        compiled(lambda: net, STEPS)
    assert names_told(caplog) == ["blocks.0.fc", "blocks.1.fc", "lif1"]


def names_told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Returns the names of the layers in the one message, which has a line for each."""
    (message,) = said(caplog, INFO)
    first, *lines = message.split("\n")
    assert first == "torch.compile:"
    return [line.split()[0] for line in lines]


@pytest.mark.parametrize("breaks", ["backward", "item", "print"])
def test_a_loop_that_graph_breaks_cut_is_told_once(breaks, caplog):
    """Each layer is compiled alone then, with gradients and without."""
    net = looped(all_steps)()

    def step(x):
        mem, other = net.lif1.reset_mem(), net.lif2.reset_mem()
        for x_t in x:
            spk, mem = net.lif1(net.fc1(x_t), mem)
            spk, other = net.lif2(net.fc2(spk), other)
            loss = spk.sum()
            if breaks == "backward" and loss.requires_grad:
                loss.backward()
                mem, other = mem.detach(), other.detach()
            elif breaks == "item":
                loss.item()
            elif breaks == "print":
                print(end="")

    with caplog.at_level(WARNING, "snnlstm"):
        compiled_step = torch.compile(step, backend=BACKEND)
        compiled_step(numbers(*STEPS))
        with torch.no_grad():
            compiled_step(numbers(*STEPS))
    messages = [message for message in said(caplog, WARNING) if "one step" in message]
    assert len(messages) == 1, messages
    assert all(word in messages[0] for word in (".backward()", ".item()", "print")), messages


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
    with caplog.at_level(WARNING, "snnlstm"):
        for _ in range(2):
            snnlstm.reset(net)
            for x in numbers(T, N, 2, 6, 6):
                run(x)
    (message,) = said(caplog, WARNING)
    assert "the graph has one step of layer 0: the loop lies outside" in message


def test_a_layer_that_is_compiled_alone_has_the_name_of_its_class(caplog):
    with caplog.at_level(WARNING, "snnlstm"):
        compiled(lambda: snnlstm.SConv2dLSTM(2, 3, 3, threshold=0.1), (N, 2, 6, 6))
    (message,) = said(caplog, WARNING)
    assert "one step of layer SConv2dLSTM: " in message


def summed(net: Any, x: torch.Tensor) -> Any:
    mem, total = net.lif1.reset_mem(), 0
    for t in range(x.shape[1]):
        spk, mem = net.lif1(net.fc1(x[:, t]), mem)
        total = total + spk
    return total


def of_an_image(net: Any, x: torch.Tensor) -> Any:
    mem, out = net.lif1.reset_mem(), []
    for _ in range(1):
        spk, mem = net.lif1(net.fc1(x), mem)
        out.append(spk)
    return torch.stack(out)


@pytest.mark.parametrize(
    ("forward", "shape"), [(all_steps, (1, N, 6)), (summed, (N, 1, 6)), (of_an_image, (N, 6))]
)
def test_a_loop_of_one_step_is_not_told_that_it_lies_outside(forward, shape, caplog):
    with caplog.at_level(WARNING, "snnlstm"):
        compiled(looped(forward), shape)
        assert not said(caplog, WARNING)
        with torch.no_grad():
            compiled(looped(forward), shape)
    (message,) = said(caplog, WARNING)
    assert "of T=1 small steps" in message


def test_a_second_number_of_steps_has_a_warning_and_a_third_no_other(caplog):
    with caplog.at_level(WARNING, "snnlstm"):
        net = torch.compile(looped(all_steps)(), backend=BACKEND)
        net(numbers(T, N, 6))
        assert not said(caplog, WARNING)
        net(numbers(T - 1, N, 6))
        net(numbers(T + 1, N, 6))
    messages = said(caplog, WARNING)
    assert len([m for m in messages if all(word in m for word in SECOND)]) == 1, messages


class Wide(nn.Module):
    """A network of a sweep over widths."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc, self.cell = nn.Linear(6, 25), snnlstm.SConv2dLSTM(1, width, 3, threshold=0.05)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
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


def truncated(**options: Any) -> tuple[nn.Module, Any, Calls]:
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
    with caplog.at_level(WARNING, "snnlstm"), torch._dynamo.config.patch(recompile_limit=4):
        if cause == "the batch size":
            net, part, _ = truncated()
            in_parts(net, [4, 3], True, part)
        else:
            for width in range(2, 6):
                assert not any("limit" in message for message in said(caplog, WARNING))
                compiled(lambda w=width: Wide(w), STEPS)
    (message,) = [message for message in said(caplog, WARNING) if "limit" in message]
    assert all(word in message for word in ("4 graphs", cause, "drop_last", "torch.compiler.reset"))
    assert "number of steps" not in message


def test_snntorchs_layers_that_are_ours_by_patch_have_no_warning(caplog):
    with caplog.at_level(WARNING, "snnlstm"), snnlstm.patch():
        compiled(lambda: Documentation(), IMAGES)
    assert not said(caplog, WARNING)


def test_another_neuron_of_snntorch_is_no_layer_of_ours(caplog):
    """accelerate would not change it, so nobody is told to call it."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lif = snn.Synaptic(alpha=0.5, beta=0.5, init_hidden=True)

        def forward(self, x):
            self.lif.reset_mem()
            return torch.stack([self.lif(x_t) for x_t in x])

    with caplog.at_level(WARNING, "snnlstm"):
        compiled(Net, STEPS)
    assert not said(caplog, WARNING)


@pytest.mark.parametrize(("steps", "features", "told"), [(3, 6, 1), (4, 6, 0), (3, 500, 0)])
def test_few_small_steps_without_gradients_have_a_warning(steps, features, told, caplog):
    """Wide spikes have 4 * 500 bytes for each of 3 samples and 3 steps."""
    net = snnlstm.Leaky(beta=0.5)
    run = torch.compile(lambda x: torch.stack([net(x_t)[0] for x_t in x]), backend=BACKEND)
    with caplog.at_level(WARNING, "snnlstm"), torch.no_grad():
        run(numbers(steps, N, features))
    assert len([m for m in said(caplog, WARNING) if "small steps" in m]) == told


def test_an_older_torch_is_refused_by_its_version(monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.9.1"))
    with pytest.raises(RuntimeError, match=OLDER):
        compiled(looped(all_steps), STEPS)


@pytest.mark.parametrize("options", [{"options": {"inner": "eager"}}, {"mode": "fastest"}], ids=str)
def test_unknown_options_are_refused(options):
    with pytest.raises(Exception, match=UNKNOWN):
        compiled(looped(all_steps), STEPS, **options)
