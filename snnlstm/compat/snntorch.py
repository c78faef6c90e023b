"""What the package takes from snnTorch, which is optional.

This file has the classes that ours replace, and the recognition of snnTorch's surrogates and
quantisers. If snnTorch is missing or broken, everything else works.
"""

from __future__ import annotations

import inspect
import logging
import types
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import quant, surrogate
from ..quant import StateQuant

logger = logging.getLogger("snnlstm")


def _captured(function: types.FunctionType) -> dict[str, Any]:
    """Closure variables of a function, by name."""
    cells = function.__closure__ or ()
    names = function.__code__.co_freevars
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


def recognise_surrogate(
    spike_grad: Callable[[Tensor], Tensor],
) -> surrogate.Surrogate | Callable[[Tensor], Tensor]:
    """Return our surrogate for one of ``snntorch.surrogate``, any other callable unchanged.

    snnTorch 1.0.0 makes closures, ``atan.<locals>.inner``, that hold their parameters. Later
    versions make objects, such as an ``ATanSurrogate`` with the attribute ``alpha``. Both are
    recognised by name, by parameters, which must be plain numbers, and by what they compute.
    """
    kind = None if isinstance(spike_grad, nn.Module) else _kind(spike_grad)
    if kind is None:
        return spike_grad
    try:
        value: Callable[[str], Any] = partial(getattr, spike_grad)
        if isinstance(spike_grad, types.FunctionType):
            value = _captured(spike_grad).__getitem__
        made = surrogate.make(kind.name, **{name: value(name) for name in kind.parameters})
    except (AttributeError, KeyError, TypeError, ValueError):  # no such parameter, or an odd one
        return spike_grad
    return made if _alone(_agree, spike_grad, made, _POINTS) else spike_grad


def recognise_traced(
    spike_grad: Callable[[Tensor], Tensor],
) -> surrogate.Surrogate | Callable[[Tensor], Tensor]:
    """Recognise a closure as :func:`recognise_surrogate` does, while torch.compile traces.

    The compiler can read a function's code and numbers, but no names. Each kind is tried once,
    outside the trace. Closures that the traced code itself makes, and objects, stay unchanged.
    """
    if not isinstance(spike_grad, types.FunctionType):
        return spike_grad
    for code, kind in _CODES:
        if spike_grad.__code__ is code and _is_released(kind.name):
            try:
                held = _captured(spike_grad)
            except AttributeError:
                return spike_grad
            if not all(map(surrogate.is_number, held.values())):
                raise TypeError(
                    f"under torch.compile snntorch.surrogate.{kind.name} must hold numbers alone: "
                    "pass a function of your own that calls it"
                )
            return surrogate.make(kind.name, **{name: held[name] for name in kind.parameters})
    return spike_grad


def refuse_traced(state_quant: Callable[[Tensor], Tensor]) -> None:
    """Refuse snnTorch's quantisers, which torch.compile cannot trace, while it traces."""
    if isinstance(state_quant, types.FunctionType):
        code = state_quant.__code__
        if code.co_freevars == ("levels",) and "StateQuant" in code.co_names:
            raise TypeError(
                "under torch.compile state_quant cannot be one of snntorch.functional.quant: pass "
                "snnlstm.quant.state_quant(...), which takes the same arguments"
            )


def _folded(name: str) -> str:
    return name.lower().replace("_", "").removesuffix("surrogate")


# The names of snnTorch's functions, and of the torch.autograd.Functions that they call.
_LONG_NAMES = {
    "stochasticspikeoperator": "SSO",
    "leakyspikeoperator": "LSO",
    "sparsefastsigmoid": "SFS",
}
_KINDS = {_folded(kind.name): kind for kind in surrogate.KINDS[1:]}
_KINDS |= {long: _KINDS[_folded(short)] for long, short in _LONG_NAMES.items()}


def _kind(function: object) -> surrogate.Kind | None:
    """The kind of surrogate that a function or an object of snnTorch's has in its name."""
    named: Any = function if isinstance(function, types.FunctionType) else type(function)
    if str(named.__module__).partition(".")[0] != "snntorch":
        return None
    return _KINDS.get(_folded(named.__qualname__.partition(".")[0]))


_POINTS = [0.0 if k == 7 else 0.3 * k - 2.9 for k in range(21)]


def _alone(function: Callable[..., bool], *arguments: Any) -> bool:
    """Call a function in a new thread, without the caller's modes, hooks and transforms."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function, *arguments).result()


def _agree(theirs: Callable[[Tensor], Tensor], ours: Any, points: Any) -> bool:
    """Whether two functions give the same values and gradients at some points, (n,).

    Two defects of snnTorch's surrogates do not count: its sigmoid is NaN for very negative inputs,
    and its LSO cannot be called (1.0.0), or has no gradient (its pull request 418).
    """
    found = []
    if not isinstance(points, Tensor):
        points = torch.tensor(points, dtype=torch.float64, device="cpu")
    with torch.random.fork_rng(devices=[]):
        weights = torch.linspace(0.5, 1.5, len(points), dtype=torch.float64, device="cpu")
        for function in (theirs, ours):
            torch.default_generator.manual_seed(0)  # SSO is random
            x = points.clone().requires_grad_()
            try:
                out = function(x)
                (gradient,) = torch.autograd.grad(out, x, weights.to(out.dtype))
                found.append((out.double(), gradient))
            except Exception as error:  # a foreign callable may raise anything
                broken = getattr(ours, "name", "") == "LSO"
                return broken and type(error) in (TypeError, RuntimeError)
    (out, gradient), (expected, exact) = found
    gradient = torch.where(gradient.isnan(), exact, gradient)
    return torch.equal(out, expected) and torch.allclose(gradient, exact, rtol=1e-4, atol=1e-9)


def recognise_quant(
    state_quant: Callable[[Tensor], Tensor],
) -> StateQuant | Callable[[Tensor], Tensor]:
    """Return our quantiser for one of ``snntorch.functional.quant``, other callables unchanged.

    snnTorch 1.0.0 makes closures, which hold their levels. An object may hold its levels, or the
    arguments of snnTorch's function. Both are recognised by name and by what they compute.
    """
    closure = state_quant if isinstance(state_quant, types.FunctionType) else None
    named: Any = closure or type(state_quant)
    if isinstance(state_quant, nn.Module) or not str(named.__module__).startswith("snntorch."):
        return state_quant
    if "quant" not in _folded(named.__qualname__):
        return state_quant
    try:
        held = _captured(closure) if closure else vars(state_quant)
        tensors = [value for value in held.values() if isinstance(value, Tensor)]
        if not tensors:
            names = inspect.signature(quant.state_quant).parameters
            tensors = [quant.state_quant(**{name: held[name] for name in names}).levels]
        made = StateQuant(*tensors)
    except (KeyError, TypeError, ValueError):
        return state_quant
    some = made.levels[:: max(1, made.levels.numel() // 64)].float()
    middles, ends = (some[1:] + some[:-1]) / 2, torch.stack([some.min() - 1, some.max() + 1])
    points = torch.cat([some, middles, middles * 0.999 + 1e-4, ends])
    return made if _alone(_agree, state_quant, made, points) else state_quant


# ---- base class and registry --------------------------------------------------------------


def _import_snntorch() -> types.ModuleType | None:
    try:
        import snntorch
    except Exception as error:  # a broken snnTorch may raise anything
        if not isinstance(error, ModuleNotFoundError) or error.name != "snntorch":
            logger.warning("snntorch is installed but does not import: %r", error)
        return None
    return snntorch


library: Any = _import_snntorch()
"""snnTorch itself, or None."""


_theirs: Any = getattr(library, "surrogate", None)
_CODES = tuple(
    (code, kind)
    for kind in surrogate.KINDS[1:]
    if isinstance(factory := getattr(_theirs, kind.name, None), types.FunctionType)
    for code in factory.__code__.co_consts
    if isinstance(code, types.CodeType)
)
"""The code of each closure that a function of snnTorch makes, and its kind."""


def _is_released(name: str) -> bool:
    """Whether snnTorch's surrogate of this name computes what ours does."""
    made = getattr(_theirs, name)()
    return isinstance(recognise_surrogate(made), surrogate.Surrogate)


# torch.compiler.assume_constant_result sets this flag, but its import loads the compiler.
_is_released._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _their_class(name: str) -> Any:
    found = getattr(library, name, None)
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None


Neuron: Any = _their_class("SpikingNeuron")
"""snnTorch's base class of all neurons, or None."""

SEQUENCE_NEURONS: tuple[type[nn.Module], ...] = tuple(
    kind
    for name in ("StateLeaky", "LinearLeaky", "AssociativeLeaky", "LeakyParallel")
    if (kind := _their_class(name)) is not None
)
"""snnTorch's neurons that take a whole sequence, (T, N, C), and keep no state."""

Base: Any = _their_class("SConv2dLSTM") or nn.Module
"""snnTorch's cell, so that isinstance, utils.reset and BPTT recognise ours; or nn.Module."""

TheirLeaky: Any = _their_class("Leaky") or nn.Module
"""snnTorch's leaky integrate-and-fire neuron, or nn.Module."""

STATE_FUNCTIONS = {"_base_sub": "subtract", "_base_zero": "zero", "_base_int": "none"}
"""The name of the reset that each method computes; ``state_function`` is one of these methods."""


_METHODS = (
    "fire", "fire_inhibition", "mem_reset", "_base_state_function", "_base_state_reset_zero",
    *STATE_FUNCTIONS,
)  # fmt: skip
_RELEASED: dict[Any, tuple[Any, dict[str, Any]]] = {
    kind: (kind.forward, {name: getattr(kind, name) for name in _METHODS if hasattr(kind, name)})
    for kind in (Base, TheirLeaky)
}
"""The methods with which each class computes, as they were at import."""

COMPARED: dict[Any, Callable[[str], Any]] = {}
"""For each class, a function that returns both libraries' results for a reset and a few numbers."""

_follow: dict[Any, bool] = {}


def replaced(layer: Any, kind: Any, called: Collection[str] = ()) -> str | None:
    """Why a layer does not compute what `kind` of snnTorch 1.0.0 does; None if it does.

    A layer may replace the methods in `called`, because ours calls them, too.
    """
    own, ours, (forward, released) = layer.__dict__, type(layer), _RELEASED[kind]
    if kind.forward is not forward or "forward" in own:
        return "its forward was replaced"
    for name, method in released.items():
        if (name in own and name not in called) or getattr(ours, name, None) is not method:
            return f"its {name} was replaced"
    chosen = own.get("state_function") or layer._modules.get("state_function")
    if chosen is not None:
        name = getattr(chosen, "__name__", "")
        if name not in STATE_FUNCTIONS or (
            released.get(name) is not getattr(chosen, "__func__", None)
        ):
            return "its state_function was replaced"
    if not _follows(kind):
        return f"the installed snntorch computes {kind.__name__} differently from snntorch 1.0.0"
    return None


def _follows(kind: Any) -> bool:
    """Whether the installed class computes what 1.0.0's and ours do; checked once."""
    if kind not in _follow:
        _follow[kind] = _alone(_results_agree, COMPARED[kind])
    return _follow[kind]


_follows._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _results_agree(results: Callable[[str], Any]) -> bool:
    try:
        both = [zip(*results(reset), strict=True) for reset in STATE_FUNCTIONS.values()]
        return all(torch.allclose(a.double(), b.double()) for each in both for a, b in each)
    except Exception:  # another release may raise anything
        return False
