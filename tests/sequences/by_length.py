"""Runs a batch with lengths= beside each of its samples alone, on any device."""

from typing import Any

import torch
from torch import Tensor

import snnlstm
from snnlstm import functional
from snnlstm.calls.lengths import length_mask
from tests.shared.gradients import NAMES, gradients_by_name
from tests.shared.helpers import close, ours, states, steps
from tests.shared.table import arguments_of

TIME, LENGTHS = 4, (2, 4, 0, 3, 1, 2)

NAMED = "no reset", "max_pool", "avg_pool", "dilation and stride"
CELLS = {name: arguments_of(name) for name in NAMED} | {"inhibition": {"inhibition": True}}


def unpadded() -> Tensor:
    """Returns which steps are the samples' own, (T, N, 1, 1, 1)."""
    return length_mask(torch.tensor(LENGTHS), TIME)


def padded_inputs(stride: tuple[int, int] = (1, 1)) -> dict[str, Tensor]:
    """Returns the arguments of the functional form, with NaN behind each sample's last step."""
    x = steps(TIME, len(LENGTHS), 2, 6, 7).masked_fill(~unpadded(), torch.nan)
    before = states(len(LENGTHS), 3, -(-6 // stride[0]), -(-7 // stride[1]))
    tensors = x, *before, *ours().conv.parameters(), torch.tensor(0.1)
    return {k: t.detach().double().requires_grad_() for k, t in zip(NAMES, tensors, strict=True)}


def alone(given: dict[str, Tensor], n: int, **options: Any) -> tuple[Tensor, ...]:
    """Runs sample n by itself on the reference path; returns T steps, the last state repeated."""
    length, before = LENGTHS[n], [given[name][n : n + 1] for name in ("syn", "mem")]
    rest = {name: given[name] for name in ("weight", "bias", "threshold")}
    x = given["x"][:length, n : n + 1]
    with snnlstm.algorithm("reference"):
        spk, *after = functional.sconv2dlstm(x, *before, **rest, **options, record=True)
    every = [torch.cat([spk, spk.new_zeros((TIME - length, *spk.shape[1:]))])]
    for state, found in zip(before, after, strict=True):
        last = found[-1] if length else state
        every.append(torch.cat([found, last.expand(TIME - length, *state.shape)]))
    return tuple(every)


def check(record: bool, **options: Any) -> None:
    """Compares results and gradients with those of each sample alone, in float64."""
    given = padded_inputs(options.get("stride", (1, 1)))
    out = functional.sconv2dlstm(**given, **options, lengths=torch.tensor(LENGTHS), record=record)
    apart = [alone(given, n, **options) for n in range(len(LENGTHS))]
    expected = [torch.cat(parts, 1) for parts in zip(*apart, strict=True)]
    if not record:
        expected[1:] = [state[-1] for state in expected[1:]]
    assert torch.equal(out[0], expected[0])
    close(out[1:], expected[1:], atol=1e-11, rtol=0)
    actual = gradients_by_name(out, given)
    close(actual, gradients_by_name(expected, given), atol=1e-9)
    assert not actual["x"][~unpadded().expand_as(actual["x"])].any()
