"""Networks train in the loops of Lightning, Accelerate, DataParallel and torch's AMP."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import close, ours, same_gradients, steps
from nets import NETWORKS, ExplicitStates, Lit, Recurrent, Truncated, twins
from torch import Tensor, nn
from torch.nn.parallel import replicate
from torch.utils.data import DataLoader

import snnlstm


def data(name: str) -> list[tuple[Tensor, Tensor]]:
    """Returns single samples, as a Dataset does."""
    (x, y), *_ = NETWORKS[name].batches()
    return list(zip(x, y, strict=True))


def same_weights(one: nn.Module, other: nn.Module) -> None:
    close(one.state_dict(), other.state_dict(), atol=1e-4)


def test_lightnings_trainer(tmp_path):
    lightning = pytest.importorskip("lightning", reason="pip install lightning")
    nets = twins(Lit)
    for net in nets:
        before = copy.deepcopy(net.state_dict())
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=True, default_root_dir=tmp_path, gradient_clip_val=0.5,
            accumulate_grad_batches=2,
        )  # fmt: skip
        trainer.fit(net, DataLoader(data("lit"), batch_size=2))
        assert not torch.equal(net.head.weight, before["head.weight"])
    assert nets[1].lstm.path.native
    same_weights(*nets)
    saved = torch.load(next(tmp_path.rglob("*.ckpt")), weights_only=True)
    nets[0].load_state_dict(saved["state_dict"])


def test_accelerates_loop():
    accelerate = pytest.importorskip("accelerate", reason="pip install accelerate")
    nets = twins(ExplicitStates)
    for net in nets:
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        loader = DataLoader(data("explicit"), batch_size=2)
        model, optimizer, loader = accelerator.prepare(net, optimizer, loader)
        for x, y in [*loader] * 2:
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(x).mean(0), y))
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    assert nets[1].lstm1.path.native
    same_weights(*nets)


def test_data_parallels_replicas(monkeypatch):
    """Each replica gets a part of the batch, and the gradients are those of the whole batch."""
    module = sys.modules[replicate.__module__]

    def broadcast(tensors: Any, devices: Any, detach: bool = False) -> Any:
        return [[t.detach() if detach else t.clone() for t in tensors] for _ in devices]

    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", broadcast)
    monkeypatch.setattr(module, "_get_device_index", lambda device, allow: device)
    net, whole = twins(Recurrent)[1], twins(Recurrent)[1]
    x = steps(4, 4, 2, 12, 12)  # (N, T, C, H, W)
    net(x[:1])  # the module then has a state of another batch
    for _ in range(2):
        replicas = replicate(net, [0, 1])
        out = [replica(part) for replica, part in zip(replicas, x.split(2), strict=True)]
        assert all(replica.lstm1.path.native for replica in replicas)
        expected = whole(x)
        close(torch.cat(out, 1), expected, atol=1e-5)
        torch.cat(out, 1).square().sum().backward()
        expected.square().sum().backward()
    same_gradients(net, whole)
    assert net.lstm1.mem.shape[0] == 1  # a replica's states are its own
    assert type(snnlstm.accelerate(nn.DataParallel(net)).model.module.lstm1) is type(net.lstm1)


def test_replicas_that_go_on_from_a_state_start_from_the_modules():
    """As in snnTorch, states do not come back from replicas: each call starts from one state."""
    cell = ours()
    x = steps(2, 2, 2, 6, 6)
    cell(x[0])
    before = cell.mem
    replica = cell._replicate_for_data_parallel()
    replica._parameters, replica._buffers = dict(cell._parameters), dict(cell._buffers)
    replica._modules = dict(cell._modules)
    _, _, mem = replica(x[1])
    assert cell.mem is before
    close(mem, copy.deepcopy(cell)(x[1])[2])


@pytest.mark.parametrize("autocast", [False, True])
def test_backward_inside_of_autocast_with_a_grad_scaler(autocast):
    def trained(net: Truncated, scale: float) -> Truncated:
        """Gradients of two chunks are accumulated, unscaled and clipped."""
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        x, state = steps(3, 2, 2, 6, 6), net.lstm.reset_mem()
        for index in range(4):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = 0
                for x_t in x:
                    logits, state = net(x_t, state)
                    out = out + logits
                scaler.scale(out.square().mean()).backward()
            state = [s.detach() for s in state]
            if index % 2:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        return net

    (theirs, ours), (_, unscaled) = twins(Truncated), twins(Truncated)
    before = copy.deepcopy(ours.state_dict())
    trained(ours, 2.0**16)
    assert ours.lstm.path.native
    assert not torch.equal(ours.lstm.conv.weight, before["lstm.conv.weight"])
    close(ours.state_dict(), trained(unscaled, 1.0).state_dict(), atol=1e-7)
    trained(theirs, 2.0**16)
    for name, start in before.items():
        change = theirs.state_dict()[name] - start
        difference = (ours.state_dict()[name] - start - change).abs().max()
        # Under autocast, snnTorch's convolution rounds to bfloat16.
        assert difference <= (0.3 if autocast else 1e-3) * change.abs().max(), name
