"""What a stack decided for a layer is kept, until something changes by which it was decided."""

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from snntorch import utils
from torch import Tensor, nn

import snnlstm
from snnlstm.dispatch.reasons import Reason
from snnlstm.networks import layers as sizes
from snnlstm.networks.layers import way_of
from tests.sequences.stacks import PLAIN, N, T, X, hidden, loop
from tests.shared.cpu_kernels import needs_core
from tests.shared.helpers import close

# ---- changes of a layer --------------------------------------------------------------------------


@contextmanager
def in_force(layer: Any, **values: Any) -> Iterator[None]:
    """Sets attributes, or replaces methods, within the block."""
    before = {name: getattr(layer, name) for name in values}
    for name, value in values.items():
        setattr(layer, name, value)
    yield
    for name, value in before.items():
        if getattr(value, "__self__", None) is layer:  # a method
            delattr(layer, name)
        else:
            setattr(layer, name, value)


@contextmanager
def hooked(register: Any) -> Iterator[None]:
    handle = register(lambda *_: None)
    yield
    handle.remove()


def setting(**values: Any) -> Any:
    return lambda layer: in_force(layer, **values)


def hook(kind: str) -> Any:
    return lambda layer: hooked(getattr(layer, f"register_{kind}_hook"))


def conv() -> nn.Module:
    return nn.Conv2d(2, 2, 3)


def norm() -> nn.Module:
    return nn.BatchNorm2d(2)


def cell() -> nn.Module:
    return hidden(2, 2, 3)


def lif() -> snnlstm.Leaky:
    return snnlstm.Leaky(0.9, init_hidden=True, **PLAIN)


no_statistics = setting(running_mean=None, running_var=None)
# A layer, its kind, a change, and its kind while the change is in force.
CHANGES = {
    "a hook": (conv, "fold", hook("forward"), "step"),
    "a hook before": (conv, "fold", hook("forward_pre"), "step"),
    "a hook behind the backward pass": (conv, "fold", hook("full_backward"), "step"),
    "a hook before the backward pass": (conv, "fold", hook("full_backward_pre"), "step"),
    "a hook of a cell": (cell, "sequence", hook("forward"), "step"),
    "a hook of a Leaky": (lif, "sequence", hook("forward"), "step"),
    "forward": (nn.Tanh, "fold", setting(forward=torch.sin), "step"),
    "forward of a cell": (cell, "sequence", setting(forward=torch.sin), "step"),
    "class": (nn.Tanh, "fold", setting(__class__=nn.Softsign), "step"),
    "training of a norm": (norm, "sequence", setting(training=False), "fold"),
    "training of a dropout": (nn.Dropout, "step", setting(training=False), "fold"),
    "p": (nn.Dropout, "step", setting(p=0.0), "fold"),
    "momentum": (norm, "sequence", setting(momentum=None), "step"),
    "statistics": (lambda: norm().eval(), "fold", no_statistics, "sequence"),
    "return_indices": (lambda: nn.MaxPool2d(2), "fold", setting(return_indices=True), "step"),
    "start_dim": (nn.Flatten, "fold", setting(start_dim=0), "step"),
    "reset_delay": (lif, "sequence", setting(reset_delay=False), "step"),
    "inhibition": (lif, "sequence", setting(inhibition=True), "step"),
    "surrogate": (lif, "sequence", setting(spike_grad=torch.relu), "step"),
    "a method of Leaky": (lif, "sequence", setting(mem_reset=torch.zeros_like), "step"),
}


@needs_core
@pytest.mark.parametrize("name", CHANGES)
def test_a_layer_that_changes_between_calls_is_decided_anew(name):
    make, kind, change, other = CHANGES[name]
    layer, found = make(), []
    net = snnlstm.Sequential(layer)
    x = X.flatten(2) if isinstance(layer, snnlstm.Leaky) else X
    for _ in range(2):
        net(x)
        found.append(net.report[0].kind)
        with change(layer):
            net(x)
            found.append(net.report[0].kind)
    assert found == [kind, other] * 2


@needs_core
def test_what_all_layers_have_in_common_is_asked_at_each_call():
    net, x = snnlstm.Sequential(conv(), lif()), X.clone()

    def kinds() -> list[str]:
        utils.reset(net)
        out = net(x)
        close(out, (utils.reset(net), loop(net, x))[1], atol=1e-5)
        return [layer.kind for layer in net.report]

    assert kinds() == ["fold", "sequence"]
    with hooked(nn.modules.module.register_module_forward_hook):
        assert kinds() == ["step", "step"]
    with snnlstm.algorithm("reference"):
        assert kinds() == ["fold", "step"]
    utils.reset(net)
    with torch.no_grad():
        expected = torch.stack([(utils.reset(net), net(part))[1] for part in (x, 2 * x)])
        utils.reset(net)
        close(torch.func.vmap(net)(torch.stack([x, 2 * x])), expected, atol=1e-5)
    assert [layer.kind for layer in net.report] == ["fold", "step"]
    utils.reset(net)
    assert kinds() == ["fold", "sequence"]


def test_a_number_that_is_a_tensor_may_change():
    layer = nn.Dropout()
    layer.p = torch.tensor(0.5)
    net = snnlstm.Sequential(layer)
    net(X)
    assert net.report[0].kind == "step"
    layer.p.zero_()
    net(X)
    assert net.report[0].kind == "fold"


@pytest.mark.parametrize("constant", [False, True])
def test_a_layer_that_begins_to_work_in_place_leaves_x_as_it_is(constant):
    layer = nn.ReLU()
    net, x = snnlstm.Sequential(nn.Identity(), layer), X - 0.5
    x = x[:1].expand_as(x) if constant else x
    before = net(x)
    layer.inplace = True
    copied = x.clone()
    close(net(x), before, atol=0)
    close(x, copied, atol=0)
    assert net.report[1].kind == "fold"


def test_a_hook_may_write_to_its_input():
    layer, x = nn.Tanh(), X.clone().requires_grad_()
    net = snnlstm.Sequential(nn.Sigmoid(), layer)
    net(x)

    def halve(module: nn.Module, args: Any) -> None:
        args[0].mul_(0.5)

    layer.register_forward_pre_hook(halve)
    close(net(x), (x.sigmoid() * 0.5).tanh())


@needs_core
def test_a_pool_whose_class_gets_another_forward_is_called(monkeypatch):
    net = snnlstm.Sequential(nn.MaxPool2d(2))
    net(X)
    monkeypatch.setattr(nn.MaxPool2d, "forward", lambda self, x: x * 2)
    close(net(X), 2 * X, atol=0)


def test_other_shapes_types_and_devices_are_decided_anew():
    """A step has 128 KiB, or 256 KiB of float64; x takes no memory."""
    layer, one = nn.Conv2d(2, 2, 1), torch.zeros(())

    def kind_of(number: Tensor, steps: int, *shape: int) -> str:
        return way_of("", layer, number.expand(steps, *shape), len(shape), steps, False).kind

    for _ in range(2):
        assert kind_of(one, 64, 1, 2, 128, 128) == "fold"
        assert kind_of(one, 64, 1, 2, 128, 129) == "step"
        assert kind_of(one.double(), 64, 1, 2, 128, 128) == "step"
        assert kind_of(one.double(), 32, 1, 2, 128, 128) == "fold"
        assert kind_of(one.double().to("meta"), 64, 1, 2, 128, 128) == "fold"
        assert kind_of(one, 64, 2, 128, 128) == "step"  # images without a batch
        layer.out_channels = 3
        assert kind_of(one, 64, 1, 2, 128, 128) == "step"
        layer.out_channels = 2


def test_large_steps_go_on_one_by_one_behind_layers_that_run_so(monkeypatch):
    layers = [nn.Softmax(1), hidden(2, 2, 3)]
    assert way_of("", layers[1], X[0], 4, T, False, one=True).kind == "sequence"
    net = snnlstm.Sequential(*layers)
    expected = net(X)
    monkeypatch.setattr(sizes, "_LARGEST", X[0].nbytes - 1)
    utils.reset(net)
    close(net(X), expected)
    assert [layer.reason for layer in net.report][1] == Reason.TO_STACK


def test_a_wider_linear_layer_is_decided_anew():
    layer, x = nn.Linear(256, 512), torch.zeros(()).expand(4, 512, 256)
    for width, kind in ((512, "fold"), (513, "step"), (512, "fold")):
        layer.out_features = width
        assert way_of("", layer, x, 2, 4, False).kind == kind


def test_two_classes_that_share_a_forward_are_decided_apart():
    """An x of two dimensions a step is a batch of vectors, and not one of images."""
    for layer, kind in ((nn.BatchNorm2d(2), "step"), (nn.BatchNorm1d(2), "fold")):
        assert way_of("", layer.eval(), torch.zeros(T, N, 2), 2, T, False).kind == kind


def test_layers_that_join_a_stack_are_seen():
    """A stack within a stack, or a layer, gets another layer, and one comes a second time."""
    inner, block = nn.Sequential(nn.Tanh()), nn.Module()
    block.forward = lambda x: x
    net = snnlstm.Sequential(inner, cell(), block)
    net(X)
    assert [layer.name for layer in net.report] == ["0.0", "1", "2"]
    inner.append(nn.ReLU())
    net(X)
    assert [layer.name for layer in net.report] == ["0.0", "0.1", "1", "2"]
    block.cell = net[1]
    net(X)
    shared = Reason.SHARED.format("2.cell")
    assert {layer.reason for layer in net.report} == {shared}
    del block.cell
    net(X)
    assert [layer.kind for layer in net.report] == ["fold", "fold", "sequence", "step"]


def test_a_layer_may_hold_the_network_that_it_is_in():
    block = nn.Module()
    block.forward = torch.sin
    block.net = net = snnlstm.Sequential(nn.Tanh(), block)
    close(net(X), X.tanh().sin(), atol=0)
    assert net.report[1].reason == Reason.SHARED.format("1.net.1")


# ---- what it takes -------------------------------------------------------------------------------


@needs_core
@pytest.mark.parametrize("training", [False, True])
def test_a_stack_that_was_called_before_takes_few_calls(training):
    """Counts the Python calls of this package beside those of the layers themselves."""
    layers = [hidden(2, 4, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 4), lif()]
    called: list[str] = []

    def note(frame: Any, event: str, argument: Any) -> None:
        file = frame.f_code.co_filename.replace("\\", "/")
        if event == "call" and ("snnlstm/networks/" in file or "dispatch/reasons" in file):
            called.append(frame.f_code.co_name)

    with torch.set_grad_enabled(training):
        for _ in range(3):
            for layer in layers[::4]:
                layer.reset_mem()
            called.clear()
            sys.setprofile(note)
            try:
                snnlstm.unroll(X, *layers)
            finally:
                sys.setprofile(None)
    assert len(called) <= 30, called
    assert called.count("_decided") == 0
    assert called.count("beyond_forward") == len(layers)


def test_reasons_are_their_texts():
    """In each Python, however they are printed, compared, copied and kept."""
    text = "one call for all steps"
    for one in (Reason.ONE_CALL, copy.deepcopy(Reason.ONE_CALL)):
        assert one is Reason.ONE_CALL
        assert (str(one), f"{one}", f"{one:>23}", repr(one)) == (text, text, " " + text, repr(text))
        assert type(str(one)) is str
        assert {one, one + "!"} == {text, text + "!"}
    net = snnlstm.Sequential(nn.BatchNorm1d(2))
    net(torch.rand(T, N, 2))
    assert str(net.report[0]) == f"0 BatchNorm1d: sequence ({text})"
    assert repr(net.report[0]).endswith(f"kind='sequence', reason='{text}')")
    assert net.report[0].reason == text
