"""Makes Leaky layers of both libraries with equal arguments, and runs them on equal inputs."""

import copy
from collections.abc import Callable
from typing import Any

import snntorch
import torch
from torch import Tensor

import snnlstm
from snnlstm import surrogate
from tests.shared.helpers import quietly

F64 = torch.float64
T = 4
LEARN = {"learn_beta": True, "learn_threshold": True}
RESETS = ["subtract", "zero", "none"]


def foreign(u: Tensor) -> Tensor:
    """Computes what a surrogate of ours does, and is none."""
    return surrogate.triangular()(u) * 1


def eighths(mem: Tensor) -> Tensor:
    return mem + ((mem * 8).round() / 8 - mem).detach()


# All but the first take plain torch, those of snnTorch's options in snnTorch's own forward.
PLAIN: dict[str, dict[str, Any]] = {
    "known": {},
    "foreign": {"spike_grad": foreign},
    "graded": {"graded_spikes_factor": torch.tensor(0.1, dtype=F64)},
    "several dimensions": {"beta": torch.rand(3, 5, generator=torch.Generator().manual_seed(0))},
    "state_quant": {"state_quant": eighths},
    "inhibition": {"inhibition": True},
    "reset_delay": {"reset_delay": False},
    "learned": {**LEARN, "learn_graded_spikes_factor": True},
}


def leaky_twins(dtype: torch.dtype = torch.float32, **options: Any) -> list[Any]:
    """Makes our layer and snnTorch's with equal arguments, on torch's default device.

    In float64 snnTorch's has a surrogate that keeps the dtype.
    """
    options = {"beta": 0.8, "threshold": 0.3, **options}
    layers = [quietly(library.Leaky, **copy.deepcopy(options)) for library in (snnlstm, snntorch)]
    if dtype is F64 and options.get("surrogate_disable"):
        layers[1].spike_grad = surrogate.NONE
    elif dtype is F64 and options.get("spike_grad") is None:
        layers[1].spike_grad = surrogate.atan()
    layers = [layer.double() if dtype is F64 else layer for layer in layers]
    return [layer.to(torch.get_default_device()) for layer in layers]


def currents(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Draws x of T steps, whose neurons spike at some of them."""
    generator = torch.Generator("cpu").manual_seed(seed)
    x = torch.randn((T, *shape), generator=generator, dtype=F64, device="cpu")
    return x.to(torch.get_default_device(), dtype)


def by_steps(layer: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Returns spk and mem of all steps, each of which is a call."""
    outs = []
    for x_t in x:
        out = layer(x_t)
        outs.append((out[0] if isinstance(out, tuple) else out, layer.mem))
    return tuple(map(torch.stack, zip(*outs, strict=True)))


def outcome(
    layer: Any, x: Tensor, through: str = "both", run: Callable[..., Any] = by_steps
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Returns spk and mem of all steps, and the gradients of x and of the layer's parameters.

    A loss reads "spk", "mem" or "both". What it does not depend on has None for a gradient.
    """
    leaves = [x.clone().requires_grad_(), *layer.parameters()]
    spk, mem = run(layer, leaves[0])
    weights = currents(*x.shape[1:], seed=1)
    losses = {"spk": (spk * weights).sum(), "mem": (mem * weights).square().sum()}
    total = sum(loss for name, loss in losses.items() if through in (name, "both"))
    grads: Any = [None] * len(leaves)
    if total.requires_grad:  # type: ignore[union-attr]
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
    return [spk.detach(), mem.detach()], [*grads]
