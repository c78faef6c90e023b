"""A stack of layers over whole sequences, whose cells get all steps in one call."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..calls.call import check_transforms
from ..calls.lengths import checked_lengths, mask_padding
from ..calls.spec import flag
from ..compat.snntorch import SEQUENCE_NEURONS
from ..dispatch.path import log_once
from ..dispatch.reasons import Reason, beyond_forward
from ..neurons.attributes import CELL
from ..neurons.sconv2dlstm import SConv2dLSTM
from .layers import (
    NORMS,
    LayerReport,
    Padded,
    Way,
    exchanged,
    first_item,
    in_training,
    is_constant,
    joined,
    mapped,
    neurons_alone_read,
    not_per_sample,
    stack,
    unshared,
    way_of,
    whole_sequence,
)
from .spikes import SpikeCount
from .torch_layers import Conv2d

Named = tuple[str, nn.Module]  # a layer and its name
_report = lru_cache(maxsize=1024)(LayerReport)

# ---- how a layer goes through a sequence --------------------------------------------------------


class Sequential(nn.Sequential):
    """Time-distributed ``nn.Sequential``: takes and returns sequences, (T, N, ...).

    The results, the gradients and the final states are those of a loop over the steps that calls
    the layers one after the other, but each cell gets all steps in one call. After a call
    :attr:`report` shows which of four kinds of calls each layer got:

    - *sequence*: :class:`SConv2dLSTM`, :class:`Leaky` (on the CPU where a step is at most 1 MiB),
      snnTorch's StateLeaky, LinearLeaky, AssociativeLeaky and LeakyParallel, and BatchNorm1d and
      BatchNorm2d in training if they have a momentum, one call for all steps. The four of
      snnTorch's keep no state: each call starts anew. A batch norm normalises each step by itself;
    - *fold*: layers of torch that treat every sample by itself, one call with all steps as a batch:
      Conv1d, Conv2d, Conv3d, Linear, Flatten, Identity, ReLU, LeakyReLU, Sigmoid, Tanh, MaxPool1d,
      MaxPool2d, MaxPool3d, AvgPool1d, AvgPool2d, AvgPool3d, AdaptiveAvgPool1d, AdaptiveAvgPool2d,
      AdaptiveMaxPool2d, GroupNorm, and in evaluation BatchNorm1d, BatchNorm2d, Dropout and
      Dropout2d;
    - *step*: all other layers, one call for each step: snnTorch's other neurons, dropout in
      training (a new mask for every step), layers with hooks, modules that are not known here, and
      on the CPU layers whose input or output at one step exceeds 1 MiB, or 128 KiB if it exceeds 8
      MiB at all steps (but for a Linear). Adjacent ones all run one step, then the next; a
      :class:`Leaky` in plain torch begins anew;
    - *once*: the leading layers of kind *fold*, however large, if all steps are the same image,
      ``x.expand(T, ...)``, without `lengths`: one call with one step. x must require no gradient,
      and the layers must carry no hooks and not work in place.

    The layers of a stack within the stack are reported one by one. If a layer returns a tuple, such
    as ``spk, syn, mem``, the next layer gets its first item. The last layer's tuple is returned,
    with every item stacked over time.

    ``snnlstm.Sequential(*net)`` makes one from the layers of an ``nn.Sequential``; :meth:`of` also
    keeps their names. Cells and neurons start from their stored states, as in step calls: reset
    them before every new sequence with :func:`snnlstm.reset`.

    If layers share a state, such as one cell in two places, all layers run step by step, and the
    log names the cells. Several random layers (dropout) may draw the same random numbers in
    another order than in the loop.

    Parameters
    ----------
    *layers : nn.Module
        As for an nn.Sequential; a dictionary of named layers works, too.
    batch_first : bool, default False
        Sequences, also returned ones, are (N, T, ...). The outermost stack's setting counts.

    Attributes
    ----------
    report : tuple of LayerReport, or None
        How each layer ran in the last call; None before it, and under torch.compile.

    Examples
    --------
    >>> net = snnlstm.Sequential(
    ...     snnlstm.SConv2dLSTM(2, 8, 3, threshold=0.05, max_pool=2, init_hidden=True),
    ...     nn.Flatten(),
    ...     nn.Linear(8 * 16 * 16, 10),
    ... )
    >>> net(torch.rand(20, 4, 2, 32, 32)).shape  # (T, N, C, H, W) -> (T, N, 10)
    torch.Size([20, 4, 10])
    """

    report: tuple[LayerReport, ...] | None = None
    _takes_sequences: ClassVar[bool] = True

    def __init__(self, *layers: Any, batch_first: bool = False) -> None:
        one = layers[0] if len(layers) == 1 else None
        _check_modules(one.values() if isinstance(one, dict) else layers)
        super().__init__(*layers)
        self.batch_first: bool = flag("batch_first", batch_first)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"report": None}

    def __getitem__(self, index: Any) -> Any:
        part: Any = super().__getitem__(index)
        if isinstance(index, slice):
            part.batch_first = self.batch_first
        return part

    def __add__(self, other: nn.Sequential) -> Sequential:
        return type(self).of(super().__add__(other), self.batch_first)

    def __mul__(self, other: int) -> Sequential:
        return type(self).of(super().__mul__(other), self.batch_first)

    def extra_repr(self) -> str:
        """Arguments that differ from their defaults."""
        return "batch_first=True" if self.batch_first else ""

    @classmethod
    def of(cls, net: nn.Sequential, batch_first: bool = False) -> Sequential:
        """Make a stack with the layers, names, mode and state_dict of `net`.

        Hooks on `net` itself stay behind.

        Raises
        ------
        TypeError
            If `net` is not an nn.Sequential, or has a forward of its own.
        """
        kind = type(net).__name__
        if not isinstance(net, nn.Sequential):
            raise TypeError(f"net must be an nn.Sequential, got {kind}")
        if type(net).forward not in _STACKS or "forward" in net.__dict__:
            raise TypeError(
                f"net must have nn.Sequential's forward, got {kind} with a forward of its own, "
                "which would be lost: Sequential(net) keeps it as one layer"
            )
        new = cls(OrderedDict(net._modules), batch_first=batch_first)
        new.training = net.training
        return new

    def forward(self, x: Tensor, lengths: Any = None) -> Any:
        """Run all layers over a sequence.

        x is (T, N, ...), or (N, T, ...) with `batch_first`; the rest is as in :func:`unroll`.
        """
        out, ran = _over_time(x, [*self._modules.items()], self.batch_first, lengths)
        if not torch.compiler.is_compiling():
            self.report = tuple(
                _report(name, type(layer).__name__, way.kind, way.reason)
                for (name, layer), way in ran
            )
        return out


_STACKS = nn.Sequential.forward, Sequential.forward  # which merely call each layer once, in order


def unroll(x: Tensor, *layers: nn.Module, batch_first: bool = False, lengths: Any = None) -> Any:
    """Run layers over a sequence, as :class:`Sequential` does, without making a module of them.

    It serves the ``forward`` of a network that keeps its layers under its own names: nothing is
    registered, so the network's state_dict stays the same. ::

        def forward(self, x):  # (T, N, C, H, W)
            return snnlstm.unroll(x, self.lstm1, self.lstm2, nn.Flatten(), self.fc, self.lif)

    A cell or neuron continues from its stored state, also with ``init_hidden=False``: reset it
    first. ``unroll`` gives no report: ``snnlstm.Sequential(*layers)`` makes a module of the same
    layers, whose :attr:`Sequential.report` shows how each of them ran.

    Parameters
    ----------
    x : Tensor
        (T, N, ...), or (N, T, ...) with `batch_first`; T at least 1.
    *layers : nn.Module
        In order. If a layer returns a tuple, the next one gets its first item.
    batch_first : bool, default False
        Sequences are (N, T, ...), including the returned ones.
    lengths : Tensor or list of int, optional
        (N,) ints, the steps of each sample, between 0 and T. After its last step a sample is
        padded: its spikes are 0, and its states in cells and neurons stay as they are. So the mem
        that a last Leaky returns repeats its last value, and a sum over time counts the padding:
        ``mem * (torch.arange(T)[:, None, None] < lengths[:, None])`` masks it. Lengths on a GPU are
        clamped without a check.

    Returns
    -------
    Tensor or tuple of Tensor
        The last layer's outputs of all steps, stacked. A layer that returns one number a step gives
        (T,), also with `batch_first`.

    Raises
    ------
    TypeError
        If x is not a tensor, a layer is not a module, or a layer returns anything but tensors.
    ValueError
        If x has no step, or is not a sequence for a layer that takes sequences; if a layer returns
        tensors of another shape at another step, or a neuron that takes sequences stands beside
        layers that share a state.

    Examples
    --------
    >>> cell = snnlstm.SConv2dLSTM(2, 8, 3, threshold=0.05, max_pool=2)
    >>> snnlstm.unroll(torch.rand(20, 4, 2, 32, 32), cell, nn.Flatten()).shape
    torch.Size([20, 4, 2048])
    """
    named = [*zip(map(str, range(len(layers))), layers, strict=True)]
    return _over_time(x, named, flag("batch_first", batch_first), lengths)[0]


def _check_modules(layers: Iterable[Any]) -> None:
    for layer in layers:
        if not isinstance(layer, nn.Module):
            name = getattr(layer, "__name__", type(layer).__name__)
            hint = "such as nn.ReLU() instead of torch.relu"
            if isinstance(layer, (list, tuple)):
                hint = "each an argument of its own: a * in front of the list unpacks it"
            raise TypeError(f"layers must be modules, {hint}, got {name}")


# ---- running ----------------------------------------------------------------------------------


def _over_time(
    x: Tensor, modules: Sequence[Named], batch_first: bool, lengths: Any
) -> tuple[Any, list[tuple[Named, Way]]]:
    """Run the layers over a sequence; returns their results, and how each layer ran."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    check_transforms(x)
    if x.dim() < 2 or x.shape[1 if batch_first else 0] == 0:
        shape = "(N, T, ...)" if batch_first else "(T, N, ...)"
        raise ValueError(f"x must have shape {shape} with at least one step, got {tuple(x.shape)}")
    x = x.transpose(0, 1) if batch_first else x
    traced = torch.compiler.is_compiling()
    if lengths is not None:
        lengths = checked_lengths(lengths, x.shape[0], x.shape[1], x.device, traced)
    layers, shared = _flattened(modules)
    # A shared state must change in the order of the loop, so all layers then run step by step.
    by_step = Reason.SHARED.format(shared) if shared else None
    ways: list[Way] = []
    if lengths is None and by_step is None and is_constant(x):
        x = _once(layers, x, ways, traced)
    out: Any = x
    batch: Any = None  # (T, N) while `out` has all steps as one batch
    while len(ways) < len(layers):
        name, layer = layers[len(ways)]
        x = out if isinstance(out, Tensor) else first_item(layers[len(ways) - 1][0], out)
        form = (x.dim() - 1, x.shape[0]) if batch is None else (x.dim(), batch[0])
        way = way_of(name, layer, x, *form, traced, by_step)
        if way.kind != "fold" and batch is not None:
            x, batch = x.unflatten(0, batch), None
        if lengths is not None and not ways and (way.kind != "sequence" or in_training(layer)):
            x = mask_padding(x, lengths)  # a NaN in the padding must not reach a gradient
        if way.kind == "sequence":
            out = whole_sequence(name, layer, x, lengths, last=len(ways) + 1 == len(layers))
            if out is None:  # plain torch must run this Leaky
                way = Way("step", Reason.PLAIN)
                x = x if lengths is None else mask_padding(x, lengths)
        if way.kind == "step":
            out = _step_by_step(layers, x, lengths, by_step, ways, way, traced)
            continue
        if way.kind == "fold":
            if batch is None:
                x, batch = x.flatten(0, 1), x.shape[:2]
            x = x if way.safe else unshared(x, x.stride(0) == 0)
            out = _call_of(layers, len(ways), way)(x)
        ways.append(way)
    if batch is not None:
        out = out.unflatten(0, batch)
    if ways and ways[-1].kind == "once":
        out = stack([out[0]] * len(out))  # the caller may write to single steps
    if lengths is not None and ways and ways[-1].alone:
        out = mask_padding(out, lengths)
    if not traced:
        _log_oddities(layers, ways, batch_first)
    return (exchanged(out) if batch_first else out), [*zip(layers, ways, strict=True)]


def _flattened(modules: Sequence[Named]) -> tuple[list[Named], str | None]:
    """Names and layers in order; the layers of a plain nn.Sequential take its place.

    Also the name of a layer that shares a state with an earlier one, or None: a layer that occurs
    twice and may keep a state, or a norm that writes to the running statistics of another.
    """
    layers: list[Named] = []
    shared, seen = None, set()
    pending: list[Any] = [(name, layer, True) for name, layer in reversed(modules)]
    while pending:
        name, module, is_layer = pending.pop()
        if module is None and not is_layer:
            continue
        if not isinstance(module, nn.Module):
            _check_modules([module])
        kind = type(module)
        is_stack, has_no_state = kind.forward in _STACKS, kind in SEQUENCE_NEURONS
        is_open = is_layer and is_stack and beyond_forward(module, SpikeCount) is None
        if is_layer and not is_open:
            layers.append((name, module))
        again = id(module) in seen
        if again and not (is_stack or has_no_state):
            mixes = beyond_forward(module, SpikeCount) or not_per_sample(module)
            shared = shared or (name if mixes else None)
        seen.add(id(module))
        if kind in NORMS and in_training(module) and not again:
            statistics = {id(buffer) for buffer in module._buffers.values() if buffer is not None}
            shared = shared or (name if seen & statistics else None)
            seen |= statistics
        if is_stack or not (again or has_no_state):
            for key, inner in reversed(module._modules.items()):
                pending.append((f"{name}.{key}", inner, is_open))
    return layers, shared


def _log_oddities(layers: list[Named], ways: list[Way], batch_first: bool) -> None:
    """Log, once for each cell, why it runs step by step, or that the stack exchanges its axes.

    A Leaky is logged if it is snnTorch's.
    """
    for (name, layer), way in zip(layers, ways, strict=True):
        oddities = []
        theirs = way.reason is Reason.THEIRS
        slow = theirs or (isinstance(layer, CELL) and way.reason is not Reason.TO_STACK)
        if way.kind == "step" and slow:
            oddities.append(f"runs step by step: {way.reason}")
        if not batch_first and isinstance(layer, SConv2dLSTM) and layer.batch_first:
            oddities.append(
                "has batch_first=True, and the stack, whose setting counts, has batch_first=False: "
                "x is read as (T, N, ...)"
            )
        for text in oddities:
            log_once(layer, text, "layer %s (%s) of a stack %s", name, type(layer).__name__, text)


def _once(layers: list[Named], x: Tensor, ways: list[Way], traced: bool) -> Tensor:
    """Run the leading layers whose results are the same for all steps of a constant x."""
    for name, layer in layers:
        way = way_of(name, layer, x, x.dim() - 1, len(x), traced)
        if not (way.alone and way.safe):
            break
        step = _call_of(layers, len(ways), way)(x[0])
        x = step.expand(len(x), *step.shape)
        ways.append(Way("once", Reason.CONSTANT))
    return x


def _step_by_step(
    layers: list[Named],
    x: Tensor,
    lengths: Tensor | None,
    by_step: str | None,
    ways: list[Way],
    way: Way,
    traced: bool,
) -> Any:
    """Run layers over (T, N, ...) step by step, each step through all of them.

    They are the next layer, whose `way` is given, and those that also go step by step behind it.
    """
    repeated = bool(ways) and ways[-1].kind == "once"  # no layer may modify a step of x
    outs: list[Any] = list(x.unbind(0))  # the gradient of each x[t] would be as large as x
    calls: list[tuple[str, bool, Callable[[Tensor], Any]]] = []
    before = ""
    for name, layer in layers[len(ways) :]:
        first = first_item(before, outs[0])
        if calls:
            way = way_of(name, layer, first, first.dim(), len(outs), traced, by_step, one=True)
        if way.kind != "step":
            break
        ways.append(way)
        call: Any = _call_of(layers, len(ways) - 1, way)
        if isinstance(layer, Sequential):
            call = partial(_one_step, layer)
        if lengths is not None and not way.alone:
            call = Padded(layer, call, lengths)
        calls.append((before, way.safe, call))
        outs[0], before = call(first if way.safe else unshared(first, repeated)), name
    for t in range(1, len(outs)):
        for previous, safe, call in calls:
            given = first_item(previous, outs[t])
            outs[t] = call(given if safe else unshared(given, repeated))
    return joined(before, outs)


def _call_of(layers: list[Named], at: int, way: Way) -> Callable[[Tensor], Any]:
    """The function that runs a layer: its call, or our class's forward."""
    layer = layers[at][1]
    if way.ours is Conv2d and neurons_alone_read(layers, at):
        return partial(Conv2d.convolved, layer, for_neurons=True)
    return layer if way.ours is None else partial(way.ours.forward, layer)


def _one_step(layer: Sequential, x: Tensor) -> Any:
    """Call a stack that carries hooks, and so takes sequences, with one step (N, ...)."""
    out = layer(x.unsqueeze(int(layer.batch_first)))
    return mapped(lambda item: item[0], exchanged(out) if layer.batch_first else out)
