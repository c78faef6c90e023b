"""Which implementation runs a call, why, and the algorithm that the user chose.

A :class:`Path` is the answer, which a module shows as ``cell.path``. Reasons for
:mod:`snnlstm.reference` are static, and hold for all like calls, or dynamic, and are looked for
once a call. Nothing falls back silently.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import torch_private
from .call import PLAIN, Call, autocast_dtype
from .native import WAYS_OUT, checkout
from .reference import Overrides
from .spec import DTYPES, CellSpec
from .torch_private import (
    exporting,
    forward_mode,
    global_hooks,
    is_tracing,
    recorder,
    transforms_are_active,
)

__all__ = ["ALGORITHMS", "LastPath", "Path", "algorithm", "get_algorithm", "set_algorithm"]

logger = logging.getLogger("snnlstm")


@dataclass(frozen=True)
class Path:
    """The implementation that ran a call.

    Parameters
    ----------
    name : str
        ``"reference"``, or the name of the native kernels, such as ``"cpu-avx2-direct"``.
    reason : str
        Why, in plain words.
    slow : bool, default False
        Whether the call fell back to the reference path although the caller could expect the native
        kernels. A cell's first such path is logged.
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
    """The attribute ``path`` of a module, which tells what ran its last call.

    It has no setter: a module on which the user sets a `path`, also a submodule or a tensor, keeps
    the user's, and only the log names slow paths.
    """

    def __get__(self, module: nn.Module | None, owner: type | None = None) -> Path | None:
        """Return the path of the last call, None before the first."""
        if module is None:
            return None
        attributes = module.__dict__
        for kind in ("_modules", "_parameters", "_buffers"):
            if "path" in attributes.get(kind, ()):
                return attributes[kind]["path"]
        return attributes.get("_path")


_MISSING = "the compiled core is missing"
if _folder := checkout():
    _MISSING += f" in the checkout {_folder}: {WAYS_OUT}"
_NATIVE_REASON = "the native kernels cover this call"

try:
    from .native import function as kernels
except ImportError as error:
    kernels = None  # type: ignore[assignment]
    if find_spec(f"{__package__}._C") is not None:
        _MISSING = f"the compiled core does not load: {error}"


@lru_cache(maxsize=64)
def native_path(name: str) -> Path:
    """Path of a call that the native kernels called `name` ran."""
    return Path(name, _NATIVE_REASON)


# The paths are made once, here: dynamo cannot trace a call into the core.
NATIVE_PATHS = {
    device: native_path(kernels.BACKENDS[device].name())
    for device in getattr(kernels, "DEVICES", ())
}


# ---- reasons against the kernels ------------------------------------------------------------


# What a call of a convolution goes through: its class's methods, and torch's function.
_TORCHS = {
    kind: (kind.__call__, kind.forward, getattr(kind, "_conv_forward", None))
    for kind in (nn.Conv1d, nn.Conv2d)
}
_FUNCTIONS = F.conv1d, F.conv2d
ONES = {1: (1,), 2: (1, 1)}  # by the dimensions of an image


HOOKS, GLOBAL_HOOKS = "conv carries hooks", "global module hooks are registered"


def carries_hooks(module: nn.Module) -> bool:
    """Whether a call of the module calls hooks of its own."""
    attributes = module.__dict__
    return bool(
        attributes["_forward_pre_hooks"]
        or attributes["_forward_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
    )


def reason_against_conv(
    conv: nn.Module,
    kind: type[nn.Conv1d | nn.Conv2d],
    spec: CellSpec,
    weight_shape: tuple[int, ...] | None = None,
) -> str | None:
    """Why the kernels cannot stand in for a call of the cell's `conv`; None if they can.

    They can where `conv` is a plain instance of `kind` of the geometry of `spec` (and of
    `weight_shape`, if given) whose forward was neither replaced nor hooked: only then is calling it
    the same as using its weight.
    """
    if type(conv) is not kind:
        return f"conv is a {type(conv).__name__}, not a plain nn.{kind.__name__}"
    attributes, plain = conv.__dict__, _TORCHS[kind]
    if carries_hooks(conv):
        return HOOKS
    if global_hooks():
        return GLOBAL_HOOKS
    if (
        "forward" in attributes
        or "_conv_forward" in attributes
        or kind.__call__ is not plain[0]
        or kind.forward is not plain[1]
        or getattr(kind, "_conv_forward", None) is not plain[2]
        or (F.conv1d, F.conv2d) != _FUNCTIONS
    ):
        return "conv.forward was replaced"
    dims, padding = len(attributes["stride"]), attributes["padding"]
    if (
        attributes["stride"] != ONES[dims]
        or padding not in (spec.padding[-dims:], "same")
        or attributes["dilation"] != spec.dilation[-dims:]
        or attributes["groups"] != 1
        or attributes["padding_mode"] != "zeros"
        or (weight_shape is not None and tuple(conv.weight.shape) != weight_shape)
    ):
        return "conv has another geometry than the cell"
    return None


def like_of(conv: Any, x: Any, default: Any) -> Tensor:
    """A tensor of a foreign conv's dtype and device: a parameter, x, or `default`."""
    for parameter in conv.parameters() if isinstance(conv, nn.Module) else ():
        if parameter.dtype in DTYPES:
            return parameter
    return x if isinstance(x, Tensor) and x.dtype in DTYPES else default


def overrides_of(
    conv: Any,
    kind: type[nn.Conv1d | nn.Conv2d],
    spec: CellSpec,
    channels: tuple[int, int] | None = None,
    fire: Any = None,
    mem_reset: Any = None,
) -> Overrides | None:
    """The foreign code that takes part in a call; None where the cell and its conv are plain.

    `channels`, Cin and C, are given where the weight's shape is not known to fit. `fire` and
    `mem_reset` are methods that a subclass or the cell itself overrides.

    Raises
    ------
    ValueError
        If the cell has a stride, which needs a plain conv.
    """
    shape = None
    if channels is not None:
        kernel = spec.kernel_size[-1:] if kind is nn.Conv1d else spec.kernel_size
        shape = 4 * channels[1], sum(channels), *kernel
    reason = reason_against_conv(conv, kind, spec, shape)
    if reason is not None and spec.stride != (1, 1):
        raise ValueError(
            f"conv must be a plain nn.{kind.__name__} without hooks where stride is not 1: {reason}"
        )
    if reason is None and fire is None and mem_reset is None:
        return None
    return Overrides(None if reason is None else conv, reason, fire, mem_reset)


def static_reason(call: Call, spec: CellSpec, traced: bool) -> Path | None:
    """Why the reference path must run, for all like calls; None where the kernels can."""
    device = call.x.device
    if not traced and not PLAIN.issuperset(map(type, call[:7])):
        return Path("reference", "a tensor is of a subclass")
    if not traced and call.weight.layout is not torch.strided:
        return Path("reference", "weight is not strided")
    reason = spec.reason_against_kernels(call.x.dtype)
    threshold, graded = call.threshold, call.graded
    if call.x.numel() == 0:
        return Path("reference", "x is empty")
    against = against_device(device, traced)
    if device.type not in ("cpu", "cuda"):
        return against
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
    return against or _faster_in_torch(call)


_AMX_CHANNELS = 32
"""The fewest channels of x with which torch's training under autocast is faster on AMX.

Timed on a Xeon, snnTorch's time over the kernels': 2->32 1.5, 32->64 0.9, 64->128 0.56, and a
network around 32->1 0.7 (benchmarks/NOTES.md). AMX multiplies 32 numbers of bfloat16 at a time.
"""


def _faster_in_torch(call: Call) -> Path | None:
    """Why torch's convolutions should run, where they multiply at twice the kernels' rate or more.

    Any algorithm but "auto" forces the kernels.
    """
    if (
        not torch_private.multiplies_bfloat16
        or call.x.device.type != "cpu"
        or call.x.shape[-3] < _AMX_CHANNELS
        or autocast_dtype("cpu") is not torch.bfloat16
        or get_algorithm() != "auto"
        or not torch.is_grad_enabled()
        or not any(tensor is not None and tensor.requires_grad for tensor in call[:6])
    ):
        return None
    return Path(
        "reference",
        "torch trains this layer faster under autocast: the processor multiplies bfloat16 (AMX); "
        'set_algorithm("direct") and "winograd" force the kernels',
    )


def against_device(device: torch.device, traced: bool = False) -> Path | None:
    """Why the reference path runs all calls on a device; None where the kernels can."""
    if device.type not in ("cpu", "cuda"):
        also = "; the CPU has native kernels" if device.type == "mps" and kernels else ""
        return Path("reference", f"there are no kernels for device {device.type}{also}", slow=True)
    if kernels is None:
        return Path("reference", _MISSING, slow=True, general=True)
    reason = kernels.reason_against_device(device, traced)
    return None if reason is None else Path("reference", reason, slow=True, general=True)


# ---- what may change between like calls ---------------------------------------------------------


def reason_now(traced: bool = False) -> Path | None:
    """Why plain torch must run any call now: by the user's word, or because something records."""
    if (chosen := chosen_reference()) is not None:
        return chosen
    if exporting():
        return Path("reference", "an export records plain operators")
    if transforms_are_active():
        return Path("reference", "a torch.func transform is active")
    if not traced:
        if is_tracing() or recorder() is not None:
            return Path("reference", "tracing records plain operators")
        if forward_mode():
            return Path("reference", "forward-mode differentiation is active")
    return None


def dynamic_reason(call: Call, overrides: Overrides | None, traced: bool) -> Path | None:
    """Why the reference path must run now; None where nothing speaks against the kernels."""
    path = reason_now(traced)
    if path is not None:
        return path
    if not traced:
        x, syn, mem, weight = call[:4]
        if x.is_neg() or syn.is_neg() or mem.is_neg() or weight.is_neg():
            return Path("reference", "a tensor is a lazily negated view")
    if overrides is None:
        return None
    if overrides.fire is not None or overrides.mem_reset is not None:
        return Path("reference", "fire or mem_reset is overridden", slow=True)
    general = overrides.reason in (HOOKS, GLOBAL_HOOKS)
    return Path("reference", str(overrides.reason), slow=True, general=general)


def stronger(static: Path | None, dynamic: Path | None) -> Path | None:
    """The reason of two for the reference path; None where the kernels run."""
    if dynamic is not None and (static is None or static.slow or not dynamic.slow):
        return dynamic
    return static


_logged: set[str] = set()  # the general reasons that have been logged


def log_fallback(path: Path, seen: set[str], cell: nn.Module) -> None:
    """Log a slow `path` of `cell`, unless `seen` says that the cell was logged before.

    `seen` holds the reasons that were logged for the cell. A general reason says nothing about the
    cell and is logged once per process. Hooks that tools set on every module, to count operations
    or to print summaries, are such a reason.
    """
    if path.reason in _logged if path.general else seen:
        return
    (_logged if path.general else seen).add(path.reason)
    who = type(cell).__name__
    if not path.general:
        who = f"{type(cell).__name__}({cell.extra_repr()})"
        if name := getattr(cell, "_layer_name", ""):
            who = f"layer {name}, {who},"
    logger.warning("%s takes the reference path, which is slower: %s", who, path.reason)


# ---- the user's choice of an algorithm -----------------------------------------------------------


ALGORITHMS = (
    "auto", "direct", "winograd", "fused", "hybrid", "cudnn", "measure", "reference",
)  # fmt: skip
# What takes the place of names of older versions.
_GONE = {"resident": "fused", "pointwise": "cudnn"}


def _known(what: str, name: str) -> str:
    """Return the name of an algorithm; an error calls it `what`."""
    if name not in ALGORITHMS:
        instead = f", which is now {_GONE[name]!r}" if name in _GONE else ""
        raise ValueError(f"{what} must be one of {', '.join(ALGORITHMS)}, got {name!r}{instead}")
    return name


_algorithm = _known("SNNLSTM_ALGORITHM", os.environ.get("SNNLSTM_ALGORITHM") or "auto")


def chosen_reference() -> Path | None:
    """The path of a call, if the user chose the reference path for the process; None if not.

    The choice holds for every device and every module of this package, and for the next call of a
    module that has a plan. It is no fallback, so the log does not name it.
    """
    if _algorithm != "reference":
        return None
    return Path("reference", "set_algorithm or SNNLSTM_ALGORITHM chose it")


def set_algorithm(name: str) -> None:
    """Choose the convolution algorithm of the native kernels, for the whole process.

    A process starts with the name in the environment variable ``SNNLSTM_ALGORITHM``, if it is set.
    The setting holds for all threads, because backward passes run in threads of their own. A call
    reads it once, in its forward pass, and its backward pass uses the same.

    Parameters
    ----------
    name : str
        One of these names. On a device that has no such algorithm it means ``"auto"``.

        - ``"auto"``, the default, takes the algorithm that should be fastest for the shape and the
          device.
        - ``"direct"`` sums the products one by one.
        - ``"winograd"`` (CPU) is taken if the kernel size allows it; it rounds a little more,
          and a NaN or an infinity spreads over the few pixels of its tile.
        - ``"fused"`` (CUDA) launches one kernel for each step.
        - ``"hybrid"`` (CUDA) runs the steps like ``"fused"``, and lets torch (cuDNN) form the
          gradients of weight, bias and x over all steps at once.
        - ``"cudnn"`` (CUDA) lets torch (cuDNN) form all convolutions; the kernels do the rest.
        - ``"measure"`` (CUDA) times the algorithms at the first call of a shape, forward and
          backward passes by themselves, and keeps the fastest for the process. ``"auto"`` does so,
          too, while ``torch.backends.cudnn.benchmark`` is set. While a CUDA graph is being
          captured, and under ``torch.use_deterministic_algorithms``, nothing is timed, and
          ``"measure"`` means ``"auto"``.
        - ``"reference"`` runs no kernel of this package: the reference path, in plain torch, runs
          all calls on all devices, also of cells that have run kernels before.

    Raises
    ------
    ValueError
        If `name` is none of these.
    """
    global _algorithm
    _algorithm = _known("name", name)


def get_algorithm() -> str:
    """Return the name that :func:`snnlstm.set_algorithm` was last given.

    By default it is that of ``SNNLSTM_ALGORITHM`` in the environment, or ``"auto"``.
    """
    return _algorithm


@contextmanager
def algorithm(name: str) -> Iterator[None]:
    """Use the algorithm `name` within a ``with`` block; see :func:`snnlstm.set_algorithm`.

    The setting holds for the whole process: other threads see it too while the block runs.
    """
    before = get_algorithm()
    set_algorithm(name)
    try:
        yield
    finally:
        set_algorithm(before)
