"""The spec of a cell, which describes it besides its tensors, and the checks of its options.

A check returns the normalised argument, or raises TypeError for a wrong type and ValueError for a
wrong value. The message names the argument, what came and what is accepted. Nothing is modified
before all checks have passed. The core identifies a reset and a pool by their position in
:data:`RESETS` and :data:`POOLS` (csrc/args.h).
"""

from __future__ import annotations

import sys
import warnings
from ast import literal_eval
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import lru_cache
from numbers import Integral, Number
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..compat.snntorch import recognise_quant, recognise_surrogate, recognise_traced, refuse_traced
from ..quant import StateQuant
from ..surrogate import MAKERS, NONE, Surrogate, atan, fixed, is_number

Reset = Literal["subtract", "zero", "none"]
Pool = Literal["none", "max", "avg"]
Size = int | tuple[int, ...] | list[int]
"""Type hint of sizes: one number for all axes, or one for each."""

RESETS: tuple[Reset, ...] = ("subtract", "zero", "none")
"""The reset mechanisms; ``reset_mechanism_val`` in a state_dict is a position here."""
POOLS: tuple[Pool, ...] = ("none", "max", "avg")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""The dtypes of weight and states."""
HALF_TYPES = (torch.float16, torch.bfloat16)
NAMES_OF_DTYPES = ", ".join(map(str, DTYPES))


def are_ours(surrogate: Any, quant: Any) -> bool:
    """Whether the kernels know a surrogate and a quantiser; a subclass of ours may differ."""
    return type(surrogate) is Surrogate and type(quant) in (StateQuant, type(None))


@dataclass(frozen=True)
class CellSpec:
    """What a cell computes, besides its tensors.

    A spec is frozen and hashable, so that it can be a key, and holds no tensor of a call.
    :class:`snnlstm.SConv2dLSTM` documents the arguments that the fields come from. Pairs are
    (height, width). The padding is always ``dilation * (kernel_size - 1) / 2`` and the state of an
    image of H x W is ``ceil(H / stride[0])`` x ``ceil(W / stride[1])``.
    """

    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)  # the input half's; the recurrent half has stride 1
    dilation: tuple[int, int] = (1, 1)
    reset: Reset = "none"
    pool: Pool = "none"
    pool_size: tuple[int, int] = (1, 1)  # kernel and stride; (1, 1) without pooling
    surrogate: Any = NONE  # a callable that is no Surrogate needs the reference path
    quant: Any = None  # a callable that is no StateQuant needs the reference path
    inhibition: bool = False
    # False: a plain ConvLSTM, without threshold, reset, pool or quantiser. A sequence returns each
    # step's mem instead of spk, and a step call returns no spk.
    spiking: bool = True
    padding: tuple[int, int] = field(init=False, repr=False, compare=False)
    """The zero padding on each side that keeps the image size, (height, width)."""
    # Operators of torch.library get all fields as this text, which from_text() parses.
    geometries: tuple[Any, ...] = field(init=False, repr=False, compare=False)
    """Of a plain nn.Conv1d or nn.Conv2d: its stride, padding, dilation, groups and padding mode."""
    serialized: str = field(default="", init=False, repr=False, compare=False)
    traceable: bool = field(default=False, init=False, repr=False, compare=False)
    """Whether the kernels run a step without quantiser, as far as options decide."""

    def __hash__(self) -> int:
        return hash(self.serialized)  # a string keeps its hash, which every call needs

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    def passes_gradient(self, sequence: bool) -> bool:
        """Whether spk of a sequence, or of a step call, carries a gradient."""
        return self.surrogate.kind != 0 if self.spiking else sequence

    def state_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of syn and mem for an image of `height` x `width`."""
        sh, sw = self.stride
        return -(-height // sh), -(-width // sw)

    def __post_init__(self) -> None:
        (kh, kw), (dh, dw) = self.kernel_size, self.dilation
        padding = dh * (kh - 1) // 2, dw * (kw - 1) // 2
        object.__setattr__(self, "padding", padding)
        geometries = (
            ((1,) * dims, pad, self.dilation[-dims:], 1, "zeros")
            for dims in (1, 2)
            for pad in (padding[-dims:], "same")
        )
        object.__setattr__(self, "geometries", tuple(geometries))
        # A trace of torch.compile may hold symbols, not numbers, so the text is made outside it.
        if are_ours(self.surrogate, self.quant):
            spike, quant = self.surrogate, self.quant
            values = {name: getattr(self, name) for name in _NAMED}
            values["surrogate"] = fixed(spike.kind), float(fixed(spike.p0)), float(fixed(spike.p1))
            object.__setattr__(self, "serialized", f"{values};{quant.text if quant else ''}")
            beyond = self.inhibition or quant is not None or spike.is_random
            object.__setattr__(self, "traceable", not beyond)

    @staticmethod
    @lru_cache(maxsize=256)
    def from_text(text: str) -> CellSpec:
        """The spec that :attr:`serialized` describes in these words."""
        written, _, quant = text.partition(";")
        values = literal_eval(written)
        values["surrogate"] = Surrogate(*values["surrogate"])
        return CellSpec(**values, quant=StateQuant.from_text(quant) if quant else None)


FINITE = " finite"
"""Says of a Leaky, behind :attr:`LeakySpec.serialized`, that its threshold is finite."""


class LeakySpec(NamedTuple):
    """What a Leaky computes, besides its tensors."""

    reset: Reset
    surrogate: Any  # None for one that the kernels do not know
    sequence: bool = False  # whether x has all steps, (T, ...)
    against: str | None = None  # the option for which plain torch must run the layer

    @property
    def serialized(self) -> str:
        """Reset and surrogate for an operator; empty if plain torch must run the layer."""
        spike = self.surrogate
        return "" if self.against else f"{self.reset} {(spike.kind, spike.p0, spike.p1)}"

    @staticmethod
    @lru_cache(maxsize=256)
    def from_text(text: str, sequence: bool) -> LeakySpec:
        """The spec that :attr:`serialized` describes in these words; FINITE may follow them."""
        reset, _, numbers = text.removesuffix(FINITE).partition(" ")
        return leaky_spec(cast(Reset, reset), Surrogate(*literal_eval(numbers)), sequence)


leaky_spec = lru_cache(maxsize=256)(LeakySpec)
"""Makes the spec of a Leaky; equal ones are one object, by which an entry knows its own."""


_NAMED = tuple(each.name for each in fields(CellSpec) if each.init and each.name != "quant")
"""The fields of a spec that :attr:`CellSpec.serialized` names; the quantiser follows them."""


# ---- checks -------------------------------------------------------------------------------------


def _is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def flag(name: str, value: Any) -> bool:
    """Check a yes-or-no argument: a bool, or one of the ints 0 and 1."""
    if isinstance(value, bool) or (isinstance(value, Integral) and value in (0, 1)):
        return bool(value)
    if type(value).__name__ in ("bool", "bool_"):  # the latter is NumPy's, which is not imported
        return bool(value)
    raise TypeError(f"{name} must be a bool, got {value!r}")


def a_module(name: str, value: Any) -> nn.Module:
    """Check a model."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be an nn.Module, got {type(value).__name__}")
    return value


def check_dense(name: str, tensor: Tensor) -> None:
    """Refuse sparse, nested and quantised tensors, and those of MKL-DNN."""
    if tensor.is_nested or tensor.is_quantized:
        kind = f"nested one of layout {tensor.layout}" if tensor.is_nested else "quantised one"
        raise TypeError(f"{name} must be a plain tensor, got a {kind}")
    if tensor.layout is not torch.strided:
        raise TypeError(
            f"{name} must be dense, as {name}.to_dense() is, got layout {tensor.layout}"
        )


def integer(name: str, value: Any) -> int:
    """Check an int that is at least 1."""
    if not _is_int(value):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value)


def pair(
    name: str, value: Any, dims: int, lengths: tuple[int, ...] = (), also: str = ""
) -> tuple[int, int]:
    """Check an int or a sequence of `dims` ints, each at least 1, and return (height, width).

    If `dims` is 1, the height is 1. `lengths` are other accepted lengths of the sequence, and
    `also` names other accepted values in errors.
    """
    both = (value,) * dims if _is_int(value) else value
    ints = isinstance(both, (tuple, list)) and all(map(_is_int, both))
    if not ints or len(both) not in (dims, *lengths):
        kind, count = ValueError if ints else TypeError, "two ints" if dims == 2 else "one int"
        raise kind(f"{name} must be an int or a tuple of {count}, got {value!r}")
    if min(both) < 1:
        raise ValueError(f"{name} must be at least 1{also}, got {value!r}")
    if max(both) >= 2**31:  # the core holds sizes as 32-bit ints
        raise ValueError(f"{name} must be less than 2**31, got {value!r}")
    return int(fixed(both[0])) if dims == 2 else 1, int(fixed(both[-1]))


def kernel(name: str, value: Any, dims: int) -> tuple[int, int]:
    """Check a kernel size: odd, so that one padding keeps the size of the state."""
    size = pair(name, value, dims)
    if size[0] % 2 == 0 or size[1] % 2 == 0:
        raise ValueError(
            f"{name} must be odd, got {value!r}: the recurrent convolution must keep the size "
            "of the state, and no symmetric padding does so for an even kernel"
        )
    return size


def pooling(max_pool: Any, avg_pool: Any, dims: int) -> tuple[Pool, tuple[int, int]]:
    """Check both pooling arguments; None, False, a zero and an empty tuple or list are off."""
    if not (_is_off(max_pool) or _is_off(avg_pool)):
        raise ValueError(
            "Only one of either `max_pool` or `avg_pool` may be specified, not both: got "
            f"max_pool={max_pool!r} and avg_pool={avg_pool!r}"
        )
    for kind, value in (("max", max_pool), ("avg", avg_pool)):
        if not _is_off(value):
            # torch's pools accept one int in a tuple, too.
            size = pair(f"{kind}_pool", value, dims, lengths=(1,), also=", or 0 for none")
            if size != (1, 1):
                return cast(Pool, kind), size
    return "none", (1, 1)


def _is_off(pool: Any) -> bool:
    return pool is None or (isinstance(pool, Number | tuple | list) and not pool)


def reset_name(value: Any) -> Reset:
    """Check the name of a reset mechanism."""
    if not isinstance(value, str) or value not in RESETS:
        raise ValueError(
            f"reset_mechanism must be set to either 'subtract', 'zero', or 'none', got {value!r}"
        )
    return value


def reset_of_number(value: Tensor) -> Reset | None:
    """Check the number of a reset mechanism; None for a tensor without data."""
    if value.is_meta:
        return None
    if value.numel() != 1 or value.item() not in range(len(RESETS)):
        raise ValueError(f"reset_mechanism_val must be 0, 1 or 2, got {value}")
    return RESETS[int(value)]


_DEFAULT = atan()
_MAKER_MODULES = ("snnlstm.surrogate", "snntorch.surrogate")


def surrogate(
    spike_grad: Any, disable: bool = False, traced: bool = False
) -> Surrogate | Callable[[Tensor], Tensor]:
    """Check `spike_grad`; snnTorch's closures become the :class:`Surrogate` of their kind."""
    if spike_grad is not None and not callable(spike_grad):
        raise TypeError(
            "spike_grad must be a callable such as snnlstm.surrogate.atan(), or None, "
            f"got {spike_grad!r}"
        )
    name = getattr(spike_grad, "__name__", "")
    if name in MAKERS and getattr(spike_grad, "__module__", "") in _MAKER_MODULES:
        raise TypeError(f"spike_grad must be a surrogate, got a function: call it, as in {name}()")
    if flag("surrogate_disable", disable):
        return NONE
    if spike_grad is None:
        return _DEFAULT
    return recognise_traced(spike_grad) if traced else recognise_surrogate(spike_grad)


def quantiser(
    state_quant: Any, traced: bool = False
) -> StateQuant | Callable[[Tensor], Tensor] | None:
    """Check `state_quant`; None, False and 0 are off, snnTorch's closures are recognised."""
    if state_quant is None or (isinstance(state_quant, int) and not state_quant):
        return None
    if not callable(state_quant):
        raise TypeError(
            "state_quant must be a callable such as snnlstm.quant.state_quant(), or False, "
            f"got {state_quant!r}"
        )
    if traced:
        refuse_traced(state_quant)
        return state_quant
    return recognise_quant(state_quant)


def dtype_or_none(name: str, value: Any) -> torch.dtype | None:
    """Check a dtype of the module."""
    if value is not None and not isinstance(value, torch.dtype):
        raise TypeError(f"{name} must be a torch.dtype or None, got {value!r}")
    if value is not None and value not in DTYPES:
        raise ValueError(f"{name} must be one of {NAMES_OF_DTYPES}, got {value}")
    return value


def device_or_none(name: str, value: Any) -> torch.device | None:
    """Check a device of the module."""
    if value is None:
        return None
    try:
        return torch.device(value)
    except (TypeError, RuntimeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"{name} must be a torch.device or its name, such as 'cpu' or 'cuda:0', got {value!r}"
        ) from error


def warn_of_threshold(threshold: Any) -> None:
    """Warn, at the user's line, about a cell that cannot spike or that spikes without input."""
    if never_spikes(threshold):
        what = (
            "is never exceeded: mem = o * tanh(syn) is at most 1, so this cell never spikes. Use "
            "threshold=0.05, or learn_threshold=True"
        )
    elif spikes_in_silence(threshold):
        what = (
            "is exceeded by mem = 0, from which every neuron starts: neurons spike without input. "
            "Use threshold=0.05"
        )
    else:
        return
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith("snnlstm."):
        level, frame = level + 1, frame.f_back
    warnings.warn(
        f"threshold={threshold} {what}, and look at snnlstm.spike_rates(net); see the "
        "documentation's Quick start, 'Does it spike at all?'",
        UserWarning,
        stacklevel=level,
    )


def never_spikes(threshold: Any) -> bool:
    """Whether no mem can exceed the threshold: mem = o * tanh(syn) is at most 1."""
    if isinstance(threshold, Tensor):
        return not threshold.is_meta and bool((threshold.detach() >= 1).all())
    return is_number(threshold) and bool(threshold >= 1)


def spikes_in_silence(threshold: Any) -> bool:
    """Whether a mem of 0 exceeds the threshold, or any element of a threshold tensor."""
    if isinstance(threshold, Tensor):
        return not threshold.is_meta and bool((threshold.detach() < 0).any())
    return is_number(threshold) and bool(threshold < 0)


# ---- the options --------------------------------------------------------------------------------


class Option(NamedTuple):
    """An argument of a cell that is also an attribute, which may be set at any time."""

    name: str
    default: Any
    check: Callable[[Any, int], Any]
    """Checks a value for images of 2 or 1 dimensions, and returns what the attribute becomes."""
    describes: bool = True
    """Whether it affects what a cell computes, and therefore :class:`CellSpec`."""
    in_snntorch: bool = True
    """Whether snnTorch's cell has it, too."""

    def is_default(self, value: Any) -> bool:
        """Whether a value is the default, possibly as a tuple."""
        items = value if isinstance(value, tuple) else (value,)
        return all(item == self.default for item in items)


def _flag(name: str, describes: bool = True, in_snntorch: bool = True) -> Option:
    return Option(name, False, lambda value, _: flag(name, value), describes, in_snntorch)


def _size(name: str) -> Option:
    return Option(name, 1, lambda value, dims: pair(name, value, dims)[-dims:], in_snntorch=False)


OPTIONS = {
    option.name: option
    for option in (
        Option("spike_grad", None, lambda value, _: surrogate(value)),
        Option("state_quant", None, lambda value, _: quantiser(value) or False),
        Option("max_pool", 0, lambda value, dims: pooling(value, 0, dims) and value),
        Option("avg_pool", 0, lambda value, dims: pooling(0, value, dims) and value),
        Option("reset_mechanism", "none", lambda value, _: reset_name(value)),
        _flag("surrogate_disable"),
        _flag("inhibition"),
        _flag("init_hidden", describes=False),
        _flag("output", describes=False),
        _size("stride"),
        _size("dilation"),
        _flag("batch_first", describes=False, in_snntorch=False),
    )
}
"""The options of a cell, by name. The callables come first, as in snnTorch's state_dict."""


def make_spec(
    kernel_size: Any, *, dims: int = 2, spiking: bool = True, traced: bool = False, **options: Any
) -> CellSpec:
    """Check and normalise the :data:`OPTIONS` that describe a cell.

    `traced` says whether torch.compile traces. If `dims` is 1, sizes are lengths. Equal arguments
    are checked once, except the user's callables, which a cache would keep alive.
    """
    disabled = flag("surrogate_disable", options.pop("surrogate_disable", False))
    spike = surrogate(options.pop("spike_grad", None), disabled, traced)
    quant = quantiser(options.pop("state_quant", None), traced)
    arguments = {"dims": dims, "spiking": spiking, **options}
    if are_ours(spike, quant) and not traced:
        hashable = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
        size = tuple(kernel_size) if isinstance(kernel_size, list) else kernel_size
        try:
            return _cached_spec(size, spike, quant, **hashable)
        except TypeError:  # an argument has a wrong type or no hash: the checks below name it
            pass
    return _make_spec(kernel_size, spike, quant, **arguments)


def _make_spec(
    kernel_size: Any, surrogate: Any, quant: Any, *, dims: int, spiking: bool, **options: Any
) -> CellSpec:
    max_pool, avg_pool = (options.pop(name, 0) for name in ("max_pool", "avg_pool"))
    pool, pool_size = pooling(max_pool, avg_pool, dims)
    if unknown := options.keys() - OPTIONS.keys():
        raise TypeError(f"unknown options: {', '.join(sorted(unknown))}")
    checked = {name: OPTIONS[name].check(value, dims) for name, value in options.items()}
    reset = checked.pop("reset_mechanism", "none")
    fields: dict[str, Any] = {
        k: (1, *v)[-2:] if isinstance(v, tuple) else v for k, v in checked.items()
    }
    fields |= {"reset": reset, "pool": pool, "pool_size": pool_size, "spiking": spiking}
    size = kernel("kernel_size", kernel_size, dims)
    return CellSpec(size, surrogate=surrogate, quant=quant, **fields)


# The cache is typed, so that stride=True, an error, does not find the entry of stride=1.
_cached_spec = lru_cache(maxsize=256, typed=True)(_make_spec)
