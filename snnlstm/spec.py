"""The spec of a cell, and the check of each option: what describes a cell besides its tensors.

A check returns the argument in its normal form or raises: TypeError for a wrong type, ValueError
for a wrong value. The message names the argument, what came and what is accepted. Nothing is
modified before all checks have passed. The numbers by which the core knows options stand here too,
each once (csrc/args.h).
"""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from numbers import Integral
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from .quant import StateQuant
from .snntorch import recognise_quant, recognise_surrogate, recognise_traced, refuse_traced
from .surrogate import MAKERS, NONE, Surrogate, atan, fixed

Reset = Literal["subtract", "zero", "none"]
Pool = Literal["none", "max", "avg"]

RESETS: tuple[Reset, ...] = ("subtract", "zero", "none")
"""The reset mechanisms; the position is ``reset_mechanism_val`` in a state_dict."""
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

    Frozen and hashable, so that it can key a table; it holds no tensor of the computation.
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
    checkpoint: bool = False
    # False: a plain ConvLSTM, without threshold, reset, pool or quantiser. In a sequence mem of
    # each step stands in the place of spk, and a step call has no spk.
    spiking: bool = True
    padding: tuple[int, int] = field(init=False, repr=False, compare=False)
    """Zeros on each side that keep the image size, height first."""
    # An operator of torch.library takes all fields as this text, which from_text() reads.
    serialized: str = field(default="", init=False, repr=False, compare=False)

    def __hash__(self) -> int:
        return hash(self.serialized)  # a string computes its hash once, and every call asks for it

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    def passes_gradient(self, sequence: bool) -> bool:
        """Whether spk of a sequence, or of a step call, carries a gradient."""
        return self.surrogate.kind != 0 if self.spiking else sequence

    def reason_against_kernels(self, dtype: torch.dtype) -> str | None:
        """Why the kernels cannot run a cell with these options on `dtype`; None if they can."""
        if type(self.surrogate) is not Surrogate:
            return "spike_grad is unknown to the kernels"
        if self.quant is not None:
            if type(self.quant) is not StateQuant:
                return "state_quant is unknown to the kernels"
            if self.quant.levels.dtype not in (torch.float32, dtype):
                return f"state_quant has levels of {self.quant.levels.dtype}"
            if not self.quant.ascending:
                return "state_quant has levels that do not ascend"
        return None

    def state_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of syn and mem for an image of `height` x `width`."""
        sh, sw = self.stride
        return -(-height // sh), -(-width // sw)

    def __post_init__(self) -> None:
        (kh, kw), (dh, dw) = self.kernel_size, self.dilation
        object.__setattr__(self, "padding", (dh * (kh - 1) // 2, dw * (kw - 1) // 2))
        # A trace of torch.compile may have symbols for numbers, so the text is made outside of it.
        if are_ours(self.surrogate, self.quant):
            spike, quant = self.surrogate, self.quant
            surrogate = fixed(spike.kind), float(fixed(spike.p0)), float(fixed(spike.p1))
            numbers = (
                self.kernel_size, self.stride, self.dilation, self.reset, self.pool, self.pool_size,
                surrogate, self.inhibition, self.checkpoint, self.spiking,
            )  # fmt: skip
            object.__setattr__(self, "serialized", f"{numbers};{quant.text if quant else ''}")

    @staticmethod
    @lru_cache(maxsize=256)
    def from_text(text: str) -> CellSpec:
        """The spec whose :attr:`serialized` form this is."""
        numbers, _, quant = text.partition(";")
        *first, surrogate, inhibition, checkpoint, spiking = literal_eval(numbers)
        levels = StateQuant.from_text(quant) if quant else None
        values = *first, Surrogate(*surrogate), levels, inhibition, checkpoint, spiking
        return CellSpec(*values)


# ---- checks -------------------------------------------------------------------------------------


def _is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def flag(name: str, value: Any) -> bool:
    """Check a yes-or-no argument: a bool, or one of the ints 0 and 1."""
    if isinstance(value, bool) or (isinstance(value, Integral) and value in (0, 1)):
        return bool(value)
    if type(value).__name__ in ("bool", "bool_"):  # NumPy's, whose import this spares
        return bool(value)
    raise TypeError(f"{name} must be a bool, got {value!r}")


def a_module(name: str, value: Any) -> nn.Module:
    """Check a model."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be an nn.Module, got {type(value).__name__}")
    return value


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
    """Check an int or a sequence of `dims` ints, each at least 1; returns (height, width).

    With a `dims` of 1 the height is 1. `lengths` are other lengths of the sequence that are
    accepted, and `also` names other values that the argument accepts.
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
            f"{name} must be odd, got {value!r}: the recurrent convolution has to keep the "
            "size of the state, and with an even kernel no symmetric padding does"
        )
    return size


def pooling(max_pool: Any, avg_pool: Any, dims: int) -> tuple[Pool, tuple[int, int]]:
    """Check both pooling arguments; anything falsy is off."""
    if max_pool and avg_pool:
        raise ValueError(
            "Only one of either `max_pool` or `avg_pool` may be specified, not both: got "
            f"max_pool={max_pool!r} and avg_pool={avg_pool!r}"
        )
    for kind, value in (("max", max_pool), ("avg", avg_pool)):
        if value:
            # torch's pools accept one int in a tuple, too.
            size = pair(f"{kind}_pool", value, dims, lengths=(1,), also=", or 0 for none")
            if size != (1, 1):
                return cast(Pool, kind), size
    return "none", (1, 1)


def reset_name(value: Any) -> Reset:
    """Check the name of a reset mechanism."""
    if value not in RESETS:
        raise ValueError(
            f"reset_mechanism must be set to either 'subtract', 'zero', or 'none', got {value!r}"
        )
    return cast(Reset, value)


def reset_of_number(value: Tensor) -> Reset | None:
    """Check the number of a reset mechanism; None for a tensor without data."""
    if value.is_meta:
        return None
    if value.numel() != 1 or value.item() not in range(len(RESETS)):
        raise ValueError(f"reset_mechanism_val must be 0, 1 or 2, got {value}")
    return RESETS[int(value)]


_DEFAULT = atan()
_OF_MAKERS = ("snnlstm.surrogate", "snntorch.surrogate")


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
    if name in MAKERS and getattr(spike_grad, "__module__", "") in _OF_MAKERS:
        raise TypeError(f"spike_grad must be a surrogate, got a function: call it, as in {name}()")
    if disable:
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


CHECKS: dict[str, Callable[[Any, int], Any]] = {
    "spike_grad": lambda value, _: surrogate(value),
    "state_quant": lambda value, _: quantiser(value) or False,
    "max_pool": lambda value, dims: pooling(value, 0, dims) and value,
    "avg_pool": lambda value, dims: pooling(0, value, dims) and value,
    "stride": lambda value, dims: pair("stride", value, dims)[-dims:],
    "dilation": lambda value, dims: pair("dilation", value, dims)[-dims:],
}
"""The check of each attribute of a cell that may be set; it returns what is set.

It takes the value and the dimensions of an image, 2 or 1.
"""
_FLAGS = "surrogate_disable", "inhibition", "init_hidden", "output", "checkpoint", "batch_first"
for _name in _FLAGS:
    CHECKS[_name] = lambda value, _, name=_name: flag(name, value)  # type: ignore[misc]


def _make_spec(
    kernel_size: Any,
    surrogate: Surrogate | Callable[[Tensor], Tensor],
    quant: StateQuant | Callable[[Tensor], Tensor] | None,
    *,
    dims: int = 2,
    stride: Any = 1,
    dilation: Any = 1,
    reset_mechanism: Any = "none",
    max_pool: Any = 0,
    avg_pool: Any = 0,
    inhibition: Any = False,
    checkpoint: Any = False,
    spiking: bool = True,
) -> CellSpec:
    pool, pool_size = pooling(max_pool, avg_pool, dims)
    return CellSpec(
        kernel_size=kernel("kernel_size", kernel_size, dims),
        stride=pair("stride", stride, dims),
        dilation=pair("dilation", dilation, dims),
        reset=reset_name(reset_mechanism),
        pool=pool,
        pool_size=pool_size,
        surrogate=surrogate,
        quant=quant,
        inhibition=flag("inhibition", inhibition),
        checkpoint=flag("checkpoint", checkpoint),
        spiking=spiking,
    )


SHOWN: dict[str, Any] = {
    "stride": 1, "dilation": 1, "max_pool": 0, "avg_pool": 0, "reset_mechanism": "none",
    "inhibition": False, "init_hidden": False, "checkpoint": False, "batch_first": False,
}  # fmt: skip
"""The arguments that a cell's representation shows where they differ from these defaults."""

BEYOND_SNNTORCH = ("stride", "dilation", "checkpoint")
"""The arguments that change what a cell does, and that snnTorch's cell does not have."""


def is_default(name: str, value: Any) -> bool:
    """Whether an attribute of this name in :data:`SHOWN` has its default, also as a tuple."""
    return all(item == SHOWN[name] for item in (value if isinstance(value, tuple) else (value,)))


# The cache is typed, because stride=True, an error, must not find what stride=1 left.
_cached_spec = lru_cache(maxsize=256, typed=True)(_make_spec)

DESCRIBING = (
    "spike_grad", "surrogate_disable", "state_quant", "stride", "dilation", "reset_mechanism",
    "max_pool", "avg_pool", "inhibition", "checkpoint",
)  # fmt: skip
"""The arguments of a cell, beside its kernel size, that say what it computes."""


def make_spec(
    kernel_size: Any,
    *,
    spike_grad: Any = None,
    surrogate_disable: Any = False,
    state_quant: Any = None,
    traced: bool = False,
    **others: Any,
) -> CellSpec:
    """Check what describes a cell (:data:`DESCRIBING`), and put it into its normal form.

    `traced` says whether torch.compile traces. With a `dims` of 1 sizes are lengths. Equal
    arguments are checked once, but for foreign callables, which a cache would keep alive.
    """
    spike = surrogate(spike_grad, flag("surrogate_disable", surrogate_disable), traced)
    quant = quantiser(state_quant, traced)
    if are_ours(spike, quant) and not traced:
        hashable = {k: tuple(v) if isinstance(v, list) else v for k, v in others.items()}
        size = tuple(kernel_size) if isinstance(kernel_size, list) else kernel_size
        try:
            return _cached_spec(size, spike, quant, **hashable)
        except TypeError:  # an argument has a wrong type or no hash: the checks below name it
            pass
    return _make_spec(kernel_size, spike, quant, **others)
