"""The custom autograd Functions that a loop calls, each made once.

torch.compile records the call of a Function with the graphs of its forward and backward. A graph
that runs as it is would make a class for each call, whose cycles keep the saved tensors until the
garbage collector runs, and would interpret both graphs. Here each call gets one class.
"""

from __future__ import annotations

import ast
import copy
import linecache
import re
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from ..compat.torch_private import apply_in_transforms, delayed_error, transforms_are_active
from .rows import APPLY, SET_GRAD, body_of, own_settings, value_of
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


def _compiled(body: GraphModule, *changes: Callable[[Graph], Any]) -> Callable[..., Any]:
    """A body as a function that runs in the grad mode of its caller."""
    graph = copy.deepcopy(body.graph)
    for node in own_settings(graph):
        graph.erase_node(node)
    for change in changes:
        change(graph)
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

    @cache
    def differentiable() -> Callable[..., Sequence[Tensor | None]]:
        return _differentiable(backward_body, order, len(_frames(call)))

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
        if torch.is_grad_enabled():
            return differentiable()(ctx, *grads)
        return run_backward(*grads, *ctx.saved_tensors, *ctx.others)

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
    "backward calls another Function, or sets the grad mode in a way that its source does not tell:"
    " run the network without torch.compile"
)


def _differentiable(
    body: GraphModule, order: Callable[[Graph], Any], depth: int
) -> Callable[..., Sequence[Tensor | None]]:
    """The backward of a body for second derivatives, which takes ctx and gradients.

    dynamo records while gradients are off, and so leaves out each ``no_grad`` of the user's. The
    source of the lines that nodes come from tells where one was. `depth` frames lie outside.
    """
    once, is_known = False, True

    def change(graph: Graph) -> None:
        nonlocal once, is_known
        for node in graph.find_nodes(op="call_function", target=SET_GRAD):
            graph.erase_node(node)
        for node in [node for node in graph.nodes if node.op.startswith("call")]:
            frames = _frames(node)[depth:]
            modes = [mode for file, line, _ in frames for mode in _grad_modes(file, line)]
            if not frames and value_of(node) is not None:
                modes = [None]
            once |= once_differentiable.__code__.co_filename in [file for file, _, _ in frames]
            of_another = "forward" in [name for _, _, name in frames[1:]]
            is_known &= None not in modes and not of_another
            if modes[-1:] == [False]:
                with graph.inserting_before(node):
                    graph.call_function(SET_GRAD, (False,))
                with graph.inserting_after(node):
                    graph.call_function(SET_GRAD, (True,))

    function = _compiled(body, order, change)

    def run(ctx: Any, *grads: Tensor) -> Sequence[Tensor | None]:
        return function(*grads, *ctx.saved_tensors, *ctx.others)

    def refusing(ctx: Any, *grads: Tensor) -> Sequence[Tensor | None]:
        used = (*grads, *ctx.saved_tensors, *ctx.others)
        out, tensors = function(*used), [value for value in used if isinstance(value, Tensor)]
        error = delayed_error(_NOT_RECORDED.encode(), len(out) + len(tensors))
        return error(*out, *tensors)[: len(out)]

    return once_differentiable(run) if once else run if is_known else refusing


def _frames(node: Node) -> list[tuple[str, int, str]]:
    """The file, line and function of each call that led to a node, from the outermost one on."""
    trace = node.meta.get("stack_trace") or ""
    found = re.findall(r'^ *File "(.*)", line (\d+), in (.*)$', trace, re.MULTILINE)
    return [(file, int(line), name) for file, line, name in found]


@cache
def _grad_modes(file: str, line: int) -> Sequence[bool | None]:
    """The grad modes that a line's function sets around it, the last one innermost.

    None stands for one that nobody knows.
    """
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return (None,)
    nodes = [n for n in ast.walk(tree) if getattr(n, "lineno", line) <= line <= _end(n)]
    functions = [n for n in nodes if isinstance(n, ast.FunctionDef | ast.Lambda)]
    if not functions or _words(functions[-1]) & {"is_grad_enabled", "set_grad_enabled"}:
        return (None,)
    function = functions[-1]  # the innermost one
    blocks = [n for n in nodes if isinstance(n, ast.With) and n.lineno >= function.lineno]
    items = [item for block in blocks for item in block.items]
    known = {False: {"no_grad", "inference_mode"}, True: {"enable_grad"}}
    modes = []
    for item in [*getattr(function, "decorator_list", ()), *items]:
        words = _words(item)
        mode = next((mode for mode, names in known.items() if words & names), None)
        # torch's decorators call the function within ctx_factory().
        if mode is not None or (item in items and not words & {"autocast", "ctx_factory"}):
            modes.append(mode)
    return modes


def _end(node: Any) -> int:
    return getattr(node, "end_lineno", None) or 0


def _words(node: ast.AST) -> set[str]:
    """The names in the source of a node."""
    return {getattr(part, "attr", getattr(part, "id", "")) for part in ast.walk(node)}
