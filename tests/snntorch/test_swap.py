"""accelerate() makes the cells of snnTorch's in a model ours."""

import copy
import pickle
import shutil
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import snntorch
import torch
from snntorch.functional.quant import state_quant
from torch import nn

import snnlstm
from tests.shared.fresh import fresh
from tests.shared.helpers import (
    close,
    described,
    ours,
    same_gradients,
    states,
    steps,
    theirs,
)

X, START = steps(1, 2, 2, 6, 6)[0], states(2, 3, 6, 6)


def test_accelerate_keeps_all_that_the_cell_has():
    options = {
        "max_pool": 2, "learn_threshold": True, "reset_mechanism": "zero", "init_hidden": True,
        "output": True, "spike_grad": snntorch.surrogate.sigmoid(5), "threshold": 0.2,
    }  # fmt: skip
    cell, expected = theirs(**options), theirs(**options)
    seen = []
    handle = cell.register_forward_hook(lambda module, args, out: seen.append(module))
    # The public name of this method came with torch 2.5.
    cell._register_load_state_dict_pre_hook(lambda module, *_: seen.append(module), True)
    for each in (cell, expected):
        each(X)
        each.eval()
    cell.remark = "mine"
    conv, mem, before = cell.conv, cell.mem, dict(cell.named_parameters())
    assert snnlstm.accelerate(cell).model is cell
    assert type(cell) is snnlstm.SConv2dLSTM
    for name, parameter in cell.named_parameters():
        assert before[name] is parameter
    assert list(cell.state_dict()) == list(expected.state_dict())
    assert cell.conv is conv
    assert cell.mem is mem
    assert not cell.training
    assert (cell.init_hidden, cell.output, cell.reset_mechanism) == (True, True, "zero")
    assert cell.spike_grad == snnlstm.surrogate.sigmoid(5)
    assert cell.remark == "mine"
    assert len(list(cell.buffers())) == 2
    close(cell(X), expected(X))
    cell.load_state_dict(cell.state_dict())
    handle.remove()
    cell(X)
    assert seen == [cell, cell, cell]
    cell.reset_parameters()
    assert cell.threshold == expected.threshold


class KeepsAList(nn.Module):
    """A network calls its cells from a plain list."""

    def __init__(self, cell):
        super().__init__()
        self.cell, self.order = cell, [cell]

    def forward(self, x):
        return self.order[0](x)


def compiled_in_place(cell):
    cell.compile(backend="eager")
    return cell


HOLDERS = {
    "bare": lambda cell: cell,
    "list": KeepsAList,
    "torch.compile": lambda cell: torch.compile(cell, backend="eager"),
    "cell.compile": compiled_in_place,
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_whatever_holds_a_cell_holds_the_one_that_runs(holder):
    cell, expected = theirs(init_hidden=True), theirs(init_hidden=True)
    model = HOLDERS[holder](cell)
    close(model(X), expected(X))
    snnlstm.accelerate(model)
    assert type(cell) is snnlstm.SConv2dLSTM
    assert cell not in snntorch.SpikingNeuron.instances
    for reset in (cell.reset_mem, snntorch.SConv2dLSTM.reset_hidden):
        for _ in range(2):
            close(model(X), expected(X))
        reset()
        expected.reset_mem()


def test_accelerate_runs_the_reset_mechanism_that_a_checkpoint_brought():
    old, expected = theirs(reset_mechanism="none"), theirs(reset_mechanism="zero")
    old.load_state_dict(expected.state_dict())
    close(snnlstm.accelerate(old).model(X, *START), expected(X, *START))


class Mine(snntorch.SConv2dLSTM):
    pass


# snnTorch has a proposal of such a cell.
OnSignals = type("SConv1dLSTM", (snntorch.SpikingNeuron,), {})


def test_accelerate_reports_every_cell_and_neuron_by_name(caplog):
    shared, replaced = theirs(3, 3, 3), theirs()
    replaced.forward = lambda x: x
    model = nn.ModuleDict({
        "a": nn.Sequential(theirs(surrogate_disable=True), nn.ModuleList([shared])), "b": shared,
        "mine": Mine(2, 3, 3), "even": theirs(2, 3, 2), "hand": replaced, "ours": ours(),
        "lif": snntorch.Synaptic(0.9, 0.8), "flat": nn.Flatten(), "signals": OnSignals(1.0),
    })  # fmt: skip
    before = dict(model.named_children())
    report = snnlstm.accelerate(model)
    assert report.model is model
    assert report.swapped == ("a.0", "a.1.0", "b")
    assert model["a"][1][0] is model["b"]
    assert type(model["b"]) is type(model["a"][0]) is snnlstm.SConv2dLSTM
    assert model["a"][0].spike_grad == snnlstm.surrogate.NONE
    reasons = {
        "mine": "Mine is a subclass of snntorch.SConv2dLSTM and may compute something else",
        "even": "kernel_size must be odd, got 2",
        "hand": "its forward was replaced",
        "ours": "is snnlstm's already",
        "lif": "Synaptic is another neuron; only SConv2dLSTM and Leaky have faster ones",
        "signals": "SConv1dLSTM is another neuron; only SConv2dLSTM and Leaky have faster ones",
    }
    assert list(report.left) == list(reasons)
    assert all(report.left[name].startswith(reason) for name, reason in reasons.items())
    assert all(model[name] is before[name] for name in reasons)
    # The log names the cells that accelerate could be expected to swap and did not.
    said = [message.split(":")[0] for message in caplog.messages]
    assert said == [f"accelerate leaves {name}" for name in ("mine", "even", "hand")]


class MyConvLstm(nn.Module):
    def __init__(self, out_channels=4 * 3):
        super().__init__()
        self.gates = nn.Conv2d(2 + 3, out_channels, 3, padding=1)

    def forward(self, *args):
        raise AssertionError("it is called")


class MyBlock(MyConvLstm):
    pass


def test_the_report_names_what_looks_like_a_convlstm_and_nothing_changes():
    model = nn.ModuleDict({
        "cell": theirs(), "mine": MyConvLstm(), "odd": MyConvLstm(13), "wide": MyConvLstm(20),
        "block": MyBlock(), "lstm": nn.LSTM(2, 3), "ours": snnlstm.ConvLSTM(2, 3, 3, 1),
    })  # fmt: skip
    report = snnlstm.accelerate(model)
    others = "odd.gates", "wide.gates", "block.gates"
    assert (report.swapped, list(report.left)) == (("cell", *others), ["mine"])
    assert type(model["mine"].gates) is type(model["ours"].cell_list[0].conv) is nn.Conv2d
    assert "page ConvLSTM" in report.left["mine"]
    assert "mine         left: it looks like a ConvLSTM and stays as it is" in str(report)
    assert type(model["mine"]) is MyConvLstm


class MyPool(nn.MaxPool2d):
    pass


def test_pools_become_ours(caplog):
    """Ours are subclasses of torch's. What may compute something else stays, and is reported."""

    def pools():
        net = nn.ModuleDict({
            "max": nn.MaxPool2d(2), "avg": nn.AvgPool2d(3, 2, ceil_mode=True), "lif": neuron(),
            "mine": MyPool(2), "hand": nn.AvgPool2d(2), "signal": nn.MaxPool1d(2),
        })  # fmt: skip
        net["hand"].forward = torch.relu
        return net

    def neuron():
        return snntorch.Leaky(0.5, init_hidden=True)

    net, expected, x, seen = pools(), pools(), torch.randn(4, 8, 12, 13), []
    handle = net["max"].register_forward_hook(lambda *_: seen.append(1))
    net["avg"].remark, before = "mine", dict(net.named_children())
    left = {
        "mine": "MyPool is a subclass of nn.MaxPool2d and may compute something else",
        "hand": "its forward was replaced",
    }
    report = snnlstm.accelerate(net)
    assert (report.swapped, report.left) == (("max", "avg", "lif"), left)
    again = snnlstm.accelerate(net)
    assert again.left == left | dict.fromkeys(report.swapped, "is snnlstm's already")
    assert dict(net.named_children()) == before
    assert (repr(net), list(net.state_dict())) == (repr(expected), list(expected.state_dict()))
    assert isinstance(net["max"], nn.MaxPool2d)
    assert net["avg"].remark == "mine"
    for made in (net, copy.deepcopy(net)):
        for name in ("max", "avg", "mine", "hand"):
            assert torch.equal(made[name](x), expected[name](x))
    assert type(pickle.loads(pickle.dumps(net["avg"]))) is type(net["avg"]) is not nn.AvgPool2d
    # Attributes count as they are at a call.
    for pool in (net["max"], expected["max"]):
        pool.kernel_size, pool.stride, pool.return_indices = 3, 1, True
    assert all(map(torch.equal, net["max"](x), expected["max"](x)))
    handle.remove()
    assert len(seen) == 3
    assert not caplog.records


OPTIONS = [
    {},
    {"max_pool": 2, "reset_mechanism": "subtract", "learn_threshold": True},
    {"avg_pool": 2, "reset_mechanism": "zero", "init_hidden": True, "output": True},
    {"surrogate_disable": True, "bias": False, "init_hidden": True},
    {"spike_grad": snntorch.surrogate.fast_sigmoid(10), "inhibition": True},
    {"spike_grad": torch.sigmoid},
    {"spike_grad": nn.Sigmoid(), "state_quant": nn.Hardtanh()},
    {"state_quant": state_quant(4)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=described)
def test_an_accelerated_cell_goes_on_with_state_hooks_and_a_method_that_was_set(options):
    x, seen = steps(4, 2, 2, 6, 7), []
    one, other = theirs(**options), theirs(**options)
    one.register_forward_hook(lambda *_: seen.append(type(one)))
    for cell in (one, other):
        cell(x[0])
        cell.fire = MethodType(lambda self, mem: 2 * torch.sigmoid(mem), cell)
    random = torch.get_rng_state()
    assert snnlstm.accelerate(nn.ModuleDict({"cell": one})).swapped == ("cell",)
    assert torch.equal(torch.get_rng_state(), random)
    for x_t in x[1:]:
        close(one(x_t), other(x_t))
    if not options.get("surrogate_disable"):
        one.spk.sum().backward()
        other.spk.sum().backward()
        same_gradients(one, other, atol=2e-5)
    assert seen == [snntorch.SConv2dLSTM, *3 * [snnlstm.SConv2dLSTM]]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((None, name) for name in ("state_function", "_base_state_function", "_base_int")),
        (snntorch.SConv2dLSTM, "forward"), (snntorch.SConv2dLSTM, "_base_sub"),
        (snntorch.SpikingNeuron, "fire"),
    ],
)  # fmt: skip
def test_cells_whose_functions_were_replaced_are_left(kind, name, monkeypatch):
    """A function is replaced in one cell, or in a class."""
    model = nn.Sequential(theirs(), theirs(3, 4, 3))
    holder = kind or model[0]
    original = getattr(holder, name)
    monkeypatch.setattr(holder, name, lambda *args: original(*args))
    said = f"its {name} was replaced"
    report = snnlstm.accelerate(model)
    assert list(report.left.items())[:1] == [("0", said)]
    assert [type(cell) is snntorch.SConv2dLSTM for cell in model] == [True, kind is not None]


def test_the_report_names_the_cells_that_never_spike():
    def cell(**kwargs):
        return theirs(2, 2, 3, **kwargs)

    model = nn.ModuleDict({
        "silent": cell(threshold=1.0), "high": cell(threshold=torch.full((2, 1, 1), 1.5)),
        "learned": cell(threshold=1.0, learn_threshold=True), "low": cell(),
        "rounded": cell(threshold=1.0, state_quant=state_quant(4)),
        "mixed": cell(threshold=torch.tensor([0.1, 2.0]).view(2, 1, 1)),
        "ours": ours(2, 2, 3, threshold=1.0),
    })  # fmt: skip
    report = snnlstm.accelerate(model)
    assert report.silent == ("silent", "high", "ours")
    lines = str(report).splitlines()
    assert [line.split()[0] for line in lines if "NEVER SPIKES" in line] == [*report.silent]
    assert lines[1].startswith("  silent   swapped; NEVER SPIKES: no mem exceeds its threshold")


def test_the_report_names_a_device_without_kernels(caplog):
    model = nn.Sequential(theirs(), theirs(3, 2, 3), nn.Flatten()).to("meta")
    report = snnlstm.accelerate(model)
    assert report.slow == ("there are no kernels for device meta",)
    assert str(report).splitlines()[3:] == [
        "  on the reference path, which is slower: there are no kernels for device meta"
    ]
    assert not caplog.records  # the cells that a swap makes are on meta, too
    assert snnlstm.accelerate(nn.Sequential(theirs())).slow == ()


CHANGED = {
    "SConv2dLSTM": ("_neurons/sconv2dlstm.py", "mem2 *= self.reset", "mem2 *= 2 * self.reset"),
    "Leaky": ("_neurons/leaky.py", "return self._base_state_function(input_)\n\n    def _base_int",
              "return (1 - self.reset) * self._base_state_function(input_)\n\n    def _base_int"),
}  # fmt: skip
WITH_ANOTHER = """
import warnings
warnings.simplefilter("error", UserWarning)
net = torch.nn.Sequential(
    snntorch.SConv2dLSTM(1, 1, 1, threshold=0.1), snntorch.Leaky(0.5, reset_mechanism="zero")
)
print(snnlstm.accelerate(net).left)
layer, theirs = (l.Leaky(0.5, reset_mechanism="zero") for l in (snnlstm, snntorch))
x, mem = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 1.5])
assert torch.equal(layer(x, mem)[1], theirs(x, mem)[1])
print(layer.path.reason)
"""
TRACED = """
compiled = torch.compile(layer, backend="eager", fullgraph=True)
assert torch.equal(compiled(x, mem)[1], theirs(x, mem)[1])
"""


def with_another(folder: Path, file: str, old: str, new: str, program: str) -> Any:
    """Runs a program beside a copy of snnTorch, one of whose files has new text for an old one."""
    changed = shutil.copytree(Path(snntorch.__file__).parent, folder / "snntorch") / file
    source = changed.read_text()
    assert source.count(old) == 1
    changed.write_text(source.replace(old, new))
    said = "assert snntorch.__file__.startswith(FOLDER), snntorch.__file__"
    begin = f"import snntorch, snnlstm, torch\nFOLDER = {str(folder)!r}\n{said}\n"
    return fresh(begin + program, [folder, Path.cwd()])


@pytest.mark.parametrize("name", CHANGED)
def test_layers_that_the_installed_snntorch_computes_otherwise_are_left_to_it(name, tmp_path):
    """The change of Leaky is that of snnTorch's pull request 426, in which "zero" drops x, too."""
    traced = TRACED if name == "Leaky" else ""
    out = with_another(tmp_path, *CHANGED[name], WITH_ANOTHER + traced)
    assert out.returncode == 0, out.stderr
    left, reason = out.stdout.splitlines()
    said = f"the installed snntorch computes {name} differently from snntorch 1.0.0"
    assert left == str({str([*CHANGED].index(name)): said})
    assert reason == (said if name == "Leaky" else "the native kernels cover this call")
    assert said in out.stderr


WITH_OTHER_SURROGATES = """
for spike in snntorch.surrogate.atan(), snntorch.surrogate.fast_sigmoid():
    layer = snnlstm.Leaky(0.5, spike_grad=spike)
    layer(torch.rand(3))
    print(layer.path.reason)
"""


def test_a_surrogate_that_the_installed_snntorch_computes_otherwise_stays_as_it_is(tmp_path):
    """The copy has 1.0.0's name, and one of its functions is another one."""
    change = "surrogate.py", "torch.pi / 2 * ctx.alpha", "torch.pi * ctx.alpha"
    out = with_another(tmp_path, *change, WITH_OTHER_SURROGATES)
    assert out.stdout.splitlines() == [
        "the surrogate is not a known one", "the native kernels cover this call"
    ], out.stderr  # fmt: skip
