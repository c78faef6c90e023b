"""What the package takes from snnTorch, which is optional.

This file has the classes that ours replace, and the recognition of snnTorch's surrogates and
quantisers. If snnTorch is missing or broken, everything else works.
"""

from __future__ import annotations

import inspect
import io
import logging
import operator
import textwrap
import threading
import tokenize
import types
import zlib
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import surrogate
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
    recognised by name and by parameters, which must be plain numbers. A function that is not
    1.0.0's must also compute what ours does: each function and each class is tried until it did so.
    """
    kind = kind_of(spike_grad)
    if kind is None:
        return spike_grad
    try:
        value: Callable[[str], Any] = partial(getattr, spike_grad)
        if isinstance(spike_grad, types.FunctionType):
            value = _captured(spike_grad).__getitem__
        made = surrogate.make(kind.name, **{name: value(name) for name in kind.parameters})
    except (AttributeError, KeyError, TypeError, ValueError):  # no such parameter, or an odd one
        return spike_grad
    function = getattr(spike_grad, "__code__", type(spike_grad))
    released = any(function is code and kind is its for code, its in _CODES) and _follows(_theirs)
    if not released and function not in _agreeing:
        if not _alone(_agree, spike_grad, made, _POINTS):
            return spike_grad
        _agreeing.add(function)
    return made


_agreeing: set[Any] = set()
"""Codes and classes of other releases that compute what ours do."""


def reader_of(spike_grad: Any, names: Sequence[str]) -> Callable[[], Iterable[Any]]:
    """What reads the numbers of a surrogate of snnTorch's, which may change."""
    if not names:
        return tuple
    if isinstance(spike_grad, types.FunctionType):
        return partial(map, operator.attrgetter("cell_contents"), spike_grad.__closure__ or ())
    return lambda: [getattr(spike_grad, name, None) for name in names]


def recognise_traced(
    spike_grad: Callable[[Tensor], Tensor],
) -> surrogate.Surrogate | Callable[[Tensor], Tensor]:
    """Recognise a closure as :func:`recognise_surrogate` does, while torch.compile traces.

    The compiler can read a function's code and numbers, but no names. Closures that the traced code
    itself makes, those of other releases than 1.0.0, and objects stay unchanged.
    """
    if not isinstance(spike_grad, types.FunctionType):
        return spike_grad
    for code, kind in _CODES:
        if spike_grad.__code__ is code and _follows(_theirs):
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


def kind_of(function: object) -> surrogate.Kind | None:
    """The kind of surrogate that a function or an object of snnTorch's has in its name."""
    if isinstance(function, nn.Module):
        return None
    named: Any = function if isinstance(function, types.FunctionType) else type(function)
    if str(named.__module__).partition(".")[0] != "snntorch":
        return None
    return _KINDS.get(_folded(named.__qualname__.partition(".")[0]))


_POINTS = [0.0 if k == 7 else 0.3 * k - 2.9 for k in range(21)]


def _alone(function: Callable[..., bool], *arguments: Any) -> bool:
    """Call a function in a new thread, without the caller's modes, hooks and transforms."""
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.append(function(*arguments)))
    try:
        thread.start()
    except RuntimeError:  # no thread starts while the interpreter shuts down
        return function(*arguments)
    thread.join()
    return results == [True]


class Constants(TorchFunctionMode):
    """Lets code compute with 0.25 in the place of random numbers, which other threads draw, too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.rand_like:
            return torch.full_like(args[0], 0.25)
        return func(*args, **(kwargs or {}))


def _agree(theirs: Callable[[Tensor], Tensor], ours: Any, points: Any) -> bool:
    """Whether two functions give the same values and gradients at some points, (n,).

    Two defects of snnTorch's surrogates do not count: its sigmoid is NaN for very negative inputs,
    and its LSO cannot be called (1.0.0), or has no gradient (its pull request 418).
    """
    results, name = [], getattr(ours, "name", "")
    if not isinstance(points, Tensor):
        points = torch.tensor(points, dtype=torch.float64, device="cpu")
    weights = torch.linspace(0.5, 1.5, len(points), dtype=torch.float64, device="cpu")
    for function in (theirs, ours):
        x = points.clone().requires_grad_()
        try:
            out: Any = function(x)
            if name == "SSO":  # autograd would call its backward pass without the mode
                with Constants():
                    gradient, *_ = out.grad_fn.apply(weights.to(out.dtype))
            else:
                (gradient,) = torch.autograd.grad(out, x, weights.to(out.dtype))
            results.append((out.double(), gradient.double()))
        except Exception as error:  # a foreign callable may raise anything
            return name == "LSO" and type(error) in (TypeError, RuntimeError)
    (out, gradient), (expected, exact) = results
    gradient = torch.where(gradient.isnan(), exact, gradient)
    return torch.equal(out, expected) and torch.allclose(gradient, exact, rtol=1e-4, atol=1e-9)


def recognise_quant(
    state_quant: Callable[[Tensor], Tensor],
) -> StateQuant | Callable[[Tensor], Tensor]:
    """Return our quantiser for one of ``snntorch.functional.quant``, other callables unchanged.

    snnTorch makes closures, which hold their levels. They are recognised by name and by what they
    compute.
    """
    if not isinstance(state_quant, types.FunctionType):
        return state_quant
    if not str(state_quant.__module__).startswith("snntorch."):
        return state_quant
    try:
        made = StateQuant(*(v for v in _captured(state_quant).values() if isinstance(v, Tensor)))
    except (TypeError, ValueError):
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


def _their_class(name: str) -> Any:
    kind = getattr(library, name, None)
    return kind if isinstance(kind, type) and issubclass(kind, nn.Module) else None


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


_METHODS = ["fire", "fire_inhibition", "mem_reset", "_base_state_function"]
_METHODS += ["_base_state_reset_zero", *STATE_FUNCTIONS]
_RELEASED: dict[Any, tuple[Any, dict[str, Any]]] = {
    kind: (kind.forward, {name: getattr(kind, name) for name in _METHODS if hasattr(kind, name)})
    for kind in (Base, TheirLeaky)
}
"""The methods with which each class computes, as they were at import."""

# Checksums of the sources of _RELEASED and of the surrogates, which versions 0.9.4 and 1.0.0 share.
_SOURCES = {"Leaky": 366135782, "SConv2dLSTM": 1703028562, "snntorch.surrogate": 2261938492}
_VERSIONS = "0.9.4", "1.0.0"

_follow: dict[Any, bool] = {}


def replaced(layer: Any, kind: Any, called: Collection[str] = ()) -> str | None:
    """Why a layer does not compute what `kind` of snnTorch 1.0.0 does; None if it does.

    A layer may replace the methods in `called`, because ours calls them, too.
    """
    attributes, (_, released) = layer.__dict__, _RELEASED[kind]
    method = "forward" if "forward" in attributes else _patched(type(layer), kind)
    for name in released:
        if name in attributes and name not in called:
            method = name
    if method is not None:
        return f"its {method} was replaced"
    chosen = attributes.get("state_function") or layer._modules.get("state_function")
    if chosen is not None:
        name = getattr(chosen, "__name__", "")
        if name not in STATE_FUNCTIONS or (
            released.get(name) is not getattr(chosen, "__func__", None)
        ):
            return "its state_function was replaced"
    if not _follows(kind):
        return f"the installed snntorch computes {kind.__name__} differently from snntorch 1.0.0"
    return None


def _patched(ours: Any, kind: Any) -> str | None:
    """The method of a class of ours, or the forward of snnTorch's `kind`, that was replaced."""
    forward, released = _RELEASED[kind]
    if kind.forward is not forward:
        return "forward"
    for name, method in released.items():
        if getattr(ours, name, None) is not method:
            return name
    return None


def _follows(kind: Any) -> bool:
    """Whether a class, or the surrogates, have 1.0.0's source; or its version without a source."""
    if kind not in _follow:
        source, version = source_of(kind), getattr(library, "__version__", None)
        same_source = source == _SOURCES[kind.__name__]
        _follow[kind] = version in _VERSIONS if source is None else same_source
    return _follow[kind]


def source_of(kind: Any) -> int | None:
    """A checksum, without comments, of a module or a class's methods that compute; or None."""
    forward, methods = _RELEASED.get(kind, (kind, {}))
    checksum = 0
    try:
        for name, method in {"forward": forward, **methods}.items():
            lines = textwrap.dedent(inspect.getsource(method))
            for token in tokenize.generate_tokens(io.StringIO(lines).readline):
                text = token.string.strip()
                if token.type not in (tokenize.COMMENT, tokenize.NL) and text[:3] != '"""':
                    text = f"{name} {tokenize.tok_name[token.type]} {text}"
                    checksum = zlib.crc32(text.encode(), checksum)
    except (OSError, TypeError, tokenize.TokenError, SyntaxError):
        return None
    return checksum


# The compiler asks while it traces. torch.compiler.assume_constant_result sets this flag, but its
# import loads the compiler.
_patched._dynamo_marked_constant = True  # type: ignore[attr-defined]
_follows._dynamo_marked_constant = True  # type: ignore[attr-defined]
