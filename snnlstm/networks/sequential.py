"""A stack of layers over whole sequences, whose cells get all steps in one call."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..calls.call import check_transforms
from ..calls.lengths import checked_lengths, mask_padding
from ..calls.spec import flag
from ..compat.snntorch import SEQUENCE_NEURONS
from ..dispatch.path import log_once
from ..neurons.attributes import CELL
from ..neurons.sconv2dlstm import SConv2dLSTM
from .layers import (
    CONSTANT,
    ONE_CALL,
    PER_SAMPLE,
    THEIRS,
    TO_STACK,
    Frozen,
    LayerReport,
    changed,
    counted_bytes,
    exchanged,
    first_item,
    in_training,
    is_constant,
    joined,
    mapped,
    not_per_sample,
    report_of,
    stack,
    too_large,
    unshared,
    whole_sequence,
)
from .pool2d import faster

Named = tuple[str, nn.Module]  # a layer and its name

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
      Conv1d, Conv2d, Linear, Flatten, Identity, ReLU, LeakyReLU, Sigmoid, Tanh, MaxPool1d,
      MaxPool2d, AvgPool1d, AvgPool2d, AdaptiveAvgPool2d, GroupNorm, and in evaluation BatchNorm1d,
      BatchNorm2d, Dropout and Dropout2d;
    - *step*: all other layers, one call for each step: snnTorch's other neurons, dropout in
      training (a new mask for every step), layers with hooks, modules that are not known here, and
      on the CPU layers whose input or output at one step exceeds 1 MiB, or 128 KiB if it exceeds 8
      MiB at all steps (but for a Linear). Adjacent ones all run one step, then the next;
    - *once*: the leading layers of kind *fold*, however large, if all steps are the same image,
      ``x.expand(T, ...)``, without `lengths`: one call with one step. x must require no gradient,
      and the layers must carry no hooks and not work in place.

    The layers of a stack within the stack are reported one by one. If a layer returns a tuple, such
    as ``spk, syn, mem``, the next layer gets its first item. The last layer's tuple is returned,
    with every item stacked over time.

    ``snnlstm.Sequential(*net)`` makes one from the layers of an ``nn.Sequential``; :meth:`of` also
    keeps their names. Cells and neurons start from their stored states, as in step calls: reset
    them before every new sequence with :meth:`SConv2dLSTM.reset_hidden`, or with
    ``snntorch.utils.reset(net)`` after ``import snntorch.utils``.

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
        if not _is_stack(net) or "forward" in net.__dict__:
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
        out, report = _over_time(x, self._modules.items(), self.batch_first, lengths)
        if not torch.compiler.is_compiling():
            self.report = report
        return out


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
    _check_modules(layers)
    named = [(str(position), layer) for position, layer in enumerate(layers)]
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
    x: Tensor, modules: Iterable[Named], batch_first: bool, lengths: Any
) -> tuple[Any, tuple[LayerReport, ...]]:
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
    layers, shared = list(_layers(modules, "")), _shared_state(modules)
    # A shared state must change in the order of the loop, so all layers then run step by step.
    by_step = shared and f"layer {shared} is in several places and may keep a state"
    reports: list[LayerReport] = []
    if lengths is None and by_step is None and is_constant(x):
        x = _once(layers, x, reports)
    out, before = x, ""
    batch: torch.Size | None = None  # (T, N) while `out` has all steps as one batch
    while rest := layers[len(reports) :]:
        name, layer = rest[0]
        x = first_item(before, out)
        whole = x if batch is None else x.unflatten(0, batch)
        report = report_of(name, layer, whole, by_step)
        skips = report.kind == "sequence" and not in_training(layer)
        if lengths is not None and not reports and not skips:
            whole = mask_padding(whole, lengths)  # a NaN in the padding must not reach a gradient
        if report.kind == "step":
            out, batch = _step_by_step(rest, whole, lengths, by_step, reports), None
        elif report.kind == "sequence":
            out, batch = whole_sequence(name, layer, whole, lengths, last=len(rest) == 1), None
            reports.append(report)
        else:
            x = whole.flatten(0, 1) if batch is None else x
            out, batch = faster(layer)(unshared(x, layer, x.stride(0) == 0)), whole.shape[:2]
            reports.append(report)
        before = reports[-1].name
    if batch is not None:
        out = out.unflatten(0, batch)
    if reports and reports[-1].kind == "once":
        out = stack([out[0]] * len(out))  # the caller may write to single steps
    if lengths is not None and reports and reports[-1].reason in PER_SAMPLE:
        out = mask_padding(out, lengths)
    if not traced:
        _log_oddities(layers, reports, batch_first)
    return (exchanged(out) if batch_first else out), tuple(reports)


def _layers(modules: Iterable[tuple[str, Any]], prefix: str) -> Iterator[Named]:
    """Yield names and layers in order; the layers of a plain nn.Sequential take its place."""
    for name, layer in modules:
        if _is_stack(layer) and changed(layer) is None:
            yield from _layers(layer._modules.items(), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", layer


def _is_stack(layer: nn.Module) -> bool:
    """Whether a call of the layer merely calls each of its layers once, in order."""
    return type(layer).forward in (nn.Sequential.forward, Sequential.forward)


def _shared_state(modules: Iterable[Named]) -> str | None:
    """Name of a layer that occurs twice and may keep a state; None if there is none."""
    seen: set[int] = set()
    for first, layer in modules:
        without: set[int] = set()  # ids of modules that keep no state
        for name, module in layer.named_modules(prefix=first, remove_duplicate=False):
            if type(module) in SEQUENCE_NEURONS:
                without.update(map(id, module.modules()))
            repeats = id(module) in seen - without
            seen.add(id(module))
            if repeats and not _is_stack(module) and (changed(module) or not_per_sample(module)):
                return name
    return None


def _log_oddities(layers: list[Named], reports: list[LayerReport], batch_first: bool) -> None:
    """Log, once for each cell, why it runs step by step, or that the stack exchanges its axes.

    A Leaky is logged if it is snnTorch's.
    """
    for (name, layer), report in zip(layers, reports, strict=True):
        oddities = []
        slow = report.reason == THEIRS or (isinstance(layer, CELL) and report.reason != TO_STACK)
        if report.kind == "step" and slow:
            oddities.append(f"runs step by step: {report.reason}")
        if not batch_first and isinstance(layer, SConv2dLSTM) and layer.batch_first:
            oddities.append(
                "has batch_first=True, and the stack, whose setting counts, has batch_first=False: "
                "x is read as (T, N, ...)"
            )
        for text in oddities:
            log_once(layer, text, "layer %s (%s) of a stack %s", name, report.layer, text)


def _once(layers: list[Named], x: Tensor, reports: list[LayerReport]) -> Tensor:
    """Run the leading layers whose results are the same for all steps of a constant x."""
    for name, layer in layers:
        mixing = changed(layer) or not_per_sample(layer, x.dim() - 1)
        if mixing is not None or getattr(layer, "inplace", False):
            break
        step = faster(layer)(x[0])
        x = step.expand(len(x), *step.shape)
        reports.append(LayerReport(name, type(layer).__name__, "once", CONSTANT))
    return x


def _step_by_step(
    layers: list[Named],
    x: Tensor,
    lengths: Tensor | None,
    by_step: str | None,
    reports: list[LayerReport],
) -> Any:
    """Run the leading layers that go step by step over (T, N, ...), each step through all."""
    repeated = bool(reports) and reports[-1].kind == "once"  # no layer may modify a step of x
    outs: list[Any] = list(x.unbind(0))  # the gradient of each x[t] would be as large as x
    calls: list[tuple[str, nn.Module, Callable[[Tensor], Any]]] = []
    before = ""
    for name, layer in layers:
        first = first_item(before, outs[0])
        report = report_of(name, layer, first, by_step, steps=len(outs))
        if calls and report.reason == ONE_CALL and too_large(counted_bytes(first)):
            report = replace(report, kind="step", reason=TO_STACK)
        if report.kind != "step":
            break
        reports.append(report)
        call = faster(layer)
        if isinstance(layer, Sequential):
            call = partial(_one_step, layer)
        if lengths is not None and report.reason not in PER_SAMPLE:
            call = Frozen(layer, call, lengths)
        calls.append((before, layer, call))
        outs[0], before = call(unshared(first, layer, repeated)), name
    for t in range(1, len(outs)):
        for previous, layer, call in calls:
            outs[t] = call(unshared(first_item(previous, outs[t]), layer, repeated))
    return joined(before, outs)


def _one_step(layer: Sequential, x: Tensor) -> Any:
    """Call a stack that carries hooks, and so takes sequences, with one step (N, ...)."""
    out = layer(x.unsqueeze(int(layer.batch_first)))
    return mapped(lambda item: item[0], exchanged(out) if layer.batch_first else out)
