"""Computes the gradients of a case, and compares gradients."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.shared import flat
from tests.shared.cases import Case, Inputs, Options, wanting_gradients
from tests.shared.helpers import set_seed
from tests.shared.oracle import decisions

NAMES = ("x", "syn", "mem", "weight", "bias", "threshold")
OUTPUTS = ("spk", "syn", "mem")

Run = Callable[..., tuple[Tensor, Tensor, Tensor]]


def gradients(
    run: Run,
    inputs: Inputs,
    options: Options,
    output_gradients: Sequence[Tensor | None],
    wanted: Sequence[str] = NAMES,
    ask: Callable[..., Sequence[Tensor]] = torch.autograd.grad,
) -> dict[str, Tensor]:
    """Returns the gradients of the `wanted` inputs by name.

    An output whose gradient is None stays unused. `ask` takes the arguments of
    torch.autograd.grad, and returns what that returns.
    """
    leaves = wanting_gradients(inputs)
    for name in NAMES:
        leaf = getattr(leaves, name)
        if leaf is not None:
            leaf.requires_grad_(name in wanted)
    out = run(*leaves, options)
    pairs = [
        (o, g.to(o.dtype))
        for o, g in zip(out, output_gradients, strict=True)
        if g is not None and o.requires_grad
    ]
    sources = {n: getattr(leaves, n) for n in wanted if getattr(leaves, n) is not None}
    if not pairs or not sources:
        return {name: torch.zeros_like(leaf) for name, leaf in sources.items()}
    set_seed(0)
    grads = ask(
        [o for o, _ in pairs],
        list(sources.values()),
        [g for _, g in pairs],
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(sources, grads, strict=True))


def gradients_by_name(out: Sequence[Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the gradients of a sum in which neighbours count differently.

    The weights are multiples of 1/8, which a float32 spike's gradient holds exactly.
    """
    weights = [torch.arange(o.numel()).remainder(13).sub(6).div(8).view(o.shape) for o in out]
    loss = sum((o * w).sum().double() for o, w in zip(out, weights, strict=True))
    sources = list(leaves.values())
    grads = torch.autograd.grad(loss, sources, allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, grads, strict=True))


def compare(
    actual: dict[str, Tensor],
    exact: dict[str, Tensor],
    error: float,
    output_gradients: Sequence[Tensor | None],
) -> None:
    """Asserts that each gradient is exact within `error` of its largest element."""
    assert actual.keys() == exact.keys()
    terms = sum(float(g.double().abs().sum()) for g in output_gradients if g is not None)
    for name, gradient in actual.items():
        expected = exact[name].double()
        assert gradient.shape == expected.shape
        assert gradient.isfinite().all(), name
        scale = float(expected.abs().max())
        if name == "threshold":
            # Each of its few numbers is a sum of many terms of either sign.
            scale = max(scale, terms)
        worst = float((gradient.double() - expected).abs().max())
        kind = torch.finfo(gradient.dtype)
        small = 10 * kind.tiny * kind.eps + 1e-30  # for the rounding of subnormal numbers
        assert worst <= error * scale + small, f"{name}: {worst:.3g} where {scale:.3g} is largest"


def exact_or_undecided(
    actual: dict[str, Tensor],
    exact: dict[str, Tensor],
    error: float,
    output_gradients: Sequence[Tensor | None],
    decided: Callable[[], bool],
) -> bool:
    """Compares gradients; returns False if they differ because the runs decided otherwise.

    `decided` says whether both runs made equal decisions. That takes a run, and is asked last.
    """
    try:
        compare(actual, exact, error, output_gradients)
    except AssertionError:
        if decided():
            raise
        return False
    return True


def agrees(run: Run, case: Case, inputs: Inputs) -> bool:
    """Returns whether `run` makes all decisions as the float64 reference does."""
    options = case.recorded().options
    with torch.no_grad():
        actual = decisions(case, inputs, *run(*inputs, options)[1:])
        expected = decisions(case, inputs, *flat.reference(*inputs.double(), options)[1:])
    return all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


def gradients_for(case: Case, outputs: Sequence[str] = OUTPUTS) -> list[Tensor | None]:
    """Returns random gradients of the `outputs`, and None for the other outputs."""
    return [
        g if name in outputs else None
        for name, g in zip(OUTPUTS, case.output_gradients(), strict=True)
    ]


def leaves_and_gradients(case: Case) -> tuple[Inputs, tuple[Tensor, ...]]:
    inputs = wanting_gradients(case.inputs())
    return inputs, case.output_gradients()


def total(out: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    return sum((o * g).sum() for o, g in zip(out, grads, strict=True))


# ---- unusual ways ----------------------------------------------------------------------------


def _negated(outputs: Any, sources: Any, grads: Any, **rest: Any) -> Any:
    """Asks with output gradients whose sign is a flag of the tensor."""
    return torch.autograd.grad(outputs, sources, [torch._neg_view(-g) for g in grads], **rest)


def _hooked(outputs: Any, sources: Any, grads: Any, **rest: Any) -> Any:
    """Asks with half of the output gradients, which hooks on the outputs then double."""
    for output in outputs:
        output.register_hook(lambda grad: 2 * grad)
    return torch.autograd.grad(outputs, sources, [0.5 * g for g in grads], **rest)


def _twice(outputs: Any, sources: Any, grads: Any, **rest: Any) -> Any:
    """Asks twice, and returns what the second pass over the kept graph gives."""
    torch.manual_seed(0)
    torch.autograd.grad(outputs, sources, grads, retain_graph=True, **rest)
    torch.manual_seed(0)
    return torch.autograd.grad(outputs, sources, grads, **rest)


# Each function takes the arguments of torch.autograd.grad, and returns what that returns.
ASKED = {
    "plain": torch.autograd.grad, "negated": _negated, "hooked": _hooked, "twice": _twice,
}  # fmt: skip
# Each hook unpacks a saved tensor to equal numbers in another form.
KEPT = {
    "as it is": None,
    "moved": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),  # not aligned
    "widened": lambda t: t.double() if t.is_floating_point() else t,
    "negated": lambda t: torch._neg_view(-t) if t.is_floating_point() else t,
    "strided": lambda t: t.detach().repeat_interleave(2, -1)[..., ::2] if t.dim() else t,
}
