"""The weight gradient of a loop of step calls, formed once.

Step calls between which the weight did not change share one node of the autograd graph, through
which weight and bias pass. A step's backward pass leaves its gate gradients in the node's
:class:`Left`; the node, which the engine runs after all steps, forms the gradients of weight and
bias over all of them. What one backward pass leaves is told from what others leave by the number of
the pass, so that several may run at once, and a pass that does not want the weight's gradient
leaves nothing.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from ..call import version
from .tensors import Step

__all__ = ["Loop", "loop_of"]

# Gate gradients that wait for the node, in bytes, and in steps: their memory is that of the gates,
# which the backward pass would have given back step by step.
MOST_BYTES = 64 << 20
MOST_STEPS = 256

_pass_number = torch._C._current_graph_task_id


class _Pass:
    """What one backward pass has left of the steps of a loop."""

    def __init__(self) -> None:
        # A choice that forms the gradient, and the steps of its loop_key, which wait for it.
        self.waiting: list[tuple[Any, list[Step]]] = []
        self.bytes = 0
        self.count = 0
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def form(self, wanted: tuple[bool, bool]) -> None:
        """Add the gradients of the steps that wait to the sums, and let go of the steps."""
        for choice, steps in self.waiting:
            of_weight, of_bias = choice.weight_gradient(steps, wanted)
            self.weight, self.bias = _sum(self.weight, of_weight), _sum(self.bias, of_bias)
        self.waiting, self.bytes, self.count = [], 0, 0


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other


class Left:
    """What the steps of one loop left, by the number of the backward pass that runs."""

    def __init__(self, wanted: tuple[bool, bool]) -> None:
        self.wanted = wanted
        self._passes: dict[int, _Pass] = {}

    def add(self, choice: Any, step: Step) -> None:
        """Leave a step's gate gradient to the node."""
        number = _pass_number()
        left = self._passes.get(number) or self._passes.setdefault(number, _Pass())
        for other, steps in left.waiting:
            if other.loop_key == choice.loop_key:
                steps.append(step)
                break
        else:
            left.waiting.append((choice, [step]))
        left.bytes += step.d_gates.nbytes
        left.count += 1
        if left.bytes >= MOST_BYTES or left.count >= MOST_STEPS:
            left.form(self.wanted)

    def take(self) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of weight and bias over all that was left."""
        left = self._passes.pop(_pass_number(), None) or _Pass()
        left.form(self.wanted)
        return left.weight, left.bias


class _WeightOfLoop(torch.autograd.Function):
    """Weight and bias as they are; in the backward pass, the gradients that the steps left."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor | None, left: Left
    ) -> tuple[Tensor, Tensor | None]:
        ctx.left = left
        ctx.set_materialize_grads(False)
        # A view would keep the parameter itself alive. What is detached shares its version counter,
        # so that autograd notices a change in place.
        return weight.detach(), None if bias is None else bias.detach()

    @staticmethod
    def backward(ctx: Any, of_weight: Any, of_bias: Any) -> tuple:
        # Steps whose gradients are to be differentiated formed them themselves: they come in here.
        weight, bias = ctx.left.take()
        of_weight, of_bias = _sum(of_weight, weight), _sum(of_bias, bias)
        wanted = ctx.needs_input_grad
        return of_weight if wanted[0] else None, of_bias if wanted[1] else None, None


class Loop:
    """Weight and bias of a loop of step calls, as its node hands them to the steps.

    ``left`` is where the steps' backward passes leave their gate gradients, ``node`` what
    :func:`torch._C._will_engine_execute_node` asks for, ``steps`` the number of step calls so far.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        wanted = weight.requires_grad, bias is not None and bias.requires_grad
        self.left, self.steps = Left(wanted), 0
        self.weight, self.bias = _WeightOfLoop.apply(weight, bias, self.left)
        self.node = self.weight.grad_fn
        self._facts = _facts(weight), _facts(bias)
        # The nodes to which the gradients go tell whose gradients they are.
        self._ends = [end for end, _ in self.node.next_functions]

    def goes_on(self, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether these are the loop's weight and bias, and nobody has written to them since."""
        ends = self._ends
        return (
            (_facts(weight), _facts(bias)) == self._facts
            and _leads_to(ends[0], weight)
            and (bias is None or _leads_to(ends[1], bias))
        )


def _facts(tensor: Tensor | None) -> Any:
    """What writing to a tensor, ``tensor.data = other`` and ``requires_grad_()`` change."""
    if tensor is None:
        return None
    return tensor.data_ptr(), version(tensor), tensor.shape, tensor.dtype, tensor.requires_grad


def _leads_to(end: Any, tensor: Tensor) -> bool:
    """Whether a gradient that goes to the node `end` is the tensor's."""
    if end is None:
        return not tensor.requires_grad
    return tensor.grad_fn is end or getattr(end, "variable", None) is tensor


# Loops by the id of their weight. A loop lives as long as the graph of one of its steps.
_loops: weakref.WeakValueDictionary[int, Loop] = weakref.WeakValueDictionary()


def loop_of(weight: Tensor, bias: Tensor | None) -> Loop:
    """The loop that a step call with these goes on with, or a new one."""
    loop = _loops.get(id(weight))
    if loop is None or not loop.goes_on(weight, bias):
        with torch.enable_grad():
            loop = _loops[id(weight)] = Loop(weight, bias)
    return loop
