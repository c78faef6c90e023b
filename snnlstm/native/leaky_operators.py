"""Leaky as operators, for torch.compile.

Traced code calls ``snnlstm::leaky``, and cannot know which backend compiles its graph. So this
operator is composite: it stays whole in dynamo's graph, and backends take it apart into the plain
operations of its formula. Our backend puts in its place what :func:`leaky_in_graph` makes, which
runs the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..calls.call import LeakyCall
from ..calls.entries import TORCH_TYPES, backend_of, entry_of
from ..calls.spec import FINITE, LeakySpec
from ..reference import leaky_step, real_dtype
from .leaky import Plan, reason_against, run_plan

NAMESPACE = "snnlstm"
while hasattr(getattr(torch.ops, NAMESPACE), "leaky"):
    # The package was imported before. Its compiled graphs call those operators, and would crash if
    # others took their names.
    NAMESPACE += "_"
OPERATORS: Any = getattr(torch.ops, NAMESPACE)

_SCHEMA = (
    "(Tensor x, Tensor mem, Tensor beta, Tensor threshold, Tensor graded, str text, "
    "bool sequence, bool record) -> (Tensor, Tensor)"
)


def _formula(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Run the steps of x, (...) or (T, ...), in plain torch.

    A mem of another shape than a step's means zeros. The result's mem has every step, or, for a
    sequence without `record`, the last one alone.
    """
    x, mem, beta, threshold, graded, text, sequence, record = arguments
    reset, surrogate, *_ = LeakySpec.from_text(text, sequence)
    dtype, infinite, spks, mems = real_dtype(x, beta), not text.endswith(FINITE), [], []
    for x_t in x.unbind() if sequence else (x,):
        spk, mem = leaky_step(x_t, mem, beta, threshold, graded, surrogate, reset, dtype, infinite)
        spks.append(spk)
        mems.append(mem)
    if not sequence:
        return spk, mem
    return torch.stack(spks), torch.stack(mems) if record else mem


torch.library.define(f"{NAMESPACE}::leaky", _SCHEMA)
torch.library.impl(f"{NAMESPACE}::leaky", "CompositeImplicitAutograd")(_formula)
leaky = OPERATORS.leaky.default


def leaky_in_graph() -> Callable[..., Any]:
    """Make the function that runs one call of ``snnlstm::leaky`` in a graph.

    The kernels run it if they can, without torch's dispatcher. A guard recognises a call like the
    last one.
    """
    last: Any = None  # the entry of the last call

    def run(*arguments: Any) -> tuple[Tensor, Tensor]:
        nonlocal last
        x, mem, beta, threshold, graded, _, sequence, every = arguments
        call = LeakyCall(x, mem, beta, threshold, graded, every)
        if last is None or not last.serves(call, last.spec, *backend_of(x, "auto"), None):
            spec = LeakySpec.from_text(*arguments[5:7])
            of_torch = TORCH_TYPES.issuperset(map(type, call[:5]))
            if not of_torch or reason_against(call, spec.sequence):
                return _formula(*arguments)
            last = entry_of(call, spec, *backend_of(x, "auto"), None)
        plan = last.plan or last.planned(Plan, call)
        spk, after = run_plan(plan, call, last.needs_grad)
        # A copy, because a state that is a view could not be detached in place.
        is_view = sequence and not every and after.dim() == x.dim()
        return spk, after[-1].clone() if is_view else after

    return run
