"""snnlstm.Sequential computes what a loop over the steps computes, for any kind of layers."""

import copy
import pickle
from collections import OrderedDict

import pytest
import snntorch
import torch
from helpers import close, ours, same_gradients, steps, theirs
from snntorch import utils
from torch import nn

import snnlstm

T, N = 4, 3
X = steps(T, N, 2, 6, 6)


def loop(net, x):
    """Runs layer after layer in each step, step after step."""

    def layers(stack):
        for layer in stack:
            if isinstance(layer, nn.Sequential):
                yield from layers(layer)
            else:
                yield layer

    outs = []
    for step in x:
        out = step
        for layer in layers(net):
            out = layer(out[0] if isinstance(out, tuple) else out)
        outs.append(out)
    if isinstance(outs[0], tuple):
        return tuple(map(torch.stack, zip(*outs, strict=True)))
    return torch.stack(outs)


def total(out):
    """Returns a scalar in which every item and every step counts differently."""
    items = out if isinstance(out, tuple) else (out,)
    return sum(
        (item * torch.linspace(1, 2, item.shape[0]).view(-1, *[1] * (item.dim() - 1))).sum() * k
        for k, item in enumerate(items, 1)
    )


def states_of(net):
    return [
        getattr(module, name)
        for module in net.modules()
        for name in ("syn", "mem", "running_mean", "running_var", "num_batches_tracked")
        if isinstance(getattr(module, name, None), torch.Tensor)
    ]


def equals_the_loop(net, x, kinds, atol=2e-6):
    """Compares two runs of both; the second run starts from the states of the first."""
    one, other = snnlstm.Sequential(*copy.deepcopy(net)), net
    torch.manual_seed(5)
    actual = [one(x), one(x)]
    torch.manual_seed(5)
    expected = [loop(other, x), loop(other, x)]
    close(actual, expected, atol=atol)
    close(states_of(one), states_of(other), atol=atol)
    if torch.is_grad_enabled() and any(True for _ in other.parameters()):
        sum(map(total, actual)).backward()
        sum(map(total, expected)).backward()
        same_gradients(one, other)
    assert [layer.kind for layer in one.report] == kinds.split()
    return one


PLAIN = {"threshold": 0.2, "spike_grad": snnlstm.surrogate.atan()}  # snnTorch's cannot be copied


def leaky(**kwargs):
    return snntorch.Leaky(0.9, **PLAIN, **kwargs)


class Cumulative(nn.Module):
    """A layer of the user's has a state."""

    def __init__(self):
        super().__init__()
        self.mem = torch.zeros(())

    def forward(self, x):
        self.mem = self.mem + x
        return self.mem


class Halves(nn.Module):
    """A layer of the user's writes to its input."""

    def forward(self, x):
        return x.mul_(0.5)


def hidden(*args, **kwargs):
    return ours(*args, init_hidden=True, **kwargs)


NETS = {
    "cells": (lambda: [hidden(max_pool=2), hidden(3, 2, 3)], "sequence sequence"),
    "cells that return their states": (lambda: [ours(), ours(3, 2, 3)], "sequence sequence"),
    "output at the end": (lambda: [ours(), hidden(3, 2, 3, output=True)], "sequence sequence"),
    "a classifier": (
        lambda: [
            nn.Conv2d(2, 2, 3, padding=1), hidden(avg_pool=2), nn.Flatten(), nn.Linear(27, 4),
            leaky(init_hidden=True, output=True),
        ],
        "fold sequence fold fold step",
    ),
    "neurons that return their states": (lambda: [leaky(), nn.ReLU(), leaky()], "step fold step"),
    "other neurons": (
        lambda: [
            nn.Flatten(), nn.Linear(72, 3), snntorch.Synaptic(0.9, 0.8, init_hidden=True, **PLAIN),
            snntorch.SLSTM(3, 3, init_hidden=True, **PLAIN),
            snntorch.RLeaky(0.9, linear_features=3, **PLAIN),
        ],
        "fold fold step step step",
    ),
    "nested": (
        lambda: [nn.Sequential(ours(), nn.Sequential(nn.Conv2d(3, 2, 3), nn.ELU())), leaky()],
        "sequence fold fold step",
    ),
    "nested, with a tuple at the end": (lambda: [nn.Sequential(ours())], "sequence"),
    "batch norm": (lambda: [ours(), nn.BatchNorm2d(3), ours(3, 2, 3)], "sequence step sequence"),
    "dropout": (lambda: [ours(), nn.Dropout(0.5), ours(3, 2, 3)], "sequence step sequence"),
    "in place": (
        lambda: [
            ours(), nn.Dropout(0.5, inplace=True), ours(3, 2, 3), nn.Identity(),
            nn.ReLU(inplace=True), ours(2, 3, 3), Halves(),
        ],
        "sequence step sequence fold fold sequence step",
    ),
    "an unknown layer": (lambda: [ours(), Cumulative()], "sequence step"),
    "snntorch's cell": (
        lambda: [theirs(spike_grad=snnlstm.surrogate.atan()), nn.Tanh()], "step fold",
    ),
    "norms": (
        lambda: [nn.GroupNorm(1, 2), nn.LayerNorm([2, 6, 6]), nn.InstanceNorm2d(2, affine=True)],
        "fold fold fold",
    ),
    "running statistics": (
        lambda: [nn.InstanceNorm2d(2, track_running_stats=True), nn.BatchNorm2d(2)], "step step",
    ),
    "pools and shapes": (
        lambda: [
            nn.ZeroPad2d(1), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(3), nn.Upsample(scale_factor=2),
            nn.PixelUnshuffle(2), nn.Flatten(2), nn.Unflatten(2, (3, 3)), nn.Flatten(-3),
        ],
        "fold " * 8,
    ),
    "softmax": (lambda: [nn.Softmax(1), nn.LogSoftmax(-1), nn.GLU(-2), nn.Softmax(2)], "fold " * 4),
    "across the batch": (
        lambda: [nn.Softmax(0), nn.LogSoftmax(-4), nn.Flatten(0, 1), nn.Unflatten(0, (3, 2))],
        "step " * 4,
    ),
    "of the whole batch": (lambda: [nn.LayerNorm([N, 2, 6, 6])], "step"),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_it_equals_the_loop_in_training(name):
    make, kinds = NETS[name]
    torch.manual_seed(0)
    equals_the_loop(nn.Sequential(*make()), X, kinds)


IN_EVALUATION = {
    "batch norm": "sequence fold sequence",
    "dropout": "sequence fold sequence",
    "running statistics": "fold fold",
    "a classifier": "fold sequence fold fold step",
}


@pytest.mark.parametrize("name", IN_EVALUATION)
def test_it_equals_the_loop_in_evaluation(name):
    torch.manual_seed(0)
    net = nn.Sequential(*NETS[name][0]())
    loop(net, X)  # the loop fills the running statistics
    utils.reset(net)
    with torch.no_grad():
        equals_the_loop(net.eval(), X, IN_EVALUATION[name])


@pytest.mark.parametrize("shape", [(1, N), (T, 1), (T, 0), (1, 0)], ids=str)
def test_short_sequences_and_empty_batches(shape):
    net = nn.Sequential(ours(), nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(32, 4), leaky())
    equals_the_loop(net, torch.rand(*shape, 2, 6, 6), "sequence fold fold fold step")


def test_what_is_stepped_in_evaluation_too():
    """x[t] of (C, H, W) is one sample to a Conv2d: T must not become its channels or batch."""
    equals_the_loop(nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False)).eval(), X, "step")
    net = nn.Sequential(nn.Conv2d(2, 2, 3), nn.MaxPool2d(2), nn.Flatten(0), nn.Linear(8, 3))
    equals_the_loop(net, torch.rand(T, 2, 6, 6), "step step step step")
    net = nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(2, 2, 3)), nn.Flatten())
    equals_the_loop(net, X, "step fold")  # the old spectral_norm changes at every step


def test_layers_that_change_under_way_take_effect():
    calls = []
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), ours(3, 2, 3), nn.ReLU())
    for layer in net:
        layer.register_forward_hook(lambda module, args, out: calls.append(args[0].shape[0]))
    one = snnlstm.Sequential(*net)
    expected = loop(copy.deepcopy(net), X)
    calls.clear()
    close(one(X), expected)
    assert [layer.reason for layer in one.report] == 3 * ["it carries hooks"]
    assert calls == 3 * T * [N]  # a hook sees each step, as in the loop
    net[0]._forward_hooks.clear()
    net[0].forward = lambda x: torch.cat([x, x[:, :1] * x.mean()], 1)  # mixes samples
    expected = loop(copy.deepcopy(net), X)
    close(one(X), expected)
    assert one.report[0].reason == "its forward was replaced"


def test_global_hooks_are_called_at_every_step():
    seen = []
    net = snnlstm.Sequential(nn.Tanh())
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    try:
        net(X)
    finally:
        handle.remove()
    assert seen.count(nn.Tanh) == T
    assert net.report[0].reason == "global module hooks are registered"


class Louder(snnlstm.SConv2dLSTM):
    def forward(self, x):
        return super().forward(x * x.mean())[0]


class Renamed(snnlstm.SConv2dLSTM):
    pass


class Block(nn.Sequential):
    """This subclass changes nothing."""


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


def test_subclasses_are_known_by_their_forward():
    louder, renamed = Louder(2, 3, 3, threshold=0.1), Renamed(3, 2, 3, threshold=0.1)
    net = snnlstm.Sequential(louder, Block(renamed, nn.ReLU()), Residual(nn.BatchNorm2d(2)))
    other = copy.deepcopy(net)
    outs = []
    for x in X:
        spk = other[1][1](other[1][0](other[0](x))[0])
        outs.append(other[2](spk))
    close(net(X), torch.stack(outs))
    assert [(layer.name, layer.layer, layer.kind) for layer in net.report] == [
        ("0", "Louder", "step"),
        ("1.0", "Renamed", "sequence"),
        ("1.1", "ReLU", "fold"),
        ("2", "Residual", "step"),
    ]
    assert net.report[0].reason == "its class has a forward of its own"


def test_a_sequential_within_a_sequential():
    inner = snnlstm.Sequential(ours(), nn.ReLU())
    calls = []
    net = nn.Sequential(inner, nn.Flatten())
    one = equals_the_loop(net, X, "sequence fold fold")
    one[0].register_forward_hook(lambda module, args, out: calls.append(args[0].shape))
    one(X)
    assert calls == [X.shape]
    assert [layer.kind for layer in one.report] == ["sequence", "fold"]


def test_a_sequential_with_hooks_keeps_its_order_of_dimensions():
    inner = snnlstm.Sequential(ours(), leaky(), batch_first=True)
    expected = snnlstm.Sequential(*copy.deepcopy(inner))(X)
    calls = []
    inner.register_forward_hook(lambda module, args, out: calls.append(args[0].shape))
    close(snnlstm.Sequential(inner)(X), expected)
    assert calls == [X.transpose(0, 1).shape]


@pytest.mark.parametrize(("tied", "name"), [("cell", "2"), ("norm", "1")])
def test_layers_that_share_a_state_are_run_step_by_step(tied, name, caplog):
    cell, norm = hidden(2, 2, 3), nn.BatchNorm2d(2)
    net = [cell, nn.Tanh(), cell] if tied == "cell" else [nn.Sequential(norm, cell), norm]
    one = equals_the_loop(nn.Sequential(*net), X, "step step step")
    reason = f"layer {name} is in several places and may keep a state"
    assert {layer.reason for layer in one.report} == {reason}
    where = "0" if tied == "cell" else "0.1"
    said = f"Sequential runs layer {where} (SConv2dLSTM) step by step: {reason}"
    assert caplog.messages[0] == said


def test_steps_of_shared_layers_may_be_written_to():
    cell = hidden(2, 2, 3)
    net = snnlstm.Sequential(nn.ReLU(inplace=True), cell, cell)
    grads = []
    for call in (net, lambda x: loop(net, [step.clone() for step in x])):
        x = X.clone().requires_grad_()
        cell.reset_mem()
        total(call(1 * x)).backward()
        grads.append(x.grad)
    close(*grads)


def test_layers_without_a_state_may_be_in_several_places():
    relu, conv = nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1)
    equals_the_loop(nn.Sequential(conv, relu, hidden(2, 2, 3), conv, relu), X,
                    "fold fold sequence fold fold")  # fmt: skip


def test_it_is_an_nn_sequential():
    net = nn.Sequential(ours(), nn.ReLU(), nn.Flatten())
    one = snnlstm.Sequential(*net)
    assert str(one) == str(net)
    assert list(one.state_dict()) == list(net.state_dict())
    assert one[0] is net[0]
    assert type(one[:2]) is snnlstm.Sequential
    assert one.report is None
    one(X)
    close(pickle.loads(pickle.dumps(one))(X), one(X))


def test_a_sum_and_a_multiple_take_sequences():
    net = snnlstm.Sequential(hidden(2, 2, 3), nn.ReLU(), batch_first=True)
    for made, layers in ((net + nn.Sequential(nn.Flatten()), 3), (net * 2, 4), (2 * net, 4)):
        assert type(made) is snnlstm.Sequential
        assert made.batch_first
        assert len(made) == layers
        utils.reset(net)
        expected = loop(made, X)
        utils.reset(net)
        close(made(X.transpose(0, 1)).transpose(0, 1), expected)


@pytest.mark.parametrize("replaced", [False, True])
def test_of_refuses_a_forward_that_would_be_lost(replaced):
    net = nn.Sequential(nn.ReLU()) if replaced else Residual(nn.ReLU())
    if replaced:
        net.forward = net.forward
    with pytest.raises(TypeError, match=r"must have nn.Sequential's forward, got .* of its own"):
        snnlstm.Sequential.of(net)


def test_of_keeps_names_and_mode():
    tied = nn.ReLU()
    layers = {"cell": ours(), "relu": tied, "flat": nn.Flatten(), "again": tied}
    net = nn.Sequential(OrderedDict(layers)).eval()
    one = snnlstm.Sequential.of(net)
    assert type(one) is snnlstm.Sequential
    assert list(one.state_dict()) == list(net.state_dict())
    assert not one.training
    expected = loop(copy.deepcopy(net), X)
    close(one(X), expected)
    assert [layer.name for layer in one.report] == ["cell", "relu", "flat", "again"]


def test_an_empty_one_returns_its_input():
    assert snnlstm.Sequential()(X) is X


class Theirs(snntorch.SConv2dLSTM):
    pass


def test_the_log_names_what_accelerate_cannot_mend(caplog):
    subclass, replaced = Theirs(2, 3, 3, threshold=0.1), theirs(3, 2, 3)
    replaced.forward = replaced.forward
    snnlstm.Sequential(subclass, replaced)(X)
    start = "Sequential runs layer {} ({}) step by step: {}"
    assert caplog.messages == [
        start.format(0, "Theirs", "its class is a subclass of snntorch.SConv2dLSTM"),
        start.format(1, "SConv2dLSTM", "its forward was replaced"),
    ]


def test_accelerate_works_on_it_and_fallbacks_of_cells_are_logged_once(caplog):
    net = snnlstm.Sequential(theirs(), nn.ReLU(), ours(3, 2, 3))
    net[2].register_forward_hook(lambda *_: None)
    for _ in range(2):
        net(X)
    assert caplog.messages == [
        "Sequential runs layer 0 (SConv2dLSTM) step by step: it is snntorch's, and "
        "snnlstm.accelerate(net) makes it ours",
        "Sequential runs layer 2 (SConv2dLSTM) step by step: it carries hooks",
    ]
    before = net(X)
    utils.reset(net)
    assert snnlstm.accelerate(net).swapped == ("0",)
    first = net(X)
    assert net.report[0].kind == "sequence"
    utils.reset(net)
    close(net(X), first)
    assert not torch.equal(before[0], first[0])  # utils.reset reached the cells


def test_of_a_tuple_the_next_layer_gets_the_first_item():
    net = nn.Sequential(nn.MaxPool2d(2, return_indices=True), nn.Identity(), nn.LSTM(3, 5))
    one = snnlstm.Sequential(*net[:2])
    close(one(X), loop(net[:2], X))
    assert one.report[0].reason == "it returns indices"
    x = torch.rand(T, N, 2, 3)
    out, (h, c) = snnlstm.Sequential(net[2])(x)  # a tuple in a tuple
    expected = [net[2](step) for step in x]
    close(out, torch.stack([step[0] for step in expected]))
    close((h, c), [torch.stack([step[1][k] for step in expected]) for k in range(2)])
