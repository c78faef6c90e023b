"""Functions that ask for gradients in unusual ways, and hooks that change saved tensors."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map


class Wrapper(Tensor):
    """This tensor subclass has no memory of its own: `inner` does every operation."""

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
    """Asserts that tensors agree but for rounding, relative to the largest element."""
    error = max(1e-4, 4 * torch.finfo(other.dtype).eps)
    assert (one - other).abs().max() <= error * other.abs().max() + 1e-30


def _negated(outputs: Any, sources: Any, grads: Any, **rest: Any) -> Any:
    """Asks with output gradients whose sign is a flag of the tensor."""
    return torch.autograd.grad(outputs, sources, [torch._neg_view(-g) for g in grads], **rest)


def _batched(outputs: Any, sources: Any, grads: Any, **rest: Any) -> Any:
    both = [torch.stack([g, -2 * g]) for g in grads]
    found = torch.autograd.grad(outputs, sources, both, is_grads_batched=True, **rest)
    first = []
    for source, each in zip(sources, found, strict=True):
        if each.shape == source.shape:  # the outputs do not depend on this source
            assert not each.any()
            first.append(each)
            continue
        _assert_near(-2 * each[0], each[1])
        first.append(each[0])
    return first


def _dual(outputs: Any, sources: Any, grads: Any, **rest: Any) -> Any:
    """Asks with output gradients that have a tangent, and checks the tangents of the results."""
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
    "plain": torch.autograd.grad, "negated": _negated, "batched": _batched, "dual": _dual,
    "wrapped": _wrapped, "hooked": _hooked, "twice": _twice,
}  # fmt: skip
# Each hook unpacks a saved tensor to equal numbers in another form.
KEPT = {
    "as it is": None,
    "copied": torch.clone,
    "widened": lambda t: t.double() if t.is_floating_point() else t,
    "negated": lambda t: torch._neg_view(-t) if t.is_floating_point() else t,
    "strided": lambda t: t.detach().repeat_interleave(2, -1)[..., ::2] if t.dim() else t,
}
