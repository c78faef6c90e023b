"""The functions whose calls of several steps can become one call, each with the way to call it.

In the call for all steps, a tensor that differs from step to step has them as its first dimension,
(T, ...). The functions are known by name: a rule serves ``F.relu(x)``, ``torch.relu(x)`` and
``x.relu()``.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from ..compat.torch_private import apply_recorded, operators_named, size_hint
from ..native.batch_norm import batch_norm
from ..native.leaky_operators import OPERATORS
from ..native.linear import linear
from ..networks.layers import PER_SAMPLE

CELL_OPERATOR = OPERATORS.forward.default
LEAKY_OPERATOR = OPERATORS.leaky.default
STATEFUL = frozenset((CELL_OPERATOR, LEAKY_OPERATOR))
ITEM = operator.getitem
APPLY = apply_recorded
SET_GRAD = torch._C._set_grad_enabled

# ---- what a node is -----------------------------------------------------------------------------


def name_of(node: Node) -> str:
    """Name of the function or method that a node calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def is_operator(node: Node) -> bool:
    """Whether a node calls a function of the module operator."""
    return getattr(operator, name_of(node), None) is node.target


def is_of_torch(node: Node) -> bool:
    """Whether a node calls a method of a tensor, or one of torch's functions by its name."""
    if node.op == "call_method":
        return True
    spaces = torch, F, torch._C._nn
    return any(getattr(space, name_of(node), None) is node.target for space in spaces)


def named_arguments(node: Node) -> dict[str, Any]:
    """The arguments of a function that is written in Python, with its defaults, by name."""
    if not isinstance(node.target, FunctionType):
        return {}
    bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return bound.arguments


def dropped(node: Node) -> Any:
    """The argument of a dropout that does nothing, in evaluation or of p = 0; None for others."""
    if name_of(node) != "dropout" or not is_of_torch(node):
        return None
    named = named_arguments(node) or {
        **dict(zip(("input", "p", "train"), node.args, strict=False)),
        **node.kwargs,
    }
    idle = named["p"] == 0 or named.get("training", named.get("train")) is False
    return named["input"] if idle else None


def value_of(node: Any) -> Any:
    """What a node returned when it was recorded, a tensor without memory."""
    return node.meta.get("example_value") if isinstance(node, Node) else None


def shape_of(node: Node) -> Any:
    """Shape and dtype of a node's result; None if it is no tensor."""
    value = value_of(node)
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else None


def dim_of(node: Node) -> int:
    return value_of(node).dim()


def requires_grad(node: Any) -> bool:
    """Whether a node's result, or one of its results, requires a gradient."""
    value = value_of(node)
    values = value if isinstance(value, tuple | list) else (value,)
    return any(isinstance(item, Tensor) and item.requires_grad for item in values)


def bytes_of(node: Node) -> int:
    """Bytes of a node's result; of several tensors, those of the first, such as spk."""
    value = value_of(node)
    first = value[0] if isinstance(value, tuple | list) else value
    return first.element_size() * size_hint(first.numel())


def body_of(node: Any) -> Any:
    """The attribute of the graph's module that a node gets; for a Function, a graph of its own."""
    return getattr(node.graph.owning_module, node.target)


def own_settings(graph: Graph) -> list[Node]:
    """The two nodes by which dynamo turns gradients off in such a graph, as autograd does."""
    settings = graph.find_nodes(op="call_function", target=SET_GRAD)
    return [*settings[:1], *settings[1:][-1:]]


# ---- the rules -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """How calls of a function become one.

    Parameters
    ----------
    together : callable
        Called with a :class:`~snnlstm.loops.rewrite.Writer` and a run, writes the one call, and
        returns its result.
    states : tuple of (int, int)
        Positions of the states among the arguments, each with its position among the results.
    options : tuple of int
        Positions of the arguments that all steps of a layer with states share.
    first_alone : bool
        Whether all other arguments than the first one must be the same in each step.
    """

    together: Callable[[Any, Any], Any]
    states: tuple[tuple[int, int], ...] = ()
    options: tuple[int, ...] = ()
    first_alone: bool = True


def _first(w: Any, run: Any) -> Any:
    """The first arguments of the calls, as a sequence, (T, ...)."""
    return w.sequence([call.args[0] for call in run.calls])


def _whole(w: Any, run: Any, function: Any = None, x: Any = None) -> Any:
    """The run's function, or another one, takes all steps, or x, with the arguments of one call."""
    call = run.calls[0]
    x = _first(w, run) if x is None else x
    return w.call(function or call.target, x, *w.arguments(call), **w.options(call))


def linear_of_steps(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` of all steps, (T, N, K), which is slow if x is not contiguous.

    If only time lies within the batch, as in ``x[:, t]``, x or the result is copied: the smaller.
    """
    if x.dim() == 3 and not x.is_contiguous():
        by_sample = x.transpose(0, 1)
        if by_sample.is_contiguous() and weight.shape[0] <= weight.shape[-1]:
            return linear(by_sample, weight, bias).transpose(0, 1).contiguous()
    return linear(x.contiguous(), weight, bias)


def _folded(w: Any, run: Any) -> Any:
    """A function that treats every sample by itself takes the steps as a larger batch."""
    out = _whole(w, run, x=w.call("flatten", _first(w, run), 0, 1))
    return w.call("unflatten", out, 0, (len(run.calls), -1))


def _elementwise(w: Any, run: Any) -> Any:
    """Operands are aligned to the right, as torch broadcasts them."""
    rank = max(dim_of(arg) for arg in run.calls[0].all_input_nodes)

    def joined(args: Sequence[Any]) -> Any:
        if not isinstance(args[0], Node):
            return args[0]
        if w.is_one(args):
            return w.copied(args[0])
        out, missing = w.sequence(args), rank - dim_of(args[0])
        return w.call(ITEM, out, (slice(None),) + (None,) * missing) if missing else out

    args = [joined(column) for column in zip(*(call.args for call in run.calls), strict=True)]
    names = run.calls[0].kwargs
    kwargs = {name: joined([call.kwargs[name] for call in run.calls]) for name in names}
    if run.calls[0].target is operator.add and not requires_grad(run.calls[0]):
        for at in range(2):
            if _is_spare(w, args[at], run, at):  # a sum in new memory takes four times as long
                return w.call(operator.iadd, args[at], args[1 - at])
    return w.call(run.calls[0].target, *args, **kwargs)


def _is_spare(w: Any, operand: Any, run: Any, at: int) -> bool:
    """Whether a run may write into its operand at a position, which nobody else reads.

    It is the result of a convolution or of a batch norm in training.
    """
    made = operand.args[0] if getattr(operand, "target", "") == "unflatten" else operand
    is_new = isinstance(made, Node) and (name_of(made) == "conv2d" or made.target is batch_norm)
    alike = shape_of(run.calls[0]) == shape_of(run.calls[0].args[at])
    return is_new and alike and all(w.readers(call.args[at]) == 1 for call in run.calls)


def _behind_time(dim: int) -> int:
    """A dimension of a step as a dimension of all steps."""
    return dim + 1 if dim >= 0 else dim


def _flattened(w: Any, run: Any) -> Any:
    call = run.calls[0]
    dims = {"start_dim": 0, "end_dim": -1}
    dims.update(zip(dims, call.args[1:], strict=False))
    dims.update(call.kwargs)
    return w.call("flatten", _first(w, run), *map(_behind_time, dims.values()))


def _reshaped(w: Any, run: Any) -> Any:
    sizes: Any = run.calls[0].args[1:]
    if len(sizes) == 1 and isinstance(sizes[0], tuple | list):
        sizes = sizes[0]
    return w.call("reshape", _first(w, run), (len(run.calls), *w.copied(list(sizes))))


def _concatenated(w: Any, run: Any) -> Any:
    tensors: Any = zip(*(call.args[0] for call in run.calls), strict=True)
    dim = (*run.calls[0].args[1:], *run.calls[0].kwargs.values(), 0)[0]
    return w.call(torch.cat, [w.sequence(column) for column in tensors], _behind_time(dim))


def _cells(w: Any, run: Any) -> Any:
    """All steps of a cell; the steps may differ in whether a result needs a gradient."""
    _, *args = run.calls[0].args
    syn, mem, *parameters, _, text, algorithm, _ = map(w.copied, args)
    training = any(call.args[-1] for call in run.calls)
    x = _first(w, run)
    return w.call(CELL_OPERATOR, x, syn, mem, *parameters, run.record, text, algorithm, training)


def _leakies(w: Any, run: Any) -> Any:
    _, *args = run.calls[0].args
    mem, *parameters, text, _, _ = map(w.copied, args)
    return w.call(LEAKY_OPERATOR, _first(w, run), mem, *parameters, text, True, run.record)


# The states are arguments 1 and 2 of a cell, and argument 1 of a Leaky; spk is result 0.
_CELLS = Rule(_cells, states=((1, 1), (2, 2)), options=(3, 4, 5, 6, 7, 9, 10))
LEAKIES = Rule(_leakies, states=((1, 1),), options=(2, 3, 4, 5))
LINEAR, _FOLDED = Rule(lambda w, run: _whole(w, run, linear_of_steps)), Rule(_folded)
_LEADING = Rule(_whole)  # functions of the last dimensions take any number of leading ones
ELEMENTWISE = Rule(_elementwise, first_alone=False)
_FLATTEN, RESHAPE = Rule(_flattened), Rule(_reshaped)
VIEWS = _FLATTEN, RESHAPE
_CAT = Rule(_concatenated, first_alone=False)
BATCH_NORMS = Rule(lambda w, run: _whole(w, run, batch_norm))

# Some are functions of the module operator; others also reduce a tensor, by the same name.
_NOT_ELEMENTWISE = {"getitem", "matmul", "concat", "max", "min"}
_ALSO_ELEMENTWISE = {"to", "float", "double", "half", "bfloat16", "detach", "dropout"}
# The least number of dimensions of a batch; the norm of fewer dimensions comes last.
_BATCH_DIMS = {name: dim for name, dim in reversed(PER_SAMPLE.values()) if name}


def rule_of(node: Node) -> Rule | None:
    """How the calls of a node's function become one; None if they cannot, or nobody knows.

    The node must have no effect, such as a dropout has; a batch norm in training has one that its
    rule allows.
    """
    args, value = node.args, value_of(node)
    if node.target is CELL_OPERATOR:
        return _CELLS if dim_of(args[0]) == 4 and args[7] is None else None
    if node.target is LEAKY_OPERATOR:
        return None if args[6] else LEAKIES
    if not isinstance(value, Tensor) or not (is_operator(node) or is_of_torch(node)):
        return None
    name, inputs = name_of(node), node.all_input_nodes
    if "memory_format" in node.kwargs:  # it is that of a step
        return None
    if _is_elementwise(name, node):
        return ELEMENTWISE if inputs and _promotes_alike(inputs) else None
    if name == "cat" and args and isinstance(args[0], tuple | list):
        dims = {dim_of(tensor) for tensor in args[0]}  # torch skips empty tensors of one dimension
        return _CAT if len(dims) == 1 and 0 not in dims else None
    if not args or not isinstance(value_of(args[0]), Tensor):
        return None
    dim = dim_of(args[0])
    if name == "linear" and dim:
        return LINEAR
    if name == "layer_norm":
        return _LEADING
    if name == "pad" and (*args[2:], *node.kwargs.values(), "constant")[0] == "constant":
        return _LEADING
    if dim >= _BATCH_DIMS.get(name, math.inf):
        if name != "batch_norm":
            return _FOLDED
        training = named_arguments(node).get("training")
        return None if training is None else BATCH_NORMS if training else _FOLDED
    if name == "flatten" and dim:
        return _FLATTEN
    if name in ("view", "reshape") and not node.kwargs and not isinstance(args[1], torch.dtype):
        return RESHAPE
    return None


def _is_elementwise(name: str, node: Node) -> bool:
    if name in _NOT_ELEMENTWISE:
        return False
    known = operators_named(name)
    pointwise = known is not None and known.pointwise
    return is_operator(node) or pointwise or name in _ALSO_ELEMENTWISE


def _promotes_alike(inputs: Sequence[Node]) -> bool:
    """Whether the result's dtype stays as it is if numbers, (), become a tensor, (T,)."""
    if not all(isinstance(value_of(arg), Tensor) for arg in inputs):
        return False
    has_number = any(dim_of(arg) == 0 for arg in inputs)
    return not has_number or len({value_of(arg).dtype for arg in inputs}) == 1
