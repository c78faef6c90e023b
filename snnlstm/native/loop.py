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

from .tensors import Step

__all__ = ["Loop", "loop_of"]

# Gate gradients that wait for the node, in bytes, and in steps: their memory is that of the gates,
# which the backward pass would have given back step by step.
MOST_BYTES = 64 << 20
MOST_STEPS = 256


class _Pass:
    """What one backward pass has left of the steps of a loop."""

    def __init__(self) -> None:
        # What forms the gradient, and the steps that wait, by the plan's way of forming it.
        self.waiting: dict[Any, tuple[Any, list[Step]]] = {}
        self.bytes = 0
        self.count = 0
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def add(self, choice: Any, step: Step, wanted: tuple[bool, bool]) -> None:
        waiting = self.waiting.get(choice.loop_key)
        if waiting is None:
            waiting = self.waiting[choice.loop_key] = choice, []
        waiting[1].append(step)
        self.bytes += step.d_gates.nbytes
        self.count += 1
        if self.bytes >= MOST_BYTES or self.count >= MOST_STEPS:
            self.form(wanted)

    def form(self, wanted: tuple[bool, bool]) -> None:
        """Add the gradients of the steps that wait to the sums, and let go of the steps."""
        for choice, steps in self.waiting.values():
            of_weight, of_bias = choice.weight_gradient(steps, wanted)
            self.weight = _sum(self.weight, of_weight)
            self.bias = _sum(self.bias, of_bias)
        self.waiting, self.bytes, self.count = {}, 0, 0


def _sum(so_far: Tensor | None, more: Tensor | None) -> Tensor | None:
    if so_far is None or more is None:
        return more if so_far is None else so_far
    return so_far.add_(more)


class Left:
    """What the steps of one loop left, by the number of the backward pass."""

    def __init__(self, wanted: tuple[bool, bool]) -> None:
        self.wanted = wanted
        self._passes: dict[int, _Pass] = {}

    def add(self, number: int, choice: Any, step: Step) -> None:
        """Leave a step's gate gradient to the node, for the backward pass of this number."""
        left = self._passes.get(number)
        if left is None:
            left = self._passes.setdefault(number, _Pass())
        left.add(choice, step, self.wanted)

    def take(self, number: int) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of weight and bias over all that was left in this backward pass."""
        left = self._passes.pop(number, None)
        if left is None:
            return None, None
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
        # Not views, which would keep the parameters themselves alive. The version counters are
        # shared, so that a change in place is noticed.
        return weight.detach(), None if bias is None else bias.detach()

    @staticmethod
    def backward(ctx: Any, of_weight: Any, of_bias: Any) -> tuple:
        # What comes in is of steps that formed their gradients themselves, to be differentiated.
        more_weight, more_bias = ctx.left.take(torch._C._current_graph_task_id())
        if more_weight is not None:
            of_weight = more_weight if of_weight is None else of_weight + more_weight
        if more_bias is not None:
            of_bias = more_bias if of_bias is None else of_bias + more_bias
        wanted = ctx.needs_input_grad
        return of_weight if wanted[0] else None, of_bias if wanted[1] else None, None


class Loop:
    """Weight and bias of a loop of step calls.

    Attributes
    ----------
    weight, bias : Tensor
        What the steps make use of. They hang on the loop's node.
    left : Left
        Where the steps' backward passes leave their gate gradients.
    node : Node
        What :func:`torch._C._will_engine_execute_node` asks for.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        wanted = weight.requires_grad, bias is not None and bias.requires_grad
        self.left = Left(wanted)
        self.weight, self.bias = _WeightOfLoop.apply(weight, bias, self.left)
        self.node = self.weight.grad_fn
        self._facts = _facts(weight), _facts(bias)
        # The nodes that the gradients go to tell of which tensors they are.
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
    return (
        tensor.data_ptr(), tensor._version, tensor.shape, tensor.dtype, tensor.requires_grad
    )  # fmt: skip


def _leads_to(end: Any, tensor: Tensor) -> bool:
    """Whether a gradient that goes to the node `end` is the tensor's."""
    if end is None:
        return not tensor.requires_grad
    return tensor.grad_fn is end or getattr(end, "variable", None) is tensor


# By the address of the weight's object. A loop lives as long as the graph of a step of it.
_loops: weakref.WeakValueDictionary[int, Loop] = weakref.WeakValueDictionary()


def loop_of(weight: Tensor, bias: Tensor | None) -> Loop:
    """The loop that a step call with these goes on with, or a new one."""
    loop = _loops.get(id(weight))
    if loop is None or not loop.goes_on(weight, bias):
        with torch.enable_grad():
            loop = _loops[id(weight)] = Loop(weight, bias)
    return loop
