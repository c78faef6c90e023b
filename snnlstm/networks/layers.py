"""How each layer of a network runs over a sequence: the kind of its calls, and the calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..calls.call import SIZES
from ..calls.entries import BoundedDict
from ..calls.lengths import CheckedLengths, held, hold_last, mask_padding
from ..compat.snntorch import SEQUENCE_NEURONS, Neuron, TheirLeaky
from ..dispatch.reasons import Reason, beyond_forward, recorded_now
from ..native import lender
from ..neurons.attributes import CELL
from ..neurons.leaky import Leaky
from ..neurons.sconv2dlstm import SConv1dLSTM, SConv2dLSTM
from .spikes import SpikeCount
from .torch_layers import AvgPool2d, Conv2d, Linear, MaxPool2d, ours_for

try:
    from ..native.batch_norm import batch_norm
except ImportError:  # there is no core
    batch_norm = None  # type: ignore[assignment]
_no_core = batch_norm is None


@dataclass(frozen=True)
class LayerReport:
    """How one layer ran over a sequence.

    Parameters
    ----------
    name : str
        Name of the layer, as ``named_modules()`` gives it.
    layer : str
        Name of its class.
    kind : {"sequence", "fold", "step", "once"}
        One call with the whole sequence; one call with all steps as a larger batch, (T * N, ...);
        one call for each step; or one call for all equal steps.
    reason : str
        Reason, in plain words.
    """

    name: str
    layer: str
    kind: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} {self.layer}: {self.kind} ({self.reason})"


class Way(NamedTuple):
    """What was decided for a layer.

    Attributes
    ----------
    kind, reason : str
        As in :class:`LayerReport`.
    alone : bool
        Whether the layer neither mixes samples nor keeps a state, however many steps a call gets.
    safe : bool
        Whether a call leaves its input as it is.
    ours : type or None
        Our class whose forward stands in for the layer's.
    """

    kind: str
    reason: str
    alone: bool = False
    safe: bool = False
    ours: Any = None


PER_SAMPLE: dict[type[nn.Module], tuple[str, int]] = {
    nn.Conv1d: ("conv1d", 3), nn.Conv2d: ("conv2d", 4), nn.Conv3d: ("conv3d", 5),
    nn.MaxPool1d: ("max_pool1d", 3), nn.MaxPool2d: ("max_pool2d", 4),
    nn.MaxPool3d: ("max_pool3d", 5), nn.AvgPool1d: ("avg_pool1d", 3),
    nn.AvgPool2d: ("avg_pool2d", 4), nn.AvgPool3d: ("avg_pool3d", 5),
    nn.AdaptiveAvgPool1d: ("adaptive_avg_pool1d", 3),
    nn.AdaptiveAvgPool2d: ("adaptive_avg_pool2d", 4),
    nn.AdaptiveMaxPool2d: ("adaptive_max_pool2d", 4),
    Conv2d: ("conv2d", 4), MaxPool2d: ("max_pool2d", 4), AvgPool2d: ("avg_pool2d", 4),
    nn.GroupNorm: ("group_norm", 2), nn.BatchNorm1d: ("batch_norm", 2),
    nn.BatchNorm2d: ("batch_norm", 4),
    nn.Linear: ("", 2), Linear: ("", 2), nn.Flatten: ("", 2), nn.Identity: ("", 2),
    nn.ReLU: ("", 2), nn.LeakyReLU: ("", 2), nn.Sigmoid: ("", 2), nn.Tanh: ("", 2),
    nn.Dropout: ("", 2), nn.Dropout2d: ("", 4),
}  # fmt: skip
"""The layers that treat every sample by itself.

Each has the name of torch's function, if compiled loops fold its calls as those of the layer, and
the least number of dimensions of a step, (N, C, ...), whose first one is the batch.
"""

# The way of a layer of these classes follows from its class, the class's forward, its hooks, these
# attributes, a norm's statistics, and the sizes.
_KNOWN = {*PER_SAMPLE, SConv2dLSTM, SConv1dLSTM, Leaky}
_DECIDING = (
    "training", "inplace", "return_indices", "start_dim", "p", "momentum",
    "in_features", "out_features", "in_channels", "out_channels",
)  # fmt: skip
_NUMBERS = {bool, int, float, type(None)}  # neither symbols nor tensors, which may change
LINEAR = nn.Linear, Linear
NORMS = nn.BatchNorm1d, nn.BatchNorm2d  # those with kernels for all steps in training
_ways: BoundedDict[Any, Way] = BoundedDict()


def way_of(
    name: str,
    layer: Any,
    x: Tensor,
    dim: int,
    steps: int,
    traced: bool,
    by_step: str | None = None,
    one: bool = False,
) -> Way:
    """How a layer runs over so many steps of `dim` dimensions.

    x has all of them, or is `one` of those that come from layers which run step by step. `traced`
    says whether torch.compile traces the call, and `by_step` is a reason to run all steps one by
    one.
    """
    kind = type(layer)
    if by_step is not None and kind in SEQUENCE_NEURONS:
        raise ValueError(f"layer {name} ({kind.__name__}) needs whole sequences, but {by_step}")
    hooked = beyond_forward(layer, harmless=SpikeCount)
    counted = x.device.type == "cpu" and not traced  # a GPU has no need of small steps
    step = (x.nbytes if one else x.nbytes // steps) if counted else 0
    key: Any = None
    if kind in _KNOWN and not traced:
        facts = (*map(layer.__dict__.get, _DECIDING), dim, steps, step)
        if _NUMBERS.issuperset(map(type, facts)):
            key = kind, kind.forward, hooked, kind in NORMS and in_training(layer), facts
    way = None if key is None else _ways.get(key)
    if way is None:
        way = _decided(layer, hooked, dim, steps, step, traced)
        if key is not None:
            _ways.keep(key, way)
    if by_step is not None:
        return way._replace(kind="step", reason=by_step)
    if one and way.reason is Reason.ONE_CALL and step > _LARGEST:
        return way._replace(kind="step", reason=Reason.TO_STACK)
    return way


def _decided(
    layer: Any, hooked: Reason | None, dim: int, steps: int, step: int, traced: bool
) -> Way:
    """The way of a layer over so many steps of `step` bytes; `hooked` is what a call runs more."""
    kind, alone = type(layer), False
    whole = "sequence", Reason.ONE_CALL
    against: str | None = hooked
    if kind in SEQUENCE_NEURONS or getattr(kind, "_takes_sequences", False):
        whole = "sequence", Reason.TAKES
        # A Sequential is here for its hooks. Global ones see each step of every layer.
        each = hooked is Reason.GLOBAL_HOOKS and kind not in SEQUENCE_NEURONS
        against = hooked if each else None
    elif isinstance(layer, SConv2dLSTM):
        against = hooked if kind.forward is SConv2dLSTM.forward else Reason.OWN_FORWARD
    elif isinstance(layer, CELL) and kind is not CELL:
        against = Reason.SUBCLASS
    elif kind in (CELL, TheirLeaky):
        against = hooked or Reason.THEIRS
    elif kind is Leaky:
        plain = Reason.PLAIN if traced else None
        against = hooked or plain or reason_by_size(step, steps, states=True)
    elif Neuron is not None and isinstance(layer, Neuron):
        against = Reason.KEEPS_STATE
    elif in_training(layer) and layer.momentum is not None and not (traced or _no_core):
        against = hooked or reason_by_size(step, steps)
    else:
        whole, against = ("fold", Reason.ALONE), hooked or not_per_sample(layer, dim)
        alone = against is None
        wide = step * _widening(layer)
        against = against or reason_by_size(wide, steps, kind in LINEAR)
    listed = kind in PER_SAMPLE or kind.__module__.startswith("snntorch.")
    safe = listed and hooked is None and not getattr(layer, "inplace", False)
    ours = ours_for(layer) if hooked is None and not traced else None
    if against is None and kind in LINEAR:
        whole = "fold", Reason.PRODUCT
    return Way(*(whole if against is None else ("step", against)), alone, safe, ours)


# ---- sizes --------------------------------------------------------------------------------------

# In bytes, as measured in benchmarks/NOTES.md. All steps at once save calls, but where they are
# large the system hands out new pages for them, which costs more; a single step stays in the cache.
_LARGEST = 1 << 20  # one step; larger ones run one by one, as in the loop
_SMALL = 128 << 10  # one step; smaller ones run all at once, however many
_LARGEST_SEQUENCE = 8 << 20  # all steps at once


def too_large(step: float) -> bool:
    """Whether steps of so many bytes run one by one on the CPU."""
    return step > _LARGEST


def steps_at_once(step: int) -> int:
    """How many steps of so many bytes a call takes where no gradient keeps all of them."""
    return max(1, _LARGEST_SEQUENCE // max(1, step))


def reason_by_size(
    step: float, steps: int, linear: bool = False, states: bool = False
) -> Reason | None:
    """Why so many steps of so many bytes pass a layer one by one on the CPU; None if all at once.

    Layers with states, and linear ones, take sequences of any length: a linear layer reads its
    weight, and writes its gradient, once for all steps.
    """
    if too_large(step):
        return Reason.LARGE_STATE if states else Reason.LARGE
    is_long = step > _SMALL and step * steps > _LARGEST_SEQUENCE
    return Reason.LARGE_SEQUENCE if is_long and not (states or linear) else None


def not_per_sample(layer: Any, dim: int | None = None) -> str | None:
    """Why the result for one sample may depend on other samples, or on the steps before.

    A step has `dim` dimensions, if that is known.
    """
    if type(layer) not in PER_SAMPLE:
        return Reason.UNKNOWN.format(type(layer).__name__)
    if in_training(layer):
        return Reason.STATISTICS
    if isinstance(layer, nn.Dropout | nn.Dropout2d) and layer.training and layer.p != 0:
        return Reason.RANDOM
    if getattr(layer, "return_indices", False):
        return Reason.INDICES
    start = layer.start_dim if isinstance(layer, nn.Flatten) else 1
    if dim is not None and (dim < PER_SAMPLE[type(layer)][1] or start % dim == 0):
        return Reason.MIXES.format(dim)
    return None


def in_training(layer: Any) -> bool:
    """Whether a layer is a batch norm whose statistics are those of its input."""
    if type(layer) not in NORMS:
        return False
    return layer.training or (layer.running_mean is None and layer.running_var is None)


def _widening(layer: Any) -> float:
    """The layer's output size divided by its input size, at least 1."""
    if isinstance(layer, nn.Linear):
        return max(1, layer.out_features / max(1, layer.in_features))
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return max(1, layer.out_channels / max(1, layer.in_channels))
    return 1


def is_constant(x: Tensor) -> bool:
    """Whether all steps of x (T, ...) are one tensor in memory, and no gradient tells them apart.

    An export, a trace or a transform would make that a property of later inputs, too.
    """
    if type(x) is not Tensor or x.layout is not torch.strided or x.shape[0] < 2 or x.stride(0):
        return False
    told_apart = x.requires_grad and torch.is_grad_enabled()
    return not told_apart and recorded_now(torch.compiler.is_compiling()) is None


def neurons_alone_read(layers: Sequence[tuple[str, Any]], at: int) -> bool:
    """Whether a Leaky alone reads what a layer returns, if behind batch norms."""
    behind = (type(layer) for _, layer in layers[at + 1 :])
    return next((kind for kind in behind if kind not in NORMS), None) in (Leaky, TheirLeaky)


def unshared(x: Tensor, repeated: bool = False) -> Tensor:
    """A copy of x, which a layer may modify, if x is a view, or `repeated` for other steps.

    Autograd lets no layer modify one of several views in place; without autograd they may be.
    """
    is_view = torch.is_grad_enabled() and (torch.compiler.is_compiling() or x._is_view())
    return x.clone() if repeated or is_view else x


# ---- calls of a layer ---------------------------------------------------------------------------


def whole_sequence(name: str, layer: Any, x: Tensor, lengths: Tensor | None, last: bool) -> Any:
    """Call a layer that takes sequences: a cell, a neuron, or a Sequential that carries hooks.

    A batch norm normalises each step by itself. None if plain torch must run a Leaky.
    """
    if isinstance(layer, Leaky):
        return layer.sequence(x, last and (layer.output or not layer.init_hidden), lengths)
    if type(layer) in NORMS:
        out = _normalised(layer, x)
        return out if lengths is None else mask_padding(out, lengths)
    cell, neuron = isinstance(layer, SConv2dLSTM), type(layer) in SEQUENCE_NEURONS
    if (cell or neuron) and x.dim() != (layer._dims if cell else 0) + 3:
        step = f"{layer.in_channels}, {SIZES[layer._dims]}" if cell else "C"
        raise ValueError(
            f"x must be a sequence of steps (N, {step}) for layer {name} "
            f"({type(layer).__name__}), got steps of shape {tuple(x.shape[1:])}"
        )
    if neuron:
        return layer(x) if lengths is None else pad(layer(mask_padding(x, lengths)), lengths)
    options: dict[str, Any] = {}
    if lengths is not None:
        options["lengths"] = CheckedLengths(lengths, x.shape[0])
    if cell:  # a cell that returns its states returns those of every step
        options["record"] = last and (layer.output or not layer.init_hidden)
    if layer.batch_first:
        return exchanged(layer(exchanged(x), **options))
    return layer(x, **options)


def _normalised(norm: Any, x: Tensor) -> Tensor:
    """The results of ``nn.BatchNorm1d`` or ``nn.BatchNorm2d`` in training, step by step."""
    norm._check_input_dim(x[0])
    tracks = norm.training and norm.track_running_stats
    counts = tracks and norm.num_batches_tracked is not None
    mean, var = (norm.running_mean, norm.running_var) if tracks else (None, None)
    if counts:
        norm.num_batches_tracked.add_(1)  # the loop counts the first step before an error
    out = batch_norm(x, mean, var, norm.weight, norm.bias, True, norm.momentum, norm.eps)
    if counts:
        norm.num_batches_tracked.add_(len(x) - 1)
    return out


def pad(out: Any, lengths: Tensor) -> Any:
    """Pad a neuron's results of all steps, spk or spk and mem, as :class:`Padded` does by step."""
    if isinstance(out, Tensor):
        return mask_padding(out, lengths)
    spk, mem = out
    return mask_padding(spk, lengths), hold_last(mem, mem.new_zeros(()), lengths)


class Padded:
    """Calls a layer step by step, and leaves padded samples as they are.

    `call` calls the layer. The layer computes padded samples, too, but its first result is 0 there.
    Its other results stay as they were, and so do its states of a sample, which are attributes or
    non-persistent buffers of shape (N, ...).
    """

    def __init__(self, layer: nn.Module, call: Callable[[Tensor], Any], lengths: Tensor) -> None:
        self._layer, self._call, self._lengths, self._step = layer, call, lengths, 0
        self._returned: Any = None

    def __call__(self, x: Tensor) -> Any:
        live = self._lengths > self._step
        before = {id(owner): _kept(owner) for owner in self._layer.modules()}
        out = self._call(x)
        olds = {}  # the stored states before the call, which may return them
        for owner in self._layer.modules():
            for name, after in _kept(owner).items():
                if after.dim() > 1 and after.shape[0] == len(live):
                    olds[id(after)] = old = before[id(owner)].get(name)
                    setattr(owner, name, held(live, after, old))
        if self._returned is None and isinstance(out, tuple | list):
            self._returned = tuple(olds.get(id(item)) for item in out)
        self._step, self._returned = self._step + 1, held(live, out, self._returned, True)
        return self._returned


def _kept(owner: nn.Module) -> dict[str, Tensor]:
    """The tensors in which a module may keep something from step to step."""
    if isinstance(owner, SConv2dLSTM):
        return {"syn": owner._state.syn, "mem": owner._state.mem}
    temporary = owner._non_persistent_buffers_set
    tensors = owner.__dict__ | {k: v for k, v in owner._buffers.items() if k in temporary}
    return {k: v for k, v in tensors.items() if isinstance(v, Tensor)}


# ---- what layers return -------------------------------------------------------------------------


def first_item(name: str, out: Any) -> Tensor:
    """The part of layer `name`'s result that the next layer gets: of a tuple, the first item."""
    while isinstance(out, tuple | list) and out:
        out = out[0]
    return out if isinstance(out, Tensor) else joined(name, [out])


def joined(name: str, outs: list[Any] | tuple[Any, ...]) -> Any:
    """Join what layer `name` returned at all steps: tensors stacked, tuples item by item."""
    first = outs[0]
    if all(isinstance(out, Tensor) for out in outs):
        for out in outs:
            if out.shape != first.shape:
                raise ValueError(
                    f"layer {name} must return tensors of one shape at every step, "
                    f"got {tuple(first.shape)} and {tuple(out.shape)}"
                )
        return stack(outs)
    if all(isinstance(out, tuple | list) and len(out) == len(first) > 0 for out in outs):
        return tuple(joined(name, items) for items in zip(*outs, strict=True))
    odd = next(out for out in outs if not isinstance(out, Tensor))
    raise TypeError(
        f"layer {name} must return tensors, or tuples of as many tensors, at every step, "
        f"got {type(odd).__name__}"
    )


def mapped(function: Callable[[Tensor], Tensor], out: Any) -> Any:
    """Apply a function to a tensor, or to each tensor in tuples."""
    if isinstance(out, Tensor):
        return function(out)
    return tuple(mapped(function, item) for item in out)


def exchanged(out: Any) -> Any:
    """Exchange each tensor's first two dimensions; (T,), one number per step, has no batch."""
    return mapped(lambda item: item.transpose(0, 1) if item.dim() > 1 else item, out)


def stack(steps: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """torch.stack(steps); a large result lies in a block of :mod:`snnlstm.native.lender`."""
    if not torch.compiler.is_compiling() and recorded_now() is None:
        size = len(steps) * steps[0].numel() * steps[0].element_size()
        if size >= lender.MAPPED and _are_alike(steps):
            return _Stack.apply(*steps)
    return torch.stack(steps)


def _are_alike(steps: list[Tensor] | tuple[Tensor, ...]) -> bool:
    """Whether they are plain tensors on the CPU, in a memory layout that torch.stack keeps."""
    first, is_image, last = steps[0], steps[0].dim() == 4, torch.channels_last
    return (
        first.device.type == "cpu"
        and first.layout is torch.strided
        and (first.is_contiguous() or (is_image and first.is_contiguous(memory_format=last)))
        and all(
            type(step) is Tensor and step.dtype is first.dtype and step.stride() == first.stride()
            for step in steps
        )
    )


class _Stack(torch.autograd.Function):
    """torch.stack with ``out``, which torch's own refuses where gradients are computed."""

    @staticmethod
    def forward(ctx: Any, *steps: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        first = steps[0]
        shape, strides = (len(steps), *first.shape), (first.numel(), *first.stride())
        out = lender.empty_result(shape, strides, first.dtype, first.device)
        return torch.stack(steps, out=out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None,) * len(ctx.needs_input_grad) if grad is None else grad.unbind()
