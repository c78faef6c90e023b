"""Networks that were written for snnTorch train alike with snnTorch's cell and with ours.

Our cell and Leaky are imported in the place of snnTorch's, or come by ``patch()`` or by
``accelerate()``. The kernels must run each of them.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import snntorch
import torch
from torch import Tensor, nn

import snnlstm
from benchmarks import trained
from benchmarks.demo import training
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
    kinds = snntorch.SConv2dLSTM, snntorch.Leaky
    layers = [name for name, layer in net.named_modules() if type(layer) in kinds]
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


def test_trained_networks_are_timed_beside_fresh_ones_on_the_same_digits(monkeypatch, capsys):
    """Some noise of two classes stands for the demo's digits."""
    labels = torch.arange(48, device="cpu") % 2
    images = torch.rand(48, 8, 8, device="cpu") * (0.2 + 0.8 * labels[:, None, None])
    split = images, labels, images, labels
    monkeypatch.setattr(training, "load_split", lambda seed: split)
    monkeypatch.setattr(trained, "EPOCHS", 2)
    trained.weights.cache_clear()
    for name, case in trained.FRESH.items():
        after, cells = (
            trained.TRAINED[f"{name}-trained"],
            (snntorch.SConv2dLSTM, snnlstm.SConv2dLSTM),
        )
        fresh = theirs(case).state_dict()
        nets = [theirs(after, cell) for cell in cells]
        close(nets[1].state_dict(), nets[0].state_dict(), atol=0, rtol=0)
        assert any((nets[0].state_dict()[key] - fresh[key]).abs().max() > 0.01 for key in fresh)
        close(case.batches()[0], after.batches()[0], atol=0, rtol=0)
        x, y = after.batches()[0]
        assert f"T={len(x)} N={len(y)}" in after.title
        runs = [(cells[0], after.loop), (cells[1], after.loop), (cells[1], after.sequences)]
        losses = []
        for cell, run in runs:
            net = theirs(after, cell)
            losses.append(after.train(run, net, after.optimizer(net.parameters()), x, y).item())
        assert losses == pytest.approx([losses[0]] * 3, rel=5e-3)
        (line,) = capsys.readouterr().out.splitlines()
        begin, end = re.fullmatch(f"{name}: .* from ([\\d.]+) to ([\\d.]+)", line).groups()
        assert float(end) < float(begin)
    trained.weights.cache_clear()
