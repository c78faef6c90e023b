"""Swaps snnTorch's cells and Leaky for ours: in a model, or wherever one is made.

In a model it also swaps torch's pools, linear layers and convolutions.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import wraps
from types import MethodType
from typing import Any, NoReturn

from torch import nn

from ..calls.spec import a_module, flag, never_spikes
from ..compat.registry import register
from ..compat.snntorch import Base, Neuron, TheirLeaky, library, replaced
from ..dispatch.reasons import Reason, against_device
from ..neurons.leaky import Leaky
from ..neurons.sconv2dlstm import SConv2dLSTM
from . import torch_layers

logger = logging.getLogger("snnlstm")

_ITSELF = "(the model itself)"
_SILENT = "NEVER SPIKES: no mem exceeds its threshold of 1 or more; threshold=0.05 is usual"
# Both libraries' cells have these arguments and attributes.
_SAME = ["in_channels", "out_channels", "kernel_size", "bias", "max_pool", "avg_pool"]
_SAME += ["init_hidden", "inhibition", "output", "surrogate_disable"]
_OURS: dict[Any, Any] = {Base: SConv2dLSTM, TheirLeaky: Leaky}
_OURS.pop(nn.Module, None)  # it stands for a class that snnTorch does not have
_CONVLSTM = (
    "it looks like a ConvLSTM and stays as it is; the documentation's page ConvLSTM shows how "
    "snnlstm.ConvLSTM replaces it"
)
_ROUNDED = (
    "linear layers and convolutions equal torch's to rounding, which may flip a spike at its "
    "threshold: products=False leaves torch's"
)
_PRODUCTS = tuple(torch_layers.OURS[kind] for kind in torch_layers.PRODUCTS)


@dataclass(frozen=True, repr=False)
class SwapReport:
    """What :func:`snnlstm.accelerate` did. Printed, it is a table.

    Parameters
    ----------
    model : nn.Module
        The model, changed in place.
    swapped : tuple of str
        Names of the swapped layers, as ``model.named_modules()`` gives them. A layer that occurs in
        several places has all of its names here. The name of the model itself is "".
    left : dict of str to str
        Names of the cells, neurons, pools, linear layers and convolutions that stay as they were,
        each with the reason.
    silent : tuple of str
        Names of the cells whose threshold no mem can exceed, so that they never spike.
    slow : tuple of str
        Why the swapped cells take the reference path for now, such as a device without kernels.
    """

    model: nn.Module
    swapped: tuple[str, ...]
    left: dict[str, str] = field(default_factory=dict)
    silent: tuple[str, ...] = ()
    slow: tuple[str, ...] = ()

    @property
    def headline(self) -> str:
        """The first line of the table."""
        return f"accelerate: {len(self.swapped)} swapped, {len(self.left)} left"

    def __str__(self) -> str:
        rows = [(name, "swapped") for name in self.swapped]
        rows += [(name, f"left: {reason}") for name, reason in self.left.items()]
        width = max((len(name or _ITSELF) for name, _ in rows), default=0)
        lines = [self.headline]
        for name, what in rows:
            what += f"; {_SILENT}" if name in self.silent else ""
            lines.append(f"  {name or _ITSELF:{width}}  {what}")
        lines += [f"  on the reference path, which is slower: {reason}" for reason in self.slow]
        if any(isinstance(m, _PRODUCTS) for m in self.model.modules()):
            lines.append(f"  {_ROUNDED}")
        return "\n".join(lines)

    __repr__ = __str__

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        """Raise a TypeError, because users take the report for the model."""
        raise TypeError(
            "accelerate swaps the layers in place and returns a report: call the model itself"
        )


# ---- in a model ---------------------------------------------------------------------------


def accelerate(model: nn.Module, *, products: bool = True) -> SwapReport:
    """Make every ``snntorch.SConv2dLSTM`` and ``snntorch.Leaky`` in a model ours, in place.

    ``torch.nn.MaxPool2d`` and ``torch.nn.AvgPool2d`` become faster subclasses of themselves, too,
    and so do ``torch.nn.Linear`` and ``torch.nn.Conv2d`` in a model with a spiking neuron: on the
    CPU they use the zeros among spikes. Their results equal torch's to rounding, so a spike at its
    threshold may flip.

    Each layer stays the same object, with its parameters, buffers, submodules, state and hooks, and
    changes its class, so optimizers, plain lists and ``torch.compile`` keep working with it. Some
    layers stay as they are, and the report gives the reason: instances of subclasses and layers
    whose methods were replaced (they may compute something else), all layers of a class that the
    installed snnTorch computes differently from 1.0.0, cells that snnTorch could not run either,
    such as one with an even kernel, and other neurons. Layers are found among the model's modules,
    but not in plain lists or other objects. The report also names modules of other classes
    that look like a ConvLSTM without spikes.

    Three settings that snnTorch's cell accepts and ignores take effect: ``inhibition``, and a
    ``reset_mechanism`` or ``surrogate_disable`` that was changed after construction.

    Parameters
    ----------
    model : nn.Module
        A model, or a bare cell.
    products : bool, default True
        False leaves torch's linear layers and convolutions as they are, and so their results by
        bits.

    Returns
    -------
    SwapReport

    Raises
    ------
    ImportError
        If snntorch is not installed.
    TypeError
        If `model` is not an nn.Module.
    """
    report = _swap(model, flag("products", products))
    named = list(model.named_modules(remove_duplicate=False))
    for name, module in reversed(named):  # the first of several names stays
        if type(module) in (SConv2dLSTM, Leaky):
            module._layer_name = name
    cells = [m for name, m in named if name in report.swapped and type(m) in _OURS.values()]
    paths = [against_device(cell.graded_spikes_factor.device) for cell in cells]
    return replace(
        report,
        silent=tuple(name for name, module in named if _is_silent(module)),
        slow=tuple(dict.fromkeys(path.reason for path in paths if path is not None)),
    )


def _is_silent(module: Any) -> bool:
    """Whether no mem of a cell can exceed its threshold."""
    fixed = type(module) is SConv2dLSTM and not isinstance(module.threshold, nn.Parameter)
    return fixed and not module.state_quant and never_spikes(module.threshold)


def _require_snntorch(function: str) -> None:
    if Base is nn.Module:
        lacks = "which is not installed or has no SConv2dLSTM: pip install snntorch"
        raise ImportError(f"{function}() needs snntorch, {lacks}")


def _swap(model: nn.Module, products: bool) -> SwapReport:
    """Turn snnTorch's layers, and some of torch's, into ours, and report the rest."""
    a_module("model", model)
    _require_snntorch("accelerate")
    spikes = any(isinstance(module, (Neuron, *_OURS.values())) for module in model.modules())
    rounding = () if products and spikes else torch_layers.PRODUCTS
    torchs = [kind for kind in torch_layers.OURS if kind not in rounding]
    owned, of_cells = _owned_by_torch(model), _convolutions_of_cells(model)
    # All new cells are made before the model is changed, so that an error leaves it whole.
    results: dict[str, Any] = {}
    pairs: dict[nn.Module, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if module not in pairs:
            try:
                result = None if module in of_cells else _as_ours(module, torchs)
                if module in owned and isinstance(result, nn.Module):
                    result = f"its owner, {owned[module]}, may read its weight and not call it"
            except (TypeError, ValueError) as error:
                result = str(error)
            pairs[module] = result
            theirs = isinstance(module, tuple(_OURS))
            if isinstance(result, str) and theirs and result is not Reason.OURS:
                logger.warning("accelerate leaves %s: %s", name or "the model itself", result)
        results[name] = pairs[module]
    report = SwapReport(
        model,
        tuple(name for name, result in results.items() if isinstance(result, nn.Module)),
        {name: result for name, result in results.items() if isinstance(result, str)},
    )
    swapped = [pair for pair in pairs.items() if isinstance(pair[1], nn.Module)]
    for layer, made in swapped:
        with suppress(ValueError):  # snnTorch's list would keep it alive
            Neuron.instances.remove(layer)
        object.__setattr__(layer, "__class__", type(made))
        object.__setattr__(layer, "__dict__", made.__dict__)
        if isinstance(layer, tuple(_OURS.values())):
            register(layer)
    if not swapped and not any(isinstance(module, tuple(_OURS)) for module in pairs):
        logger.warning("accelerate found neither SConv2dLSTM nor Leaky in the model")
    logger.info("%s", report.headline)
    return report


def _owned_by_torch(model: nn.Module) -> dict[nn.Module, str]:
    """The linear layers within other layers of torch's, such as attention, with their owners."""
    containers = nn.Sequential, nn.ModuleList, nn.ModuleDict
    return {
        child: type(module).__name__
        for module in model.modules()
        if type(module).__module__.startswith("torch.nn.") and not isinstance(module, containers)
        for child in module.children()
        if isinstance(child, nn.Linear)
    }


def _convolutions_of_cells(model: nn.Module) -> set[nn.Module]:
    """The convolutions within cells: ours read the weight, and others stay as they are."""

    def is_cell(module: nn.Module) -> bool:
        if isinstance(module, nn.Sequential):
            return False
        ours = type(module).__module__.startswith("snnlstm.")
        return ours or isinstance(module, Base) or _looks_like_a_convlstm(module)

    cells = filter(is_cell, model.modules())
    return {child for cell in cells for child in cell.children() if isinstance(child, nn.Conv2d)}


def _as_ours(module: nn.Module, torchs: Collection[Any]) -> nn.Module | str | None:
    """Our layer for one of snnTorch's, or of the classes `torchs`.

    Or why another cell, neuron, ConvLSTM or layer of these classes is left, or None.
    """
    name = type(module).__name__
    for theirs, ours in _OURS.items():
        if isinstance(module, ours):
            return Reason.OURS
        if type(module) is theirs:
            is_cell = theirs is Base
            reason = replaced(module, theirs, called=("fire", "mem_reset") if is_cell else ())
            return reason or (_cell_of(module) if is_cell else _leaky_of(module))
        if isinstance(module, theirs):
            base = f"snntorch.{theirs.__name__}"
            return f"{name} is a subclass of {base} and may compute something else"
    if Neuron is not None and isinstance(module, Neuron):
        return f"{name} is another neuron; only SConv2dLSTM and Leaky have faster ones"
    for kind in torchs:
        if isinstance(module, kind):
            return _layer_of(module, kind)
    return _CONVLSTM if _looks_like_a_convlstm(module) else None


def _layer_of(old: nn.Module, torchs: type[nn.Module]) -> nn.Module | str:
    """Make a layer that holds everything that one of torch holds; or say why `old` stays."""
    ours = torch_layers.OURS[torchs]
    if type(old) is ours:
        return Reason.OURS
    if (reason := torch_layers.reason_against(old, torchs)) is not None:
        return reason
    new = nn.Module.__new__(ours)
    new.__dict__ = old.__dict__
    return new


def _looks_like_a_convlstm(module: nn.Module) -> bool:
    """Whether a class of the user's is named after the LSTM and has a convolution of [x, h]."""
    package = type(module).__module__.partition(".")[0]
    if package in ("torch", "snnlstm", "snntorch") or "lstm" not in type(module).__name__.lower():
        return False
    convs = [child for child in module.children() if isinstance(child, nn.Conv2d)]
    return any(c.out_channels % 4 == 0 and c.in_channels > c.out_channels // 4 for c in convs)


def _leaky_of(old: Any) -> nn.Module:
    """Make a Leaky that holds everything that one of snnTorch holds."""
    new = nn.Module.__new__(Leaky)
    private = "reset", "state_function"
    new.__dict__ = {k: v for k, v in old.__dict__.items() if k not in private}
    new.state_function = old.state_function
    return new


def _cell_of(old: Any) -> nn.Module:
    """Make a cell that holds everything that one of snnTorch holds."""
    same = {name: getattr(old, name) for name in _SAME}
    cell = SConv2dLSTM(
        **same | {"bias": bool(old.bias)},
        threshold=0.1,  # _share replaces this tensor and all others
        spike_grad=None if old.surrogate_disable else old.spike_grad,
        state_quant=old.state_quant,
        device="meta",
    )
    _share(old, cell, {"reset", *_chosen(old)})
    states = {name: cell._buffers.pop(name) for name in ("syn", "mem")}
    cell._non_persistent_buffers_set -= set(states)
    cell._initial_threshold = cell.threshold.detach().clone()
    cell.syn, cell.mem = states["syn"], states["mem"]
    cell.reset_mechanism_val = cell.reset_mechanism_val  # the setter also sets what runs
    return cell


def _chosen(cell: nn.Module) -> set[str]:
    """Names of attributes that are methods of the cell's class, such as state_function."""
    methods = {k: v for k, v in cell.__dict__.items() if isinstance(v, MethodType)}
    kind = type(cell)
    return {k for k, v in methods.items() if v.__func__ is getattr(kind, v.__name__, None)}


def _share(old: nn.Module, new: nn.Module, private: set[str]) -> None:
    """Give `new` all attributes of `old`, except those that only old's class needs."""
    # Handles of hooks refer to the dictionaries of hooks, so both cells share these.
    shared = {key for key in old.__dict__ if "hook" in key} | {"training"}
    extra = set(old.__dict__) - set(new.__dict__) - private
    new.__dict__.update({key: old.__dict__[key] for key in shared | extra})
    for key in ("_parameters", "_modules", "_buffers", "_non_persistent_buffers_set"):
        new.__dict__[key] = old.__dict__[key].copy()


# ---- wherever one is made -----------------------------------------------------------------


_OLD_NAME = "SConvLSTM"  # snnTorch's cell had this name in older versions
_patch: ExitStack | None = None  # undoes the patch that is in force


def patch() -> AbstractContextManager[object]:
    """Let ``snntorch.SConv2dLSTM(...)`` and ``snntorch.Leaky(...)`` make ours from now on.

    This affects all code, whenever it imported the name: the class stays the same object, and a
    call of it makes an instance of our subclass. So ``isinstance`` and ``snntorch.utils.reset``
    recognise the layers made before and those made after. Our cell's keyword arguments, such as
    ``stride=``, are accepted. Subclasses of snnTorch's classes do not change, and neither do layers
    that exist already: see :func:`snnlstm.accelerate`. A second call changes nothing. The cell's
    old name, ``snntorch.SConvLSTM``, exists as long as the patch is in force.

    Returns
    -------
    context manager
        A ``with`` block undoes the patch at its end, unless the patch was in force before.

    Raises
    ------
    ImportError
        If snntorch is not installed.
    """
    global _patch
    _require_snntorch("patch")
    undo = ExitStack()
    if _patch is not None:
        return undo
    _patch = ExitStack()
    for theirs, ours in _OURS.items():
        _make_ours(theirs, ours)
    if not hasattr(library, _OLD_NAME):
        setattr(library, _OLD_NAME, Base)
        _patch.callback(delattr, library, _OLD_NAME)
    undo.callback(unpatch)
    return undo


def _make_ours(theirs: Any, ours: Any) -> None:
    """Let a call of snnTorch's class make an instance of ours, until the patch is undone."""
    original = theirs.__init__

    @wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if type(self) is theirs:
            self.__class__ = ours
            ours.__init__(self, *args, **kwargs)
        else:
            original(self, *args, **kwargs)

    theirs.__init__ = init
    _patch.callback(setattr, theirs, "__init__", original)  # type: ignore[union-attr]


def unpatch() -> None:
    """Undo :func:`snnlstm.patch`. Layers made under the patch stay ours."""
    global _patch
    if _patch is not None:
        _patch.close()
    _patch = None
