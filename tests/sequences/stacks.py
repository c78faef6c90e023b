"""Compares stacks of layers with a loop over the steps, for any kind of layers."""

import copy
from collections import Counter

import snntorch
import torch
from torch import nn

import snnlstm
from snnlstm.calls.entries import BoundedDict
from snnlstm.networks import layers as sizes
from tests.loops.compiled import BACKEND, Calls
from tests.sequences.by_length import LENGTHS, TIME, unpadded
from tests.shared.helpers import close, flat, ours, same_gradients, steps

T, N = 4, 3
X = steps(T, N, 2, 6, 6)


def fold_up_to(most, monkeypatch):
    """Lets layers other than cells run all steps at once only if one has at most so many bytes."""
    monkeypatch.setattr(sizes, "too_large", lambda step: step > most)
    monkeypatch.setattr(sizes, "_ways", BoundedDict())


def layers_of(stack):
    for layer in stack:
        if isinstance(layer, nn.Sequential):
            yield from layers_of(layer)
        else:
            yield layer


def loop(net, x):
    """Runs layer after layer in each step, step after step."""
    outs = []
    for step in x:
        out = step
        for layer in layers_of(net):
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


def exchanged(out):
    """Returns the result with its first two dimensions exchanged."""
    return tuple(map(exchanged, out)) if isinstance(out, tuple) else out.transpose(0, 1)


def compiled(net, x):
    """Compiles the loop, in which equal steps are one tensor; also returns the calls left."""
    calls, same = Calls(), x.stride(0) == 0
    torch._dynamo.reset()
    with calls.counted() as backend:
        run = torch.compile(
            lambda x: loop(net, [x] * T if same else x), backend=backend, fullgraph=True
        )
        return run(x[0] if same else x), calls


FORMS = {
    "Sequential": lambda net, x: net(x),
    "batch_first": lambda net, x: exchanged(net(exchanged(x))),
    "compiled": compiled,
}
# The names by which calls in compiled graphs are counted.
COUNTED = {
    nn.Conv2d: "conv", nn.Linear: "linear", snnlstm.SConv2dLSTM: "cell", snnlstm.Leaky: "leaky",
    nn.BatchNorm1d: "batch_norm", nn.BatchNorm2d: "batch_norm", nn.InstanceNorm2d: "instance_norm",
    nn.Dropout: "dropout", nn.Sigmoid: "sigmoid", nn.Tanh: "tanh",
}  # fmt: skip


def equals_the_loop(net, x, kinds, atol=2e-6, form="Sequential", more_calls=()):
    """Compares two runs of both; the second run starts from the states of the first.

    A compiled loop runs once, with the calls that the kinds of its layers or `more_calls` tell.
    """
    one = snnlstm.Sequential(*copy.deepcopy(net), batch_first=form == "batch_first")
    other, run, runs = net, FORMS[form], range(1 if form == "compiled" else 2)
    if form == "compiled":
        snnlstm.accelerate(one)
    torch.manual_seed(5)
    actual = [run(one, x) for _ in runs]
    torch.manual_seed(5)
    expected = [loop(other, x) for _ in runs]
    if form == "compiled":
        actual, (calls,) = map(list, zip(*actual, strict=True))
        wanted = Counter()
        for layer, kind in zip(layers_of(one), kinds.split(), strict=True):
            wanted[COUNTED.get(type(layer))] += T if kind == "step" else 1
        del wanted[None]
        wanted = dict(wanted) | dict(more_calls)
        found = {name: calls[name] for name in wanted}
        assert BACKEND != "snnlstm" or found == wanted, (found, wanted)
    close(actual, expected, atol=atol)
    close(states_of(one), states_of(other), atol=atol)
    if torch.is_grad_enabled() and any(True for _ in other.parameters()):
        sum(map(total, actual)).backward()
        sum(map(total, expected)).backward()
        same_gradients(one, other)
    if form in ("Sequential", "batch_first") and kinds is not None:
        assert [layer.kind for layer in one.report] == kinds.split()
    return one


PLAIN = {"threshold": 0.2, "spike_grad": snnlstm.surrogate.atan()}  # snnTorch's cannot be copied


def leaky(**kwargs):
    return snntorch.Leaky(0.9, **PLAIN, **kwargs)


SPIKES = PLAIN | {"threshold": 0.3}
# Neurons of 5 features that take whole sequences.
NEURONS = {
    "StateLeaky": lambda: snntorch.StateLeaky(0.8, 5, learn_beta=True, **SPIKES),
    "StateLeaky without spikes": lambda: snntorch.StateLeaky(0.8, 5, output=False),
    "truncated": lambda: snntorch.StateLeaky(0.8, 5, kernel_truncation_steps=2, **SPIKES),
    "LinearLeaky": lambda: snntorch.LinearLeaky(0.7, 5, 4, **SPIKES),
    "AssociativeLeaky": lambda: snntorch.AssociativeLeaky(5, 2, 2, 4),
    "LeakyParallel": lambda: snntorch.LeakyParallel(5, 4, beta=0.5, **SPIKES),
}


def delta_leaky(size=72):
    neuron = snntorch.DeltaLeaky(beta=0.9, init_hidden=True, delta_threshold=0.2, **SPIKES)
    return [nn.Flatten(), nn.Linear(size, 3), neuron]


def hidden(*args, **kwargs):
    return ours(*args, init_hidden=True, **kwargs)


def check_alone(layers):
    """Compares results, states and gradients with lengths= with those of each sample alone.

    The loss reads the last step of states.
    """
    x = steps(TIME, len(LENGTHS), 2, 6, 7).masked_fill_(~unpadded(), float("nan"))
    net = nn.Sequential(*layers)
    kinds = snnlstm.SConv2dLSTM, snntorch.Leaky, snntorch.DeltaLeaky
    stored = [layer for layer in layers if isinstance(layer, kinds)]
    out = flat(snnlstm.unroll(x, *layers, lengths=LENGTHS))
    (out[0].sum() + sum(part[-1].sum() for part in out[1:])).backward()
    kept = [layer.mem for layer in stored]
    grads = [p.grad for p in net.parameters()]
    net.zero_grad(set_to_none=True)
    for n, length in enumerate(LENGTHS):
        for layer in stored:
            layer.reset_mem()
        assert not out[0][length:, n].any()
        if length == 0:
            assert not any(part[:, n].any() for part in out)
            continue
        by_itself = flat(snnlstm.unroll(x[:length, n : n + 1], *layers))
        close([part[:length, n : n + 1] for part in out], by_itself, atol=1e-5)
        for part in out[1:]:
            close(part[length:, n], part[length - 1, n].expand_as(part[length:, n]), atol=0)
        close([mem[n : n + 1] for mem in kept], [layer.mem for layer in stored])
        (by_itself[0].sum() + sum(part[-1].sum() for part in by_itself[1:])).backward()
    close(grads, [p.grad for p in net.parameters()], atol=1e-4)
