"""What layers return step by step, gathered into one tensor for all steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .native import pool as memory

__all__ = ["IN_PLACE", "Gathered", "first_item"]

IN_PLACE = 1 << 20
"""Bytes of the whole tensor, from which on each step's result is copied into it at once."""


def first_item(name: str, out: Any) -> Tensor:
    """What the next layer gets of what layer `name` returned: of a tuple, the first item."""
    while isinstance(out, tuple | list):
        out = out[0]
    if not isinstance(out, Tensor):
        raise TypeError(_no_tensor(name, out))
    return out


def _no_tensor(name: str, out: Any) -> str:
    return (
        f"layer {name} must return tensors, or tuples of them, at every step, "
        f"got {type(out).__name__}"
    )


class _Put(torch.autograd.Function):
    """Copies the result of some steps to its place; what it returns stands for the copy."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, place: Tensor) -> Tensor:
        place.copy_(part)
        return part.new_empty(()).expand(part.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Collect(torch.autograd.Function):
    """Returns the whole tensor, whose gradient goes to the parts that require one."""

    @staticmethod
    def forward(ctx: Any, gathered: Gathered, *parts: Tensor) -> Tensor:
        ctx.places = gathered.places
        assert gathered.whole is not None
        return gathered.whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(grad[place] for place in ctx.places)


class Gathered:
    """Gathers what layers return at T steps: tensors, or tuples of them, whose items are joined.

    A large tensor is made once, and each step's result is copied to its place as it comes, while
    it lies in the cache, and is then let go of. ``torch.stack`` at the end would keep all of them
    until then, and read them from memory again.
    """

    def __init__(self, name: str, steps: int) -> None:
        self.name, self.steps, self.filled = name, steps, 0
        self.items: list[Gathered] | None = None  # of a tuple
        self.whole: Tensor | None = None  # of a large tensor
        self.parts: list[Tensor] = []  # what is to be joined; of a large one, what _Put returned
        self.places: list[int | slice] = []  # of these parts, in the whole

    def add(self, out: Any, chunk: bool = False) -> None:
        """Add the results of the next steps.

        `out` is a sequence of one result each, or one result of some steps: a tensor (k, ...), or
        with `chunk` a tuple of such.
        """
        if isinstance(out, Tensor) and self.items is None:
            self._add(out, out.shape[0])
        elif self.filled == 0 and (chunk or all(isinstance(step, tuple | list) for step in out)):
            results = out if chunk else list(zip(*out, strict=True))
            if self.items is None:
                self.items = [Gathered(self.name, self.steps) for _ in results]
            for item, result in zip(self.items, results, strict=True):
                item.add(result, chunk)
        elif self.items is None and all(isinstance(step, Tensor) for step in out):
            if len(out) == self.steps:
                self._add(torch.stack(list(out)), self.steps)
            else:
                for step in out:
                    self._add(step)
        else:
            raise TypeError(_no_tensor(self.name, out[0]))

    def _add(self, part: Tensor, count: int = 0) -> None:
        """Add the result of one step, or that of `count` steps, (count, ...)."""
        shape = part.shape[1:] if count else part.shape
        if self.filled == 0 and count != self.steps:
            self._begin(part[0] if count else part)
        elif self.whole is not None and not self._fits(shape, part.dtype):
            # From now on torch.cat promotes the dtypes, or raises its error.
            self.parts, self.whole = [self.result()[: self.filled]], None
        if self.whole is None:
            self.parts.append(part if count else part.unsqueeze(0))
        else:
            place = slice(self.filled, self.filled + count) if count else self.filled
            if torch.is_grad_enabled() and part.requires_grad:
                self.parts.append(_Put.apply(part, self.whole[place]))
                self.places.append(place)
            else:
                self.whole[place].copy_(part)
        self.filled += count or 1

    def _fits(self, shape: torch.Size, dtype: torch.dtype) -> bool:
        assert self.whole is not None
        return self.whole.shape[1:] == shape and self.whole.dtype == dtype

    def _begin(self, step: Tensor) -> None:
        """Make the whole, in the order of the step's memory, if it is large and plain."""
        if step.nbytes * self.steps >= IN_PLACE and _plain(step):
            like = torch.empty_like(step)
            shape, strides = (self.steps, *step.shape), (step.numel(), *like.stride())
            self.whole = memory.empty_strided(shape, strides, step.dtype)

    def result(self) -> Any:
        """The results of all steps, (T, ...)."""
        if self.items is not None:
            return tuple(item.result() for item in self.items)
        if self.whole is not None:
            return _Collect.apply(self, *self.parts) if self.parts else self.whole
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)


def _plain(tensor: Tensor) -> bool:
    """Whether eager torch computes the tensor, and no transform or tracer sees what happens."""
    return (
        type(tensor) is Tensor
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
    )
