"""Cells train under DistributedDataParallel and FSDP2, in 2 and 4 processes on one machine.

The processes of a group run all checks.
"""

import functools
import inspect
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import snnlstm
from tests.shared.cpu_kernels import native
from tests.shared.fresh import HANG
from tests.shared.helpers import THRESHOLD, close, in_processes, ours, steps

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:  # before torch 2.6
    fully_shard = None
if not hasattr(torch.cpu.Stream(), "record_event"):  # torch 2.6 has FSDP2 for GPUs alone
    fully_shard = None

parallel_of: Callable[..., DistributedDataParallel] = DistributedDataParallel
if "_unsafe_preserve_version_counter" not in inspect.getsource(DistributedDataParallel):
    # DDP of an older torch writes to the buffers before each call, and autograd notices it: no
    # module with buffers, such as snnTorch's cell, can be called twice before its backward pass.
    parallel_of = functools.partial(DistributedDataParallel, broadcast_buffers=False)


def net(**options: Any) -> nn.Sequential:
    """Makes a network that is equal in every process: a stem, a cell with states, a readout."""
    torch.manual_seed(0)
    cell = {"threshold": THRESHOLD, "init_hidden": True, "reset_mechanism": "subtract"} | options
    return nn.Sequential(
        nn.Conv2d(2, 2, 3, padding=1),
        snnlstm.SConv2dLSTM(2, 4, 3, **cell),
        nn.Flatten(),
        nn.Linear(4 * 36, 3),
    )


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    """Calls the model once for each step of (T, N, 2, 6, 6), and returns a loss."""
    snnlstm.SConv2dLSTM.reset_hidden()
    return sum(model(x_t) for x_t in x).square().mean()


def whole_batch(world: int, seed: int = 1) -> Tensor:
    return steps(3, 2 * world, 2, 6, 6, seed=seed)


def own_part(x: Tensor, rank: int) -> Tensor:
    return x[:, 2 * rank : 2 * rank + 2]


def whole_gradients(model: nn.Module) -> list[Tensor]:
    grads = [parameter.grad for parameter in model.parameters()]
    return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]


def gradients_alone(x: Tensor, **options: Any) -> list[Tensor]:
    """Returns the gradients that one process forms of the whole batch."""
    alone = net(**options)
    loss_of(alone, x).backward()
    return whole_gradients(alone)


def states_stay_where_they_are_and_last_batches_may_differ(rank: int, world: int) -> None:
    """snnTorch's states are buffers, and those of rank 0 replace those of other ranks."""
    cell, alone = ours(), ours()
    parallel = parallel_of(cell)
    for batch in (2, 2, 1 + rank):
        x = steps(1, batch, 2, 6, 6, seed=10 * rank + batch)[0]
        spk, syn, mem = parallel(x)
        close((spk, syn, mem), alone(x))
        (spk.sum() + mem.sum()).backward()
        snnlstm.SConv2dLSTM.detach_hidden()
    assert cell.mem.shape == (1 + rank, 3, 6, 6)


def gradients_are_those_of_one_process_on_the_whole_batch(rank: int, world: int) -> None:
    """The model is called once a step, and one backward pass follows all calls."""
    x = whole_batch(world)
    for options in ({}, {"learn_threshold": True}, {"threshold": torch.full((4, 1, 1), 0.1)}):
        parallel = parallel_of(net(**options))
        loss_of(parallel, own_part(x, rank)).backward()
        assert parallel.module[1].path.native == (native is not None)
        close(whole_gradients(parallel), gradients_alone(x, **options), atol=1e-5, rtol=1e-4)


def ranks_with_more_batches_than_others(rank: int, world: int) -> None:
    """Under torch's Join, ranks that are done take part in what other ranks communicate."""
    parallel = parallel_of(net(learn_threshold=True))
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    with Join([parallel]):
        for seed in range(1 + rank):
            optimizer.zero_grad()
            parallel.module[1].reset_mem()
            parallel(steps(1, 2, 2, 6, 6, seed=seed)[0]).square().mean().backward()
            optimizer.step()
    mine = torch.cat([p.detach().flatten() for p in parallel.parameters()])
    first = mine.clone()
    dist.broadcast(first, 0)
    close(mine, first)


def sharded_gradients_are_those_of_one_process(rank: int, world: int) -> None:
    """FSDP2 shards the cell, its conv, or the network as one unit."""
    x = whole_batch(world)
    options = {"learn_threshold": True, "threshold": torch.full((4, 1, 1), 0.1)}
    expected = gradients_alone(x, **options)
    mesh = init_device_mesh("cpu", (world,))
    for unit in ("cell", "conv", "network"):
        model = net(**options)
        cell = model[1]
        if unit != "network":
            fully_shard(cell if unit == "cell" else cell.conv, mesh=mesh)
        fully_shard(model, mesh=mesh)
        loss_of(model, own_part(x, rank)).backward()
        close(whole_gradients(model), expected, atol=1e-5, rtol=1e-4)
        assert isinstance(cell, snnlstm.SConv2dLSTM)
        assert type(cell.mem) is Tensor
        assert cell.mem.shape == (2, 4, 6, 6)  # not sharded
        assert cell.conv.weight.to_local().shape[0] == 16 // world
        # conv's parameters are whole in conv's forward alone, which the reference path calls.
        assert cell.path.native == (native is not None and unit != "conv")
        assert unit != "conv" or "conv is a FSDPConv2d" in cell.path.reason


CHECKS = (
    states_stay_where_they_are_and_last_batches_may_differ,
    gradients_are_those_of_one_process_on_the_whole_batch,
    ranks_with_more_batches_than_others,
    sharded_gradients_are_those_of_one_process,
)


def _run(rank: int, world: int, store: str) -> None:
    timeout = timedelta(seconds=HANG)
    dist.init_process_group("gloo", f"file://{store}", timeout, world, rank)
    for check in CHECKS if fully_shard else CHECKS[:-1]:
        check(rank, world)
    # destroy_process_group may wait for gloo's threads, which wait for the GIL.
    os._exit(0)


# Four processes are part of `make test-all`.
@pytest.mark.parametrize("world", [2, 4] if os.environ.get("SNNLSTM_LONG") else [2])
def test_processes(world, tmp_path):
    """A torch without FSDP2, or without it on a CPU, has its part left out."""
    in_processes(_run, world, str(tmp_path / "store"), count=world)
