"""Leaky computes what snntorch 1.0.0's does: bitwise in float32, and to 1e-12 by a formula."""

import copy
import pickle
from typing import Any

import pytest
import snntorch
import torch
from torch import Tensor

import snnlstm
from snnlstm import surrogate
from snnlstm.surrogate import KINDS
from tests.shared.helpers import close, described, same

F64 = torch.float64
T = 4


def twins(**options: Any) -> list[Any]:
    """Makes our layer and snnTorch's with equal arguments."""
    options = {"beta": 0.8, "threshold": 0.3, **options}
    return [library.Leaky(**copy.deepcopy(options)) for library in (snnlstm, snntorch)]


def inputs(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Draws x of T steps, whose neurons spike at some of them."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn((T, *shape), generator=generator, dtype=F64).to(dtype)


def run(layer: Any, x: Tensor, through: str = "both") -> tuple[list[Tensor], list[Tensor]]:
    """Runs a loop of steps; returns spk, mem and reset of all steps, and the gradients."""
    x = x.clone().requires_grad_()
    outs, total = [], torch.zeros((), dtype=F64)
    weights = inputs(*x.shape, dtype=F64, seed=1)
    for t, x_t in enumerate(x):
        out = layer(x_t)
        spk, mem = out if isinstance(out, tuple) else (out, layer.mem)
        outs += [spk.detach(), mem.detach().clone(), layer.reset]
        if through != "mem":
            total = total + (spk * weights[0, t]).sum()
        if through != "spk":
            total = total + (mem * weights[1, t]).sum()
    total.backward()
    return outs, [x.grad, *gradients(layer)]  # type: ignore[list-item]


def gradients(layer: Any) -> list[Any]:
    return [getattr(layer, name).grad for name in ("beta", "threshold")]


def alike(ours: Any, theirs: Any, x: Tensor, through: str = "both", **tolerance: float) -> None:
    (out, grads), (expected, exact) = run(ours, x, through), run(theirs, x, through)
    assert ours.path.native, ours.path
    for one, other in zip(out, expected, strict=True):
        assert torch.equal(one.to(other.dtype), other)
    assert any(spk.any() for spk in out[::3]), "no neuron has spiked"
    close(grads, exact, **tolerance or {"atol": 1e-5})


SHAPES = [(7,), (3, 5), (2, 3, 5), (2, 3, 4, 5), (1, 1), (33, 67)]
# snnTorch's LSO cannot be called, and SSO draws numbers.
SURROGATES = [kind.name for kind in KINDS[1:] if kind.name not in ("LSO", "SSO")]


@pytest.mark.parametrize("through", ["spk", "mem", "both"])
@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
@pytest.mark.parametrize("shape", SHAPES, ids=described)
def test_steps(shape: tuple[int, ...], reset: str, through: str) -> None:
    options: dict[str, Any] = {"reset_mechanism": reset, "learn_beta": True, "init_hidden": True}
    alike(*twins(**options, learn_threshold=True), inputs(*shape), through, atol=1e-4, rtol=1e-4)
    alike(*twins(**options, output=True), inputs(*shape, seed=2), through, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SURROGATES)
def test_surrogates(name: str) -> None:
    spike_grad = getattr(snntorch.surrogate, name)()
    x = inputs(3, 5) / 2  # snnTorch's sigmoid is NaN for very negative inputs
    alike(*twins(spike_grad=spike_grad, learn_threshold=True), x, atol=1e-4, rtol=1e-4)


OF_CHANNELS, OF_FEATURES = torch.tensor([0.3, 0.6, 0.9])[:, None, None], torch.linspace(0.1, 0.9, 5)
OPTIONS: list[dict[str, Any]] = [
    {"beta": 1, "threshold": 1}, {"beta": 1.3}, {"beta": -0.2}, {"beta": 0.0}, {"beta": 1.0},
    {"beta": OF_CHANNELS}, {"beta": OF_FEATURES}, {"threshold": OF_CHANNELS},
    {"beta": OF_CHANNELS, "threshold": OF_FEATURES}, {"threshold": OF_FEATURES[None, None]},
    {"beta": torch.tensor([0.7]), "threshold": torch.tensor(0.2, dtype=F64)},
    {"beta": OF_CHANNELS * 3 - 1, "threshold": OF_CHANNELS}, {"graded_spikes_factor": -0.5},
    {"surrogate_disable": True}, {"beta": OF_CHANNELS[:2, None] + 0.2},
]  # fmt: skip


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "gaps"])
@pytest.mark.parametrize("reset", ["subtract", "zero"])
@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
def test_options(options: dict[str, Any], reset: str, layout: str) -> None:
    learn = {f"learn_{name}": torch.is_tensor(options.get(name)) for name in ("beta", "threshold")}
    x = inputs(2, 3, 4, 5)
    if layout == "channels_last":
        x = torch.stack([x_t.to(memory_format=torch.channels_last) for x_t in x])
        x = x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    elif layout == "transposed":
        x = x.mT.contiguous().mT
    elif layout == "gaps":
        x = torch.stack([x, x], -1)[..., 0]
    alike(*twins(**options, **learn, reset_mechanism=reset), x, atol=1e-4, rtol=1e-4)


def formula(x: Tensor, mem: Tensor, beta: Tensor, threshold: Tensor, reset: str) -> Any:
    """The step of semantics, in x's dtype, with the fast sigmoid's gradient."""
    signal = (mem > threshold).to(x.dtype).detach()
    mem = mem * (1 - signal) if reset == "zero" else mem
    mem = beta.clamp(0, 1) * mem + x - (signal * threshold if reset == "subtract" else 0)
    return surrogate.fast_sigmoid()(mem - threshold), mem


def by_formula(x: Tensor, reset: str, *parameters: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    leaves = [x.clone().requires_grad_(), *(p.clone().requires_grad_() for p in parameters)]
    mem, outs, total = torch.zeros_like(x[0]), [], torch.zeros((), dtype=F64)
    weights = inputs(*x.shape, dtype=F64, seed=1)
    for t, x_t in enumerate(leaves[0]):
        before = mem
        spk, mem = formula(x_t, mem, *leaves[1:], reset)
        outs += [spk, mem, (before > parameters[1]).to(x.dtype)]
        total = total + (spk * weights[0, t]).sum() + (mem * weights[1, t]).sum()
    return outs, list(torch.autograd.grad(total, leaves))


@pytest.mark.parametrize("whole", [False, True], ids=["steps", "sequence"])
@pytest.mark.parametrize("dtype", [F64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
def test_dtypes(reset: str, dtype: torch.dtype, whole: bool) -> None:
    """x of a half type is read as it is, and all is computed in float32."""
    real = F64 if dtype is F64 else torch.float32
    beta, threshold = torch.rand(3, 1, 1, dtype=real), torch.rand(5, dtype=real)
    layer = snnlstm.Leaky(
        beta, threshold, surrogate.fast_sigmoid(), learn_beta=True, learn_threshold=True,
        reset_mechanism=reset,
    )  # fmt: skip
    x = inputs(2, 3, 4, 5, dtype=dtype)
    outs, grads = run_whole(layer, x) if whole else run(layer, x)
    expected, exact = by_formula(x.to(real), reset, beta, threshold)
    tolerance = {"atol": 1e-12, "rtol": 1e-12} if dtype is F64 else {"atol": 2e-5, "rtol": 2e-5}
    for out, one in zip(outs, expected, strict=True):
        assert out.dtype is real
        close(out, one, **tolerance)
    assert grads[0].dtype is dtype
    close(grads[0], exact[0].to(dtype), atol=tolerance["atol"], rtol=0 if dtype is F64 else 1e-2)
    close(grads[1:], exact[1:], **tolerance if dtype is F64 else {"atol": 1e-3, "rtol": 1e-3})


def run_whole(layer: Any, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """As run(), in one call."""
    x, weights = x.clone().requires_grad_(), inputs(*x.shape, dtype=F64, seed=1)
    spks, mems = layer.sequence(x, True)
    assert torch.equal(layer.mem, mems[-1]) and not layer.mem._is_view()
    ((spks * weights[0]).sum() + (mems * weights[1]).sum()).backward()
    resets = [torch.zeros_like(mems[:1]), mems[:-1]]
    signal = torch.cat(resets).detach() > layer.threshold
    outs = [t.detach() for triple in zip(spks, mems, signal.to(mems.dtype)) for t in triple]
    return outs, [x.grad, *gradients(layer)]  # type: ignore[list-item]
