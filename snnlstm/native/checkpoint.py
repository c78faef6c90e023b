"""The cell with ``checkpoint=True``: less memory for the backward pass, one more forward pass.

A sequence is cut into segments of some sqrt(T) steps. Saved for the backward pass are the states
between the segments alone; the gates of one segment at a time are computed again, just before
their gradients (Chen et al. 2016, "Training deep nets with sublinear memory cost").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate, pairwise

from torch import Tensor

from ..call import Call, make_call
from ..lengths import last
from . import backend, pool, tensors
from .tensors import Gradients, Result

__all__ = ["backward", "boundary_count", "forward"]


@lru_cache
def _lengths(steps: int) -> list[int]:
    """Lengths of the segments of a sequence, differing by one at most; the longest are last."""

    def cost(count: int) -> int:
        """In state-sized tensors: a step takes 5, a boundary 2."""
        short, long = steps // count, -(-steps // count)
        # The backward pass takes the longest segments first. A shorter one gets the memory of a
        # longer one again, unless their lengths are too far apart.
        return 5 * (long if long <= pool.FITTING * short else long + short) + 2 * count

    count = min(range(1, steps + 1), key=cost, default=1)
    return [(steps + k) // count for k in range(count)]


def _segments(call: Call) -> list[slice]:
    if not call.options.sequence:
        return [slice(None)]
    ends = list(accumulate(_lengths(call.x.shape[0]), initial=0))
    return [slice(begin, end) for begin, end in pairwise(ends)]


def boundary_count(call: Call) -> int:
    """How many tensors :func:`forward` keeps of a call."""
    return 2 * (len(_segments(call)) - 1)


def _piece(call: Call, segment: slice, syn: Tensor, mem: Tensor, saving: bool) -> Call:
    """A segment as a call of its own, under the autocast of the whole; `saving` for a backward."""
    options = call.signature.options
    if saving:
        options = replace(options, checkpoint=False)
    x, lengths = call.x[segment], call.lengths
    if lengths is not None:
        lengths = (lengths - (segment.start or 0)).clamp(0, len(x))
    return make_call((x, syn, mem, *call[3:7]), options, autocast=False, lengths=lengths)


def forward(call: Call, algorithm: str) -> Result:
    """Run the forward kernels segment by segment.

    The result has saved syn and mem before the second segment, before the third, and so on.
    """
    segments = _segments(call)
    if len(segments) == 1:
        return backend.plan_of(call, algorithm).forward(call, False)
    record = call.options.record
    whole = backend.empty_result(call, training=False)
    boundaries: list[Tensor] = []
    syn, mem, part, piece = call.syn, call.mem, whole, call
    for segment in segments:
        if segment.start > 0:
            syn, mem = part.syn, part.mem
            if record and piece.lengths is not None:
                syn = last(syn, piece.syn, piece.lengths)
                mem = last(mem, piece.mem, piece.lengths)
            elif record:
                syn, mem = syn[-1].clone(), mem[-1].clone()
            boundaries += syn, mem
        piece = _piece(call, segment, syn, mem, saving=False)
        part = backend.plan_of(piece, algorithm).forward(piece, False)
        whole.spk[segment] = part.spk
        if record:
            whole.syn[segment], whole.mem[segment] = part.syn, part.mem
    if not record:
        whole = whole._replace(syn=part.syn, mem=part.mem)
    return whole._replace(saved=boundaries, name=part.name)


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
    call: Call,
    boundaries: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
    algorithm: str,
) -> Gradients:
    """Compute the gates again, last segment first, and the gradients from them.

    Parameters and result are those of a plan's backward; :func:`forward` saved `boundaries`.
    """
    grad_spk, grad_syn, grad_mem = grads
    record = call.options.record
    states = [call.syn, call.mem, *boundaries]
    total = tensors.empty_gradients(call.x, call.signature, (wanted[0], *(False,) * 5))
    sums: list[Tensor | None] = [None, None, None]  # weight, bias, threshold
    carry_syn, carry_mem = (None, None) if record else (grad_syn, grad_mem)
    for k, segment in reversed(list(enumerate(_segments(call)))):
        piece = _piece(call, segment, states[2 * k], states[2 * k + 1], saving=True)
        plan = backend.plan_of(piece, algorithm)
        again = plan.forward(piece, True)
        into_syn, into_mem = carry_syn, carry_mem
        if record:
            into_syn = _with_carry(grad_syn, segment, carry_syn)
            into_mem = _with_carry(grad_mem, segment, carry_mem)
        want_states = (True, True) if k > 0 else tuple(wanted[1:3])
        found = plan.backward(
            piece,
            plan.restored(again.saved),
            (None if grad_spk is None else grad_spk[segment], into_syn, into_mem),
            (wanted[0], *want_states, *wanted[3:]),
            again.decided,
            again.packed,
        )
        carry_syn, carry_mem = found.syn, found.mem
        if total.x is not None and found.x is not None:
            total.x[segment] = found.x
        for place, grad in enumerate(found[3:]):
            so_far = sums[place]
            sums[place] = grad if so_far is None or grad is None else so_far.add_(grad)
        del again, found  # so that the next segment may have their memory
    return Gradients(total.x, carry_syn, carry_mem, *sums)
