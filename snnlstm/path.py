"""Which implementation runs a call, and why.

:func:`choose` decides between the native kernels and :mod:`snnlstm.reference`; the answer is
a :class:`Path`, which the module shows as ``cell.path``. Nothing falls back silently.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

from .options import CellOptions
from .quant import StateQuant
from .surrogate import Surrogate

__all__ = ["Path", "algorithm", "choose", "get_algorithm", "set_algorithm"]

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
        Whether this is a fallback where the caller could expect the native kernels; those are
        logged once per module and reason.
    general : bool, default False
        Whether the reason lies in the installation or the machine: logged once per process.
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


_MISSING = "the compiled core is missing"
_NATIVE_REASON = "the native kernels cover this call"

try:
    # native.name(device_type) -> str names the kernels that run a call; native.trouble says on
    # which devices they cannot run, native.refusal which calls; native.DEVICES is the set of
    # device types that the core was built for, native.TRACEABLE whether dynamo can trace
    # autograd.run (through the operators of ops.py).
    from . import native as _native
except ImportError as error:
    _native = None  # type: ignore[assignment]
    if find_spec(f"{__package__}._C") is not None:
        _MISSING = f"the compiled core does not load: {error}"

# Made once: dynamo cannot trace a call into the core.
_NATIVE_PATHS = {
    device: Path(_native.name(device), _NATIVE_REASON)
    for device in (() if _native is None else _native.DEVICES)
}


@lru_cache(maxsize=64)
def native_path(name: str) -> Path:
    """Path of a call that the native kernels called `name` ran."""
    return Path(name, _NATIVE_REASON)


ALGORITHMS = ("auto", "direct", "winograd", "pointwise")
_algorithm = "auto"
_algorithm_lock = threading.Lock()


def set_algorithm(name: str) -> None:
    """Choose the convolution algorithm of the native kernels, for the whole process.

    The setting is one global (not per thread: the backward pass runs in threads of its own).
    A call reads it once, in its forward pass, and its backward pass keeps to that.

    Parameters
    ----------
    name : {"auto", "direct", "winograd", "pointwise"}
        ``"auto"``, the default, takes the fastest by shape. ``"direct"`` sums products as they
        stand. ``"winograd"`` is used wherever the kernel size allows; it rounds a little more,
        and a NaN or an infinity spreads over the few pixels of the tile in which it lies.
        ``"pointwise"`` leaves the convolution to torch (cuDNN) and runs the kernels behind it.
        Where a device has no such algorithm (the CPU no ``"pointwise"``, CUDA no
        ``"winograd"``) the name means ``"auto"``.

    Raises
    ------
    ValueError
        If `name` is none of these.
    """
    global _algorithm
    if name not in ALGORITHMS:
        raise ValueError(f"name must be one of {', '.join(ALGORITHMS)}, got {name!r}")
    with _algorithm_lock:
        _algorithm = name


def get_algorithm() -> str:
    """Return the name last given to :func:`snnlstm.set_algorithm`, ``"auto"`` by default."""
    return _algorithm


@contextmanager
def algorithm(name: str) -> Iterator[None]:
    """Use the algorithm `name` within a ``with`` block; see :func:`snnlstm.set_algorithm`.

    The setting is process-wide: other threads see it too while the block runs.
    """
    before = get_algorithm()
    set_algorithm(name)
    try:
        yield
    finally:
        set_algorithm(before)


def _global_hooks() -> bool:
    kinds = ("forward", "forward_pre", "backward", "backward_pre")
    return any(getattr(nn_module, f"_global_{kind}_hooks") for kind in kinds)


global_hooks: Callable[[], Any] = getattr(nn_module, "_has_any_global_hook", _global_hooks)
"""Whether hooks on all modules are registered. (torch 2.4 has no function for it.)"""


_HOOKS, _GLOBAL_HOOKS = "conv carries hooks", "global module hooks are registered"


def conv_reason(
    conv: nn.Module, weight_shape: tuple[int, int, int, int], options: CellOptions
) -> str | None:
    """Why the kernels cannot stand in for a call of `conv`; None if they can.

    They can where `conv` is a plain nn.Conv2d of the geometry of `options` whose forward was
    neither replaced nor hooked: only then is calling it the same as using its weight.

    Parameters
    ----------
    conv : nn.Module
        The cell's ``conv``.
    weight_shape : (int, int, int, int)
        The (4C, Cin + C, kh, kw) that the cell was made with.
    options : CellOptions
    """
    if type(conv) is not nn.Conv2d:
        return f"conv is a {type(conv).__name__}, not a plain nn.Conv2d"
    if (
        conv._forward_pre_hooks
        or conv._forward_hooks
        or conv._backward_hooks
        or conv._backward_pre_hooks
    ):
        return _HOOKS
    if global_hooks():
        return _GLOBAL_HOOKS
    if "forward" in conv.__dict__:
        return "conv.forward was replaced"
    if (
        conv.stride != (1, 1)
        or conv.padding != options.padding
        or conv.dilation != options.dilation
        or conv.groups != 1
        or conv.padding_mode != "zeros"
        or tuple(conv.weight.shape) != weight_shape
    ):
        return "conv has another geometry than the cell"
    return None


# torch.compiler.is_exporting is younger than the oldest torch that is supported.
_is_exporting = getattr(torch.compiler, "is_exporting", torch.onnx.is_in_onnx_export)


def exporting() -> bool:
    """Whether torch.export, and with it the ONNX exporter that is built on it, is tracing."""
    return _is_exporting()


def _plain(tensor: Tensor | None) -> bool:
    return tensor is None or type(tensor) is Tensor or type(tensor) is nn.Parameter


def _varies_along_channels_only(threshold: Tensor) -> bool:
    shape = threshold.shape
    return threshold.numel() == 1 or (len(shape) >= 3 and threshold.numel() == shape[-3])


def _quiet(
    x: Tensor,
    syn: Tensor,
    mem: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    graded: Tensor,
) -> str | None:
    """Reasons for the reference path that nobody expects to be fast."""
    if exporting():
        return "an export records plain operators"
    if torch.compiler.is_compiling():
        return None
    if not all(map(_plain, (x, syn, mem, weight, bias, threshold, graded))):
        return "a tensor is of a subclass"
    if torch._C._get_tracing_state() is not None:
        return "tracing records plain operators"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if x.layout is not torch.strided or weight.layout is not torch.strided:
        return "x or weight is not strided"
    if x.is_neg() or syn.is_neg() or mem.is_neg():
        return "a tensor is a lazily negated view"
    return None


def _loud(
    x: Tensor, threshold: Tensor, graded: Tensor, options: CellOptions, conv: str | None
) -> str | None:
    """Reasons for the reference path where speed could be expected."""
    if conv is not None:
        return conv
    if not isinstance(options.surrogate, Surrogate):
        return "spike_grad is unknown to the kernels"
    if options.quant is not None:
        if not isinstance(options.quant, StateQuant):
            return "state_quant is unknown to the kernels"
        if options.quant.levels.dtype not in (torch.float32, x.dtype):
            return f"state_quant has levels of {options.quant.levels.dtype}"
        if not options.quant.ascending:
            return "state_quant has levels that do not ascend"
    if not _varies_along_channels_only(threshold):
        return "the threshold varies along the batch or the image"
    if graded.requires_grad:
        return "graded_spikes_factor requires a gradient"
    if graded.numel() != 1:
        return "graded_spikes_factor is not a single number"
    return None


def choose(
    x: Tensor,
    syn: Tensor,
    mem: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    graded: Tensor,
    options: CellOptions,
    conv: str | None = None,
) -> Path:
    """Decide which implementation runs a call whose arguments have been checked.

    Parameters
    ----------
    x, syn, mem, weight, bias, threshold, graded, options
        As `snnlstm.reference.run` takes them.
    conv : str, optional
        What ``conv_reason`` said of the convolution module, if there is one.

    Returns
    -------
    Path
    """
    device = x.device.type
    if device not in ("cpu", "cuda"):
        return Path("reference", f"there are no kernels for device {device}")
    if conv is not None:  # it has weights of its own
        weight, bias = x, None
    reason = _quiet(x, syn, mem, weight, bias, threshold, graded)
    if reason is None and (x.numel() == 0 or x.shape[-3] == 0):
        reason = "x is empty"
    if reason is not None:
        return Path("reference", reason)
    reason = _loud(x, threshold, graded, options, conv)
    if reason is not None:
        return Path("reference", reason, slow=True, general=reason in (_HOOKS, _GLOBAL_HOOKS))
    if _native is None:
        return Path("reference", _MISSING, slow=True, general=True)
    return _choose_native(x.device, x.dtype)


def _choose_native(device: torch.device, dtype: torch.dtype) -> Path:
    assert _native is not None
    if torch.compiler.is_compiling() and not getattr(_native, "TRACEABLE", False):
        return Path("reference", "torch.compile fuses plain operators", slow=True)
    trouble = _native.trouble(device)
    if trouble is not None:
        return Path("reference", trouble, slow=True, general=True)
    reason = _native.refusal(device, dtype)
    if reason is not None:
        return Path("reference", reason, slow=True)
    return _NATIVE_PATHS[device.type]


_logged: set[str] = set()  # general reasons


def log_fallback(path: Path, seen: set[str], cell: nn.Module | None = None) -> None:
    """Log a slow `path` of `cell`, unless its reason is in `seen`, which remembers it.

    A general reason says nothing of the cell, and is logged once per process. Tools that count
    operations or print summaries hook every module for a moment: that is one, too.
    """
    if not path.slow or path.reason in seen or torch.compiler.is_compiling():
        return
    seen.add(path.reason)
    if path.general:
        if path.reason in _logged:
            return
        _logged.add(path.reason)
    who = "SConv2dLSTM"
    if cell is not None and not path.general:
        who = f"{type(cell).__name__}({cell.extra_repr()})"
        if name := getattr(cell, "_layer_name", ""):
            who = f"layer {name}, {who},"
    logger.warning("%s runs the reference path (plain torch, slower): %s", who, path.reason)
