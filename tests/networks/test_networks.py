"""Networks that were written for snnTorch train alike with snnTorch's cell and with ours.

Our cell is imported in the place of snnTorch's, comes by ``patch()``, or by ``accelerate()``. The
kernels must run every cell.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import snntorch
import torch
from torch import Tensor, nn

import snnlstm
from benchmarks.networks import NETWORKS, Network
from tests.shared.helpers import close

STEPS = 10
every_network = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"], autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Makes the device torch's default for all tensors of a test."""
    with torch.device(request.param), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)
        yield request.param


@pytest.fixture
def float64() -> Iterator[None]:
    """Lets snnTorch run in float64, with spikes in the dtype of their input as on its master."""
    functions = [
        value
        for value in vars(snntorch.surrogate).values()
        if isinstance(value, type) and issubclass(value, torch.autograd.Function)
    ]
    with pytest.MonkeyPatch.context() as patch:
        for function in functions:
            patch.setattr(function, "forward", staticmethod(_in_dtype_of_x(function.forward)))
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(torch.float32)


def _in_dtype_of_x(forward: Any) -> Any:
    return lambda ctx, x, *rest: forward(ctx, x, *rest).to(x.dtype)


def made(network: Network, cell: Any) -> nn.Module:
    torch.manual_seed(0)
    return network.make(cell)


def theirs(network: Network) -> nn.Module:
    return made(network, snntorch.SConv2dLSTM)


def imported(network: Network) -> nn.Module:
    return made(network, snnlstm.SConv2dLSTM)


def patched(network: Network) -> nn.Module:
    with snnlstm.patch():
        return theirs(network)


def accelerated(network: Network) -> nn.Module:
    net = theirs(network)
    cells = [name for name, cell in net.named_modules() if type(cell) is snntorch.SConv2dLSTM]
    assert snnlstm.accelerate(net).swapped == tuple(cells)
    return net


OURS = {"imported": imported, "patched": patched, "accelerated": accelerated}


def train(net: nn.Module, network: Network, steps: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Returns the losses of some training steps, and the gradients of the first."""
    torch.manual_seed(1)  # dropout
    optimizer, batches, losses = network.optimizer(net.parameters()), network.batches(), []
    gradients: dict[str, Tensor] = {}
    for index in range(steps):
        losses.append(network.step(net, optimizer, *batches[index % len(batches)]).detach())
        if index == 0:
            for name, parameter in net.named_parameters():
                assert parameter.grad is not None, name
                gradients[name] = parameter.grad.clone()
    return losses, gradients


def cells(net: nn.Module) -> list[Any]:
    found = [cell for cell in net.modules() if isinstance(cell, snntorch.SConv2dLSTM)]
    assert found
    return found


def neurons(net: nn.Module) -> list[Any]:
    return [neuron for neuron in net.modules() if isinstance(neuron, snntorch.SpikingNeuron)]


def all_native(net: nn.Module) -> bool:
    assert all(type(cell) is snnlstm.SConv2dLSTM for cell in cells(net))
    return all(cell.path.native for cell in cells(net))


@every_network
def test_the_first_step_agrees(network):
    """The step runs in float32, as most people's do."""
    net = theirs(network)
    expected = train(net, network, 1)
    assert all(cell.spk.any() for cell in cells(net))  # without spikes there is little to compare
    assert all(gradient.any() for gradient in expected[1].values())
    for name, make in OURS.items():
        net = make(network)
        losses, gradients = train(net, network, 1)
        assert all_native(net), name
        if not network.autocast:
            close(losses, expected[0], atol=1e-5, rtol=1e-5)
            for key, gradient in gradients.items():
                scale = float(expected[1][key].abs().max())
                close(gradient / scale, expected[1][key] / scale, atol=1e-4)
        else:  # bfloat16 decides some spikes otherwise
            close(losses, expected[0], atol=0.05, rtol=0.05)


@every_network
def test_ten_training_steps_stay_together(network, float64):
    net = theirs(network)
    expected, _ = train(net, network, STEPS)
    weights = net.state_dict()
    assert (expected[0] - expected[-1]).abs() > 1e-3  # it learns
    for make in OURS.values():
        net = make(network)
        losses, _ = train(net, network, STEPS)
        assert all_native(net)
        close(losses, expected, atol=1e-8, rtol=1e-8)
        close(net.state_dict(), weights, atol=1e-7, rtol=1e-7)


def saved_and_loaded(net: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_network
@pytest.mark.parametrize("make", [imported, accelerated])
def test_a_network_is_saved_whole(network, make):
    """torch.save saves a trained net if no neuron has one of snnTorch's closures."""
    net = make(network)
    train(net, network, 1)
    others = [neuron for neuron in neurons(net) if not isinstance(neuron, snnlstm.SConv2dLSTM)]
    if others:
        with pytest.raises((AttributeError, pickle.PicklingError), match="local object"):
            saved_and_loaded(net)
        assert len(snnlstm.accelerate(net, surrogates=True).surrogates) == len(others)
    loaded = saved_and_loaded(net)
    close(loaded.state_dict(), net.state_dict(), atol=0, rtol=0)
    for neuron in neurons(loaded):  # snntorch.utils.reset reaches no neuron that was loaded
        neuron.reset_mem()
    copied = copy.deepcopy(loaded)
    losses = [train(one, network, 1)[0] for one in (net, loaded, copied)]
    assert losses[0] == losses[1] == losses[2]
