"""The cell with ``checkpoint=True``: less memory for the backward pass, one more forward pass.

A sequence is cut into segments of some sqrt(T) steps. Kept for the backward pass are the states
between the segments alone; the gates of one segment at a time are computed again, just before
their gradients (Chen et al. 2016, "Training deep nets with sublinear memory cost").
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

from torch import Tensor

from . import blocks, native
from .options import CellOptions

__all__ = ["backward", "forward"]


@lru_cache
def _lengths(steps: int) -> list[int]:
    """Lengths of the segments of a sequence, differing by one at most; the longest are last."""

    def cost(count: int) -> int:
        """In state-sized tensors: a step takes 5, a boundary 2."""
        short, long = steps // count, -(-steps // count)
        # Memory for the longer ones is used again for the shorter ones where little of it is lost.
        return 5 * (long if long <= blocks.FITTING * short else long + short) + 2 * count

    count = min(range(1, steps + 1), key=cost, default=1)
    return [(steps + k) // count for k in range(count)]


def _segments(x: Tensor, options: CellOptions) -> list[slice]:
    if not options.sequence:
        return [slice(None)]
    ends = list(accumulate(_lengths(x.shape[0]), initial=0))
    return [slice(begin, end) for begin, end in pairwise(ends)]


def forward(
    x: Tensor,
    syn: Tensor,
    mem: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    graded: Tensor,
    options: CellOptions,
    algorithm: str,
) -> tuple[native.Result, list[Tensor]]:
    """Run the forward kernels segment by segment.

    Returns
    -------
    result : Result
        As :func:`snnlstm.native.forward` returns it, without ``saved``.
    boundaries : list of Tensor
        syn and mem before the second segment, before the third, and so on.
    """
    arguments = (weight, bias, threshold, graded)
    segments = _segments(x, options)
    if len(segments) == 1:
        return native.forward(x, syn, mem, *arguments, options, False, algorithm), []
    result = native.empty_result(x, mem, options, training=False)
    boundaries: list[Tensor] = []
    part = result
    for segment in segments:
        if segment.start > 0:
            syn, mem = part.syn, part.mem
            if options.record:
                syn, mem = syn[-1].clone(), mem[-1].clone()
            boundaries += syn, mem
        part = native.forward(x[segment], syn, mem, *arguments, options, False, algorithm)
        result.spk[segment] = part.spk
        if options.record:
            result.syn[segment], result.mem[segment] = part.syn, part.mem
    return (result if options.record else result._replace(syn=part.syn, mem=part.mem)), boundaries


def _last_first(items: list[Any]) -> Iterator[tuple[int, Any]]:
    return reversed(list(enumerate(items)))


def _with_carry(grad: Tensor | None, segment: slice, carry: Tensor | None) -> Tensor | None:
    """Gradient of a recorded state over a segment; the next segment's is added to its last step."""
    if grad is not None:
        out = grad[segment].clone()
    elif carry is not None:
        out = carry.new_zeros((segment.stop - segment.start, *carry.shape))
    else:
        return None
    if carry is not None:
        out[-1] += carry
    return out


def backward(
    x: Tensor,
    syn: Tensor,
    mem: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    graded: Tensor,
    options: CellOptions,
    boundaries: list[Tensor],
    grad_spk: Tensor | None,
    grad_syn: Tensor | None,
    grad_mem: Tensor | None,
    wanted: tuple[bool, ...],
    algorithm: str,
) -> native.Gradients:
    """Compute the gates again, last segment first, and the gradients from them.

    Parameters and result as :func:`snnlstm.native.backward`'s; `boundaries` from :func:`forward`.
    """
    states = [syn, mem, *boundaries]
    segments = _segments(x, options)
    inner = replace(options, checkpoint=False)
    total = native.empty_gradients(x, syn, mem, weight, (wanted[0], *(False,) * 5))
    sums: list[Tensor | None] = [None, None, None]  # weight, bias, threshold
    carry_syn, carry_mem = (None, None) if options.record else (grad_syn, grad_mem)
    for k, segment in _last_first(segments):
        first_syn, first_mem = states[2 * k], states[2 * k + 1]
        part = x[segment]
        saved = native.forward(
            part, first_syn, first_mem, weight, bias, threshold, graded, inner, True, algorithm
        ).saved
        assert saved is not None
        if options.record:
            into = [
                _with_carry(g, segment, c)
                for g, c in ((grad_syn, carry_syn), (grad_mem, carry_mem))
            ]
        else:
            into = [carry_syn, carry_mem]
        want_states = (True, True) if k > 0 else wanted[1:3]
        grads = native.backward(
            part,
            first_syn,
            first_mem,
            weight,
            threshold,
            graded,
            inner,
            saved,
            None if grad_spk is None else grad_spk[segment],
            into[0],
            into[1],
            (wanted[0], *want_states, *wanted[3:]),
            algorithm,
        )
        del saved  # so that the next segment may have its memory
        carry_syn, carry_mem = grads.syn, grads.mem
        if total.x is not None and grads.x is not None:
            total.x[segment] = grads.x
        for place, grad in enumerate(grads[3:]):
            so_far = sums[place]
            sums[place] = grad if so_far is None or grad is None else so_far.add_(grad)
    return native.Gradients(total.x, carry_syn, carry_mem, *sums)
