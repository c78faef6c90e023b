"""Our cell in the place of snnTorch's, and back: in a model, or wherever one is made."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any

import torch
from torch import nn

from . import foreign
from .checks import never_spikes
from .options import a_module, flag
from .sconv1dlstm import SConv1dLSTM
from .sconv2dlstm import SConv2dLSTM
from .snntorch import (
    METHODS,
    Base,
    Base1d,
    Neuron,
    recognise_quant,
    recognise_surrogate,
    register,
    take_out,
)

__all__ = ["SwapReport", "accelerate", "patch", "restore", "unpatch"]

logger = logging.getLogger("snnlstm")

_ITSELF = "(the model itself)"
_SILENT = "NEVER SPIKES: no mem exceeds its threshold of 1 or more; 0.1 and below are usual"
_SAME = (  # arguments and attributes of both cells
    "in_channels", "out_channels", "kernel_size", "bias", "max_pool", "avg_pool", "init_hidden",
    "inhibition", "output", "surrogate_disable",
)  # fmt: skip
OURS = {kind: ours for kind, ours in ((Base, SConv2dLSTM), (Base1d, SConv1dLSTM)) if kind}
"""Our class for each class of snnTorch's cells."""

_ALREADY = ("is snnlstm's already", "is snntorch's already")


@dataclass(frozen=True, repr=False)
class SwapReport:
    """What :func:`snnlstm.accelerate` or :func:`snnlstm.restore` did. Printed, it is a table.

    Parameters
    ----------
    action : str
        ``"accelerate"`` or ``"restore"``.
    model : nn.Module
        The model, changed in place.
    swapped : tuple of str
        Names of the swapped cells, as ``model.named_modules()`` gives them. A cell that occurs in
        several places has all of its names here. The name of the model itself is "".
    left : dict of str to str
        Names of the cells and neurons that stay as they were, each with the reason.
    taken : dict of str to str
        Names of the swapped ConvLSTMs without spikes, each with what it was taken for.
    surrogates : tuple of str
        Names of snnTorch's other neurons that got picklable surrogates.
    silent : tuple of str
        Names of the cells whose threshold no mem can exceed, so that they never spike.
    """

    action: str
    model: nn.Module
    swapped: tuple[str, ...]
    left: dict[str, str] = field(default_factory=dict)
    taken: dict[str, str] = field(default_factory=dict)
    surrogates: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()

    @property
    def headline(self) -> str:
        """The first line of the table."""
        return f"{self.action}: {len(self.swapped)} swapped, {len(self.left)} left"

    def __str__(self) -> str:
        rows = [
            (name, f"swapped: {self.taken[name]}" if name in self.taken else "swapped")
            for name in self.swapped
        ]
        rows += [(name, f"left: {reason}") for name, reason in self.left.items()]
        width = max((len(name or _ITSELF) for name, _ in rows), default=0)
        lines = [self.headline]
        for name, what in rows:
            what += "; its surrogate is snnlstm's now" if name in self.surrogates else ""
            what += f"; {_SILENT}" if name in self.silent else ""
            lines.append(f"  {name or _ITSELF:{width}}  {what}")
        return "\n".join(lines)

    __repr__ = __str__


# ---- in a model ---------------------------------------------------------------------------


def accelerate(model: nn.Module, surrogates: bool = False) -> SwapReport:
    """Make every ``snntorch.SConv2dLSTM`` and every ConvLSTM in a model one of ours, in place.

    Each cell of snnTorch stays the object that it is, with its parameters, buffers, submodules,
    state and hooks, and changes its class: whatever holds the cell goes on working, such as
    optimizers, plain lists and ``torch.compile``. Some stay as they are, and the report gives the
    reason: instances of subclasses and cells whose forward was replaced (they may compute something
    else), cells that could not run in snnTorch either, such as one with an even kernel, and other
    neurons. Only modules of the model are found, not cells that a plain list or another object
    alone holds.

    A ConvLSTM without spikes may be of any class. It needs one ``nn.Conv2d`` from Cin + C to 4C
    channels and a forward of x and (h, c). A copy of it is called in float64, and its results and
    gradients must be those of :class:`snnlstm.ConvLSTMCell`. Its class then becomes a subclass of
    its own class, which overrides forward; attributes, methods, keys and ``isinstance`` stay. A
    stack of such cells is tried likewise, so that a sequence goes in one call. The report says why
    others were left, such as cells with peepholes, a norm inside or gates in another order.

    Two things that snnTorch's cell accepts and ignores take effect: ``inhibition`` and a changed
    ``reset_mechanism``.

    Parameters
    ----------
    model : nn.Module
        A model, or a bare cell.
    surrogates : bool, default False
        Also give snnTorch's other neurons our surrogates in the place of its closures. Our
        surrogates compute the same and can be pickled, so that ``torch.save(model)`` works.
        :func:`snnlstm.restore` leaves them there.

    Returns
    -------
    SwapReport

    Raises
    ------
    ImportError
        If snntorch is not installed, and the model has no ConvLSTM that can be taken.
    TypeError
        If `model` is not an nn.Module.
    """
    surrogates = flag("surrogates", surrogates)
    taken, left = foreign.take(a_module("model", model))
    report = _swap("accelerate", model, list(OURS), _why_not_ours, _adopt, taken, left)
    named = list(model.named_modules(remove_duplicate=False))
    for name, module in reversed(named):  # the first of several names stays
        if type(module) in OURS.values() or isinstance(module, foreign.Taken):
            module._layer_name = name
    changed = {id(m) for _, m in named if surrogates and _take_our_surrogate(m)}
    return replace(
        report,
        surrogates=tuple(name for name, module in named if id(module) in changed),
        silent=tuple(name for name, module in named if _is_silent(module)),
    )


def _take_our_surrogate(neuron: nn.Module) -> bool:
    """Replace a surrogate of snnTorch's in another neuron; returns whether there was one."""
    if Neuron is None or not isinstance(neuron, Neuron) or isinstance(neuron, SConv2dLSTM):
        return False
    theirs = neuron.spike_grad
    neuron.spike_grad = recognise_surrogate(theirs)
    return neuron.spike_grad is not theirs


def _is_silent(module: nn.Module) -> bool:
    """Whether no mem of a cell can exceed its threshold."""
    return (
        isinstance(module, SConv2dLSTM)
        and type(module) in OURS.values()
        and not isinstance(module.threshold, nn.Parameter)
        and not module.state_quant
        and never_spikes(module.threshold)
    )


def restore(model: nn.Module) -> SwapReport:
    """Make every :class:`SConv2dLSTM` of this package in a model one of snnTorch's, in place.

    This undoes :func:`snnlstm.accelerate`, and takes models that were built with our cell, too. A
    cell keeps what it keeps there. snnTorch's own ``spike_grad`` and ``state_quant`` come back
    where they were not changed since; otherwise ours stay, which work in snnTorch's cell as well.
    A cell that does what snnTorch's cannot stays as it is, and the report gives the reason:
    ``stride``, ``dilation`` and ``checkpoint``, and, unless the cell came from snnTorch,
    ``inhibition``, float16 and bfloat16. ConvLSTMs without spikes get their own classes back.

    `model`, the report and the errors are those of :func:`snnlstm.accelerate`.
    """
    taken = foreign.give_back(a_module("model", model))
    return _swap("restore", model, list(OURS.values()), _why_not_theirs, _give_back, taken, {})


def _require_snntorch(function: str) -> None:
    if Base is nn.Module:
        raise ImportError(
            f"{function}() needs snntorch, which is not installed or has no SConv2dLSTM: "
            "pip install snntorch"
        )


def _swap(
    action: str,
    model: nn.Module,
    kinds: list[Any],
    why_not: Callable[[nn.Module], str | None],
    make: Callable[[Any], nn.Module],
    taken: dict[int, str],
    left: dict[int, str],
) -> SwapReport:
    """Make cells of one library, of the classes `kinds`, those of the other, and report the rest.

    `why_not` gives a reason to leave a module, and `make` the new cell. `taken` and `left` have the
    ids of ConvLSTMs without spikes, with what each was taken for, and why each was left.
    """
    if not taken:
        _require_snntorch(action)
    # All new cells are made before the model is changed, so that an error leaves it whole.
    swapped: dict[int, tuple[nn.Module, nn.Module]] = {}
    reasons = dict(left)
    for name, module in model.named_modules() if Base is not nn.Module else ():
        reason = why_not(module)
        if reason is None and type(module) in kinds:
            try:
                swapped[id(module)] = module, make(module)
            except (TypeError, ValueError) as error:
                reason = str(error)
        if reason is not None:
            reasons[id(module)] = reason
            if isinstance(module, tuple(OURS)) and reason not in _ALREADY:
                logger.warning("%s leaves %s: %s", action, name or "the model itself", reason)
    named = list(model.named_modules(remove_duplicate=False))
    report = SwapReport(
        action,
        model,
        tuple(name for name, module in named if id(module) in swapped or id(module) in taken),
        {name: reasons[id(module)] for name, module in named if id(module) in reasons},
        {name: taken[id(module)] for name, module in named if id(module) in taken},
    )
    take_out([cell for pair in swapped.values() for cell in pair])
    for cell, made in swapped.values():
        object.__setattr__(cell, "__class__", type(made))
        object.__setattr__(cell, "__dict__", made.__dict__)
        register(cell)
    found = swapped or reasons or taken
    if not found and not any(isinstance(module, tuple(OURS)) for _, module in named):
        logger.warning("%s found neither an SConv2dLSTM nor a ConvLSTM in the model", action)
    logger.info("%s", report.headline)
    return report


def _why_not_ours(module: nn.Module) -> str | None:
    """Why accelerate leaves a cell or neuron; None for what it swaps and for other modules."""
    if isinstance(module, SConv2dLSTM):
        return _ALREADY[0]
    name = type(module).__name__
    if type(module) is Base:
        return _why_not_as_released(module)
    if type(module) in OURS:
        return foreign.difference(module, _adopt)
    if isinstance(module, Base):
        return f"{name} is a subclass of snntorch.SConv2dLSTM and may compute something else"
    if Neuron is not None and isinstance(module, Neuron):
        return f"{name} is another neuron; only SConv2dLSTM has a faster one"
    return None


def _why_not_as_released(cell: Any) -> str | None:
    """What makes a cell of snnTorch's class compute something else; None if nothing does."""
    for name, released in METHODS.items():
        if name in cell.__dict__ and name not in ("fire", "mem_reset"):  # ours calls these two
            return f"its {name} was replaced"
        if getattr(Base, name, None) is not released:
            return f"snntorch.SConv2dLSTM.{name} was replaced"
    if "state_function" in cell.__dict__:
        chosen = getattr(cell.state_function, "__func__", None)
        if chosen is None or METHODS.get(chosen.__name__) is not chosen:
            return "its state_function was replaced"
    return None


def _why_not_theirs(module: nn.Module) -> str | None:
    """Why restore leaves a cell; None for what it swaps and for other modules."""
    name = type(module).__name__
    if not isinstance(module, SConv2dLSTM):
        return _ALREADY[1] if type(module) in OURS else None
    if type(module) is SConv1dLSTM and SConv1dLSTM not in OURS.values():
        return f"snntorch has no {name}"
    if type(module) not in OURS.values():
        return f"{name} is a subclass of snnlstm.SConv2dLSTM and may compute something else"
    if "forward" in module.__dict__:
        return "its forward was replaced"
    ones = (1,) * module._dims
    for name, default in (("stride", ones), ("dilation", ones), ("checkpoint", False)):
        value = getattr(module, name)
        if value != default:
            return f"snntorch's cell has no {name}, and here it is {value}"
    if module._adopted is None:
        if module.inhibition:
            return "snntorch's cell ignores inhibition, and here it is True"
        dtype = module.graded_spikes_factor.dtype
        if dtype in (torch.float16, torch.bfloat16):
            return f"snntorch's cell cannot start from zeros in {dtype}"
    return None


def _adopt(old: Any) -> nn.Module:
    """Make a cell that holds everything that one of snnTorch holds."""
    same = {name: getattr(old, name) for name in _SAME}
    cell = OURS[type(old)](
        **same | {"bias": bool(old.bias)},
        threshold=0.1,  # replaced below as all tensors are
        spike_grad=None if old.surrogate_disable else old.spike_grad,
        state_quant=old.state_quant,
        device="meta",
    )
    cell._adopted = {
        name: getattr(old, name)
        for name in ("spike_grad", "state_quant")
        if name not in old._modules
    }
    _share(old, cell, {"reset", *_own_methods(old)})
    states = {name: cell._buffers.pop(name) for name in ("syn", "mem")}
    cell._non_persistent_buffers_set -= set(states)
    cell._initial_threshold = cell.threshold.detach().clone()
    cell.syn, cell.mem = states["syn"], states["mem"]
    cell.reset_mechanism_val = cell.reset_mechanism_val  # the setter sets what runs, too
    return cell


def _give_back(old: SConv2dLSTM) -> nn.Module:
    """Make a cell of snnTorch that holds everything that one of ours holds."""
    originals = old._adopted or {}
    spike_grad, state_quant = old.spike_grad, old.state_quant
    if "spike_grad" in originals and recognise_surrogate(originals["spike_grad"]) == spike_grad:
        spike_grad = originals["spike_grad"]
    if state_quant and recognise_quant(originals.get("state_quant", False)) == state_quant:
        state_quant = originals["state_quant"]
    kind = next(theirs for theirs, ours in OURS.items() if ours is type(old))
    cell = kind.__new__(kind)
    # This cell is tiny and draws no random numbers; its tensors are replaced below.
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        (_original_init if kind is Base and _original_init else kind.__init__)(
            cell, 1, 1, 1, spike_grad=spike_grad, surrogate_disable=old.surrogate_disable,
            reset_mechanism=old.reset_mechanism, state_quant=state_quant,
        )  # fmt: skip
    for name in (*_SAME, "padding"):
        setattr(cell, name, getattr(old, name))
    ours = set(vars(type(old)(1, 1, 1, threshold=0.1, device="meta")))
    ours |= {"_path", "_adopted", "_layer_name"}
    _share(old, cell, ours)
    for name, method in _own_methods(cell).items():
        setattr(cell, name, MethodType(method.__func__, old))  # old is to become cell
    cell._buffers.update(syn=old.syn, mem=old.mem)
    cell._non_persistent_buffers_set |= {"syn", "mem"}
    return cell


def _own_methods(cell: Any) -> dict[str, MethodType]:
    """The attributes that are methods of the cell itself, such as the chosen state_function."""
    methods = {k: v for k, v in cell.__dict__.items() if isinstance(v, MethodType)}
    return {name: method for name, method in methods.items() if method.__self__ is cell}


def _share(old: nn.Module, new: nn.Module, private: set[str]) -> None:
    """Give `new` what `old` holds, but for the attributes that only old's class needs."""
    # The handles of hooks point to the dictionaries of hooks.
    shared = {key for key in old.__dict__ if "hook" in key} | {"training"}
    extra = set(old.__dict__) - set(new.__dict__) - private
    new.__dict__.update({key: old.__dict__[key] for key in shared | extra})
    new._parameters = old._parameters.copy()
    new._modules = old._modules.copy()
    new._buffers = old._buffers.copy()
    new._non_persistent_buffers_set = old._non_persistent_buffers_set.copy()


# ---- wherever one is made -----------------------------------------------------------------


_original_init: Callable[..., None] | None = None


def patch() -> AbstractContextManager[object]:
    """From now on, ``snntorch.SConv2dLSTM(...)`` makes one of our cells.

    It does not matter who imported the name, and when: the class stays the same object, and a call
    of the class makes an instance of ours, which is a subclass of it. So ``isinstance`` and
    ``snntorch.utils.reset`` know the cells made before and those made after. Our keyword
    arguments, such as ``stride=``, are accepted. Subclasses of snnTorch's cell stay what they
    are, and so do cells that exist already: see :func:`snnlstm.accelerate`. A second call changes
    nothing.

    Returns
    -------
    context manager
        In a ``with`` statement it undoes the patch at the end of the block, unless the patch was
        there before.

    Raises
    ------
    ImportError
        If snntorch is not installed.
    """
    global _original_init
    _require_snntorch("patch")
    undo = ExitStack()
    if _original_init is not None:
        return undo
    original = Base.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if type(self) is Base:
            self.__class__ = SConv2dLSTM
            SConv2dLSTM.__init__(self, *args, **kwargs)
        else:
            original(self, *args, **kwargs)

    Base.__init__, _original_init = init, original
    undo.callback(unpatch)
    return undo


def unpatch() -> None:
    """Undo :func:`snnlstm.patch`.

    Cells that were made meanwhile stay ours: see :func:`snnlstm.restore`.
    """
    global _original_init
    if _original_init is not None:
        Base.__init__, _original_init = _original_init, None
