"""What the graph of a Leaky keeps, and what a backward pass does to the layer's state."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import snnlstm
from tests.shared.helpers import close, ours, steps
from tests.shared.leaky import F64, LEARN, currents, leaky_twins

# ---- parameters that change through .data --------------------------------------------------------


def assign(parameter: Tensor) -> None:
    parameter.data = parameter.data * 0.7


def scale(parameter: Tensor) -> None:
    parameter.data *= 0.7  # in place


PARAMETERS: dict[str, dict[str, Any]] = {
    "numbers": {},
    "vectors": {"beta": torch.rand(5), "threshold": torch.rand(3, 1)},
    "copied": {"beta": torch.rand(3, 5), "threshold": torch.tensor(0.3, dtype=F64)},
}


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("change", [assign, scale], ids=["assigned", "in place"])
@pytest.mark.parametrize("name", ["beta", "threshold"])
@pytest.mark.parametrize("kind", PARAMETERS)
def test_each_step_keeps_the_numbers_that_it_read(
    kind: str, name: str, change: Callable[[Tensor], None], order: int
) -> None:
    found = []
    for layer in leaky_twins(**PARAMETERS[kind], **LEARN):
        x = currents(5, 3).mT if kind == "copied" else currents(3, 5)
        x, total = x.clone().requires_grad_(), 0
        for x_t in x:
            spk, mem = layer(x_t)
            total = total + spk.sum() + mem.square().sum()
            change(getattr(layer, name))
        leaves = [x, layer.beta, layer.threshold]
        grads = torch.autograd.grad(total, leaves, create_graph=order == 2)
        if order == 2:
            grads = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
        assert not isinstance(layer, snnlstm.Leaky) or layer.path.native
        found.append([g.double() for g in grads])
    close(*found, atol=1e-4, rtol=1e-4)


# ---- the state -----------------------------------------------------------------------------------


def test_a_parameter_that_is_set_as_mem_stays_outside_of_the_layer() -> None:
    layer, start = leaky_twins()[0], nn.Parameter(torch.tensor([0.1, 0.2]))
    layer.mem = start
    first = layer(torch.ones(2))[1]
    layer(torch.ones(2))
    close(layer.mem, torch.tensor([0.8 * 1.08 + 1 - 0.3, 0.8 * 1.16 + 1 - 0.3]))
    assert not layer._parameters
    layer.mem = start
    layer.detach_hidden()
    assert start.requires_grad
    first.sum().backward()
    close(start.grad, torch.tensor([0.8, 0.8]))
    layer(torch.ones(2), start)[1].sum().backward()  # which snnTorch refuses
    close(start.grad, torch.tensor([1.6, 1.6]))
    assert not layer._parameters


@pytest.mark.parametrize("reset", ["subtract", "zero"])
def test_a_sparse_x_runs_as_in_snntorch_or_is_refused_by_name(reset: str) -> None:
    x, found = currents(3, 5)[0].relu().to_sparse(), []
    for layer in leaky_twins(reset_mechanism=reset):
        found.append(layer(x, torch.ones(3, 5)))
        layer.reset_mem()
        with pytest.raises((TypeError, RuntimeError)):  # the latter from snnTorch
            layer(x.to_dense(), x)
    close(*found)
    layer = leaky_twins(reset_mechanism=reset)[0]
    shorter = torch.ones(2, 5).to_sparse()
    for given, name in (
        ((x,), "input_"),
        ((x.to_dense(), x), "mem"),
        ((x.to_dense(), shorter), "mem"),
    ):
        with pytest.raises(TypeError, match=f"{name} must be dense, as {name}.to_dense"):
            layer(*given)
        assert not layer.mem.numel()


@pytest.mark.filterwarnings("ignore:.*prototype")
def test_a_nested_tensor_is_refused_by_name_after_plain_ones() -> None:
    nested, x = torch.nested.nested_tensor([torch.rand(5), torch.rand(4)]), currents(3, 5)[0]
    layer = leaky_twins()[0]
    for given, name in ((nested,), "input_"), ((x, nested), "mem"):
        layer(*(x for _ in given))
        with pytest.raises(TypeError, match=f"{name} must be a plain tensor, got a nested one"):
            layer(*given)


LAYERS: dict[str, Callable[[], Any]] = {
    "Leaky": lambda: leaky_twins(learn_beta=True)[0],
    "reset_delay": lambda: leaky_twins(reset_delay=False)[0],
    "cell": ours,
}


def plainly(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


@pytest.mark.parametrize("how", ["one", "two", "steps"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_checkpoint_leaves_the_state_of_the_forward_pass(name: str, how: str) -> None:
    """torch calls the layer again in the backward pass, and stops its last call half-way."""
    found = []
    for again in True, False:
        layer, x = LAYERS[name](), steps(4, 2, 2, 5, 5).requires_grad_()
        run: Any = partial(checkpoint, use_reentrant=False) if again else plainly

        def sequence(x: Tensor, layer: Any = layer) -> Tensor:
            layer.reset_mem()
            return [layer(x_t) for x_t in x][-1][-1]

        if how == "steps":
            out = run(layer, x[0], *(torch.zeros(0) for _ in range(2 if name == "cell" else 1)))
            for x_t in x[1:]:
                out = run(layer, x_t, *out[1:])
            last = [out[-1]]
        else:
            last = [run(sequence, k * x) for k in ([1] if how == "one" else [1, 0.5])]
        before = layer.mem
        sum(mem.square().sum() for mem in last).backward()
        assert layer.mem is before
        found.append([layer.mem, x.grad])
        with torch.no_grad():
            layer(x[0])  # which goes on from that state
        found[-1].append(layer.mem)
    close(*found)
