"""Networks that were written for snnTorch train alike with snnTorch's cell and with ours.

Our cell and Leaky are imported in the place of snnTorch's, or come by ``patch()`` or by
``accelerate()``. The kernels must run each of them.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import snntorch
import torch
from torch import Tensor, nn

import snnlstm
from benchmarks.networks import NETWORKS, Network
from tests.shared.helpers import close

STEPS = 6


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"], autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Makes the device torch's default for all tensors of a test."""
    with torch.device(request.param), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)
        yield request.param


@pytest.fixture
def float64() -> Iterator[None]:
    """Lets snnTorch run in float64, with spikes in the dtype of their input as on its master."""

    def in_dtype_of_x(forward: Callable[..., Tensor]) -> Any:
        return staticmethod(lambda ctx, x, *rest: forward(ctx, x, *rest).to(x.dtype))

    with pytest.MonkeyPatch.context() as patch:
        for kind in vars(snntorch.surrogate).values():
            if isinstance(kind, type) and issubclass(kind, torch.autograd.Function):
                patch.setattr(kind, "forward", in_dtype_of_x(kind.forward))
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(torch.float32)


def theirs(network: Network, cell: Any = snntorch.SConv2dLSTM) -> nn.Module:
    torch.manual_seed(0)
    return network.make(cell)


def imported(network: Network) -> nn.Module:
    return theirs(network, snnlstm.SConv2dLSTM)


def patched(network: Network) -> nn.Module:
    with snnlstm.patch():
        return theirs(network)


def accelerated(network: Network) -> nn.Module:
    net = theirs(network)
    kinds = snntorch.SConv2dLSTM, snntorch.Leaky, nn.MaxPool2d, nn.Linear, nn.Conv2d
    cells = [layer.conv for layer in net.modules() if type(layer) is snntorch.SConv2dLSTM]
    layers = [
        name for name, layer in net.named_modules() if type(layer) in kinds and layer not in cells
    ]
    assert snnlstm.accelerate(net).swapped == tuple(layers)
    return net


def train(net: nn.Module, network: Network) -> list[Tensor]:
    """Returns the losses of some training steps."""
    torch.manual_seed(1)  # dropout
    optimizer, batches, losses = network.optimizer(net.parameters()), network.batches(), []
    for index in range(STEPS):
        batch = batches[index % len(batches)]
        losses.append(network.train(network.loop, net, optimizer, *batch).detach())
        assert all(parameter.grad.any() for parameter in net.parameters())
    return losses


@pytest.mark.parametrize("name", NETWORKS)
def test_training_steps_stay_together(name, float64):
    """Each network trains with the imported cell, and one with the others, too."""
    network = NETWORKS[name]
    net = theirs(network)
    expected, weights = train(net, network), net.state_dict()
    assert (expected[0] - expected[-1]).abs() > 1e-3  # it learns
    has_cells = any(isinstance(m, snntorch.SConv2dLSTM) for m in net.modules())
    for make in (imported, patched, accelerated) if name == "events" else (imported,):
        net = make(network)
        close(train(net, network), expected, atol=1e-8, rtol=1e-8)
        close(net.state_dict(), weights, atol=1e-7, rtol=1e-7)
        layers = [m for m in net.modules() if isinstance(m, snntorch.SpikingNeuron)]
        kinds = {snnlstm.SConv2dLSTM, snnlstm.Leaky} if has_cells else {snnlstm.Leaky}
        assert {type(layer) for layer in layers} == kinds
        assert all(layer.path.native or "AMX" in layer.path.reason for layer in layers)
