"""Decides which implementation runs a call, and runs it.

:func:`run` decides between the native kernels and :mod:`snnlstm.reference`. The answer is a
:class:`Path`, which the module shows as ``cell.path``. Nothing falls back silently.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

from . import reference
from .call import PLAIN, Call
from .options import DTYPES, CellOptions
from .settings import get_algorithm

__all__ = ["LastPath", "Path", "run"]

logger = logging.getLogger("snnlstm")


@dataclass(frozen=True)
class Path:
    """The implementation that ran a call.

    Parameters
    ----------
    name : str
        ``"reference"``, or what the native kernels are, such as ``"cpu-avx2-direct"``.
    reason : str
        Why, in plain words.
    slow : bool, default False
        Whether this is a fallback where the caller could expect the native kernels. A cell's first
        such path is logged.
    general : bool, default False
        Whether the reason lies in the installation, the machine or hooks, which tools set on all
        modules. Each such reason is logged once per process.
    """

    name: str
    reason: str
    slow: bool = False
    general: bool = False

    @property
    def native(self) -> bool:
        """Whether the native kernels ran."""
        return self.name != "reference"

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


class LastPath:
    """The attribute ``path`` of a module, which tells what its last call ran.

    It has no setter: a module on which the user sets a `path`, also one that is a submodule or a
    tensor, keeps the user's, and the log alone names slow paths.
    """

    def __get__(self, module: nn.Module | None, owner: type | None = None) -> Path | None:
        """Return the path of the last call, None before the first."""
        if module is None:
            return None
        own = module.__dict__
        for kind in ("_modules", "_parameters", "_buffers"):
            if "path" in own.get(kind, ()):
                return own[kind]["path"]
        return own.get("_path")


_MISSING = "the compiled core is missing"
_NATIVE_REASON = "the native kernels cover this call"
_WHOLE_GATES = "they cover this call, and keep whole gates: checkpoint='gates' is for the CPU"

try:
    from .native import backend as _native
    from .native import function as _function
except ImportError as error:
    _native = _function = None  # type: ignore[assignment]
    if find_spec(f"{__package__}._C") is not None:
        _MISSING = f"the compiled core does not load: {error}"


@lru_cache(maxsize=64)
def _native_path(name: str, reason: str) -> Path:
    """Path of a call that the native kernels called `name` ran."""
    return Path(name, reason)


# The paths are made once, here: dynamo cannot trace a call into the core.
_NATIVE_PATHS = {
    device: _native_path(_native.name(device), _NATIVE_REASON)
    for device in getattr(_native, "DEVICES", ())
}


# ---- reasons against the kernels ------------------------------------------------------------


def _methods(kind: type[nn.Conv1d | nn.Conv2d]) -> tuple[Any, ...]:
    """What a call of a convolution goes through: its class's methods, and torch's function."""
    function = F.conv2d if kind is nn.Conv2d else F.conv1d
    return kind.__call__, kind.forward, kind._conv_forward, function


_TORCHS = {kind: _methods(kind) for kind in (nn.Conv1d, nn.Conv2d)}


def _global_hooks() -> bool:
    kinds = ("forward", "forward_pre", "backward", "backward_pre")
    return any(getattr(nn_module, f"_global_{kind}_hooks") for kind in kinds)


global_hooks: Callable[[], Any] = getattr(nn_module, "_has_any_global_hook", _global_hooks)
"""Whether hooks on all modules are registered. (torch 2.4 has no function for it.)"""


HOOKS, GLOBAL_HOOKS = "conv carries hooks", "global module hooks are registered"


def carries_hooks(module: nn.Module) -> bool:
    """Whether a call of the module calls hooks of its own."""
    own = module.__dict__
    return bool(
        own["_forward_pre_hooks"]
        or own["_forward_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    )


def reason_against_conv(
    conv: nn.Module,
    kind: type[nn.Conv1d | nn.Conv2d],
    options: CellOptions,
    weight_shape: tuple[int, ...] | None = None,
) -> str | None:
    """Why the kernels cannot stand in for a call of the cell's `conv`; None if they can.

    They can where `conv` is a plain instance of `kind` of the geometry of `options` (and of
    `weight_shape`, if given) whose forward was neither replaced nor hooked: only then is calling it
    the same as using its weight.
    """
    if type(conv) is not kind:
        return f"conv is a {type(conv).__name__}, not a plain nn.{kind.__name__}"
    assert isinstance(conv, (nn.Conv1d, nn.Conv2d))
    own = conv.__dict__
    if carries_hooks(conv):
        return HOOKS
    if global_hooks():
        return GLOBAL_HOOKS
    if "forward" in own or "_conv_forward" in own or _methods(kind) != _TORCHS[kind]:
        return "conv.forward was replaced"
    dims = len(conv.stride)
    if (
        conv.stride != (1, 1)[-dims:]
        or conv.padding not in (options.padding[-dims:], "same")
        or conv.dilation != options.dilation[-dims:]
        or conv.groups != 1
        or conv.padding_mode != "zeros"
        or (weight_shape is not None and tuple(conv.weight.shape) != weight_shape)
    ):
        return "conv has another geometry than the cell"
    return None


def like_of(conv: Any, x: Any, other: Any) -> Tensor:
    """A tensor of a foreign conv's dtype and device: a parameter, x, or `other`."""
    for parameter in conv.parameters() if isinstance(conv, nn.Module) else ():
        if parameter.dtype in DTYPES:
            return parameter
    return x if isinstance(x, Tensor) and x.dtype in DTYPES else other


def foreign_conv(
    conv: nn.Module,
    kind: type[nn.Conv1d | nn.Conv2d],
    options: CellOptions,
    channels: tuple[int, int],
) -> dict[str, Any]:
    """The fields of a call by which a `conv` that is no plain `kind` takes part in it.

    `channels` are Cin and C. A stride needs a plain one: ValueError.
    """
    cin, c = channels
    kernel = options.kernel_size[-1:] if kind is nn.Conv1d else options.kernel_size
    reason = reason_against_conv(conv, kind, options, (4 * c, cin + c, *kernel))
    if reason is not None and options.stride != (1, 1):
        raise ValueError(
            f"conv must be a plain nn.{kind.__name__} without hooks where stride is not 1: {reason}"
        )
    return {"conv": conv, "reason": reason}


# torch.compiler.is_exporting is younger than the oldest torch that is supported.
exporting = getattr(torch.compiler, "is_exporting", torch.onnx.is_in_onnx_export)
"""Whether torch.export, and with it the ONNX exporter that is built on it, is tracing."""

# What torch.fx.experimental.proxy_tensor.make_fx records by.
_get_mode, _PROXY = torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey.PROXY

_PLAIN = {*PLAIN, type(None)}


def _reason_against_now(call: Call, traced: bool) -> Path | None:
    """Why the reference path must run: reasons that may come and go between like calls."""
    if exporting():
        return Path("reference", "an export records plain operators")
    x, syn, mem, weight, bias, threshold, graded = call[:7]
    if call.reason is not None:  # a foreign conv has weights of its own
        weight, bias = x, None
    if torch._C._are_functorch_transforms_active():
        return Path("reference", "a torch.func transform is active")
    if not traced:
        if not _PLAIN.issuperset(map(type, (x, syn, mem, weight, bias, threshold, graded))):
            return Path("reference", "a tensor is of a subclass")
        if torch._C._get_tracing_state() is not None or _get_mode(_PROXY) is not None:
            return Path("reference", "tracing records plain operators")
        if forward_ad._current_level >= 0:
            return Path("reference", "forward-mode differentiation is active")
        if weight.layout is not torch.strided:
            return Path("reference", "weight is not strided")
        if x.is_neg() or syn.is_neg() or mem.is_neg() or weight.is_neg():
            return Path("reference", "a tensor is a lazily negated view")
    if x.numel() == 0:
        return Path("reference", "x is empty")
    if call.fire is not None or call.mem_reset is not None:
        return Path("reference", "fire or mem_reset is overridden", slow=True)
    if call.reason is not None:
        general = call.reason in (HOOKS, GLOBAL_HOOKS)
        return Path("reference", call.reason, slow=True, general=general)
    if graded.requires_grad:
        return Path("reference", "graded_spikes_factor requires a gradient", slow=True)
    return None


def _reason_against_options(call: Call) -> str | None:
    """Why the kernels cannot run a call with these options and shapes; None if they can."""
    threshold, reason = call.threshold, call.options.reason_against_kernels(call.x.dtype)
    if reason is not None:
        return reason
    count, shape = threshold.numel(), threshold.shape
    if count != 1 and not (len(shape) >= 3 and count == shape[-3]):
        return "the threshold varies along the batch or the image"
    if call.graded.numel() != 1:
        return "graded_spikes_factor is not a single number"
    return None


def _reason_against_like(call: Call, traced: bool) -> Path | None:
    """Why the reference path must run: reasons that hold for all like calls."""
    notes = {} if traced else call.signature.notes
    if "fallback" not in notes:
        device, reason = call.x.device.type, _reason_against_options(call)
        fallback = None if reason is None else Path("reference", reason, slow=True)
        if device not in ("cpu", "cuda"):
            fallback = Path("reference", f"there are no kernels for device {device}")
        notes["fallback"] = fallback
    return notes["fallback"]


def path_of(call: Call) -> Path:
    """Decide which implementation runs a call.

    The name of a native path says what kind of kernels will run. Which of them ran is known after
    the call.
    """
    traced = call.traced
    now, like = _reason_against_now(call, traced), _reason_against_like(call, traced)
    if now is not None and (like is None or like.slow or not now.slow):
        return now
    if like is not None:
        return like
    if _native is None:
        return Path("reference", _MISSING, slow=True, general=True)
    path = _path_of_device(call.x.device, traced)
    # A traced call meets its reason in the operator.
    reason = _native.reason_against(call) if path.native and not traced else None
    return path if reason is None else Path("reference", reason, slow=True)


def _path_of_device(device: torch.device, traced: bool) -> Path:
    """The path that the device, its driver and the build of the core allow."""
    reason = _native.reason_against_device(device, traced)
    if reason is not None:
        return Path("reference", reason, slow=True, general=True)
    return _NATIVE_PATHS[device.type]


# ---- running ----------------------------------------------------------------------------------


def run(call: Call) -> tuple[Tensor, Tensor, Tensor, Path]:
    """Choose an implementation for a call, and run it: spk, syn and mem, and what ran."""
    path = path_of(call)
    if not path.native:
        return (*reference.run(call), path)
    assert _function is not None
    spk, syn, mem, name = _function.run(call, get_algorithm())
    reason = _NATIVE_REASON
    if call.options.checkpoint == "gates" and call.x.device.type != "cpu":
        reason = _WHOLE_GATES
    return spk, syn, mem, path if name is None else _native_path(name, reason)


_logged: set[str] = set()  # the general reasons that have been logged


def log_fallback(path: Path, seen: set[str], cell: nn.Module | None = None) -> None:
    """Log a slow `path` of `cell`, unless `seen` says that the cell was logged before.

    `seen` is the cell's and remembers the reason. A general reason says nothing of the cell, and is
    logged once per process. The hooks that tools set on every module, to count operations or to
    print summaries, are such a reason.
    """
    if path.reason in _logged if path.general else seen:
        return
    (_logged if path.general else seen).add(path.reason)
    who = "SConv2dLSTM" if cell is None else type(cell).__name__
    if cell is not None and not path.general:
        who = f"{type(cell).__name__}({cell.extra_repr()})"
        if name := getattr(cell, "_layer_name", ""):
            who = f"layer {name}, {who},"
    logger.warning("%s runs the reference path (plain torch, slower): %s", who, path.reason)
