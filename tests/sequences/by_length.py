"""Runs a batch with lengths= beside each of its samples alone."""

from typing import Any

import torch
from torch import Tensor

from snnlstm import functional, reference
from snnlstm.calls.lengths import length_mask
from tests.shared.gradients import NAMES
from tests.shared.helpers import close, states, steps

TIME, LENGTHS = 6, (2, 6, 0, 5, 1, 2, 4)

CELLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "pool-reset": {"max_pool": 2, "reset_mechanism": "subtract"},
    "odd-pool": {"avg_pool": (3, 2), "reset_mechanism": "zero"},
    "inhibition": {"inhibition": True},
    "stride": {"stride": 2, "dilation": 2},
    "segments": {"checkpoint": True},
}


def inputs(
    dtype: torch.dtype, cin: int = 2, channels: int = 3, side: int = 6, stride: int = 1
) -> dict[str, Tensor]:
    """Returns the arguments of the functional form, with NaN behind each sample's last step."""
    count = len(LENGTHS)
    x = steps(TIME, count, cin, side, side + 1).to(dtype)
    for n, length in enumerate(LENGTHS):
        x[length:, n] = torch.nan
    syn, mem = states(count, channels, -(-side // stride), -(-(side + 1) // stride))
    size = (cin + channels) * 9
    weight = torch.randn(4 * channels, cin + channels, 3, 3, dtype=dtype) * size**-0.5
    bias, threshold = torch.randn(4 * channels, dtype=dtype) / 9, torch.full((), 0.1, dtype=dtype)
    tensors = x, syn.to(dtype), mem.to(dtype), weight, bias, threshold
    return {k: t.requires_grad_() for k, t in zip(NAMES, tensors, strict=False)}


def alone(
    given: dict[str, Tensor], n: int, run: Any = reference.sconv2dlstm, **options: Any
) -> tuple[Tensor, ...]:
    """Runs sample n by itself; returns T steps, the last state repeated."""
    length, states = LENGTHS[n], {k: given[k][n : n + 1] for k in ("syn", "mem")}
    rest = {k: given[k] for k in ("weight", "bias", "threshold")}
    out = run(given["x"][:length, n : n + 1], **states, **rest, **options, record=True)
    after = TIME - length
    spk = torch.cat([out[0], out[0].new_zeros((after, *out[0].shape[1:]))])
    repeated = [
        torch.cat([found, (found[-1] if length else before).expand(after, *before.shape)])
        for found, before in zip(out[1:], states.values(), strict=True)
    ]
    return spk, *repeated


def gradients(out: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the gradients of a random sum over what each sample computes."""
    generator = torch.Generator("cpu").manual_seed(3)

    def drawn(like: Tensor) -> Tensor:
        numbers = torch.randn(like.shape, generator=generator, dtype=torch.float64, device="cpu")
        return numbers.to(like)

    grads = [drawn(one) for one in out]
    found = torch.autograd.grad(out, list(given.values()), grads)
    return dict(zip(given, found, strict=True))


def check(dtype: torch.dtype, record: bool, sizes: Any = (), **options: Any) -> None:
    """Compares results and gradients with those of each sample alone, in float64."""
    given = inputs(dtype, *sizes, stride=options.get("stride", 1))
    exact = {k: t.detach().double().requires_grad_() for k, t in given.items()}
    out = functional.sconv2dlstm(**given, **options, lengths=torch.tensor(LENGTHS), record=record)
    apart = [alone(exact, n, **options) for n in range(len(LENGTHS))]
    expected = [torch.cat(parts, 1) for parts in zip(*apart, strict=True)]
    if not record:
        expected[1:] = [state[-1] for state in expected[1:]]
    tight = 1e-11 if dtype is torch.float64 else 1e-6
    close([t.double() for t in out[1:]], expected[1:], atol=tight, rtol=0)
    assert torch.equal(out[0].double(), expected[0])
    for n, length in enumerate(LENGTHS):
        assert not out[0][length:, n].any()
    actual = gradients(out, given)
    for name, grad in gradients(expected, exact).items():
        scale = max(1.0, float(grad.abs().max()))
        close(actual[name].double() / scale, grad / scale, atol=1e-9 if tight < 1e-9 else 3e-5)
    for n, length in enumerate(LENGTHS):
        assert not actual["x"][length:, n].any()


def own() -> Tensor:
    """Returns which steps are the samples' own, (T, N, 1, 1, 1)."""
    return length_mask(torch.tensor(LENGTHS), TIME)
