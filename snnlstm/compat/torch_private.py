"""torch's private functions, each with a replacement for versions of torch that lack it.

Other files import the functions from here; private methods and attributes of tensors and modules,
such as ``_is_view``, they use directly. A missing function may cost time or a feature, but never
makes a result wrong without notice: the log says once what is lost.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache, partial, reduce
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.utils._device import DeviceContext

logger = logging.getLogger("snnlstm")


def _find(path: str, instead: Any, lost: str = "") -> Any:
    """Return what `path` names in torch, else `instead`; the log then names what is `lost`."""
    try:
        return reduce(getattr, path.split("."), torch)
    except AttributeError:
        if lost:
            logger.warning("torch %s has no torch.%s: %s", torch.__version__, path, lost)
        return instead


def _never(*_: Any) -> bool:
    return False


def _always(*_: Any) -> bool:
    return True


# ---- what is active ------------------------------------------------------------------------------

any_autocast: Callable[[], bool] = _find("_C._is_any_autocast_enabled", _always)
"""Whether autocast may be on for some device type."""

_UNSEEN = "transforms of torch.func raise errors in a cell"
transforms_are_active: Callable[[], bool] = _find(
    "_C._are_functorch_transforms_active", _never, _UNSEEN
)
"""Whether a call is within a transform of torch.func."""

multiplies_bfloat16: bool = _find("cpu._is_amx_tile_supported", _never)()
"""Whether the processor multiplies tiles of bfloat16 (AMX), which torch's convolutions use."""

is_tracing: Callable[[], bool] = _find("_C._is_tracing", torch.jit.is_tracing)
"""Whether torch.jit.trace, or the ONNX exporter that is built on it, is tracing."""

_LOST = "make_fx records a cell's results as constants"
recorder: Callable[[], Any] = partial(
    _find("_C._get_dispatch_mode", lambda _: None, _LOST),
    _find("_C._TorchDispatchModeKey.PROXY", None),
)
"""The mode in which torch.fx.experimental.proxy_tensor.make_fx records; None if it does not."""

dispatch_modes: Callable[[], int] = _find("_C._len_torch_dispatch_stack", _always)
"""How many modes intercept torch's operators: a recorder, a FakeTensorMode, or the user's."""

_function_modes: Callable[[], int] = _find("_C._len_torch_function_stack", _always)
_modes_above: Callable[[], Any] = _find("overrides._get_current_function_mode_stack", list)


def modes() -> bool:
    """Whether a mode intercepts operators or functions; one that only sets a device does not."""
    functions = _function_modes() and any(type(m) is not DeviceContext for m in _modes_above())
    return bool(dispatch_modes() or functions)


fake_mode: Callable[[], Any] = partial(
    _find("_C._get_dispatch_mode", lambda _: None, "cells raise errors in a FakeTensorMode"),
    _find("_C._TorchDispatchModeKey.FAKE", None),
)
"""The FakeTensorMode in which operators return tensors without memory; None outside of one."""

forward_level: Callable[[], int] = partial(getattr, forward_ad, "_current_level", -1)
"""Level of forward-mode differentiation; -1 if it is not active, or if torch does not say."""

backward_pass: Callable[[], int] = _find(
    "_C._current_graph_task_id",
    lambda: -1,
    "a cell does not notice that torch.utils.checkpoint calls it in a backward pass",
)
"""Number of the backward pass that is running in this thread; -1 outside of one."""

at_end_of_backward: Callable[[Callable[[], None]], None] = _find(
    "autograd.Variable._execution_engine.queue_callback",
    lambda _: None,
    "a backward pass that calls a layer again, as torch.utils.checkpoint's, changes its state",
)
"""Has the backward pass that is running call a function when it ends."""

keeps_graph: Callable[[], bool] = _find("_C._autograd._get_current_graph_task_keep_graph", _always)
"""Whether the graph of the backward pass that is running is kept for another one.

torch 2.4 does not say; a packed weight then lives as long as the graph's nodes.
"""

# torch 2.4 has no function for exporting, and none for hooks on all modules.
exporting: Callable[[], bool] = _find("compiler.is_exporting", torch.onnx.is_in_onnx_export)
"""Whether torch.export, and with it the ONNX exporter that is built on it, is tracing."""


def _global_hooks() -> bool:
    kinds = ("forward", "forward_pre", "backward", "backward_pre")
    return any(getattr(nn_module, f"_global_{kind}_hooks", ()) for kind in kinds)


global_hooks: Callable[[], Any] = getattr(nn_module, "_has_any_global_hook", _global_hooks)
"""Whether hooks on all modules are registered."""

opaque: Callable[[Any], Any] = _find(
    "_disable_dynamo", lambda function: function, "compiled autograd fails in a cell's pass"
)
"""Makes torch.compile skip a function; torch.compiler.disable would import dynamo."""

# ---- tensors within transforms -------------------------------------------------------------------

NO_LEVEL = -1

level_of: Callable[[Tensor], int] = _find("_C._functorch.maybe_get_level", lambda _: NO_LEVEL)
"""Level of the transform of torch.func that wrapped a tensor.

It is NO_LEVEL for a plain tensor, and less than that if a derivative has ended.
"""


def has_ended(tensor: Tensor) -> bool:
    """Whether a tensor belongs to a transform of torch.func that has ended."""
    if torch.compiler.is_compiling():
        return False
    level = level_of(tensor)
    return level < NO_LEVEL or (level > NO_LEVEL and not transforms_are_active())


is_batch: Callable[[Tensor], bool] = _find("_C._functorch.is_legacy_batchedtensor", _never)
"""Whether a gradient is batched, as with is_grads_batched=True."""

# ---- CUDA ----------------------------------------------------------------------------------------

current_stream: Callable[[int], int] = _find(
    "_C._cuda_getCurrentRawStream", lambda index: torch.cuda.current_stream(index).cuda_stream
)
"""The address of the current stream of a GPU, which is given by number."""

driver_version: Callable[[], int | None] = _find("_C._cuda_getDriverVersion", lambda: None)
"""Newest CUDA version that the driver runs, 1000 * major + 10 * minor; 0 or None if unknown."""

fp32_precision: Callable[[str, str], str] | None = _find("_C._get_fp32_precision_getter", None)
"""Reads torch.backends.cudnn.conv.fp32_precision ten times as fast; torch 2.9 and newer."""

# ---- guards --------------------------------------------------------------------------------------


def _guard(guards: Any, tensors: Sequence[Tensor]) -> Any:
    sizes, strides = [[*t.shape] for t in tensors], [[*t.stride()] for t in tensors]
    return guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)


def tells_apart(guards: Any) -> bool:
    """Whether a class such as TensorGuards accepts similar tensors, and refuses those that differ.

    Tensors that it accepts are not checked again, and are read with the layout of the first one.
    """
    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
        like = torch.zeros(2, 3, dtype=torch.float32)
        wanting = like.new_zeros(2, 3, requires_grad=True)
        others = [like.new_zeros(4, 3), like.new_zeros(3, 2).t(), like.double(), like.to("meta")]
        others += [wanting, nn.Parameter(like, requires_grad=False)]
        try:
            check = _guard(guards, [like]).check
            return check(like.clone()) is True and not any(map(check, others))
        except (AttributeError, RuntimeError, TypeError):  # none, or with other arguments
            return False


# torch.compile builds its guards from this class; a call takes 5 us more without it.
_guards = _find("_C._dynamo.guards.TensorGuards", None)
if not tells_apart(_guards):
    _guards = None


def guard_of(tensors: Sequence[Tensor]) -> Any:
    """Return torch's own check of tensors, for :func:`matches`; None if torch has no such check."""
    return None if _guards is None else _guard(_guards, tensors)


def matches(guard: Any, tensors: Sequence[Tensor]) -> bool:
    """Whether tensors are like those of a guard.

    They are if type, dtype, device, sizes, strides and requires_grad are equal, and also what
    torch's dispatcher uses: layout, lazy negation, autocast, torch.func, tracing.
    """
    if guard.check(*tensors):
        return True
    firsts: dict[int, int] = {}
    for at, tensor in enumerate(tensors):
        firsts.setdefault(id(tensor), at)
    if len(firsts) == len(tensors) or modes():
        return False
    # torch's check refuses a tensor that occurs twice, but takes another one in the same memory.
    others = [
        tensor if firsts[id(tensor)] == at else tensor.detach().requires_grad_(tensor.requires_grad)
        for at, tensor in enumerate(tensors)
    ]
    return guard.check(*others)


# ---- recorded graphs -----------------------------------------------------------------------------


_unwrapped: Callable[[Tensor], Tensor] = _find("_C._functorch.get_unwrapped", lambda t: t)
_is_wrapped: Callable[[Tensor], bool] = _find("_C._functorch.is_functorch_wrapped_tensor", _never)


def memory_of(tensor: Tensor) -> int:
    """A number for the memory of a tensor, which other tensors in the same memory share."""
    while _is_wrapped(tensor):  # within a transform of torch.func
        tensor = _unwrapped(tensor)
    strided = tensor.layout is torch.strided
    return tensor.untyped_storage()._cdata if strided else id(tensor)


def size_hint(size: Any) -> int:
    """A recorded size as a number; a size that may change is as it was when it was recorded."""
    return size if isinstance(size, int) else size.node.hint


class Operators(NamedTuple):
    """What is known of torch's operators of one name.

    Attributes
    ----------
    writes : frozenset of int
        Positions of the arguments to which they write.
    draws : bool
        Whether they draw random numbers.
    pointwise : bool
        Whether they treat each number by itself.
    """

    writes: frozenset[int]
    draws: bool
    pointwise: bool


@cache
def operators_named(name: str) -> Operators | None:
    """What is known of torch's operators of a name; None if there are none."""
    packet, tags = getattr(torch.ops.aten, name, None), set()
    if packet is None:
        return None
    writes = set()
    for overload in (getattr(packet, key) for key in packet.overloads()):
        arguments = overload._schema.arguments
        if not any(argument.is_out for argument in arguments):
            tags.update(overload.tags)
            for position, argument in enumerate(arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    writes.add(position)
    draws, pointwise = torch.Tag.nondeterministic_seeded in tags, torch.Tag.pointwise in tags
    return Operators(frozenset(writes), draws, pointwise)


apply_recorded: Callable[..., Any] | None = _find(
    "_functorch.autograd_function.autograd_function_apply", None
)
"""What torch.compile records as the call of a custom autograd Function."""

apply_in_transforms: Callable[..., Any] = _find(
    "_functorch.autograd_function.custom_function_call", None
)
"""Calls an autograd Function with ``setup_context`` within transforms of torch.func."""


def backend_of(name: str) -> Callable[..., Any]:
    """The backend of torch.compile of a name."""
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend(name)


tracing_context: Callable[[], Any] = _find("_guards.TracingContext.try_get", lambda: None)
"""An object of the graph that torch.compile is recording or compiling; None outside of both."""


_compile_id: Callable[[], Any] = _find("_guards.CompileContext.current_compile_id", lambda: None)
_exports: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()


def kept_by_export(key: Any, make: Callable[[], Any]) -> Any:
    """What the running export keeps under a key, or makes at its first use.

    The exporter of torch.jit, which torch 2.4 has no other word for, keeps nothing.
    """
    export = tracing_context() or fake_mode()
    kept = {} if export is None else _exports.setdefault(export, {})
    if key not in kept:
        kept[key] = make()
    return kept[key]


def graph_number() -> tuple[Any, int, int]:
    """Numbers of the code that is being compiled, and of its graph; and how many torch allows."""
    from torch._dynamo import config

    made = _compile_id()
    graph = getattr(made, "frame_compile_id", None) or 0
    return getattr(made, "frame_id", None), graph + 1, config.recompile_limit


def graph_break(gm: Any) -> str | None:
    """The line and the reason of the break that ended a recorded graph; None without one."""
    reason: Any = getattr(gm, "compile_subgraph_reason", None)
    if not getattr(reason, "graph_break", False):
        return None
    frame = reason.user_stack[-1] if reason.user_stack else None
    line = f"{frame.filename}:{frame.lineno}" if frame else "an unknown line"
    return f"torch.compile ended it by a graph break at {line}, {reason.reason.splitlines()[0]}"
