"""Leaky computes what snnTorch's layer does in each way to run it, whatever its options and inputs.

A test runs a row of ROWS in one of WAYS with each reset mechanism, and two compiled graphs have all
rows. Spikes and mem of float32 equal snnTorch's by bits. Gradients are compared three times: those
of the kernels, those of a pass that can be differentiated again, and second ones. In the place of
snnTorch, whose reset by an infinite threshold is NaN, stands a formula.
"""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from itertools import product
from typing import Any, NamedTuple

import pytest
import snntorch
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

import snnlstm
from snnlstm.calls.spec import FINITE
from snnlstm.compat.snntorch import recognise_surrogate
from snnlstm.surrogate import NONE
from tests.conftest import Backend, _backends
from tests.shared.cases import IN_SNNTORCH, laid_out
from tests.shared.cpu_kernels import native, needs_core
from tests.shared.helpers import close
from tests.shared.leaky import (
    F64,
    LEARN,
    PLAIN,
    RESETS,
    T,
    by_steps,
    currents,
    foreign,
    leaky_twins,
)

if native is not None:
    from snnlstm.native import operators

BYPASS = snntorch.Leaky._surrogate_bypass
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
INF, NAN = torch.inf, torch.nan

# ---- what a user can vary ------------------------------------------------------------------------


class Row(NamedTuple):
    """These are a layer, its inputs, and the loss that is differentiated."""

    options: dict[str, Any]  # of the layer, whose beta and threshold are learned unless these say
    shape: tuple[int, ...] = (2, 3, 4, 5)
    dtype: torch.dtype = F32  # of x
    layout: str = "contiguous"  # of x
    real: torch.dtype | None = None  # of the layer; None: as computes x
    x: Callable[[Tensor], Tensor] = lambda x: x
    mem: Callable[[Tensor], Tensor] | None = None  # makes the first mem of a contiguous one
    wanted: str = "x mem"  # the tensors, beside the parameters, that require gradients
    through: str = "spk mem"  # the results that the loss reads
    second: bool = True  # whether snnTorch's surrogate has second derivatives
    reason: str = ""  # why no kernel runs the row
    long: bool = False  # whether the emulator runs the row only at length


def row(reason: str = "", **changes: Any) -> Row:
    """Makes a row of changes to the plain one; those that are no fields are options."""
    own = {name: changes.pop(name) for name in Row._fields if name in changes}
    return Row(LEARN | changes, reason=reason, **own)


CHANNELS, FEATURES = torch.tensor([0.3, 0.6, 0.9])[:, None, None], torch.linspace(0.1, 0.9, 5)
NEURONS = torch.linspace(0.1, 0.9, 120).reshape(2, 3, 4, 5)
PARAMETERS: dict[str, dict[str, Any]] = {
    "numbers": {"beta": 0.8, "threshold": 0.3},
    "channels": {"beta": CHANNELS},
    "features": {"beta": FEATURES},
    "thresholds": {"threshold": CHANNELS},
    "channels and features": {"beta": CHANNELS, "threshold": FEATURES},
    "two ones before": {"threshold": FEATURES[None, None]},
    "a vector of one": {"beta": torch.tensor([0.7]), "threshold": torch.tensor(0.2, dtype=F64)},
    "clamped channels": {"beta": CHANNELS * 3 - 1, "threshold": CHANNELS},
    "fewer channels": {"beta": CHANNELS[:2, None] + 0.2},
    "each neuron": {"beta": NEURONS, "threshold": NEURONS[0]},
    "each threshold": {"beta": NEURONS[0], "threshold": NEURONS},
    "rows": {"beta": NEURONS[0, :, :, :1], "threshold": NEURONS[0, :, :, :1]},
    "another order": {"beta": NEURONS, "threshold": NEURONS[:, :1, :, :1]},
}
SHAPES = [(), (7,), (3, 5), (2, 3, 5), (1, 1), (33, 67), (2, 3, 40, 50), (0, 5), (3, 0, 4), (0,)]
LAYOUTS = "channels_last", "transposed", "strided", "sliced", "expanded", "negated"
# These make the first mem of one that has all of its numbers in float16, too.
MEMS: dict[str, Any] = {
    "as x": lambda mem: mem,
    "in another layout": lambda mem: mem.transpose(1, 3).contiguous().transpose(1, 3),
    "negated": lambda mem: torch._neg_view(-mem),
    "of float16": Tensor.half,
    "of another shape": lambda mem: mem[0],
    "expanded": lambda mem: mem[:1].expand_as(mem),
}
SPECIAL = torch.tensor([NAN, INF, -INF, 0.5, -0.5])
THRESHOLDS = {
    "infinite": INF, "-infinite": -INF, "some infinite": torch.tensor([INF, 0.3, 0.3, 0.2, -INF]),
    "NaN": NAN, "some NaN": torch.tensor([0.3, NAN, 0.3, 0.1, 0.2]),
}  # fmt: skip


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


ROWS: dict[str, Row] = {
    "plain": row(),
    "spk alone": row(through="spk"),
    "mem alone": row(through="mem"),
    "a fixed threshold": row(learn_threshold=False),
    "a fixed beta": row(learn_beta=False),
    "x alone": row(learn_threshold=False, learn_beta=False, wanted="x"),
    "mem0 alone": row(learn_threshold=False, learn_beta=False, wanted="mem"),
    # What does not depend on it has no graph, so states may be carried over backward passes.
    "the threshold alone": row(learn_beta=False, wanted=""),
    "the threshold alone, no surrogate": row(learn_beta=False, wanted="", surrogate_disable=True),
    "no surrogate": row(surrogate_disable=True),
    **{f"beta {beta}": row(beta=beta) for beta in (-0.2, 0.0, 1.0, 1.3)},
    "integers for numbers": row(beta=1, threshold=1, learn_beta=False, learn_threshold=False),
    "graded": row(graded_spikes_factor=-0.5),
    "graded by 0": row(graded_spikes_factor=0.0),
    **{spike.name: row(spike_grad=getattr(snntorch.surrogate, spike.name)(), x=lambda x: x / 2,
                        second=spike.name != "heaviside")
       for spike in IN_SNNTORCH},  # snnTorch's sigmoid is NaN for very negative inputs
    **{name: row(**options) for name, options in PARAMETERS.items()},
    **{f"x {layout}, {name}": row(**PARAMETERS[name], layout=layout, long=True)
       for layout, name in product(LAYOUTS, ("numbers", "channels and features", "another order"))},
    **{f"{dtype}, {name}": row(**PARAMETERS[name], dtype=dtype, long=name != "channels")
       for dtype, name in product((F16, BF16, F64), ("numbers", "channels", "each neuron"))},
    **{f"shape {shape}": row(shape=shape, long=True) for shape in SHAPES},
    **{f"mem0 {name}": row(mem=make) for name, make in MEMS.items()},
    **{f"mem0 {name}, x channels_last": row(mem=make, layout="channels_last", long=True)
       for name, make in MEMS.items()},
    "mem0 as x, x of float16": row(mem=lambda mem: mem, dtype=F16),
    "special x": row(x=lambda x: SPECIAL.expand(T, 5), shape=(5,), through="spk"),
    **{f"mem0 -infinite, beta {beta}": row(
        beta=beta, shape=(3,), x=lambda x: x + 0.5, through="spk",
        mem=lambda mem: torch.tensor([-INF, 0.1, 0.5]))
       for beta in (-0.5, 0.5, 1.5)},
    **{f"threshold {name}": row(threshold=value, shape=(3, 5), through="spk", second=False)
       for name, value in THRESHOLDS.items()},
    "parametrized": row(beta=FEATURES / 2, threshold=FEATURES / 3),
    # What no kernel runs.
    "integers": row(f"x is of {torch.int64}", dtype=torch.int64),
    "integers beside float64": row(f"x is of {torch.bool}", dtype=torch.bool, real=F64,
                                   threshold=0.625),
    "mem0 of float64": row("mem is on another device, or of torch.float64", mem=Tensor.double),
    "mem0 of float64, x of float16": row("mem is on another device, or of torch.float64",
                                         mem=Tensor.double, dtype=F16),
    "mem0 of float64 and another shape": row(mem=lambda mem: mem[0].double()),
    "beta of float64": row("beta is of torch.float64", beta=FEATURES.double()),
    "numbers of float64, x without dimensions": row(
        "beta is of torch.float64", beta=torch.tensor(0.8, dtype=F64), shape=(),
        threshold=torch.tensor(0.3, dtype=F64)),
    "several gradeds": row("graded_spikes_factor is learned, or is not a single number",
                           graded_spikes_factor=FEATURES),
    "graded is learned": row("graded_spikes_factor is learned", learn_graded_spikes_factor=True),
    "a surrogate of a tensor": row("the surrogate is not a known one",
                                   spike_grad=snntorch.surrogate.atan(torch.tensor(3.0))),
    "beta does not broadcast": row("beta is empty, or does not broadcast to x",
                                   beta=torch.rand(2, 1, 5), shape=(3, 5)),
    "threshold does not broadcast": row("threshold is empty, or does not broadcast to x",
                                        threshold=torch.rand(2, 1, 3, 5), shape=(3, 5)),
    "threshold NaN, foreign": row("the surrogate is not a known one", threshold=NAN, shape=(3, 5),
                                  spike_grad=foreign, through="spk", second=False),
    **{name: row(reason, **PLAIN[name], shape=(3, 5)) for name, reason in {
        "foreign": "the surrogate is not a known one", "state_quant": "state_quant",
        "inhibition": "inhibition", "reset_delay": "reset_delay is False",
    }.items()},
}  # fmt: skip

# ---- what a row computes -------------------------------------------------------------------------


def reset_of(name: str) -> str:
    """Returns the reset mechanism of a row in a test that has one alone."""
    return RESETS[list(ROWS).index(name) % 3]


@contextmanager
def told(text: str) -> Iterator[None]:
    """Begins the message of an error within the block with a text."""
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{text}: {error}") from error


def is_finite(layer: Any) -> bool:
    return bool(layer.threshold.isfinite().all())


def twins(name: str, reset: str, **options: Any) -> list[Any]:
    """Makes our layer of a row, and snnTorch's."""
    one = ROWS[name]
    real = one.real or (F64 if one.dtype is F64 else F32)
    layers = leaky_twins(real, **one.options, reset_mechanism=reset, **options)
    for layer in layers if name == "parametrized" else ():
        register_parametrization(layer, "beta", Doubled())
        register_parametrization(layer, "threshold", Doubled())
    return layers


def given(name: str, from_mem: bool, count: int = T) -> dict[str, Any]:
    """Returns the tensors of `count` steps; without `from_mem` or a mem of the row, mem is None."""
    one = ROWS[name]
    x, mem = (currents(*one.shape, dtype=F64, seed=seed) for seed in (0, 9))
    x = one.x(x) if one.dtype.is_floating_point else x > 0
    x = laid_out(x.to(one.dtype), one.layout)[:count].detach()
    mem = (mem[0] / 2).half().to(F64 if one.dtype is F64 else F32)
    mem = (one.mem or MEMS["as x"])(mem) if one.mem or from_mem else None
    for tensor, wanted in ((x, "x"), (mem, "mem")):
        if tensor is not None and wanted in one.wanted.split():
            tensor.requires_grad_(tensor.is_floating_point())
    return {"x": x, "mem": mem}


def formula(layer: Any, x: Tensor, mem: Tensor | None) -> tuple[Tensor, ...]:
    """Runs the steps of a layer of snnTorch's with one of its surrogates and any threshold."""
    threshold, found = layer.threshold, []
    mem = torch.zeros_like(x[0]) if mem is None else mem
    for x_t in x:
        before = mem > threshold
        kept = torch.where(before, 0, mem) if layer.reset_mechanism == "zero" else mem
        mem = layer.beta.clamp(0, 1) * kept + x_t
        if layer.reset_mechanism == "subtract":
            mem = mem - torch.where(before, threshold, 0)
        spk = layer.spike_grad(mem - threshold) * layer.graded_spikes_factor
        found.append((spk, mem))
    return tuple(map(torch.stack, zip(*found, strict=True)))


def results(
    name: str, layer: Any, tensors: dict[str, Any], out: Any, second: bool = True
) -> dict[str, Any]:
    """Returns spk and mem, and three sets of gradients: by kernels, by formulas, and second ones.

    What the loss does not depend on has no first gradient. Without `second` there is the first set.
    """
    spk, mem = out
    found: dict[str, Any] = {"spk": spk.detach(), "mem": mem.detach()}
    found["graphs"] = torch.tensor([spk.requires_grad, mem.requires_grad])
    leaves = tensors | dict(layer.named_parameters())
    leaves = {k: leaf for k, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
    weights = currents(*spk.shape[1:], seed=1)[: len(spk)]
    losses = {"spk": (spk * weights).sum(), "mem": (mem * weights[-len(mem) :]).square().sum()}
    loss = sum(losses[through] for through in ROWS[name].through.split())
    if not leaves or not loss.requires_grad:  # type: ignore[union-attr]
        return found
    ask = partial(torch.autograd.grad, inputs=[*leaves.values()], allow_unused=True)
    kinds = {"first": ask(loss, retain_graph=True)}
    if second:
        kinds["again"] = again = ask(loss, create_graph=True, materialize_grads=True)
        total = sum(grad.double().square().sum() for grad in again)
        if ROWS[name].second and total.requires_grad:  # type: ignore[union-attr]
            kinds["second"] = ask(total, materialize_grads=True)
    for kind, grads in kinds.items():
        named = zip(leaves, grads, strict=True)
        found |= {f"{kind} {key}": grad.detach() for key, grad in named if grad is not None}
    return found


def compare(name: str, found: dict[str, Any], expected: dict[str, Any]) -> None:
    one = ROWS[name]
    narrow = one.dtype.itemsize == 2 or "float16" in name
    of_results, of_gradients = (1e-13, 1e-11) if one.dtype is F64 else (0, 1e-2 if narrow else 1e-4)
    if not any(key.startswith("again") for key in found):
        expected = {k: v for k, v in expected.items() if not k.startswith(("again", "second"))}
    for key, value in expected.items():
        error = of_results if key in ("spk", "mem", "graphs") else of_gradients
        largest = value.double().nan_to_num(0, 0, 0).abs().flatten()
        scale = float(torch.cat([largest, torch.ones(1)]).max())
        with told(key):
            close(found[key], value, atol=error * scale, rtol=0)
    assert found.keys() == expected.keys()


# ---- layer by layer ------------------------------------------------------------------------------


def stored(layer: Any, x: Tensor, mem: Tensor | None) -> tuple[Tensor, ...]:
    if mem is not None:
        layer.mem = mem
    return by_steps(layer, x)


def passed(layer: Any, x: Tensor, mem: Tensor | None) -> tuple[Tensor, ...]:
    mem, found = layer.reset_mem() if mem is None else mem, []
    for x_t in x:
        spk, mem = layer(x_t, mem)
        found.append((spk, mem))
    return tuple(map(torch.stack, zip(*found, strict=True)))


def unrolled(layer: Any, x: Tensor, mem: Tensor | None) -> tuple[Tensor, ...]:
    if mem is not None:
        layer.mem = mem
    layer.output = True
    spk, after = snnlstm.unroll(x, layer)
    assert torch.equal(layer.mem, after[-1]) or layer.mem.isnan().any()
    assert not layer.mem._is_view()
    return spk, after


def by_reference(layer: Any, x: Tensor, mem: Tensor | None) -> tuple[Tensor, ...]:
    with snnlstm.algorithm("reference"):
        return passed(layer, x, mem)


# How all steps run, and whether they start from another mem than the stored one of a new layer.
WAYS: dict[str, tuple[Callable[..., Any], bool]] = {
    "stored": (stored, False), "unrolled": (unrolled, False), "unrolled from mem": (unrolled, True),
    "passed": (passed, True), "by reference": (by_reference, True),
}  # fmt: skip


@cache
def expected(
    name: str, reset: str, from_mem: bool, device: str = "cpu", count: int = T, every: bool = True
) -> dict[str, Any]:
    """Returns the results of snnTorch's layer; without `every`, mem is that of the last step."""
    _, layer = twins(name, reset, init_hidden=not from_mem)
    tensors = given(name, from_mem, count)
    x, mem = tensors.values()
    x = x.to(layer.beta.dtype if ROWS[name].real or x.dtype is F64 else F32)
    if mem is not None:
        mem = mem.to(torch.promote_types(mem.dtype, F32))
    run = (passed if from_mem else stored) if is_finite(layer) else formula
    spk, mem = run(layer, x, mem)
    return results(name, layer, tensors, (spk, mem if every else mem[-1:]))


def calls() -> list[Any]:
    """Returns each row for each backend; the emulator runs what its kernels do."""
    found = []
    for backend, (name, one) in product(_backends(), ROWS.items()):
        emulated = backend.name == "emulator"
        if backend.native and not (emulated and one.reason):
            marks = [pytest.mark.emulator_long] if emulated and one.long else []
            found.append(pytest.param(backend, name, marks=marks, id=f"{backend.name}-{name}"))
    return found


@pytest.mark.parametrize(("backend", "name"), calls(), indirect=["backend"])
def test_each_way_computes_what_snntorch_does(backend: Backend, name: str) -> None:
    one = ROWS[name]
    resets = RESETS if not one.long or os.environ.get("SNNLSTM_LONG") else [reset_of(name)]
    for reset, (way, (run, from_mem)) in product(resets, WAYS.items()):
        kernels = way in ("stored", "unrolled")
        if (backend.name == "emulator" and not kernels) or ("unrolled" in way and not one.shape):
            continue  # a sequence has samples
        with told(f"{way}, {reset}"):
            layer, _ = twins(name, reset, init_hidden=not from_mem)
            tensors = given(name, from_mem)
            found = results(name, layer, tensors, run(layer, *tensors.values()))
            wanted = expected(name, reset, from_mem, str(backend.device))
            compare(name, found, wanted)
            reason = "set_algorithm" if way == "by reference" else one.reason
            backend.check(layer.path, native=not reason)
            assert layer.path.reason.startswith(reason)
            spk, above = wanted["spk"], wanted["mem"] > layer.threshold
            assert spk.any() or above.any() or not spk.numel() or not is_finite(layer)


# ---- operators -----------------------------------------------------------------------------------


def operated(layer: Any, x: Tensor, mem: Tensor | None, operator: Any, form: str) -> Any:
    """Runs an operator of torch.compile's graphs: once a step, or once for all of them."""
    known = NONE if layer.spike_grad is BYPASS else recognise_surrogate(layer.spike_grad)
    text = f"{layer.reset_mechanism} {(known.kind, known.p0, known.p1)}"
    text += FINITE if is_finite(layer) else ""
    given = layer.beta, layer.threshold, layer.graded_spikes_factor, text
    mem, found = x.new_zeros(0) if mem is None else mem, []
    if form == "steps":
        for x_t in x:
            spk, mem = operator(x_t, mem, *given, False, False)
            found.append((spk, mem))
        return tuple(map(torch.stack, zip(*found, strict=True)))
    spk, mem = operator(x, mem, *given, True, form == "sequence")
    return spk, mem if form == "sequence" else mem[None]


# The form of the calls, and whether they start from another mem than zeros.
FORMS = {"steps": True, "sequence": False, "sequence, last mem": True}


@needs_core
@pytest.mark.parametrize("name", [name for name, one in ROWS.items() if not one.reason])
def test_each_operator_computes_what_snntorch_does(name: str) -> None:
    """The composite one, and what our backend puts in its place."""
    reset, composite = reset_of(name), torch.ops.snnlstm.leaky.default
    in_graph = operators.IN_GRAPH[composite]()
    for (form, from_mem), operator in product(FORMS.items(), (composite, in_graph)):
        if form == "steps" or ROWS[name].shape:
            with told(f"{operator}, {form}"):
                layer, _ = twins(name, reset)
                tensors = given(name, from_mem)
                out = operated(layer, *tensors.values(), operator, form)
                found = results(name, layer, tensors, out)
                compare(name, found, expected(name, reset, from_mem, every="last" not in form))


# ---- compiled ------------------------------------------------------------------------------------

COMPILERS = "eager", "snnlstm"
COMPILED = [
    "plain", "mem alone", "no surrogate", "sigmoid", "graded", "another order", "shape (7,)",
    "x strided, numbers", f"{F16}, channels", f"{F64}, channels", "threshold some infinite",
    "threshold some NaN", *(name for name, one in ROWS.items() if one.reason),
]  # fmt: skip


class Switch:
    """Compiles a graph by several backends, and runs what the one of this name has made."""

    def __init__(self) -> None:
        self.name, self.operators = "", 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        targets = [str(node.target) for node in graph.graph.nodes]
        self.operators += targets.count("snnlstm.leaky.default")
        made = {
            name: torch._dynamo.lookup_backend(name)(copy.deepcopy(graph), inputs)
            for name in COMPILERS
        }
        return lambda *arguments: made[self.name](*arguments)


@needs_core
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_layers_compute_what_snntorch_does() -> None:
    """One graph has all of them, because tracing takes long. Ours joins the two steps of each."""
    layers = [twins(name, reset_of(name))[0] for name in COMPILED]

    def calls(inputs: Any) -> Any:
        return [passed(layer, *each) for layer, each in zip(layers, inputs, strict=True)]

    compiled = torch.compile(calls, backend=(switch := Switch()), fullgraph=True)
    for switch.name in COMPILERS:
        tensors = [given(name, False, 2) for name in COMPILED]
        outs = compiled([tuple(each.values()) for each in tensors])
        for name, *each in zip(COMPILED, layers, tensors, outs, strict=True):
            plain = bool(ROWS[name].reason)  # dynamo's custom Functions have no second ones
            with told(f"{name} by {switch.name}"):
                found = results(name, *each, second=not plain)
                compare(name, found, expected(name, reset_of(name), False, count=2))
    assert switch.operators == 2 * sum(not ROWS[name].reason for name in COMPILED)
