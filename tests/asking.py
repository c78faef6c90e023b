"""Unusual ways to ask for gradients, and to keep what a backward pass needs."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map


class Wrapper(Tensor):
    """A tensor without memory of its own, that hands every operation on to another."""

    @staticmethod
    def __new__(cls, inner):
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree_map(_inner, args), tree_map(_inner, kwargs or {})
        return tree_map(_outer, function(*args, **kwargs))


def _inner(value):
    return value.inner if isinstance(value, Wrapper) else value


def _outer(value):
    return Wrapper(value) if isinstance(value, Tensor) else value


def _assert_near(one: Tensor, other: Tensor) -> None:
    """Sums of many terms differ by rounding, relative to the largest."""
    error = max(1e-4, 4 * torch.finfo(other.dtype).eps)
    assert (one - other).abs().max() <= error * other.abs().max() + 1e-30


def _negated(outputs: Any, sources: Any, grads: Any, **rest: Any) -> Any:
    """Gradients whose sign is a flag of the tensor."""
    return torch.autograd.grad(outputs, sources, [torch._neg_view(-g) for g in grads], **rest)


def _batched(outputs: Any, sources: Any, grads: Any, **rest: Any) -> Any:
    both = [torch.stack([g, -2 * g]) for g in grads]
    found = torch.autograd.grad(outputs, sources, both, is_grads_batched=True, **rest)
    first = []
    for source, each in zip(sources, found, strict=True):
        if each.shape == source.shape:  # nothing led there
            assert not each.any()
            first.append(each)
            continue
        _assert_near(-2 * each[0], each[1])
        first.append(each[0])
    return first


def _dual(outputs: Any, sources: Any, grads: Any, **rest: Any) -> Any:
    """Gradients with a tangent, to which the result's is linear."""
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(g.clone(), 0.5 * g.clone()) for g in grads]
        found = [
            forward_ad.unpack_dual(f)
            for f in torch.autograd.grad(outputs, sources, duals, **rest)
        ]  # fmt: skip
    for value, tangent in found:
        if tangent is None:
            assert not value.any()
        else:
            _assert_near(tangent, 0.5 * value)
    return [value for value, _ in found]


def _wrapped(outputs: Any, sources: Any, grads: Any, **rest: Any) -> Any:
    found = torch.autograd.grad(outputs, sources, [Wrapper(g) for g in grads], **rest)
    assert all(isinstance(f, Wrapper) or not f.any() for f in found)
    return [_inner(f) for f in found]


def _hooked(outputs: Any, sources: Any, grads: Any, **rest: Any) -> Any:
    """Hooks on the outputs change the gradients on their way, to twice what was asked for."""
    for output in outputs:
        output.register_hook(lambda grad: 2 * grad)
    return torch.autograd.grad(outputs, sources, [0.5 * g for g in grads], **rest)


def _twice(outputs: Any, sources: Any, grads: Any, **rest: Any) -> Any:
    """A second pass over a graph that was kept."""
    torch.manual_seed(0)
    torch.autograd.grad(outputs, sources, grads, retain_graph=True, **rest)
    torch.manual_seed(0)
    return torch.autograd.grad(outputs, sources, grads, **rest)


# Each takes the arguments of torch.autograd.grad, and returns what that returns.
ASKED = {
    "plain": torch.autograd.grad, "negated": _negated, "batched": _batched, "dual": _dual,
    "wrapped": _wrapped, "hooked": _hooked, "twice": _twice,
}  # fmt: skip
# Each is a hook that brings a saved tensor back otherwise.
KEPT = {
    "as it is": None,
    "copied": torch.clone,
    "widened": lambda t: t.double() if t.is_floating_point() else t,
    "negated": lambda t: torch._neg_view(-t) if t.is_floating_point() else t,
    "strided": lambda t: t.detach().repeat_interleave(2, -1)[..., ::2] if t.dim() else t,
}
