"""A stack of layers over whole sequences, whose cells get all steps in one call."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .call import SIZES, checked_lengths, repeated, silenced
from .layers import (
    CELL,
    PER_SAMPLE,
    Frozen,
    LayerReport,
    changed,
    may_write,
    not_per_sample,
    report_of,
)
from .native import pool
from .sconv2dlstm import SConv2dLSTM
from .snntorch import SEQUENCE_NEURONS
from .spec import flag

__all__ = ["LayerReport", "Sequential", "unroll"]

logger = logging.getLogger("snnlstm")

Named = tuple[str, nn.Module]  # a layer and its name


class Sequential(nn.Sequential):
    """Time-distributed ``nn.Sequential``: takes and returns sequences, (T, N, ...).

    Equal to a loop over the steps that calls the layers one after the other, gradients and the
    states at the end included, but each cell gets all steps in one call. After a call
    :attr:`report` shows which of three kinds of calls each layer got:

    - *sequence*: :class:`SConv2dLSTM`, and snnTorch's StateLeaky, LinearLeaky, AssociativeLeaky and
      LeakyParallel, one call for all steps. These neurons keep no state: each call starts anew;
    - *fold*: layers of torch that treat every sample alone, one call with all steps as one batch:
      Conv1d, Conv2d, Linear, Flatten, Identity, ReLU, LeakyReLU, Sigmoid, Tanh, MaxPool1d,
      MaxPool2d, AvgPool1d, AvgPool2d, AdaptiveAvgPool2d, GroupNorm, and in evaluation BatchNorm1d,
      BatchNorm2d, Dropout and Dropout2d;
    - *step*: everything else, one call for each step: snnTorch's other neurons, batch norm in
      training (its statistics are those of one step), dropout in training (a new mask for every
      step), whatever carries hooks, modules that are not known here, and on the CPU layers of
      which one step is larger than 128 KiB. Several such layers run together: all of them for one
      step, then for the next.

    Each layer of a stack within the stack has a kind of its own. If a layer returns a tuple, such
    as ``spk, syn, mem``, the next layer gets its first item. The last layer's tuple is returned,
    with every item stacked over time.

    ``snnlstm.Sequential(*net)`` makes one from the layers of an ``nn.Sequential``; :meth:`of` keeps
    their names as well, where they have any. States start from the stored ones, as in step
    calls: reset them before every new sequence, for example with
    ``snntorch.utils.reset(net)``, after ``import snntorch.utils``, or with
    :meth:`SConv2dLSTM.reset_hidden`.

    Layers that share a state, such as one cell in two places, cannot be run one after the
    other: the steps are then taken one by one, and the log says so. If there are several random
    layers (dropout), they may draw the same random numbers in another order than in the loop.

    Parameters
    ----------
    *layers : nn.Module
        As of an nn.Sequential; a dictionary of named layers works, too.
    batch_first : bool, default False
        Sequences are (N, T, ...), those that are returned too. The setting of the outermost stack
        counts.

    Attributes
    ----------
    report : tuple of LayerReport, or None
        How each layer went in the last call; None before it, and under torch.compile.

    Examples
    --------
    >>> net = snnlstm.Sequential(
    ...     snnlstm.SConv2dLSTM(2, 8, 3, threshold=0.1, max_pool=2, init_hidden=True),
    ...     nn.Flatten(),
    ...     nn.Linear(8 * 16 * 16, 10),
    ... )
    >>> net(torch.rand(20, 4, 2, 32, 32)).shape  # (T, N, C, H, W) -> (T, N, 10)
    torch.Size([20, 4, 10])
    """

    report: tuple[LayerReport, ...] | None = None

    def __init__(self, *layers: Any, batch_first: bool = False) -> None:
        one = layers[0] if len(layers) == 1 else None
        _check_modules(one.values() if isinstance(one, dict) else layers)
        super().__init__(*layers)
        self.batch_first: bool = flag("batch_first", batch_first)

    def __getitem__(self, index: Any) -> Any:
        found: Any = super().__getitem__(index)
        if isinstance(index, slice):
            found.batch_first = self.batch_first
        return found

    def __add__(self, other: nn.Sequential) -> Sequential:
        return type(self).of(super().__add__(other), self.batch_first)

    def __mul__(self, other: int) -> Sequential:
        return type(self).of(super().__mul__(other), self.batch_first)

    def extra_repr(self) -> str:
        """Arguments that differ from their defaults."""
        return "batch_first=True" if self.batch_first else ""

    @classmethod
    def of(cls, net: nn.Sequential, batch_first: bool = False) -> Sequential:
        """Make one with the layers, names and mode of `net`, so with the same state_dict.

        Hooks on `net` itself are not taken over.

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

        x (T, N, ...), or (N, T, ...) with `batch_first`, `lengths`, the result and the errors are
        those of :func:`unroll`.
        """
        out, report = _over_time(x, self._modules.items(), self.batch_first, lengths)
        if not torch.compiler.is_compiling():
            self.report = report
        return out


def unroll(x: Tensor, *layers: nn.Module, batch_first: bool = False, lengths: Any = None) -> Any:
    """Run layers over a sequence, as :class:`Sequential` does, without making a module of them.

    For the ``forward`` of a network that keeps its layers under names of its own: nothing is
    registered, so the network's state_dict stays as it is. ::

        def forward(self, x):  # (T, N, C, H, W)
            return snnlstm.unroll(x, self.lstm1, self.lstm2, nn.Flatten(), self.fc, self.lif)

    With ``init_hidden=False`` a cell or neuron goes on from its stored state: reset it first.
    ``unroll`` keeps nothing, so it has no report: ``snnlstm.Sequential(*layers)`` makes a module
    of the same layers, whose :attr:`Sequential.report` tells how each of them went.

    Parameters
    ----------
    x : Tensor
        (T, N, ...), or (N, T, ...) with `batch_first`; T at least 1.
    *layers : nn.Module
        In order. If a layer returns a tuple, the next one gets its first item.
    batch_first : bool, default False
        Sequences are (N, T, ...), those that are returned too.
    lengths : Tensor or list of int, optional
        (N,) ints, the steps of each sample, between 0 and T. Behind its last step a sample's
        outputs are 0, and its states, of cells and of neurons, stay as they are. Numbers on a GPU
        are not checked, but clamped.

    Returns
    -------
    Tensor or tuple of Tensor
        The last layer's outputs of all steps, stacked. A number a step is (T,), also with
        `batch_first`.

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
    >>> cell = snnlstm.SConv2dLSTM(2, 8, 3, threshold=0.1, max_pool=2)
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
            raise TypeError(
                f"layers must be modules, such as nn.ReLU() in the place of torch.relu, got {name}"
            )


# ---- running ----------------------------------------------------------------------------------


def _over_time(
    x: Tensor, modules: Iterable[Named], batch_first: bool, lengths: Any
) -> tuple[Any, tuple[LayerReport, ...]]:
    """Run the layers over a sequence; returns their results, and how each layer went."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dim() < 2 or x.shape[1 if batch_first else 0] == 0:
        shape = "(N, T, ...)" if batch_first else "(T, N, ...)"
        raise ValueError(f"x must have shape {shape} with at least one step, got {tuple(x.shape)}")
    x = x.transpose(0, 1) if batch_first else x
    traced = torch.compiler.is_compiling()
    if lengths is not None:
        lengths = checked_lengths(lengths, x.shape[0], x.shape[1], x.device, traced)
    layers = list(_layers(modules, ""))
    shared = _shared_state(modules)
    # Steps are then taken one by one, in each of which the layers have the order of the loop.
    reason = None if shared is None else f"layer {shared} is in several places and may keep a state"
    out, reports = _run(layers, x, lengths, reason)
    if not traced:
        _log_slow(layers, reports)
    return (_exchanged(out) if batch_first else out), tuple(reports)


def _layers(modules: Iterable[tuple[str, Any]], prefix: str) -> Iterator[Named]:
    """Yield names and layers in order; the layers of a plain nn.Sequential take its place."""
    for name, layer in modules:
        if _is_stack(layer) and changed(layer) is None:
            yield from _layers(layer._modules.items(), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", layer


def _is_stack(layer: nn.Module) -> bool:
    """Whether a call of the layer is no more than one call of each of its layers, in order."""
    return type(layer).forward in (nn.Sequential.forward, Sequential.forward)


def _shared_state(modules: Iterable[Named]) -> str | None:
    """Name of a layer that occurs twice and may keep a state; None if there is none."""
    seen: set[int] = set()
    for first, layer in modules:
        without: set[int] = set()  # a state
        for name, module in layer.named_modules(prefix=first, remove_duplicate=False):
            if type(module) in SEQUENCE_NEURONS:
                without.update(map(id, module.modules()))
            again = id(module) in seen - without
            seen.add(id(module))
            if again and not _is_stack(module) and (changed(module) or not_per_sample(module)):
                return name
    return None


_logged: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def _log_slow(layers: list[Named], reports: list[LayerReport]) -> None:
    """Log, once for each cell and reason, that a cell goes step by step."""
    for (name, layer), report in zip(layers, reports, strict=True):
        if report.kind != "step" or not isinstance(layer, CELL):
            continue
        seen = _logged.setdefault(layer, set())
        if report.reason not in seen:
            seen.add(report.reason)
            message = "Sequential runs layer %s (%s) step by step: %s"
            logger.warning(message, name, report.layer, report.reason)


def _run(
    layers: list[Named], x: Tensor, lengths: Tensor | None, by_step: str | None
) -> tuple[Any, list[LayerReport]]:
    """Run the layers over (T, N, ...); returns what the last one returns, and all reports.

    `by_step` is the reason to take all steps one by one, if there is one.
    """
    out: Any = x
    reports: list[LayerReport] = []
    while rest := layers[len(reports) :]:
        name, layer = rest[0]
        report = _report_of(name, layer, x[0], by_step)
        if report.kind == "sequence":
            reports.append(report)
            out = _sequence(name, layer, x, lengths, last=len(rest) == 1)
        else:
            if lengths is not None and not reports:
                x = silenced(x, lengths)  # whatever the padding holds, no gradient may become NaN
            out = _run_alike(report, rest, x, lengths, by_step, reports)
        if len(reports) < len(layers):
            x = _first_item(layers[len(reports) - 1][0], out)
    if lengths is not None and reports and reports[-1].reason in PER_SAMPLE:
        out = silenced(out, lengths)
    return out, reports


def _report_of(
    name: str, layer: nn.Module, x: Tensor, by_step: str | None, steps: int = 1
) -> LayerReport:
    """How a layer goes through a sequence, of which x (N, ...) is a step, or several as a batch."""
    if by_step is not None:
        if type(layer) in SEQUENCE_NEURONS:
            kind = type(layer).__name__
            raise ValueError(f"layer {name} ({kind}) needs whole sequences, but {by_step}")
        return LayerReport(name, type(layer).__name__, "step", by_step)
    if isinstance(layer, Sequential):  # a stack that carries hooks
        return LayerReport(name, type(layer).__name__, "sequence", "it takes sequences")
    cached = x.device.type == "cpu" and not torch.compiler.is_compiling()
    return report_of(name, layer, x.dim(), x.nbytes // steps if cached else 0)


def _run_alike(
    report: LayerReport,
    layers: list[Named],
    x: Tensor,
    lengths: Tensor | None,
    by_step: str | None,
    reports: list[LayerReport],
) -> Any:
    """Run the first layer, and those after it of its kind, over (T, N, ...).

    All of them run over all steps as one batch, or for one step, then for the next.
    """
    kind, fold = report.kind, report.kind == "fold"
    outs: list[Any] = [x.flatten(0, 1)] if fold else list(_steps_of(x))
    calls: list[tuple[str, nn.Module, Callable[[Tensor], Any]]] = []
    before = ""
    for name, layer in layers:
        first = _first_item(before, outs[0])
        if calls:
            report = _report_of(name, layer, first, by_step, len(x) if fold else 1)
        if report.kind != kind:
            break
        reports.append(report)
        function: Callable[[Tensor], Any] = layer
        if isinstance(layer, Sequential):
            function = partial(_one_step, layer)
        if lengths is not None and report.reason not in PER_SAMPLE:
            function = Frozen(layer, function, lengths)
        calls.append((before, layer, function))
        outs[0], before = function(_own(first, layer)), name
    for t in range(1, len(outs)):
        for previous, layer, call in calls:
            outs[t] = call(_own(_first_item(previous, outs[t]), layer))
    return outs[0].unflatten(0, x.shape[:2]) if fold else _joined(before, outs)


def _one_step(layer: Sequential, x: Tensor) -> Any:
    """Call a stack that carries hooks, and so takes sequences, with one step (N, ...)."""

    def step_of(out: Any) -> Any:
        return out[0] if isinstance(out, Tensor) else tuple(map(step_of, out))

    out = layer(x.unsqueeze(int(layer.batch_first)))
    return step_of(_exchanged(out) if layer.batch_first else out)


def _own(x: Tensor, layer: nn.Module) -> Tensor:
    """A copy of a view of a tensor, if the layer may write to it; else x.

    Autograd refuses to let a layer change one of several views in place; without it no copy is
    made, as in the loop.
    """
    view = torch.is_grad_enabled() and (torch.compiler.is_compiling() or x._is_view())
    return x.clone() if view and may_write(layer) else x


def _first_item(name: str, out: Any) -> Tensor:
    """What the next layer gets of what layer `name` returned: of a tuple, the first item."""
    while isinstance(out, tuple | list) and out:
        out = out[0]
    return out if isinstance(out, Tensor) else _joined(name, [out])


def _joined(name: str, outs: list[Any] | tuple[Any, ...]) -> Any:
    """What layer `name` returned at all steps as one: tensors stacked, tuples item by item."""
    first = outs[0]
    if all(isinstance(out, Tensor) for out in outs):
        for out in outs:
            if out.shape != first.shape:
                raise ValueError(
                    f"layer {name} must return tensors of one shape at every step, "
                    f"got {tuple(first.shape)} and {tuple(out.shape)}"
                )
        return torch.stack(outs)
    if all(isinstance(out, tuple | list) and len(out) == len(first) > 0 for out in outs):
        return tuple(_joined(name, items) for items in zip(*outs, strict=True))
    odd = next(out for out in outs if not isinstance(out, Tensor))
    raise TypeError(
        f"layer {name} must return tensors, or tuples of as many tensors, at every step, "
        f"got {type(odd).__name__}"
    )


def _sequence(name: str, layer: Any, x: Tensor, lengths: Tensor | None, last: bool) -> Any:
    """Call a layer that takes sequences: a cell, a neuron, or a Sequential that carries hooks."""
    options: dict[str, Any] = {} if lengths is None else {"lengths": lengths}
    if isinstance(layer, SConv2dLSTM):
        _check_step(name, layer, x, f"{layer.in_channels}, {SIZES[layer._dims]}", layer._dims + 2)
        # The states of every step are recorded where they are returned.
        options["record"] = last and (layer.output or not layer.init_hidden)
    elif type(layer) in SEQUENCE_NEURONS:
        _check_step(name, layer, x, "C", 2)
        if lengths is None:
            return layer(x)
        out = layer(silenced(x, lengths))
        if isinstance(out, Tensor):
            return silenced(out, lengths)
        spk, mem = out
        wide = repeated(mem[..., None, None], mem.new_zeros(()), lengths)
        return silenced(spk, lengths), wide[..., 0, 0]
    if layer.batch_first:
        return _exchanged(layer(_exchanged(x), **options))
    return layer(x, **options)


def _check_step(name: str, layer: Any, x: Tensor, rest: str, dim: int) -> None:
    """Check that (T, N, ...) has the dimensions of a sequence for a layer that takes sequences."""
    if x.dim() != dim + 1:
        raise ValueError(
            f"x must be a sequence of steps (N, {rest}) for layer {name} "
            f"({type(layer).__name__}), got steps of shape {tuple(x.shape[1:])}"
        )


def _exchanged(out: Any) -> Any:
    """Every tensor with its first two dimensions exchanged; (T,), a number a step, has no batch."""
    if isinstance(out, Tensor):
        return out.transpose(0, 1) if out.dim() > 1 else out
    return tuple(map(_exchanged, out))


# ---- gradients of large sequences -------------------------------------------------------------

MAPPED = 32 << 20
"""Bytes from which on the system maps and clears each of torch's tensors on the CPU anew."""


class _Unbind(torch.autograd.Function):
    """x.unbind(0), whose gradient lies in memory that is used again (benchmarks/NOTES.md)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, ...]:
        return x.unbind(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        if torch.is_grad_enabled() or not _plain(grads[0]):
            return torch.stack(grads)
        out = pool.empty((len(grads), *grads[0].shape), grads[0].dtype)
        return torch.stack(grads, out=out)


def _steps_of(x: Tensor) -> Sequence[Tensor]:
    """The steps of (T, N, ...). The gradient of each x[t] would be as large as x."""
    graph = torch.is_grad_enabled() and x.requires_grad
    return _Unbind.apply(x) if graph and _plain(x) and x.nbytes > MAPPED else x.unbind(0)


def _plain(x: Tensor) -> bool:
    """Whether eager torch computes x on the CPU, and no transform or tracer sees what happens."""
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._functorch.is_legacy_batchedtensor(x)
    )
