"""What one call works on: the options of a cell, its checked tensors, the facts of their shapes.

The numbers by which the core knows options stand here too, each once (csrc/args.h).
"""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .quant import StateQuant
from .surrogate import NONE, Surrogate

__all__ = ["Call", "CellOptions", "Pool", "Reset", "Signature"]

Reset = Literal["subtract", "zero", "none"]
Pool = Literal["none", "max", "avg"]
Checkpoint = bool | Literal["gates"]

RESETS: tuple[Reset, ...] = ("subtract", "zero", "none")
"""The reset mechanisms; the position is ``reset_mechanism_val`` in a state_dict."""
POOLS: tuple[Pool, ...] = ("none", "max", "avg")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""The dtypes of weight and states."""


def are_ours(surrogate: Any, quant: Any) -> bool:
    """Whether the kernels know a surrogate and a quantiser; a subclass of ours may differ."""
    return type(surrogate) is Surrogate and type(quant) in (StateQuant, type(None))


@dataclass(frozen=True)
class CellOptions:
    """What a cell computes, besides its tensors.

    Frozen and hashable, so that it can key a cache; it holds no tensor of the computation.
    :class:`snnlstm.SConv2dLSTM` documents the arguments that the options come from. Pairs are
    (height, width). The padding is always ``dilation * (kernel_size - 1) / 2`` and the state of an
    image of H x W is ``ceil(H / stride[0])`` x ``ceil(W / stride[1])``.
    """

    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)  # of the input half; the recurrent half has stride 1
    dilation: tuple[int, int] = (1, 1)
    reset: Reset = "none"
    pool: Pool = "none"
    pool_size: tuple[int, int] = (1, 1)  # kernel and stride; (1, 1) without pooling
    surrogate: Any = NONE  # a callable that is no Surrogate needs the reference path
    quant: Any = None  # a callable that is no StateQuant needs the reference path
    inhibition: bool = False
    sequence: bool = False  # x is (T, N, Cin, H, W), spk (T, N, C, Hp, Wp); otherwise 4-D
    record: bool = False  # syn and mem are returned for every step, (T, N, C, Ho, Wo)
    checkpoint: Checkpoint = False
    operands: torch.dtype | None = None  # under autocast the convolution's type, if it is a half
    _text: str = field(default="", init=False, repr=False, compare=False)

    def __hash__(self) -> int:
        # The hash is computed once: every call looks its options up.
        found = self.__dict__.get("_hash")
        if found is None:
            found = hash(tuple(getattr(self, f.name) for f in fields(self) if f.compare))
            object.__setattr__(self, "_hash", found)
        return found

    def __getstate__(self) -> dict[str, Any]:
        # Hashes of strings differ between processes.
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def padding(self) -> tuple[int, int]:
        """Zeros on each side that keep the image size, height first."""
        (kh, kw), (dh, dw) = self.kernel_size, self.dilation
        return dh * (kh - 1) // 2, dw * (kw - 1) // 2

    def state_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of syn and mem for an image of `height` x `width`."""
        sh, sw = self.stride
        return -(-height // sh), -(-width // sw)

    def __post_init__(self) -> None:
        if type(self.surrogate) is Surrogate and not torch.compiler.is_compiling():
            object.__setattr__(self, "_text", self._make_text())

    def text(self) -> str:
        """The options as an operator of torch.library takes them: :meth:`from_text` reads it."""
        # The text is made beforehand where possible: torch.compile may take numbers for symbols.
        return self._text or self._make_text()

    def _make_text(self) -> str:
        spike, quant = self.surrogate, self.quant
        described = (
            self.kernel_size, self.stride, self.dilation, self.reset, self.pool, self.pool_size,
            (spike.kind, spike.p0, spike.p1), self.inhibition, self.sequence, self.record,
            self.checkpoint, str(self.operands).removeprefix("torch."),
        )  # fmt: skip
        return f"{described};{quant.text if isinstance(quant, StateQuant) else ''}"

    @staticmethod
    @lru_cache(maxsize=256)
    def from_text(text: str) -> CellOptions:
        """The options that :meth:`text` wrote."""
        described, _, quant = text.partition(";")
        values: list[Any] = [*literal_eval(described)]
        values[6:7] = Surrogate(*values[6]), StateQuant.from_text(quant) if quant else None
        values[-1] = getattr(torch, values[-1], None)
        return CellOptions(*values)


class Signature:
    """All that is known of a call without looking at values: options, shapes, dtypes, device.

    :func:`make_call` finds one object for equal calls; whoever works something out from it may
    keep that in ``notes``.

    Attributes
    ----------
    options : CellOptions
        Its ``operands`` say what autocast asks for.
    dtype, device, device_type
        Those of the states.
    time, n, cin, h, w, c, ho, wo : int
        Steps (1 for a step call), and the sizes of x and of the states.
    state, state_strides : (int, int, int, int)
        Shape of syn and mem, and its strides where they are contiguous.
    thresholds : int
        How many numbers the threshold has.
    """

    def __init__(
        self, x: Tensor, mem: Tensor, threshold: Tensor, options: CellOptions, autocast: Any
    ) -> None:
        narrow = autocast if x.dtype == torch.float32 and autocast != torch.float32 else None
        self.options = replace(options, operands=narrow) if narrow else options
        self.dtype, self.device, self.device_type = x.dtype, x.device, x.device.type
        self.time = x.shape[0] if options.sequence else 1
        self.n, self.cin, self.h, self.w = x.shape[-4:]
        self.c, self.ho, self.wo = mem.shape[1:]
        pixels = self.ho * self.wo
        self.state = self.n, self.c, self.ho, self.wo
        self.state_strides = self.c * pixels, pixels, self.wo, 1
        self.thresholds = threshold.numel()
        self.notes: dict[Any, Any] = {}


_MOST = 1024  # signatures are kept; one more, and all are forgotten
_signatures: dict[tuple[Any, ...], Signature] = {}
PLAIN = (Tensor, nn.Parameter)


def version(tensor: Tensor) -> int:
    """How often a tensor was written to in place; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast computes in on a device type; None where autocast is off."""
    # torch raises an error if it is asked about a device that has no autocast.
    known = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)
    if known and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor, CellOptions]
"""x, syn, mem, weight, bias, threshold, graded and options: the first fields of a :class:`Call`."""


def known_signature(arguments: Arguments) -> tuple[Signature | None, tuple[Any, ...]]:
    """The signature of arguments like some that were checked before, if any, and its key.

    An argument that is no tensor raises AttributeError.
    """
    x, syn, mem, weight, bias, threshold, graded, options = arguments
    device = x.device
    key = (
        options, x.shape, x.dtype, device, syn.shape, syn.dtype, syn.device,
        mem.shape, mem.dtype, mem.device, weight.shape, weight.dtype, weight.device,
        threshold.shape, threshold.dtype, threshold.device, graded.shape, graded.dtype,
        graded.device, None if bias is None else (bias.shape, bias.dtype, bias.device),
        autocast_dtype(device.type) if torch._C._is_any_autocast_enabled() else None,
    )  # fmt: skip
    return _signatures.get(key) if type(x) in PLAIN else None, key


def new_signature(key: tuple[Any, ...], arguments: Arguments, fits: bool) -> Signature:
    """The signature of arguments that have just been checked; kept for those like them.

    It is not kept where the weight is one that a foreign conv may have in another shape (not
    `fits`), nor for subclasses of tensors, whose sizes may be symbols. Foreign callables are not
    kept alive.
    """
    x, _, mem, _, _, threshold, _, options = arguments
    made = Signature(x, mem, threshold, options, key[-1])
    if fits and type(x) in PLAIN and are_ours(options.surrogate, options.quant):
        if len(_signatures) >= _MOST:
            _signatures.clear()
        _signatures[key] = made
    return made


class Call(NamedTuple):
    """One call of a cell, its arguments checked: what travels from the module to the kernels."""

    x: Tensor  # (N, Cin, H, W), or (T, N, Cin, H, W) with options.sequence
    syn: Tensor  # (N, C, Ho, Wo), as mem: before the first step, of x's dtype and device
    mem: Tensor
    weight: Tensor  # (4C, Cin + C, kh, kw), gates in the order i, f, o, g
    bias: Tensor | None  # (4C,)
    threshold: Tensor  # broadcasts to mem's shape and to the pooled one, as graded does
    graded: Tensor
    options: CellOptions
    signature: Signature = None  # type: ignore[assignment]  # None while torch.compile traces
    # The module in the place of the convolution, (N, Cin + C, H, W) to (N, 4C, H, W), and why it
    # must be called; it need not be if there is no reason.
    conv: Callable[[Tensor], Tensor] | None = None
    reason: str | None = None
    # The cell's methods, if a subclass or the cell itself overrides them.
    fire: Callable[[Tensor], Tensor] | None = None
    mem_reset: Callable[[Tensor], Tensor] | None = None


def make_call(
    arguments: Arguments,
    conv: Callable[[Tensor], Tensor] | None = None,
    reason: str | None = None,
    fire: Callable[[Tensor], Tensor] | None = None,
    mem_reset: Callable[[Tensor], Tensor] | None = None,
) -> Call:
    """A call of arguments that have been checked, or are known to fit together."""
    signature: Any = None
    if not torch.compiler.is_compiling():
        signature, key = known_signature(arguments)
        signature = signature or new_signature(key, arguments, reason is None)
    return Call(*arguments, signature, conv, reason, fire, mem_reset)


def in_order_of_caller(
    options: CellOptions, batch_first: bool, spk: Tensor, syn: Tensor, mem: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The results, with the batch before time if the caller's sequences have it so."""
    if not batch_first or not options.sequence:
        return spk, syn, mem
    if options.record:
        syn, mem = syn.transpose(0, 1), mem.transpose(0, 1)
    return spk.transpose(0, 1), syn, mem
