"""The cell under transforms of torch.func, and derivatives through what it returns.

A state that outlives its transform counts as none. test_gradcheck.py has torch's own checks.
"""

import copy
import pickle

import pytest
import snntorch
import torch
import torch.nn.functional as F
from snntorch import utils
from torch import nn

import snnlstm
from tests.autograd.loops import cells, events, zeros
from tests.shared.helpers import ours


def vmap(step, x):
    torch.func.vmap(lambda row: step(row[None]))(x)


def grad(step, x):
    torch.func.grad(lambda x: step(x).sum())(x)


def jvp(step, x):
    torch.func.jvp(step, (x,), (x,))


def grad_of_vmap(step, x):
    torch.func.grad(lambda x: torch.func.vmap(lambda row: step(row[None]))(x).sum())(x)


def vmap_of_grad(step, x):
    """Gradients for each sample."""
    torch.func.vmap(torch.func.grad(lambda row: step(row[None]).sum()))(x)


EMPTIES = {
    "to": lambda layer: layer.float(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "detach_hidden": lambda layer: type(layer).detach_hidden(),
    "reset_hidden": lambda layer: type(layer).reset_hidden(),
    "Leaky.detach_hidden": lambda layer: snntorch.Leaky.detach_hidden(),
    "Leaky.reset_hidden": lambda layer: snntorch.Leaky.reset_hidden(),
    "reset_mem": lambda layer: layer.reset_mem(),
    "utils.reset": lambda layer: utils.reset(nn.Sequential(layer)),
}
TRANSFORMS = [vmap, grad, jvp, grad_of_vmap, vmap_of_grad]


def leaky():
    return snnlstm.Leaky(0.5, init_hidden=True)


def cell():
    return snnlstm.SConv2dLSTM(2, 3, 3, threshold=0.01, init_hidden=True)


@pytest.mark.parametrize("use", EMPTIES)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: t.__name__)
@pytest.mark.parametrize("make", [leaky, cell], ids=lambda f: f.__name__)
def test_a_state_that_outlives_a_transform_of_torch_func_counts_as_none(make, transform, use):
    layer, x = make(), torch.rand(2, 2, 5, 5)
    fresh = copy.deepcopy(layer)
    transform(layer, x)
    used = EMPTIES[use](layer)
    layer = used if isinstance(used, nn.Module) else layer
    assert layer.mem.shape == (0,)
    assert layer.mem.dtype is torch.float32
    torch.testing.assert_close(layer(x), fresh(x))
    torch.testing.assert_close(layer.mem, fresh.mem)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: t.__name__)
@pytest.mark.parametrize("sequence", [False, True], ids=["step", "sequence"])
@pytest.mark.parametrize("algorithm", ["auto", "reference"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_call_after_a_transform_starts_from_zeros(transform, sequence, algorithm, batch):
    for make in (leaky, cell):
        layer, x = make(), torch.rand(2, 2, 5, 5)
        fresh = copy.deepcopy(layer)
        with snnlstm.algorithm(algorithm):
            transform(layer, x)
            called = [
                snnlstm.unroll(x[None, :batch], one)[0] if sequence else one(x[:batch])
                for one in (layer, fresh)
            ]
        torch.testing.assert_close(*called)
        torch.testing.assert_close(layer.mem, fresh.mem)


@pytest.mark.parametrize("transform", [vmap, vmap_of_grad], ids=lambda t: t.__name__)
@pytest.mark.parametrize("make", [leaky, cell], ids=lambda f: f.__name__)
def test_a_reset_within_a_transform_serves_batches_of_all_sizes(make, transform):
    layer = make()

    def step(x):
        layer.reset_mem()
        return layer(x)

    for batch in (2, 3):
        transform(step, torch.rand(batch, 2, 5, 5))


def of_vmap(shape):
    kept = []
    torch.func.vmap(lambda x: kept.append(x) or x)(torch.rand(2, *shape))
    return kept[0]


def of_grad(shape):
    kept = []
    torch.func.grad(lambda x: kept.append(x * 1) or x.sum())(torch.rand(shape))
    return kept[0]


@pytest.mark.parametrize("algorithm", ["auto", "reference"])
@pytest.mark.parametrize("time", [(), (2,)], ids=["step", "sequence"])
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("make", [ours, lambda: snnlstm.Leaky(0.5)], ids=["cell", "Leaky"])
def test_an_x_that_outlived_vmap_is_refused_by_name(make, later, time, algorithm):
    layer, shape = make(), (*time, 1, 2, 5, 5)
    call = (lambda x: snnlstm.unroll(x, layer)) if time else layer
    with snnlstm.algorithm(algorithm):
        if later:
            call(torch.rand(shape))
        mem = layer.mem
        with pytest.raises(RuntimeError, match=r"^x belongs to .* that has ended: return it"):
            call(of_vmap(shape))
        assert layer.mem is mem
        call(torch.rand(shape))


@pytest.mark.parametrize("name", ["x", "syn", "mem"])
def test_a_tensor_that_outlived_a_derivative_is_refused_by_name(name):
    """torch reads such tensors, and the kernels do not."""
    shapes = {"x": (1, 2, 5, 5), "syn": (1, 3, 5, 5), "mem": (1, 3, 5, 5)}
    given = {key: torch.rand(shape) for key, shape in shapes.items()}
    cell = ours()
    with pytest.raises(RuntimeError, match=f"^{name} belongs to .* that has ended: return it"):
        cell(**given | {name: of_grad(shapes[name])})


def test_a_state_goes_on_within_a_derivative_but_not_into_the_next():
    _, cell = cells()

    def two_steps(x, *start):
        cell(x[0], *start)
        return cell(x[1])[2].sum()

    x = events(2).requires_grad_()
    (expected,) = torch.autograd.grad(two_steps(x, *zeros()), x)
    torch.testing.assert_close(torch.func.grad(two_steps)(x.detach(), *zeros()), expected)
    torch.testing.assert_close(torch.func.grad(two_steps)(x.detach()), expected)


@pytest.mark.parametrize("pool", [0, 2])
def test_spikes_computed_from_mem_send_gradients_through_it(pool):
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
