"""The custom autograd Functions that a loop calls, each made once.

torch.compile records the call of a Function with the graphs of its forward and backward. A graph
that runs as it is would make a class for each call, whose cycles keep the saved tensors until the
garbage collector runs, and would interpret both graphs. Here each call gets one class.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from ..compat.torch_private import apply_in_transforms, transforms_are_active
from .effects import effects_of
from .rules import APPLY, body_of, own_settings


def make_functions(module: GraphModule) -> GraphModule:
    """Let each recorded call of a Function call one that is made here; return the module.

    Calls of equal graphs, such as those of all steps, share one.
    """
    made: dict[Any, Callable[..., Any]] = {}
    calls = module.graph.find_nodes(op="call_function", target=APPLY)
    for call in calls:
        bodies = call.args[:2]
        key = *(_key_of(body_of(body)) for body in bodies), repr(call.kwargs)
        if key not in made:
            made[key] = _function(call)
        call.target, call.args, call.kwargs = made[key], call.args[2:], {}
        for body in bodies:
            module.graph.erase_node(body)
    if calls:
        module.recompile()
    return module


def _key_of(body: GraphModule) -> Any:
    """What equal bodies have in common."""
    names = {node: f"%{number}" for number, node in enumerate(body.graph.nodes)}
    return tuple(
        (
            id(body_of(node)) if node.op == "get_attr" else node.op == "placeholder" or node.target,
            repr(map_arg((node.args, node.kwargs), names.get)),
        )
        for node in names
    )


def _compiled(
    body: GraphModule, order: Callable[[Graph], None] = lambda graph: None
) -> Callable[..., Any]:
    """A body as a function that runs in the caller's grad mode; `order` sorts its arguments."""
    graph = copy.deepcopy(body.graph)
    for node in own_settings(graph):
        graph.erase_node(node)
    order(graph)
    return make_functions(GraphModule(body, graph)).forward


def _function(call: Node) -> Callable[..., Any]:
    """The Function of a recorded call, which takes and returns the same tensors."""
    forward_body, backward_body = map(body_of, call.args[:2])
    results, kept = forward_body.graph.output_node().args[0]
    constant, dirty = call.kwargs["non_differentiable_idx"], call.kwargs.get("dirty_idx")
    # Autograd keeps what the user saved by save_for_backward, and sees whether it was modified. It
    # also keeps results, which would form a cycle with ctx.
    by_user = call.kwargs["saved_for_backward_idx"]
    checked = [at for at, node in enumerate(kept) if at in by_user or node in results]
    others = [at for at in range(len(kept)) if at not in checked]
    is_pure = not any(effects_of(call))

    def order(graph: Graph) -> None:
        saved = graph.find_nodes(op="placeholder")[len(results) :]
        for one, following in pairwise([saved[at] for at in checked + others]):
            one.append(following)

    run, run_backward = _compiled(forward_body), _compiled(backward_body, order)

    def save(ctx: Any, outputs: Sequence[Tensor], saved: Sequence[Any]) -> None:
        ctx.save_for_backward(*[saved[at] for at in checked])
        ctx.others = [saved[at] for at in others]
        if constant:
            ctx.mark_non_differentiable(*[outputs[at] for at in constant])
        if dirty:
            ctx.mark_dirty(*[outputs[at] for at in dirty])

    def forward(ctx: Any, *args: Any) -> Sequence[Tensor]:
        outputs, saved = run(*args)
        save(ctx, outputs, saved)
        return outputs

    def backward(ctx: Any, *grads: Tensor) -> Sequence[Tensor | None]:
        given = (*grads, *ctx.saved_tensors, *ctx.others)
        with torch.no_grad():
            out = run_backward(*given)
        if not torch.is_grad_enabled():
            return out
        return _First.apply(len(out), *out, *given)

    def setup_context(ctx: Any, inputs: Sequence[Any], outputs: Sequence[Tensor]) -> None:
        _, saved = run(*inputs)  # of this transform, as inputs and outputs are
        own = [outputs[results.index(node)] if node in results else None for node in kept]
        save(ctx, outputs, [s if o is None else o for o, s in zip(own, saved, strict=True)])

    passes = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    kind: Any = type("Recorded", (torch.autograd.Function,), passes)
    # This is apply without its search for torch.func's wrappers among all arguments.
    apply = super(torch.autograd.Function, kind).apply
    within = type(
        "Recorded", (kind,), {"apply": apply, "setup_context": staticmethod(setup_context)}
    )

    def function(*args: Any) -> Any:
        if not transforms_are_active():
            return apply(*args)
        if not is_pure:
            raise RuntimeError(_IMPURE)
        return apply_in_transforms(within, *args)

    return function


_IMPURE = (
    "torch.func cannot transform a compiled autograd Function that draws random numbers, or writes "
    "to an argument: run the network without torch.compile"
)


class _First(torch.autograd.Function):
    """Returns `count` first derivatives, and raises an error where their derivative is wanted.

    dynamo records a backward while gradients are off. So a recorded backward lacks each ``no_grad``
    of the user's, and the backward of another Function that the user's backward calls.
    """

    @staticmethod
    def forward(count: int, *tensors: Any) -> Sequence[Tensor | None]:
        return tuple(None if out is None else out.clone() for out in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "a compiled loop has no second derivative of a custom autograd Function: run the "
            'network within torch.compiler.set_stance("force_eager"), or without torch.compile'
        )
