"""Checkpoints from which training goes on as if it had never stopped, bit for bit on the CPU."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.demo.distributed import Team


class Stateful(Protocol):
    """A model, an optimizer, a schedule, a scaler."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Any) -> object: ...


def save(
    path: Path, parts: dict[str, Stateful], settings: dict[str, Any], progress: dict, team: Team
) -> None:
    """Write everything that training depends on; all processes have to call it.

    settings: what has to be the same when training goes on. progress: what `load` shall return.
    """
    states = team.gather(random_state())  # each process draws numbers of its own
    if not team.leads:
        return
    found = {
        "settings": settings,
        "progress": progress,
        "random": states,
        **{name: part.state_dict() for name, part in parts.items()},
    }
    write_atomically(path, found)


def load(
    path: Path, parts: dict[str, Stateful], settings: dict[str, Any], team: Team
) -> dict[str, Any]:
    """Put the saved state into `parts` and into torch's generators; returns the progress.

    Raises ValueError where the training that was saved is not the one that is asked for.
    """
    # weights_only: a checkpoint is data. A pickle that may hold anything runs code when loaded.
    found = torch.load(path, map_location="cpu", weights_only=True)
    for name, value in settings.items():
        if found["settings"][name] != value:
            raise ValueError(
                f"--{name} is {value}, but {path} holds a training with "
                f"{found['settings'][name]}; accepted: the same, or another --checkpoint"
            )
    if len(found["random"]) != team.size:
        raise ValueError(
            f"{path} was written by {len(found['random'])} processes and goes on with as many, "
            f"got {team.size}"
        )
    for name, part in parts.items():
        part.load_state_dict(found[name])
    restore_random_state(found["random"][team.rank])
    return found["progress"]


def write_atomically(path: Path, found: dict[str, Any]) -> None:
    """Whoever reads `path` finds the old file or the new one, never a part of one."""
    beside = path.with_name(path.name + ".part")
    try:
        with beside.open("wb") as file:
            torch.save(found, file)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the new name and no content
        beside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


def random_state() -> dict[str, Any]:
    """The states of this process's generators; add numpy's and Python's where they are used."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def restore_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
