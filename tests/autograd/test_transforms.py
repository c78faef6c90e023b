"""Jacobians and torch.func's derivatives are those of snnTorch's cell, and spoil no later call.

test_gradcheck.py has torch's own checks.
"""

import copy

import pytest
import torch
import torch.nn.functional as F

import snnlstm
from tests.autograd.loops import cells, events, zeros
from tests.shared.helpers import close


def vmap(cell, x):
    torch.func.vmap(lambda row: cell(row[None], *zeros(1))[0])(x)


def grad(cell, x):
    torch.func.grad(lambda x: cell(x, *zeros())[2].sum())(x)


def jvp(cell, x):
    torch.func.jvp(lambda x: cell(x, *zeros())[2].sum(), (x,), (x,))


def grad_of_vmap(cell, x):
    torch.func.grad(lambda x: torch.func.vmap(lambda row: cell(row[None], *zeros(1))[2])(x).sum())(
        x
    )


USES = {
    "call": lambda cell, x: cell(x),
    "call of one sample": lambda cell, x: cell(x[:1]),
    "to": lambda cell, x: cell.float(),
    "deepcopy": lambda cell, x: copy.deepcopy(cell)(x),
    "detach_hidden": lambda cell, x: type(cell).detach_hidden(),
    "reset_hidden": lambda cell, x: type(cell).reset_hidden(),
    "mem": lambda cell, x: cell.mem + 1,
    "syn": lambda cell, x: cell.syn + 1,
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("transform", [vmap, grad, jvp, grad_of_vmap], ids=lambda t: t.__name__)
def test_a_cell_after_a_transform_of_torch_func(transform, use):
    """The transform's wrapped tensors must not stay behind as the stored state."""
    x = events(1)[0]
    _, cell = cells()
    transform(cell, x)
    if transform is vmap:
        assert cell.mem.shape == cell.syn.shape == (0,)
        assert cell.mem.dtype == torch.float64
    USES[use](cell, x)
    cell.reset_mem()
    _, fresh = cells()
    torch.testing.assert_close(cell.double()(x)[2], fresh(x)[2])


def test_the_state_that_a_derivative_leaves_goes_on():
    x = events(2)
    _, cell = cells()
    grad(cell, x[0])
    _, plain = cells()
    plain(x[0], *zeros())
    torch.testing.assert_close(cell(x[1]), plain(x[1]))


@pytest.mark.parametrize("place", range(4))
def test_a_tensor_that_outlived_a_derivative_is_computed_with_as_torch_does(place):
    found = []
    for cell in cells():
        tensors = [events(1)[0], *(z + 0.1 for z in zeros()), cell.conv.weight.detach()]

        def keep(t, tensors=tensors):
            tensors[place] = 2 * t
            return t.sum()

        cell(*tensors[:3])
        torch.func.grad(keep)(tensors[place])
        del cell.conv.weight
        cell.conv.weight = tensors.pop()
        found.append([out.double() for out in cell(*tensors)])
    close(*found, atol=1e-12)


@pytest.mark.parametrize("pool", [0, 2])
def test_spikes_formed_from_mem_send_their_gradients_through_it(pool):
    """Hooks on mem see the whole gradient if spk is formed as docs/migrating.md says."""
    gradients = []
    for cell in cells(max_pool=pool):
        _, syn, mem = cell(events(1)[0], *zeros())
        mem.retain_grad()
        if isinstance(cell, snnlstm.SConv2dLSTM):
            spk = cell.fire(F.max_pool2d(mem, pool) if pool else mem)
        else:
            spk = cell.spk
        (grad_of_mem,) = torch.autograd.grad(spk.sum(), mem, retain_graph=True)
        (spk.sum() + mem.square().sum() + syn.sum()).backward()
        gradients.append((grad_of_mem, mem.grad, cell.conv.weight.grad))
    torch.testing.assert_close(*gradients, atol=1e-10, rtol=1e-9)
    assert gradients[0][0].any()
