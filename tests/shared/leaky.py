"""Makes Leaky layers of both libraries with equal arguments, and their inputs."""

import copy
from typing import Any

import snntorch
import torch
from torch import Tensor

import snnlstm

F64 = torch.float64
T = 4
LEARN = {"learn_beta": True, "learn_threshold": True}


def leaky_twins(**options: Any) -> list[Any]:
    """Makes our layer and snnTorch's with equal arguments, on torch's default device."""
    options = {"beta": 0.8, "threshold": 0.3, **options}
    layers = [library.Leaky(**copy.deepcopy(options)) for library in (snnlstm, snntorch)]
    return [layer.to(torch.get_default_device()) for layer in layers]


def currents(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Draws x of T steps, whose neurons spike at some of them."""
    generator = torch.Generator("cpu").manual_seed(seed)
    x = torch.randn((T, *shape), generator=generator, dtype=F64, device="cpu")
    return x.to(torch.get_default_device(), dtype)
