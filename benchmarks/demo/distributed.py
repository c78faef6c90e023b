"""The processes that train together: who is who, who computes what, what is summed over them.

torchrun starts the processes and tells each about the others in environment variables:
https://docs.pytorch.org/docs/stable/elastic/run.html
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """This process among those that train together; by default it is alone.

    rank, size: its number, and how many there are; local_rank, local_size: those of this machine.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the one process that prints, logs and writes checkpoints."""
        return self.rank == 0

    def share(self, whole: Tensor) -> Tensor:
        """This process's part of `whole`: every size-th entry, none twice, none left out.

        torch's DistributedSampler fills the last batch up with repeated samples; here the parts
        may differ by one entry, and be empty.
        """
        return whole[self.rank :: self.size]

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model, its gradients averaged over the processes in backward."""
        if self.size == 1:
            return model
        # A buffer of snnTorch's cell is its state, of the shape of the batch: broadcast at each
        # forward, process 0's would overwrite all others', and abort where the shapes differ, as
        # in a last batch. Neither network has a buffer that training changes.
        parallel = nn.parallel.DistributedDataParallel
        known = inspect.signature(parallel).parameters  # renamed in torch 2.13
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        devices = [self.device] if self.device.type == "cuda" else None
        return parallel(model, device_ids=devices, **{name: False})

    def total(self, *values: float) -> list[float]:
        """Each value, summed over the processes. All of them have to call it."""
        if self.size == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(summed)
        return summed.tolist()

    def gather(self, mine: T) -> list[T]:
        """What each process has, in the order of their ranks. All of them have to call it."""
        if self.size == 1:
            return [mine]
        found: list[T] = [mine] * self.size
        dist.all_gather_object(found, mine)
        return found


@contextlib.contextmanager
def team(device: str) -> Iterator[Team]:
    """The team that torchrun has put this process into; device is "cpu" or "cuda"."""
    rank, size, local_rank, local_size = (
        int(os.environ.get(name, default))
        for name, default in (
            ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1),
        )
    )  # fmt: skip
    own = torch.device(device, local_rank if device == "cuda" else None)
    if device == "cuda":
        torch.cuda.set_device(own)
    if size > 1:
        if device == "cuda":
            dist.init_process_group("nccl", device_id=own)
        else:
            dist.init_process_group("gloo")
    yield Team(own, rank, size, local_rank, local_size)
    # Not after an error: the others may wait in a sum that this process will never join, and
    # torchrun ends them once it has left.
    if size > 1:
        dist.barrier()  # gloo may abort a process whose peers are still in their last sum
        dist.destroy_process_group()
