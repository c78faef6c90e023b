"""Decides which implementation runs a call, and runs it.

The static properties of a call are its key: the :class:`Entry` behind it has the plan of the native
kernels, or the reason for :mod:`snnlstm.reference`. This module asks for the others, which may
change between like calls, once a call. The answer is a :class:`Path`, which the module shows as
``cell.path``. Nothing falls back silently.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.utils.checkpoint import checkpoint

try:  # what torch.compile's guards are made of; a call takes 5 us more without it
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # it is private to torch
    TensorGuards = None  # type: ignore[assignment, misc]

from . import reference, settings
from .call import PLAIN, Call, autocast_dtype, key_of
from .reference import Overrides
from .spec import DTYPES, HALF_TYPES, CellSpec

__all__ = ["LastPath", "Path", "run"]

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
_NATIVE_REASON = "the native kernels cover this call"

try:
    from .native import function as _native
except ImportError as error:
    _native = None  # type: ignore[assignment]
    if find_spec(f"{__package__}._C") is not None:
        _MISSING = f"the compiled core does not load: {error}"


@lru_cache(maxsize=64)
def _native_path(name: str) -> Path:
    """Path of a call that the native kernels called `name` ran."""
    return Path(name, _NATIVE_REASON)


# The paths are made once, here: dynamo cannot trace a call into the core.
_NATIVE_PATHS = {
    device: _native_path(_native.BACKENDS[device].name())
    for device in getattr(_native, "DEVICES", ())
}


# ---- reasons against the kernels ------------------------------------------------------------


# What a call of a convolution goes through: its class's methods, and torch's function.
_TORCHS = {
    kind: (kind.__call__, kind.forward, kind._conv_forward) for kind in (nn.Conv1d, nn.Conv2d)
}
_FUNCTIONS = F.conv1d, F.conv2d
ONES = {1: (1,), 2: (1, 1)}  # by the dimensions of an image


def _global_hooks() -> bool:
    kinds = ("forward", "forward_pre", "backward", "backward_pre")
    return any(getattr(nn_module, f"_global_{kind}_hooks") for kind in kinds)


global_hooks: Callable[[], Any] = getattr(nn_module, "_has_any_global_hook", _global_hooks)
"""Whether hooks on all modules are registered. (torch 2.4 has no function for it.)"""


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
        or kind._conv_forward is not plain[2]
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


# torch.compiler.is_exporting is younger than the oldest torch that is supported.
exporting = getattr(torch.compiler, "is_exporting", torch.onnx.is_in_onnx_export)
"""Whether torch.export, and with it the ONNX exporter that is built on it, is tracing."""

# What torch.fx.experimental.proxy_tensor.make_fx records by.
_get_mode, _PROXY = torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey.PROXY

_PLAIN = {*PLAIN, type(None)}


# ---- what is static of a call -----------------------------------------------------------------


class Entry:
    """What follows from all that is static of a call, each static check passed.

    Attributes
    ----------
    spec : CellSpec
    fallback : Path or None
        Why the reference path must run.
    training : bool
        Whether a result may require a gradient.
    in_float32 : bool
        Whether each step of a half type runs in float32, as a call of its own.
    plan : Plan or None
        Of the native kernels, once they have run.
    """

    __slots__ = ("_guard", "_others", "fallback", "in_float32", "plan", "spec", "training")

    def __init__(
        self, spec: CellSpec, fallback: Path | None, training: bool, in_float32: bool = False
    ) -> None:
        self.spec, self.fallback, self.training = spec, fallback, training
        self.in_float32 = in_float32
        self.plan: Any = None
        self._guard: Any = None

    def guard(self, call: Call) -> None:
        """Let :meth:`serves` know calls like this one, where torch has a check of tensors."""
        if call.lengths is not None or torch._C._is_any_autocast_enabled():
            return
        tensors = _present(call)
        self._others = call.record, torch.is_grad_enabled(), _settings(call.x), len(tensors)
        sizes = [[*tensor.shape] for tensor in tensors]
        strides = [[*tensor.stride()] for tensor in tensors]
        with suppress(TypeError):  # there is none, or it takes other arguments
            guard: Any = TensorGuards
            self._guard = guard(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)

    def serves(self, call: Call) -> bool:
        """Whether all that is static of a call is as in the one that was guarded.

        torch compares type, dtype, device, sizes, strides and requires_grad of the tensors, and
        what its dispatcher goes by: layout, lazy negation, autocast, torch.func, tracing.
        """
        if self._guard is None or call.lengths is not None:
            return False
        tensors = _present(call)
        others = call.record, torch.is_grad_enabled(), _settings(call.x), len(tensors)
        return others == self._others and self._guard.check(*tensors)


def _present(call: Call) -> Sequence[Tensor]:
    """The tensors that a call has, without lengths."""
    if call.bias is not None and call.threshold is not None:
        return call[:7]  # type: ignore[return-value]
    return [tensor for tensor in call[:7] if tensor is not None]


class Entries(dict[Any, Entry]):
    """The calls that a cell has checked, by all that is static of them."""

    last: Entry | None = None
    """The entry of the last call."""


_MOST = 64  # entries are kept; one more, and all are forgotten


def _key(call: Call, spec: CellSpec | None) -> Any:
    """The key of a call, with the settings last; None if it has none.

    Tensors of subclasses have none, because their sizes may be symbols, and sparse ones, which have
    no strides. A cell's entries are those of one spec, which their keys need not name: None.
    """
    x, syn, mem, weight, bias, threshold, graded, _, _ = call
    types = {type(x), type(syn), type(mem), type(weight), type(bias), type(threshold), type(graded)}
    if not types <= _PLAIN:
        return None
    try:
        return spec, key_of(call), _settings(x)
    except (AttributeError, RuntimeError):  # one is no tensor, or sparse
        return None


def _settings(x: Tensor) -> Any:
    """The settings of the process that a plan depends on; None without kernels for the device."""
    backend = None if _native is None else _native.BACKENDS.get(x.device.type)
    return None if backend is None else backend.settings(settings.current)


def known_entry(entries: Entries, call: Call, spec: CellSpec | None = None) -> Entry | None:
    """The entry of a call whose tensors need not be checked, because a call like it was."""
    last = entries.last
    if last is not None and (spec is None or last.spec is spec) and last.serves(call):
        return last
    entry = entries.get(_key(call, spec))
    if entry is not None:
        entries.last = entry
    return entry


def entry_of_foreign(call: Call, spec: CellSpec, overrides: Overrides) -> Entry:
    """The entry of a call with foreign code, which is like no other: its conv has any weight."""
    return _made_entry(call if overrides.conv is None else call._replace(weight=call.x), spec)


def entry_of(
    entries: Entries, call: Call, spec: CellSpec, of_many: CellSpec | None = None
) -> Entry:
    """The entry of a call that was checked, looked up or made.

    `of_many` is the spec again where the entries are those of many.
    """
    # A spec with foreign callables has no text, and a table of the process would keep it alive.
    entry = known_entry(entries, call, of_many) if spec.text else None
    if entry is None:
        entry = _made_entry(call, spec)
        key = _key(call, of_many) if spec.text else None
        if key is not None:
            if len(entries) >= _MOST:
                entries.clear()
            entry.guard(call)
            entries[key] = entries.last = entry
    return entry


def _made_entry(call: Call, spec: CellSpec) -> Entry:
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in call[:6])
    fallback = _static_reason(call, spec, False)
    if fallback is not None:
        return Entry(spec, fallback, training)
    assert _native is not None
    backend = _settings(call.x)[0]
    if call.x.dtype in HALF_TYPES and not backend.half_types:
        return Entry(spec, None, training, in_float32=True)
    reason = backend.reason_against(_native.Sizes(call, spec, _operands(call)))
    return Entry(spec, None if reason is None else Path("reference", reason, slow=True), training)


def _operands(call: Call) -> torch.dtype | None:
    assert _native is not None
    return _native.operands_of(call, autocast_dtype(call.x.device.type))


def _static_reason(call: Call, spec: CellSpec, traced: bool) -> Path | None:
    """Why the reference path must run, for all like calls; None where the kernels can."""
    device = call.x.device
    if not traced and not _PLAIN.issuperset(map(type, call[:7])):
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
    return against


def against_device(device: torch.device, traced: bool = False) -> Path | None:
    """Why the reference path runs all calls on a device; None where the kernels can."""
    if device.type not in ("cpu", "cuda"):
        also = "; the CPU has native kernels" if device.type == "mps" and _native else ""
        return Path("reference", f"there are no kernels for device {device.type}{also}", slow=True)
    if _native is None:
        return Path("reference", _MISSING, slow=True, general=True)
    reason = _native.reason_against_device(device, traced)
    return None if reason is None else Path("reference", reason, slow=True, general=True)


# ---- what may change between like calls ---------------------------------------------------------


def _dynamic_reason(call: Call, overrides: Overrides | None, traced: bool) -> Path | None:
    """Why the reference path must run now; None where nothing speaks against the kernels."""
    if exporting():
        return Path("reference", "an export records plain operators")
    if torch._C._are_functorch_transforms_active():
        return Path("reference", "a torch.func transform is active")
    if not traced:
        if torch._C._get_tracing_state() is not None or _get_mode(_PROXY) is not None:
            return Path("reference", "tracing records plain operators")
        if forward_ad._current_level >= 0:
            return Path("reference", "forward-mode differentiation is active")
        x, syn, mem, weight = call[:4]
        if x.is_neg() or syn.is_neg() or mem.is_neg() or weight.is_neg():
            return Path("reference", "a tensor is a lazily negated view")
    if overrides is None:
        return None
    if overrides.fire is not None or overrides.mem_reset is not None:
        return Path("reference", "fire or mem_reset is overridden", slow=True)
    general = overrides.reason in (HOOKS, GLOBAL_HOOKS)
    return Path("reference", str(overrides.reason), slow=True, general=general)


def _stronger(static: Path | None, dynamic: Path | None) -> Path | None:
    """The reason of two for the reference path; None where the kernels run."""
    if dynamic is not None and (static is None or static.slow or not dynamic.slow):
        return dynamic
    return static


# ---- running ----------------------------------------------------------------------------------


Results = tuple[Tensor, Tensor, Tensor, Path]
"""spk, syn and mem, and what ran."""

_inside = Entries()
"""Entries of calls within calls: of the segments of a checkpoint, and of steps in float32."""


def run(call: Call, entry: Entry, overrides: Overrides | None = None) -> Results:
    """Choose an implementation for a call, and run it."""
    path, dynamic = entry.fallback, _dynamic_reason(call, overrides, False)
    if path is not None or dynamic is not None:
        path = _stronger(path, dynamic)
    if entry.spec.checkpoint and (entry.training or overrides) and _may_checkpoint():
        return _in_segments(call, entry.spec, overrides, path, False)
    return _run_by(path, call, entry, overrides)


def _run_by(
    fallback: Path | None, call: Call, entry: Entry, overrides: Overrides | None
) -> Results:
    """Run a call by the implementation that was chosen."""
    if fallback is not None:
        return (*reference.run(call, entry.spec, overrides), fallback)
    assert _native is not None
    if entry.in_float32:

        def step(call: Call) -> Results:
            return _run_by(None, call, entry_of(_inside, call, entry.spec, entry.spec), None)

        return _native.in_float32(call, step)
    plan = entry.plan
    if plan is None:  # not made with the entry, which a transform of torch.func may have asked for
        spec = replace(entry.spec, checkpoint=False)
        plan = entry.plan = _native.plan_of(call, spec, _operands(call), _settings(call.x))
    spk, syn, mem, name = _native.run(plan, call, entry.training)
    return spk, syn, mem, _native_path(name)


def run_traced(call: Call, spec: CellSpec, overrides: Overrides | None = None) -> Results:
    """The same, while torch.compile traces.

    The name of a native path says what kind of kernels run; which of them is known afterwards.
    """
    dynamic = _dynamic_reason(call, overrides, True)
    path = _stronger(_static_reason(call, spec, True), dynamic)
    if spec.checkpoint and _may_checkpoint():
        return _in_segments(call, spec, overrides, path, True)
    results = _run_traced_by(path, call, spec, overrides)
    return (*results, path or _NATIVE_PATHS[call.x.device.type])


def _run_traced_by(
    fallback: Path | None, call: Call, spec: CellSpec, overrides: Overrides | None
) -> tuple[Tensor, Tensor, Tensor]:
    if fallback is not None:
        return reference.run(call, spec, overrides)
    assert _native is not None
    return _native.run_operator(call, spec, settings.current)[:3]


def _may_checkpoint() -> bool:
    # torch's checkpoint refuses to run under the transforms of torch.func.
    return torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()


def _in_segments(
    call: Call,
    spec: CellSpec,
    overrides: Overrides | None,
    fallback: Path | None,
    traced: bool,
) -> Results:
    """The cell with ``checkpoint=True``: less memory for the backward pass, one more forward pass.

    A sequence is cut into segments of some sqrt(T) steps. Saved for the backward pass are the
    states between the segments only; the gates of one segment at a time are computed again, just
    before their gradients (Chen et al. 2016, "Training deep nets with sublinear memory cost"), by
    the implementation that ran before.
    """
    inner = replace(spec, checkpoint=False)
    paths, dtypes = (
        [fallback or _NATIVE_PATHS[call.x.device.type]],
        [None if t is None else t.dtype for t in call[:8]],
    )

    def segment(*tensors: Any) -> Any:
        if traced:
            part = Call._make((*tensors, call.record))
            return _run_traced_by(fallback, part, inner, overrides)
        # Hooks on saved tensors may bring them back as lazily negated views, or in another dtype.
        plain = [
            t if t is None else t.resolve_neg().to(dtype)
            for t, dtype in zip(tensors, dtypes, strict=True)
        ]
        part = Call._make((*plain, call.record))
        entry = entry_of(_inside, part, inner, inner)
        *results, paths[0] = _run_by(fallback, part, entry, overrides)
        return tuple(results)

    weight, bias, threshold, graded, lengths = call[3:8]
    if threshold is not None:  # it may be written to before the backward pass
        threshold = threshold.clone()
    # In state-sized tensors a step takes 5, and a boundary 2: the sum is least for these segments.
    steps = max(1, round((0.4 * call.x.shape[0]) ** 0.5)) if call.sequence else 1
    pieces = call.x.split(steps) if call.sequence and call.x.shape[0] else (call.x,)
    syn, mem, results = call.syn, call.mem, []
    for k, x in enumerate(pieces):
        left = None if lengths is None else (lengths - k * steps).clamp(0, x.shape[0])
        # All tensors are arguments, so that torch notices if one is written to meanwhile.
        out = checkpoint(
            segment, x, syn, mem, weight, bias, threshold, graded, left,
            use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
        results.append(out)
        syn, mem = (s[-1] for s in out[1:]) if call.record and x.shape[0] else out[1:]
    if len(results) == 1:
        return (*results[0], paths[0])
    spks, syns, mems = zip(*results, strict=True)
    if call.record:
        syn, mem = torch.cat(syns), torch.cat(mems)
    return torch.cat(spks), syn, mem, paths[0]


_logged: set[str] = set()  # the general reasons that have been logged


def log_fallback(path: Path, seen: set[str], cell: nn.Module | None = None) -> None:
    """Log a slow `path` of `cell`, unless `seen` says that the cell was logged before.

    `seen` holds the reasons that were logged for the cell. A general reason says nothing about the
    cell and is logged once per process. Hooks that tools set on every module, to count operations
    or to print summaries, are such a reason.
    """
    if path.reason in _logged if path.general else seen:
        return
    (_logged if path.general else seen).add(path.reason)
    who = "SConv2dLSTM" if cell is None else type(cell).__name__
    if cell is not None and not path.general:
        who = f"{type(cell).__name__}({cell.extra_repr()})"
        if name := getattr(cell, "_layer_name", ""):
            who = f"layer {name}, {who},"
    logger.warning("%s takes the reference path, which is slower: %s", who, path.reason)
