"""Compares stacks of layers with a loop over the steps, for any kind of layers."""

import copy

import snntorch
import torch
from torch import nn

import snnlstm
from tests.shared.helpers import close, ours, same_gradients, steps

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


def exchanged(out):
    """Returns the result with its first two dimensions exchanged."""
    return tuple(map(exchanged, out)) if isinstance(out, tuple) else out.transpose(0, 1)


FORMS = {
    "Sequential": lambda net, x: net(x),
    "unroll": lambda net, x: snnlstm.unroll(x, *net),
    "batch_first": lambda net, x: exchanged(net(exchanged(x))),
}


def equals_the_loop(net, x, kinds, atol=2e-6, form="Sequential"):
    """Compares two runs of both; the second run starts from the states of the first."""
    one = snnlstm.Sequential(*copy.deepcopy(net), batch_first=form == "batch_first")
    other, run = net, FORMS[form]
    torch.manual_seed(5)
    actual = [run(one, x), run(one, x)]
    torch.manual_seed(5)
    expected = [loop(other, x), loop(other, x)]
    close(actual, expected, atol=atol)
    close(states_of(one), states_of(other), atol=atol)
    if torch.is_grad_enabled() and any(True for _ in other.parameters()):
        sum(map(total, actual)).backward()
        sum(map(total, expected)).backward()
        same_gradients(one, other)
    if form != "unroll" and kinds is not None:
        assert [layer.kind for layer in one.report] == kinds.split()
    return one


PLAIN = {"threshold": 0.2, "spike_grad": snnlstm.surrogate.atan()}  # snnTorch's cannot be copied


def leaky(**kwargs):
    return snntorch.Leaky(0.9, **PLAIN, **kwargs)


def hidden(*args, **kwargs):
    return ours(*args, init_hidden=True, **kwargs)
