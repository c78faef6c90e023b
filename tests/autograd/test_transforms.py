"""The cell under transforms of torch.func, and derivatives through what it returns.

A state that outlives its transform is refused. test_gradcheck.py has torch's own checks.
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


EMPTIES = {
    "to": lambda cell: cell.float(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda cell: pickle.loads(pickle.dumps(cell)),
    "detach_hidden": lambda cell: type(cell).detach_hidden() or cell,
    "reset_hidden": lambda cell: type(cell).reset_hidden() or cell,
    "reset_mem": lambda cell: cell.reset_mem() and cell,
}


@pytest.mark.parametrize("use", EMPTIES)
@pytest.mark.parametrize("transform", [vmap, grad, jvp, grad_of_vmap], ids=lambda t: t.__name__)
def test_a_state_that_outlives_a_transform_of_torch_func_is_refused_until_it_is_reset(
    transform, use
):
    x = events(1)[0]
    _, cell = cells()
    transform(cell, x)
    for batch in (x, x[:1]):
        with pytest.raises(RuntimeError, match=r"has ended: call reset_mem\(\) before the next"):
            cell(batch)
    cell = EMPTIES[use](cell)
    assert cell.mem.shape == cell.syn.shape == (0,)
    assert cell.mem.dtype == cell.conv.weight.dtype
    _, fresh = cells()
    torch.testing.assert_close(cell.double()(x)[2], fresh(x)[2])


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


RESETS = {
    "reset_mem": lambda layer: layer.reset_mem(),
    "reset_hidden": lambda layer: snntorch.Leaky.reset_hidden(),
    "utils.reset": lambda layer: utils.reset(nn.Sequential(layer)),
}


@pytest.mark.parametrize("algorithm", ["auto", "reference"])
@pytest.mark.parametrize("reset", RESETS)
def test_a_leaky_is_reset_after_vmap(reset, algorithm):
    layer, x = snnlstm.Leaky(0.5), torch.rand(2, 3, 5)
    with snnlstm.algorithm(algorithm):
        torch.func.vmap(layer)(x)
        for call in (layer, lambda step: snnlstm.unroll(step[None], layer)):
            with pytest.raises(RuntimeError, match=r"^mem .* has ended: .* or call reset_mem\(\)"):
                call(x[0])
        RESETS[reset](layer)
        assert layer.mem.shape == (0,)
        torch.testing.assert_close(layer(x[0]), snnlstm.Leaky(0.5)(x[0]))


def test_a_leaky_is_copied_after_vmap():
    layer = snnlstm.Leaky(0.5)
    torch.func.vmap(layer)(torch.rand(2, 3, 5))
    for duplicate in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert duplicate.mem.shape == (0,)
        duplicate(torch.rand(3, 5))


def test_a_checkpointing_cell_has_its_gradients_under_torch_func():
    """torch.func refuses the hooks of torch's checkpoint, so the sequence has no segments there."""
    found = []
    for checkpoint in (False, True):
        _, cell = cells(checkpoint=checkpoint)
        found.append(torch.func.grad(lambda x, cell=cell: cell(x, *zeros())[2].sum())(events(4)))
    torch.testing.assert_close(*found)
    assert found[0].any()


def test_a_state_goes_on_within_a_derivative_but_not_into_the_next():
    _, cell = cells()

    def two_steps(x, *start):
        cell(x[0], *start)
        return cell(x[1])[2].sum()

    x = events(2).requires_grad_()
    (expected,) = torch.autograd.grad(two_steps(x, *zeros()), x)
    torch.testing.assert_close(torch.func.grad(two_steps)(x.detach(), *zeros()), expected)
    with pytest.raises(RuntimeError, match="has ended"):
        torch.func.grad(two_steps)(x.detach())


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
