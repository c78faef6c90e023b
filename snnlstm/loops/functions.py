"""The custom autograd Functions that a loop calls, each made once.

torch.compile records the call of a Function with the graphs of its forward and backward. A graph
that runs as it is would make a class for each call, whose cycles keep the saved tensors until the
garbage collector runs, and would interpret both graphs. Here each call gets one class.
"""

from __future__ import annotations

import copy
import inspect
import linecache
import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from ..compat.torch_private import apply_in_transforms, delayed_error, transforms_are_active
from .rules import APPLY, body_of, own_settings, value_of
from .steps import effects_of


def make_functions(module: GraphModule) -> GraphModule:
    """Let each recorded call of a Function call one that is made here; return the module.

    Calls of equal graphs from the same lines, such as those of all steps, share one.
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
    """What equal bodies that come from the same lines have in common."""
    names = {node: f"%{number}" for number, node in enumerate(body.graph.nodes)}
    return tuple(
        (
            id(body_of(node)) if node.op == "get_attr" else node.op == "placeholder" or node.target,
            repr(map_arg((node.args, node.kwargs), names.get)),
            node.meta.get("stack_trace"),
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
    is_recorded = cache(partial(_records_second_derivative, backward_body, len(_frames(call))))

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
        if not torch.is_grad_enabled() or is_recorded():
            return run_backward(*given)
        with torch.no_grad():
            out = run_backward(*given)
        tensors = [value for value in given if isinstance(value, Tensor)]
        error = delayed_error(_NOT_RECORDED.encode(), len(out) + len(tensors))
        return error(*out, *tensors)[: len(out)]

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

# ---- second derivatives --------------------------------------------------------------------------

_NOT_RECORDED = (
    "torch.compile has not recorded the second derivative of a custom autograd Function, whose "
    "backward may set the grad mode or calls another Function: take it outside of torch.compile"
)
_MAY_SET_MODE = re.compile(
    r"^\s*with\b|no_grad|enable_grad|grad_enabled|inference_mode|enter_context|__enter__",
    re.MULTILINE,
)


def _records_second_derivative(body: GraphModule, depth: int) -> bool:
    """Whether the derivative of a backward's body is that of the backward that the user wrote.

    dynamo records a backward while gradients are off. So it leaves out each ``no_grad`` of the
    user's, and the backward of another Function that is called. Only the source of the functions
    that nodes come from tells of them. `depth` frames lie outside of the backward.
    """
    for node in body.graph.nodes:
        if node.op.startswith("call") and value_of(node) is not None:
            frames = _frames(node)[depth:]
            sources = [_source(*frame) for frame in frames]
            if not all(sources) or any(map(_MAY_SET_MODE.search, sources)):
                return False
            if not frames or "forward" in [name for _, _, name in frames[1:]]:
                return False
    return True


def _frames(node: Node) -> list[tuple[str, int, str]]:
    """The file, line and function of each call that led to a node, from the outermost one on."""
    trace = node.meta.get("stack_trace") or ""
    found = re.findall(r'^ *File "(.*)", line (\d+), in (.*)$', trace, re.MULTILINE)
    return [(file, int(line), name) for file, line, name in found]


def _source(file: str, line: int, name: str) -> str:
    """The source of the function around a line, which a lambda lies in; empty if there is none."""
    lines = linecache.getlines(file)
    named = r"\w+" if name[0] == "<" else re.escape(name)
    starts = [at for at, text in enumerate(lines[:line]) if re.match(rf"\s*def {named}\b", text)]
    blocks = [block for at in starts if at + len(block := inspect.getblock(lines[at:])) >= line]
    return "".join(blocks[-1]) if blocks else ""
