"""The backend of torch.compile, and the log of what became of a loop."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..calls.entries import BoundedDict
from ..compat.torch_private import graph_break, graph_number
from ..dispatch.reasons import Reason, tell_of_kernels
from ..networks.layers import LayerReport

try:
    from ..native.operators import IN_GRAPH
except ImportError as error:
    raise ImportError(
        'backend "snnlstm" needs the compiled core, and python -m snnlstm says why it is missing'
    ) from error
from . import rules
from .functions import make_functions
from .layout import channels_last, for_neurons
from .rewrite import Writer
from .steps import Loop

logger = logging.getLogger("snnlstm")

OLDEST = 2, 13
"""The oldest torch whose graphs are known to have the form that is read here."""


def compile_loop(
    gm: GraphModule,
    example_inputs: Sequence[Tensor],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend "snnlstm" of torch.compile: a loop over steps runs as sequences.

    ``torch.compile(net, backend="snnlstm")`` finds it by its name. A cell or Leaky that the loop
    calls once a step gets all steps in one call, and so do layers that treat every sample by
    itself. A call that is the same in each step runs once. The log (INFO) tells what became of
    each layer, and warns if a cell or Leaky still runs step by step.

    Parameters
    ----------
    gm : GraphModule
        The graph that torch.compile has recorded.
    example_inputs : sequence of Tensor
        Its inputs.
    options, mode : None
        Accepted for torch.compile; this backend has neither options nor modes.

    Raises
    ------
    RuntimeError
        If torch is older than 2.13.
    ValueError
        If an option or a mode is given.
    """
    latest = import_module(__name__).compile_loop
    if latest is not compile_loop:  # torch keeps the one that was there at its first use
        return latest(gm, example_inputs, options=options, mode=mode)
    if options or mode is not None:
        given = f"options={options}" if options else f"mode={mode!r}"
        raise ValueError(f'backend "snnlstm" takes neither options nor a mode, got {given}')
    version = torch.__version__
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        needed = ".".join(map(str, OLDEST))
        raise RuntimeError(f'backend "snnlstm" needs torch {needed} or newer, got {version}')
    loop = Loop(gm.graph)
    graph = Writer(loop, IN_GRAPH, channels_last(loop), for_neurons(loop)).write()
    _log(loop, gm)
    leaky = next((node for node in loop.nodes if node.target is rules.LEAKY_OPERATOR), None)
    if leaky is not None:
        tell_of_kernels(rules.value_of(leaky.args[0]).device.type)
    return make_functions(GraphModule(gm, graph)).forward


# ---- the log ------------------------------------------------------------------------------------

_BY_SIZE = Reason.LARGE_STATE, Reason.TO_STACK, Reason.MEMORY  # the loop is better
_NEURONS = "SConv2dLSTM", "SConv1dLSTM", "Leaky"
_graphs: BoundedDict[Any, list[dict[str, Any]]] = BoundedDict()  # what each had, by loop
_told: BoundedDict[Any, None] = BoundedDict()  # why graphs have one step, and of which layer


@dataclass
class _Layer:
    """A module of the network, and the node of each call that has its result."""

    name: str
    kind: str
    is_neuron: bool
    """Whether it is a cell or a Leaky, of either library."""
    is_ours: bool
    calls: list[Node]


def _layers(loop: Loop) -> Iterator[_Layer]:
    """The layers of a loop, in the order of their first calls."""
    modules: dict[str, tuple[Any, list[Node]]] = {}
    for node in loop.nodes:
        stack = list(node.meta.get("nn_module_stack", {}).values())
        if node.target in rules.STATEFUL or (stack and node.target is not rules.ITEM):
            path, kind = stack[-1] if stack else ("", None)
            path = re.sub(r"\.\w+\.__self__$", "", path)  # a method that the layer keeps
            modules.setdefault(path, (kind, []))[1].append(node)
    for path, (kind, nodes) in modules.items():
        operators = [node for node in nodes if node.target in rules.STATEFUL]
        bases = getattr(kind, "__mro__", ())
        name = _name_of(path)
        if kind is None:
            name, kind = _called()
        title = getattr(kind, "__name__", "neuron")
        is_neuron = bool(operators) or any(base.__name__ in _NEURONS for base in bases)
        is_ours = bool(operators) or any(base.__module__.startswith("snnlstm.") for base in bases)
        calls = operators or [node for node in nodes if node.target == nodes[-1].target]
        if name or is_neuron:
            yield _Layer(name or title, title, is_neuron, is_ours, calls)


def _name_of(path: str) -> str:
    """The name of a module in its network, by its path as torch.compile records it."""
    name = re.sub(r"_modules\['(.*?)'\]", r"\1", path)
    return re.sub(r"^[LG]\['\w+'\]\.?", "", name).replace("'", "")


def _called() -> tuple[str, Any]:
    """The name in its network, and the class, of the layer whose call is compiled by itself."""
    frame: Any = sys._getframe()
    calls = []  # of modules, the layer's own call first
    while frame is not None:
        module = frame.f_locals.get("self") if "self" in frame.f_code.co_varnames else None
        if isinstance(module, nn.Module):
            calls.append(module)
        frame = frame.f_back
    if not calls:
        return "", None
    layer = getattr(calls[0], "_orig_mod", calls[0])  # without torch.compile's wrapper
    names = [name for net in calls for name, one in net.named_modules() if one is layer]
    return names[-1].replace("_orig_mod", "").strip("."), type(layer)


def _place(node: Node) -> str:
    """Where the user's code calls a layer, as torch.compile records it."""
    return str(node.meta.get("stack_trace")).split(f'  File "{Path(__file__).parents[1]}')[0]


def _has_one_step(loop: Loop) -> bool:
    """Whether a loop of one step is recorded: it takes a sequence apart, or stacks one result."""
    for node in loop.nodes:
        piece = loop.piece(node)
        if piece is not None and rules.value_of(piece[0]).shape[piece[1]] == 1:
            return True
        if node.target is torch.stack and len(node.all_input_nodes) == 1:
            return True
    return False


def _report(loop: Loop, layer: _Layer) -> LayerReport:
    """How a layer runs in the new graph."""
    calls = layer.calls
    alone = list(dict.fromkeys(loop.same[call] for call in calls))
    runs = {loop.runs[call][0] for call in alone if call in loop.runs}
    single = [call for call in alone if call not in loop.runs]
    has_states = calls[0].target in rules.STATEFUL
    is_sequence = has_states or rules.rule_of(calls[0]) is rules.BATCH_NORMS
    reason = next((loop.reasons[call] for call in alone if call in loop.reasons), None)
    if all(rules.dropped(call) is not None for call in calls):
        kind, reason = "fold", Reason.NOTHING
    elif len(alone) == 1 < len(calls):
        kind, reason = "once", Reason.CONSTANT
    elif runs and len(runs) + len(single) == 1:
        kind, reason = ("sequence", Reason.ONE_CALL) if is_sequence else ("fold", Reason.ALONE)
        reason = Reason.PRODUCT if rules.rule_of(calls[0]) is rules.LINEAR else reason
    elif len(runs) > len(single) and not reason and (not has_states or _alternate(loop, alone)):
        kind = "sequence" if has_states else "fold"
        reason = f"{Reason.ONE_CALL} at each of {len(runs) + len(single)} places of a step"
    elif len(runs) > len(single):
        pieces = f"{len(alone)} steps in {len(runs) + len(single)} calls"
        kind, reason = "sequence", f"{pieces}: {reason or Reason.STATES}"
    else:
        kind = "step"
        if layer.is_neuron and not has_states:
            reason = Reason.PLAIN_OPERATIONS
        elif any(loop.memory[call] & loop.written for call in calls):
            reason = Reason.IN_PLACE
        elif has_states:
            reason = reason or Reason.STATES
        elif (effects := loop.effects[calls[0]]).draws and not effects.unknown:
            reason = Reason.RANDOM
        elif rules.rule_of(calls[0]) is not None:
            reason = reason or (Reason.FEEDBACK if _depends(alone[1], alone[0]) else Reason.UNALIKE)
        reason = reason or Reason.UNKNOWN.format("it")
    if calls[0] in loop.folded:
        stack = [*loop.folded[calls[0]].meta.get("nn_module_stack", {}).values()]
        before = _name_of(stack[-1][0]) if stack else ""
        reason = f"part of {before or 'the convolution before it'}"
    return LayerReport(layer.name, layer.kind, kind, reason)


def _alternate(loop: Loop, calls: Sequence[Node]) -> bool:
    """Whether calls of two runs take turns, so that neither run ends where the other begins."""
    runs = [id(loop.runs[call][0]) for call in calls if call in loop.runs]
    return len(list(groupby(runs))) > len(set(runs))


def _depends(later: Node, earlier: Node) -> bool:
    """Whether a node needs the result of another."""
    needed, seen = [later], {later}
    while needed:
        new = {node for node in needed.pop().all_input_nodes if node not in seen}
        seen |= new
        needed += new
    return earlier in seen


def _log(loop: Loop, gm: GraphModule) -> None:
    """Tell what became of each layer, and warn of neurons that run step by step."""
    layers = list(_layers(loop))
    reports = [(layer, _report(loop, layer)) for layer in layers if len(layer.calls) > 1]
    names = [layer.name for layer in layers]
    blocks = {name for name in names if any(one.startswith(f"{name}.") for one in names)}
    lines = [f"\n  {report}" for _, report in reports if report.name not in blocks]
    if lines:
        logger.info("torch.compile:%s", "".join(lines))
    neurons = [layer for layer in layers if layer.is_neuron]
    for layer in neurons:
        if not layer.is_ours:
            text = "layer %s is snntorch's %s and runs as plain operations: call snnlstm.accelerate"
            logger.warning(f"{text}(net) before torch.compile", layer.name, layer.kind)
    for layer, report in reports:
        by_size = report.reason in _BY_SIZE
        if layer.is_neuron and layer.is_ours and report.kind == "step" and not by_size:
            text = "torch.compile: layer %s (%s) stays a loop of steps: %s"
            logger.warning(text, layer.name, report.layer, report.reason)
    firsts = [(layer, layer.calls[0]) for layer in neurons if layer.is_ours]
    # An operator of a sequence has no rule.
    ours = [n for n, call in firsts if call.target in rules.STATEFUL and rules.rule_of(call)]
    counts = {len(layer.calls) for layer in ours}
    if counts == {1} and not _has_one_step(loop):
        reason = graph_break(gm) or _OUTSIDE
        key = reason, _place(ours[0].calls[0])
        if key not in _told:
            _told.keep(key, None)
            text = "torch.compile: the graph has one step of layer %s: %s"
            logger.warning(text, ours[0].name, reason)
    elif counts:
        _warn_of_graphs(ours, max(counts))
        calls = [call for layer in ours for call in layer.calls]
        small = sum(map(rules.bytes_of, calls)) <= SMALL and not any(
            map(rules.requires_grad, calls)
        )
        if max(counts) <= FEW and small:
            logger.warning(_TOO_FEW, ours[0].name, max(counts))


_OUTSIDE = (
    "the loop lies outside of what is compiled, or .backward(), .item(), print or another graph "
    "break within the loop cut it, which TORCH_LOGS=graph_breaks shows: compile the function that "
    "has the loop over steps, without these"
)


_TOO_FEW = (
    "torch.compile: the loop around layer %s, of T=%s small steps, may be faster as it is, because "
    "torch checks before each call whether its record still holds"
)
FEW, SMALL = 3, 16 << 10
"""The most steps, and the most bytes of their spikes, that may take less time than the checks."""


STEPS, BATCH, SIZES = "the number of steps", "the batch size", "the layers' sizes"


def _warn_of_graphs(layers: Sequence[_Layer], steps: int) -> None:
    """Warn of a second number of steps around layers, or of the last graph that torch makes."""
    calls, (code, graph, most) = [layer.calls[0] for layer in layers], graph_number()
    seen = _graphs.keep((code, _place(calls[0])), [])
    if graph == 1:  # also after torch.compiler.reset()
        seen.clear()
    sizes = str([(layer.name, rules.shape_of(layer.calls[0].args[3])) for layer in layers])
    batch = rules.value_of(calls[0].args[0]).shape[:1]  # a number has none
    seen.append({STEPS: steps, BATCH: [*map(str, batch)], SIZES: sizes})
    lengths = [one[STEPS] for one in seen if one[SIZES] == sizes]
    if len(set(lengths)) == 2 and steps not in lengths[:-1]:
        logger.warning(
            "torch.compile: the loop around layer %s is compiled anew for each number of steps, by "
            "now %s; after %s graphs torch runs it uncompiled: pad all inputs to one number of "
            "steps, or let snnlstm.unroll run the layers",
            layers[0].name, " and ".join(map(str, sorted(set(lengths)))), most,
        )  # fmt: skip
    elif graph == most and len(set(lengths)) == 1:
        values = {cause: dict.fromkeys(str(one[cause]) for one in seen) for cause in seen[0]}
        causes = [cause for cause in values if len(values[cause]) > 1]
        logger.warning(
            "torch.compile: the loop around layer %s has %s graphs, which is torch's limit: calls "
            "that fit none of them run uncompiled from now on. The graphs differ in %s. Equal "
            "shapes need fewer (drop_last=True in a DataLoader), and torch.compiler.reset() before "
            "each network of a sweep makes room",
            layers[0].name, most, " and ".join(causes) or "other properties than shapes",
        )  # fmt: skip
