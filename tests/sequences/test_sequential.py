"""Sequential and unroll compute what a loop over the steps computes, for any kind of layers."""

import copy

import pytest
import snntorch
import torch
from snntorch import utils
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import snnlstm
from tests.sequences import stacks
from tests.sequences.stacks import PLAIN, N, T, X, equals_the_loop, hidden, leaky, loop
from tests.shared.helpers import close, flat, ours, theirs, watched


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


class Noise(nn.Module):
    """A layer of the user's draws numbers."""

    def forward(self, x):
        return x + torch.rand_like(x)


def tied(layer, *between):
    return [layer, *between, layer]


# The rules of both engines, Sequential and compiled loops: what mixes samples or draws numbers has
# its steps one by one, states go from step to step, and what is written is a tensor of its own.
# A row has the layers, their kinds in a Sequential, and the calls of a compiled loop that these do
# not tell: its Leaky and cells are ours, and it knows more functions.
NETS = {
    "cells": (lambda: [hidden(max_pool=2), hidden(3, 2, 3)], "sequence sequence"),
    "output at the end": (lambda: [ours(), hidden(3, 2, 3, output=True)], "sequence sequence"),
    "a classifier": (
        lambda: [
            nn.Conv2d(2, 2, 3, padding=1), hidden(avg_pool=2), nn.Flatten(), nn.Linear(27, 4),
            leaky(init_hidden=True, output=True),
        ],
        "fold sequence fold fold step",
        {"leaky": 1},
    ),
    "other neurons": (
        lambda: [
            nn.Flatten(), nn.Linear(72, 3), snntorch.Synaptic(0.9, 0.8, init_hidden=True, **PLAIN),
            snntorch.SLSTM(3, 3, init_hidden=True, **PLAIN), leaky(), nn.Tanh(),
        ],
        "fold fold step step step fold",
        {"leaky": 1},
    ),
    "nested": (
        lambda: [nn.Sequential(ours(), nn.Sequential(nn.Conv2d(3, 2, 3), nn.Tanh())), leaky()],
        "sequence fold fold step",
        {"leaky": 1},
    ),
    "nested, with a tuple at the end": (lambda: [nn.Sequential(ours())], "sequence"),
    "a Leaky in two places": (
        lambda: tied(leaky(init_hidden=True), nn.Conv2d(2, 2, 1)),
        "step step step",
        {"leaky": T + 1},
    ),
    "a cell in two places": (
        lambda: tied(hidden(2, 2, 3), nn.Conv2d(2, 2, 1)), "step step step", {"cell": T + 1},
    ),
    "a norm in two places": (
        lambda: tied(nn.BatchNorm2d(2), hidden(2, 2, 3)), "step step step",
    ),
    "no state in two places": (
        lambda: tied(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), hidden(2, 2, 3)),
        "fold fold sequence fold",
    ),
    "batch norm": (
        lambda: [ours(), nn.BatchNorm2d(3), ours(3, 2, 3)], "sequence sequence sequence",
    ),
    "dropout": (lambda: [ours(), nn.Dropout(0.5), ours(3, 2, 3)], "sequence step sequence"),
    "in place": (
        lambda: [
            ours(), nn.Dropout(0.5, inplace=True), ours(3, 2, 3), nn.Identity(),
            nn.ReLU(inplace=True), ours(2, 3, 3), Halves(),
        ],
        "sequence step sequence fold fold sequence step",
        {"cell": 3 * T},
    ),
    "an unknown layer": (lambda: [ours(), Cumulative()], "sequence step"),
    "snntorch's cell": (
        lambda: [theirs(spike_grad=snnlstm.surrogate.atan()), nn.Tanh()],
        "step fold",
        {"cell": 1},
    ),
    "norms": (
        lambda: [nn.GroupNorm(1, 2), nn.LayerNorm([2, 6, 6]), nn.InstanceNorm2d(2, affine=True)],
        "fold step step",
    ),
    "running statistics": (lambda: [nn.BatchNorm2d(2), nn.Flatten(), nn.BatchNorm1d(72)],
                           "sequence fold sequence"),
    "pools and shapes": (
        lambda: [
            nn.ZeroPad2d(1), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(3), nn.Upsample(scale_factor=2),
            nn.AvgPool2d(2), nn.Flatten(2), nn.LeakyReLU(), nn.AvgPool1d(2), nn.Conv1d(2, 3, 2),
            nn.MaxPool1d(2), nn.Sigmoid(), nn.Unflatten(2, (1, 1)), nn.Flatten(-3),
        ],
        "step fold fold step fold fold fold fold fold fold fold step fold",
    ),
    "three dimensions": (
        lambda: [
            nn.AdaptiveMaxPool2d(4), nn.Unflatten(2, (2, 2)), nn.Conv3d(2, 2, (1, 2, 2)),
            nn.MaxPool3d((1, 1, 2)), nn.AvgPool3d((2, 1, 1)), nn.Flatten(2),
            nn.AdaptiveAvgPool1d(2),
        ],
        "fold step fold fold fold fold fold",
    ),
    "across the batch": (lambda: [nn.Softmax(0), nn.Flatten(0, 1), nn.Linear(6, 3)],
                         "step step fold"),
    "into the batch": (
        lambda: [nn.Flatten(0), nn.Linear(216, 2), nn.Tanh()],
        "step step step",
        {"linear": 1, "tanh": 1},
    ),
}  # fmt: skip
# Stacks that begin with stateless layers, and how they run if all steps are one image.
CONSTANT = {
    "once, a cell": (lambda: [nn.Conv2d(2, 2, 3), nn.Tanh(), hidden(2, 3, 3)],
                     "once once sequence"),
    "once, large images": (lambda: [nn.Conv2d(2, 9, 3), nn.MaxPool2d(2), hidden(9, 3, 3)],
                           "once once sequence"),
    "once, Leaky": (
        lambda: [nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(32, 3), snnlstm.Leaky(0.9, **PLAIN)],
        "once once once sequence",
    ),
    "once, snntorch's Leaky": (
        lambda: [nn.Conv2d(2, 2, 3), leaky()], "once step", {"leaky": 1},
    ),
    "once, no state": (lambda: [nn.Identity(), nn.GroupNorm(1, 2), nn.Flatten()], "once once once"),
    "once, in place": (
        lambda: [nn.Conv2d(2, 2, 3), nn.ReLU(inplace=True), nn.Conv2d(2, 3, 3), Halves()],
        "once fold fold step",
        {"conv": 2 * T},
    ),
    "once, a layer that writes": (
        lambda: [nn.Conv2d(2, 2, 3), Halves()], "once step", {"conv": T},
    ),
    "once, an unknown state": (
        lambda: [nn.Sigmoid(), Cumulative(), nn.Tanh()], "once step fold", {"tanh": T},
    ),
    "once, batch norm": (lambda: [nn.Tanh(), nn.BatchNorm2d(2), nn.ReLU()], "once sequence fold"),
    "once, dropout": (lambda: [nn.Conv2d(2, 2, 3), nn.Dropout(0.5), nn.Tanh()], "once step fold"),
    "once, noise": (lambda: [nn.Conv2d(2, 2, 3), Noise(), nn.Sigmoid()], "once step fold"),
    "once, into the batch": (
        lambda: [nn.Flatten(0), nn.Linear(72 * N, 2)], "step step", {"linear": 1},
    ),
}  # fmt: skip
LAYERS = NETS | CONSTANT


def ways():
    """Yields each row with its forms, the most bytes of a step that is folded, and gradients.

    A row has one order of a Sequential's axes, which changes nothing in what a layer gets, and one
    of the sizes: no step is folded, or small ones are. A step of X has 864 bytes.
    """
    for k, name in enumerate(LAYERS):
        yield name, ("Sequential", "batch_first")[k % 2], None, True
        yield name, "Sequential", 1000 if k % 3 == 0 and name in NETS else 0, True
        yield name, "compiled", None, True
        if name in CONSTANT:
            yield name, "Sequential", None, False
            yield name, "compiled", None, False
    yield from ((name, "compiled", 0, True) for name in ("a classifier", "once, Leaky"))


@pytest.mark.parametrize(("name", "form", "largest", "grad"), [*ways()])
def test_layers_equal_the_loop(name, form, largest, grad, monkeypatch):
    make, kinds, *calls = LAYERS[name]
    if largest is not None:
        stacks.fold_up_to(largest, monkeypatch)
        kinds, calls = kinds.replace("fold", "step") if largest == 0 else None, []
        by_size = "Leaky" in name or "statistics" in name
        kinds = kinds.replace("sequence", "step") if by_size and kinds else kinds
        kinds = kinds.replace(" sequence", " step", 1) if "norm" in name and kinds else kinds
    torch.manual_seed(0)
    x = X[:1].expand_as(X) if name in CONSTANT else X
    atol = 2e-6 if (largest, form, name in CONSTANT) == (None, form, False) else 1e-5
    atol = 3e-5 if "statistics" in name else atol  # torch's own error behind equal pixels
    with torch.set_grad_enabled(grad):
        equals_the_loop(nn.Sequential(*make()), x, kinds, atol, form, *calls)


def test_one_constant_sample_may_be_written_to():
    x = X[:1, :1].expand(T, -1, -1, -1, -1)
    with torch.no_grad():
        net = snnlstm.Sequential(nn.Conv2d(2, 2, 3), nn.LeakyReLU(inplace=True))
        close(net(x), loop(copy.deepcopy(net), x))
        net = snnlstm.Sequential(nn.LeakyReLU(inplace=True))
        close(net(x.clone()[:1].expand_as(x)), nn.functional.leaky_relu(x))


def test_a_constant_image_is_not_repeated_in_memory(monkeypatch):
    seen = watched(monkeypatch, snnlstm.networks.sequential, "whole_sequence")
    snnlstm.unroll(X[:1].expand_as(X), nn.Conv2d(2, 2, 3), nn.Tanh(), hidden(2, 3, 3))
    x = seen[0][0][2]
    assert x.shape == (T, N, 2, 4, 4)
    assert x.stride(0) == 0
    net = snnlstm.Sequential(nn.Conv2d(2, 2, 3))
    out = net(X[:1].expand_as(X))
    assert net.report[0].reason == "every step of its input is the same tensor"
    expected = out[1].clone()
    out[0].zero_()
    close(out[1], expected, atol=0)


def test_each_step_of_a_constant_image_has_its_gradient():
    found = []
    net = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Tanh())
    for run in (snnlstm.Sequential.of(net), lambda x: loop(net, x)):
        x = X[:1].expand_as(X).requires_grad_()
        stacks.total(run(x).square()).backward()
        found.append(x.grad)
    close(*found, atol=1e-5)


@pytest.mark.parametrize("around", ["hooks", "global hooks", "lengths", "shared"])
def test_what_looks_at_single_steps_gets_them(around):
    net, seen = snnlstm.Sequential(nn.Tanh(), nn.Sigmoid()), []
    x, lengths, handle = X[:1].expand_as(X), None, None

    def hook(module, args, out):
        seen.append(len(args[0]))

    if around == "hooks":
        handle = net[0].register_forward_hook(hook)
    elif around == "global hooks":
        handle = nn.modules.module.register_module_forward_hook(hook)
    elif around == "lengths":
        lengths = [T, 0, 1]
    elif around == "shared":
        cell = hidden(2, 2, 3)
        net = snnlstm.Sequential(nn.Tanh(), cell, cell)
    net(x, lengths)
    if handle is not None:
        handle.remove()
    assert "once" not in [layer.kind for layer in net.report[:1]]
    assert seen.count(N) == {"hooks": T, "global hooks": 2 * T}.get(around, 0)


def test_a_constant_example_makes_no_constant_program():
    net = snnlstm.Sequential(nn.Conv2d(2, 2, 3), nn.Tanh())
    x = X[:1].expand_as(X)
    expected = loop(net, X)
    close(torch.jit.trace(net, x, check_trace=False)(X), expected)
    close(torch.export.export(net, (x,)).module()(X), expected)
    close(make_fx(net)(x)(X), expected)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    close(compiled(x), loop(net, x))
    close(compiled(X), expected)
    close(torch.func.vmap(net)(torch.stack([x, x])), torch.stack(2 * [loop(net, x)]))


IN_EVALUATION = {
    "batch norm": "sequence fold sequence",
    "dropout": "sequence fold sequence",
    "running statistics": "fold fold fold",
    "a classifier": "fold sequence fold fold step",
}


@pytest.mark.parametrize("form", ["Sequential", "compiled"])
@pytest.mark.parametrize("name", IN_EVALUATION)
def test_layers_equal_the_loop_in_evaluation(name, form):
    torch.manual_seed(0)
    net = nn.Sequential(*LAYERS[name][0]())
    loop(net, X)  # the loop fills the running statistics
    utils.reset(net)
    with torch.no_grad():
        calls = dict(*LAYERS[name][2:])
        if name == "dropout":
            calls["dropout"] = 0  # it does nothing
        equals_the_loop(net.eval(), X, IN_EVALUATION[name], 1e-5, form, calls)


@pytest.mark.parametrize("shape", [(1, N), (T, 1), (T, 0), (1, 0)], ids=str)
def test_short_sequences_and_empty_batches(shape):
    net = nn.Sequential(ours(), nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(32, 4), leaky())
    equals_the_loop(net, torch.rand(*shape, 2, 6, 6), "sequence fold fold fold step")


def test_layers_that_also_step_in_evaluation():
    """x[t] of (C, H, W) is one sample to a Conv2d: T must not become its channels or batch."""
    equals_the_loop(
        nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False)).eval(), X, "sequence"
    )
    net = nn.Sequential(nn.Conv2d(2, 2, 3), nn.MaxPool2d(2), nn.Flatten(0), nn.Linear(8, 3))
    equals_the_loop(net, torch.rand(T, 2, 6, 6), "step step step step")
    net = nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(2, 2, 3)), nn.Flatten())
    equals_the_loop(net, X, "step fold")  # the old spectral_norm changes at every step


def test_the_next_layer_gets_the_first_item_of_a_tuple():
    net = nn.Sequential(nn.MaxPool2d(2, return_indices=True), nn.Identity(), nn.LSTM(3, 5))
    one = snnlstm.Sequential(*net[:2])
    close(one(X), loop(net[:2], X))
    assert one.report[0].reason == "it returns indices"
    x = torch.rand(T, N, 2, 3)
    out, (h, c) = snnlstm.Sequential(net[2])(x)  # a tuple in a tuple
    expected = [net[2](step) for step in x]
    close(out, torch.stack([step[0] for step in expected]))
    close((h, c), [torch.stack([step[1][k] for step in expected]) for k in range(2)])


# ---- snnTorch's neurons that take whole sequences, and DeltaLeaky --------------------------------


def stack(make):
    torch.manual_seed(2)
    return [ours(init_hidden=True, max_pool=2), nn.Flatten(), nn.Linear(27, 5), make()]


def by_hand(net):
    return net[3](net[2](net[0](X).flatten(2)))


@pytest.mark.parametrize("make", stacks.NEURONS.values(), ids=stacks.NEURONS)
def test_neurons_that_take_sequences_are_called_once(make):
    net = snnlstm.Sequential(*stack(make))
    stepped = copy.deepcopy(net)
    for _ in range(2):  # the cell goes on from its state, and the neuron starts anew
        results = net(X), by_hand(stepped)
        close(*results)
    for out in results:
        sum(part.sum() for part in flat(out)).backward()
    for actual, expected in zip(net.parameters(), stepped.parameters(), strict=True):
        close(actual.grad, expected.grad, atol=1e-4)
    assert net.report[3].kind == "sequence"
    assert net.report[3].reason == "it takes sequences"
    out = snnlstm.unroll(X.transpose(0, 1), *net, batch_first=True)
    close([part.transpose(0, 1) for part in flat(out)], flat(by_hand(stepped)))


@pytest.mark.parametrize("make", stacks.NEURONS.values(), ids=stacks.NEURONS)
def test_hooks_of_such_neurons_see_sequences_also_in_two_places(make):
    neuron, seen = make(), []
    neuron.register_forward_hook(lambda layer, args, out: seen.append(args[0].shape))
    x = torch.rand(T, N, 5)
    back = nn.Linear(snnlstm.unroll(x, neuron)[0].shape[-1], 5)
    seen.clear()
    net = snnlstm.Sequential(neuron, back, neuron)
    once = flat(neuron(x))[0]
    close(net(x), neuron(back(once)))
    assert seen == 4 * [x.shape]
    assert [layer.kind for layer in net.report] == ["sequence", "fold", "sequence"]


@pytest.mark.parametrize("make", stacks.NEURONS.values(), ids=stacks.NEURONS)
def test_errors_name_the_layer(make):
    neuron, cell = make(), ours(2, 2, 3, init_hidden=True)
    name = type(neuron).__name__
    said = rf"a sequence of steps \(N, C\) for layer 1 \({name}\), got steps of shape \(3, 3, 6"
    with pytest.raises(ValueError, match=said):
        snnlstm.unroll(X, ours(init_hidden=True), neuron)
    said = rf"layer 3 \({name}\) needs whole sequences, but layer 1 may keep a state"
    with pytest.raises(ValueError, match=said):
        snnlstm.unroll(X, cell, cell, nn.Flatten(), neuron)


def test_a_norm_of_a_half_type_has_the_statistics_of_each_step():
    """The kernels do not run it: each step is a call of torch's function."""
    norm, x = nn.BatchNorm2d(2).bfloat16(), X.bfloat16() + 1
    expected = [copy.deepcopy(norm)(x_t) for x_t in x]
    net = snnlstm.Sequential(norm)
    close(net(x), torch.stack(expected), atol=0)
    assert net.report[0].kind == "sequence"


def test_delta_leaky_goes_step_by_step():
    equals_the_loop(nn.Sequential(*stacks.delta_leaky(), nn.Tanh()), X, "fold fold step fold")
