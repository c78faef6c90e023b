"""The reasons why the reference path runs a call, and what users' hooks replace in it.

A reason that holds for all similar calls is found once (:func:`static_reason`), and every call
checks for the others (:func:`recording_and_overrides`).
"""

from __future__ import annotations

from enum import Enum
from functools import lru_cache
from importlib.util import find_spec
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn

from ..calls import algorithms
from ..calls.call import Call, LeakyCall, autocast_dtype, may_require_grad
from ..calls.entries import TORCH_TYPES
from ..calls.spec import CellSpec, LeakySpec
from ..compat import torch_private
from ..compat.torch_private import (
    any_autocast,
    dispatch_modes,
    exporting,
    fake_mode,
    forward_level,
    global_hooks,
    is_tracing,
    recorder,
    tracing_context,
    transforms_are_active,
)
from ..native import WAYS_OUT, checkout
from ..quant import StateQuant
from ..reference import Overrides
from ..surrogate import Surrogate
from .path import Path, PathInGraph, native_path

_MISSING = "the compiled core is missing"
if _folder := checkout():
    _MISSING += f" in the checkout {_folder}: {WAYS_OUT}"
EXPORT = Path("reference", "an export records plain operators")
_CHOSEN = Path("reference", "set_algorithm or SNNLSTM_ALGORITHM chose it")

try:
    from ..native import backends, function, leaky, operators
except ImportError as error:
    backends = function = leaky = operators = None  # type: ignore[assignment]
    if find_spec("snnlstm._C") is not None:
        _MISSING = f"the compiled core does not load: {error}"


# The paths are made once, here: dynamo cannot trace a call into the core.
NATIVE_PATHS = {
    device: native_path(backends.BACKENDS[device].name())
    for device in getattr(backends, "DEVICES", ())
}


# A call of a convolution runs these methods of its class, and one of torch's functions.
_TORCHS = {
    kind: (kind.__call__, kind.forward, getattr(kind, "_conv_forward", None), F.conv1d, F.conv2d)
    for kind in (nn.Conv1d, nn.Conv2d)
}


def _is_released(kind: type[nn.Module]) -> bool:
    """Whether the methods of torch's class, and its functions, are torch's own.

    torch.compile asks once for each call that it traces, and puts no guard on the answer.
    """
    inner = getattr(kind, "_conv_forward", None)
    return (kind.__call__, kind.forward, inner, F.conv1d, F.conv2d) == _TORCHS[kind]


_is_released._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Reason(str, Enum):
    """A reason by which code decides, with its text; a member is printed and compared as the text.

    Some texts have a place for a name or a number, which :meth:`str.format` fills.
    """

    # Why a call runs more than a class's forward.
    HOOKS = "it carries hooks"
    GLOBAL_HOOKS = "global module hooks are registered"
    REPLACED = "its forward was replaced"
    CONV_HOOKS = "conv carries hooks"
    CONV_REPLACED = "conv.forward was replaced"
    MISFIT = "conv has another geometry than the cell"
    # How a layer goes through a sequence.
    ALONE = "one call, all steps as a larger batch"
    PRODUCT = "one call, all steps as a larger batch, which skips zeros of x where that is faster"
    ONE_CALL = "one call for all steps"
    TAKES = "it takes sequences"
    CONSTANT = "every step of its input is the same tensor"
    NOTHING = "it does nothing and returns its input"
    # Why it goes step by step: its size,
    LARGE = "one step of its input or output is larger than 1 MiB"
    LARGE_SEQUENCE = "steps of its input or output are larger than 128 KiB, and all than 8 MiB"
    LARGE_STATE = "it keeps a state, and one step of it is larger than 1 MiB"
    TO_STACK = "the layers before it run step by step, and one of their steps is larger than 1 MiB"
    MEMORY = "all steps at once would take too much memory"
    # what it is,
    THEIRS = "it is snntorch's, and snnlstm.accelerate(net) makes it ours"
    OURS = "is snnlstm's already"
    SUBCLASS = "its class is a subclass of snntorch.SConv2dLSTM"
    OWN_FORWARD = "its class has a forward of its own"
    PLAIN = "plain torch runs it, and its path says why"
    PLAIN_OPERATIONS = "torch.compile records it as plain operations, and its path says why"
    KEEPS_STATE = "it keeps a state from step to step"
    SHARED = "layer {} may keep a state that an earlier layer also has"
    # what it does to samples and steps,
    UNKNOWN = "{} is not known to treat every sample by itself"
    MIXES = "at a step of {} dimensions it may mix samples"
    STATISTICS = "its statistics are those of one step"
    INDICES = "it returns indices"
    RANDOM = "it draws new random numbers for every step"
    # or what a compiled loop does between its steps.
    OTHER_SETTINGS = "a setting, such as the grad mode, changes between the steps"
    WEIGHTS = "its weights differ from step to step"
    STATES = "its states are reset, detached or changed between the steps"
    ROUNDED = "its states are rounded to a half type between the steps"
    FEEDBACK = "its input, or its state, depends on its last result"
    UNALIKE = "its input is another expression in each step, as behind a neuron that runs in steps"
    IN_PLACE = "its results are modified in place"

    # The same in every Python; Enum's own differ from one to the next.
    __str__, __repr__ = str.__str__, str.__repr__
    __format__: Any = str.__format__


RANDOM = "spike_grad draws random numbers"


def beyond_forward(module: nn.Module, harmless: type | tuple[()] = ()) -> Reason | None:
    """Why a call runs more than the class's forward and `harmless` hooks; None if it does not."""
    attributes = module.__dict__
    hooks = attributes["_forward_hooks"]
    if (
        attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
        or (hooks and not all(isinstance(hook, harmless) for hook in hooks.values()))
    ):
        return Reason.HOOKS
    if global_hooks():
        return Reason.GLOBAL_HOOKS
    return Reason.REPLACED if "forward" in attributes else None


def _is_plain(conv: Any, kind: type[nn.Conv1d | nn.Conv2d], spec: CellSpec) -> bool:
    """Whether the kernels can stand in for a call of the cell's `conv`.

    They can if `conv` is a plain `kind` with the geometry of `spec`, neither replaced nor hooked:
    only then does a call of it merely convolve with its weight.
    """
    if type(conv) is not kind:
        return False
    own = conv.__dict__
    geometry = own["stride"], own["padding"], own["dilation"], own["groups"], own["padding_mode"]
    return (
        geometry in spec.geometries
        and not (own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own)
        and not (own["_backward_hooks"] or own["_backward_pre_hooks"] or "_conv_forward" in own)
        and not global_hooks() and _is_released(kind)
    )  # fmt: skip


def _reason_against_conv(conv: nn.Module, kind: type[nn.Conv1d | nn.Conv2d]) -> str:
    """Why `conv` is not plain, as :func:`_is_plain` says."""
    if type(conv) is not kind:
        return f"conv is a {type(conv).__name__}, not a plain nn.{kind.__name__}"
    reason = beyond_forward(conv)
    if reason is not None and reason is not Reason.REPLACED:
        return Reason.CONV_HOOKS if reason is Reason.HOOKS else reason
    replaced = reason is not None or "_conv_forward" in conv.__dict__ or not _is_released(kind)
    return Reason.CONV_REPLACED if replaced else Reason.MISFIT


_operator_paths: WeakKeyDictionary[Any, PathInGraph] = WeakKeyDictionary()
"""What the Leaky layers of each graph hold that torch.compile is recording or compiling."""


def operator_path() -> PathInGraph | None:
    """The path of a Leaky that torch.compile may record as an operator; None if it may not.

    The compiler asks once for each call that it traces. It guards on transforms by itself.
    """
    if recorded_now(True) is not None:
        return None
    apart = Path("compiled", "torch.compile's backend takes the operator apart into plain ones")
    path, context = PathInGraph(apart), tracing_context()
    return path if context is None else _operator_paths.setdefault(context, path)


def tell_of_kernels(device: str) -> None:
    """Tell the Leaky layers of the graph that is being compiled that the kernels run them."""
    context = tracing_context()
    if context in _operator_paths:
        _operator_paths[context].path = NATIVE_PATHS[device]


def _transforms_while_tracing() -> bool:
    """Whether a transform of torch.func is active, a question that the compiler would record."""
    return transforms_are_active()


# torch.compiler.assume_constant_result sets this flag, but its import loads the compiler.
operator_path._dynamo_marked_constant = True  # type: ignore[attr-defined]
_transforms_while_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_usual_step(given: Any, spec: CellSpec) -> bool:
    """Whether the operator takes these tensors as they are, while torch.compile traces.

    The compiler takes some 0.04 ms for each bytecode. So this function asks little in few of them,
    and leaves the errors of tensors that do not fit to the operator's fake kernel. It raises an
    AttributeError for what is no tensor.
    """
    x, syn, mem, weight, bias, threshold, graded, _, _ = given
    device, dtype, size = x.device, x.dtype, x.shape
    return (
        spec.traceable and len(size) == 4 and 0 not in size and device.type in NATIVE_PATHS
        and dtype in (torch.float32, torch.float64) and not any_autocast()
        and algorithms.current != "reference" and (bias is None or bias.dtype == dtype)
        and {syn.dtype, mem.dtype, weight.dtype, threshold.dtype, graded.dtype} == {dtype}
        and (size[0], weight.shape[0] // 4, *spec.state_size(*size[2:])) == syn.shape == mem.shape
        and not (threshold.dim() or graded.dim() or graded.requires_grad)
        and threshold.device == graded.device == device
    )  # fmt: skip


def recording_and_overrides(
    conv: Any,
    kind: type[nn.Conv1d | nn.Conv2d],
    spec: CellSpec,
    fire: Any = None,
    mem_reset: Any = None,
    traced: bool = False,
) -> tuple[Path | None, Overrides | None]:
    """Return what no key holds: the result of :func:`recorded_now`, and the user's code.

    The second is None if the cell and its conv are plain; the weight's shape is not looked at.
    `fire` and `mem_reset` are methods that the cell or class overrides.

    Raises
    ------
    ValueError
        If the cell has a stride, which needs a plain conv, and its conv is not plain.
    """
    recording = recorded_now(traced)
    is_plain = _is_plain(conv, kind, spec)
    if is_plain and fire is None and mem_reset is None:
        return recording, None
    reason = None if is_plain else _reason_against_conv(conv, kind)
    _check_stride(kind, spec, reason)
    return recording, Overrides(None if is_plain else conv, reason, fire, mem_reset)


def misfit(
    conv: Any, kind: type[nn.Conv1d | nn.Conv2d], spec: CellSpec, channels: tuple[int, int]
) -> str | None:
    """Why the weight of a plain conv does not fit a cell of these channels, Cin and C, or None.

    Raises
    ------
    ValueError
        As :func:`recording_and_overrides`.
    """
    kernel = spec.kernel_size[-1:] if kind is nn.Conv1d else spec.kernel_size
    if tuple(conv.weight.shape) == (4 * channels[1], sum(channels), *kernel):
        return None
    _check_stride(kind, spec, Reason.MISFIT)
    return Reason.MISFIT


def _check_stride(kind: type[nn.Module], spec: CellSpec, reason: str | None) -> None:
    if reason is not None and spec.stride != (1, 1):
        raise ValueError(
            f"conv must be a plain nn.{kind.__name__} without hooks where stride is not 1: {reason}"
        )


def recorded_now(traced: bool = False) -> Path | None:
    """Why plain torch must run any call now: something records or transforms it."""
    if exporting():
        return EXPORT
    if _transforms_while_tracing() if traced else transforms_are_active():
        return Path("reference", "a torch.func transform is active")
    if not traced:
        modes = dispatch_modes()
        if is_tracing() or (modes and recorder() is not None):
            return Path("reference", "tracing records plain operators")
        if modes and fake_mode() is not None:
            return Path("reference", "a FakeTensorMode is active")
        if forward_level() >= 0:
            return Path("reference", "forward-mode differentiation is active")
    return None


def static_reason(
    call: Any, spec: Any, algorithm: str, overrides: Overrides | None, traced: bool = False
) -> Path | None:
    """Why the reference path must run a call and all similar calls; None if the kernels can.

    The first reason counts. Reasons that no user can remove come first.
    """
    if algorithm == "reference":
        return _CHOSEN
    if isinstance(spec, LeakySpec):
        return _leaky_reason(call, spec)
    device, threshold, graded = call.x.device, call.threshold, call.graded
    if overrides is not None and overrides.conv is not None:  # the user's conv may have no weight
        call = call._replace(weight=call.x)
    if not traced:
        if not TORCH_TYPES.issuperset(map(type, call[:7])):
            return Path("reference", "a tensor is of a subclass")
        if call.weight.layout is not torch.strided:
            return Path("reference", "weight is not strided")
        if any(tensor.is_neg() for tensor in call[:4]):
            return Path("reference", "a tensor is a lazily negated view")
    if call.x.numel() == 0:
        return Path("reference", "x is empty")
    if overrides is not None:
        if overrides.fire is not None or overrides.mem_reset is not None:
            return Path("reference", "fire or mem_reset is overridden", slow=True)
        general = overrides.reason in (Reason.CONV_HOOKS, Reason.GLOBAL_HOOKS)
        return Path("reference", str(overrides.reason), slow=True, general=general)
    against = against_device(device, traced)
    if device.type not in ("cpu", "cuda"):
        return against
    reason = _options_against(spec, call.x.dtype)
    if reason is None and threshold is not None and graded is not None:
        count, shape = threshold.numel(), threshold.shape
        if count != 1 and not (len(shape) >= 3 and count == shape[-3]):
            reason = "the threshold varies along the batch or the image"
        elif graded.numel() != 1:
            reason = "graded_spikes_factor is not a single number"
        elif graded.requires_grad:
            reason = "graded_spikes_factor requires a gradient"
    if reason is not None:
        return Path("reference", reason, slow=True)
    return against or _faster_in_torch(call, algorithm)


def _leaky_reason(call: LeakyCall, spec: LeakySpec) -> Path | None:
    """Why plain torch must run a call of a Leaky and all similar calls."""
    if not TORCH_TYPES.issuperset(map(type, call[:2])):
        return Path("reference", "x or mem is of a subclass of Tensor")
    if call.x.layout is not torch.strided or call.mem.layout is not torch.strided:
        return Path("reference", "x or mem is sparse")
    path = against_device(call.x.device)
    if path is None and leaky is not None:
        reason = spec.against or leaky.reason_against(call, spec.sequence)
        path = None if reason is None else _slow(reason)
    return path


@lru_cache(maxsize=64)
def _slow(reason: str) -> Path:
    return Path("reference", reason, slow=True)


def _options_against(spec: CellSpec, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run a cell of this spec on `dtype`; None if they can."""
    if type(spec.surrogate) is not Surrogate:
        return "spike_grad is unknown to the kernels"
    if spec.surrogate.is_random:
        return RANDOM
    if spec.inhibition:
        return "inhibition is unknown to the kernels"
    if spec.quant is not None:
        if type(spec.quant) is not StateQuant:
            return "state_quant is unknown to the kernels"
        if spec.quant.levels.dtype not in (torch.float32, dtype):
            return f"state_quant has levels of {spec.quant.levels.dtype}"
        if not spec.quant.ascending:
            return "state_quant has levels that do not ascend"
    return None


_AMX_CHANNELS = 32
"""The fewest channels of x with which torch's training under autocast is faster on AMX.

Timed on a Xeon, snnTorch's time over the kernels': 2->32 1.5, 32->64 0.9, 64->128 0.56, and a
network around 32->1 0.7 (benchmarks/NOTES.md). AMX multiplies 32 numbers of bfloat16 at a time.
"""


def _faster_in_torch(call: Call, algorithm: str) -> Path | None:
    """Why torch should run a call, if its convolutions are at least twice as fast as the kernels'.

    Any algorithm but "auto" forces the kernels.
    """
    if (
        not torch_private.multiplies_bfloat16
        or call.x.device.type != "cpu"
        or call.x.shape[-3] < _AMX_CHANNELS
        or autocast_dtype("cpu") is not torch.bfloat16
        or algorithm != "auto"
        or not may_require_grad(call[:6])
    ):
        return None
    return Path(
        "reference",
        "torch trains this layer faster under autocast: the processor multiplies bfloat16 (AMX); "
        'set_algorithm("direct") and "winograd" force the kernels',
    )


def against_device(device: torch.device, traced: bool = False) -> Path | None:
    """Why the reference path runs all calls on a device; None if the kernels can."""
    if device.type not in ("cpu", "cuda"):
        also = "; the CPU has native kernels" if device.type == "mps" and backends else ""
        return Path("reference", f"there are no kernels for device {device.type}{also}", slow=True)
    if backends is None:
        return Path("reference", _MISSING, slow=True, general=True)
    reason = backends.reason_against_device(device, traced)
    return None if reason is None else Path("reference", reason, slow=True, general=True)
