"""Networks train in the loops of Lightning, Accelerate, DataParallel and torch's AMP."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import replicate
from torch.utils.data import DataLoader

import snnlstm
from benchmarks.networks import NETWORKS, Spectrogram, twins
from tests.shared.helpers import close, same_gradients, steps


def data(name: str) -> list[tuple[Tensor, Tensor]]:
    """Returns single samples, as a Dataset does."""
    (x, y), *_ = NETWORKS[name].batches()
    return list(zip(x, y, strict=True))


def same_weights(one: nn.Module, other: nn.Module) -> None:
    close(one.state_dict(), other.state_dict(), atol=1e-4)


def test_lightnings_trainer(tmp_path):
    lightning = pytest.importorskip("lightning", reason="pip install lightning")

    class Lit(lightning.LightningModule):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            x, y = batch
            return F.cross_entropy(self.net(x).mean(0), y)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    nets = [Lit(net) for net in twins(NETWORKS["documentation"].make)]
    for net in nets:
        before = copy.deepcopy(net.state_dict())
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=True, default_root_dir=tmp_path, gradient_clip_val=0.5,
            accumulate_grad_batches=2,
        )  # fmt: skip
        trainer.fit(net, DataLoader(data("documentation"), batch_size=2))
        assert not torch.equal(net.net.fc.weight, before["net.fc.weight"])
    assert nets[1].net.cells[0].path.native
    same_weights(*nets)
    saved = torch.load(next(tmp_path.rglob("*.ckpt")), weights_only=True)
    nets[0].load_state_dict(saved["state_dict"])


def test_accelerates_loop():
    accelerate = pytest.importorskip("accelerate", reason="pip install accelerate")
    nets = twins(NETWORKS["documentation"].make)
    for net in nets:
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        loader = DataLoader(data("documentation"), batch_size=2)
        model, optimizer, loader = accelerator.prepare(net, optimizer, loader)
        for x, y in [*loader] * 2:
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(x).mean(0), y))
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    assert nets[1].cells[0].path.native
    same_weights(*nets)


def test_data_parallels_replicas(monkeypatch):
    """Each replica gets a part of the batch, and the gradients are those of the whole batch."""
    module = sys.modules[replicate.__module__]

    def broadcast(tensors: Any, devices: Any, detach: bool = False) -> Any:
        return [[t.detach() if detach else t.clone() for t in tensors] for _ in devices]

    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", broadcast)
    monkeypatch.setattr(module, "_get_device_index", lambda device, allow: device)
    net, whole = (twins(Spectrogram)[1].eval() for _ in range(2))  # batch norm takes no statistics
    x = steps(4, 1, 20, 32)  # (N, 1, mels, columns)
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
