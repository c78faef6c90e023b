"""Runs a network eagerly and compiled, compares all that a call leaves, and counts its calls."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import keystr, tree_leaves, tree_leaves_with_path

from snnlstm.loops import layout, rules
from snnlstm.native import operators
from tests.shared.helpers import close

BACKEND = os.environ.get("SNNLSTM_TEST_BACKEND", "snnlstm")
merges = pytest.mark.skipif(BACKEND != "snnlstm", reason="only our backend merges calls")

# The names that calls are counted by; others keep torch's.
_NAMES = {
    "snnlstm::forward": "cell", "snnlstm::leaky": "leaky",
    "snnlstm::max_pool2d": "pool", "snnlstm::avg_pool2d": "pool",
    "snnlstm::batch_norm": "batch_norm", "snnlstm::linear": "linear", "snnlstm::conv2d": "conv",
    "conv2d": "conv", "_convolution": "conv", "addmm": "linear",
}  # fmt: skip
_STATES = ("syn", "mem", "spk")


class Calls(TorchFunctionMode):
    """Counts, by name, the calls of torch's functions and of the kernels in compiled graphs.

    Neither a kernel's own calls of torch's functions are counted, nor backward passes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.graphs = 0
        self._within = False  # a kernel
        self._running = False  # a compiled graph

    def __getitem__(self, name: str) -> int:
        return self.counts[name]

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        with self._one(str(getattr(function, "_name", getattr(function, "__name__", "")))):
            return function(*args, **kwargs or {})

    @contextmanager
    def _one(self, name: str) -> Iterator[None]:
        name = name.removesuffix(".default")
        if self._within or not self._running:
            yield
            return
        self.counts[_NAMES.get(name, name)] += 1
        self._within = name.startswith("snnlstm::")
        try:
            yield
        finally:
            self._within = False

    @contextmanager
    def counted(self) -> Iterator[Callable[..., Any]]:
        """Yields BACKEND, with kernels and graphs that count their calls here."""

        def counting(name: str, function: Any) -> Any:
            def run(*args: Any, **kwargs: Any) -> Any:
                with self._one(name):
                    return function(*args, **kwargs)

            return run

        def backend(graph: Any, inputs: Any, **options: Any) -> Any:
            self.graphs += 1
            compiled = lookup_backend(BACKEND)(graph, inputs, **options)

            def run(*args: Any) -> Any:
                self._running = True
                try:
                    with self:
                        return compiled(*args)
                finally:
                    self._running = False

            return run

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layout, "SAMPLES", 1)  # convolutions of float32 run channels-last
            patch.setattr(rules, "batch_norm", counting("snnlstm::batch_norm", rules.batch_norm))
            for target, make in getattr(operators, "IN_GRAPH", {}).items():
                name = getattr(target, "_name", f"snnlstm::{target.__name__}")
                made = lambda make=make, name=name: counting(name, make())  # noqa: E731
                patch.setitem(operators.IN_GRAPH, target, made)
            yield backend


@dataclass
class Outcome:
    """Holds what a call of a network leaves, by name, and the calls in its compiled graphs."""

    results: dict[str, Any]
    calls: Calls = field(default_factory=Calls)


def weighted(out: Tensor) -> Tensor:
    """Returns a sum of the elements with small dyadic factors that tell steps and samples apart."""
    factors = torch.arange(out.numel(), device=out.device) * 7 % 5 - 1
    return (out * factors.reshape(out.shape).to(out.dtype) / 4).sum()


def outcome(
    make: Callable[[], Any],
    *inputs: Tensor,
    training: bool,
    compiled: bool,
    run: Callable[..., Any] | None = None,
    times: int = 1,
    graph_breaks: bool = False,
    **options: Any,
) -> Outcome:
    """Makes a network, calls it, and in training also forms gradients.

    `run(net, *inputs)` takes the place of `net(*inputs)`, and is then what is compiled. The network
    is called `times` times, each with the states of the call before. `options` are those of
    torch.compile.
    """
    torch.manual_seed(0)
    net, calls = make(), Calls()
    function = net if run is None else lambda *args: run(net, *args)
    leaves = [x.detach().clone() for x in inputs]
    for leaf in leaves:
        leaf.requires_grad_(training and leaf.is_floating_point())
    found: dict[str, Any] = {}
    with calls.counted() as backend, torch.set_grad_enabled(training):
        if compiled:
            torch._dynamo.reset()
            options = {"fullgraph": not graph_breaks, "backend": backend} | options
            function = torch.compile(function, **options)
        for call in range(times):
            torch.manual_seed(1)
            result = function(*leaves)
            named, outs = tree_leaves_with_path(result), tree_leaves(result)
            found |= {f"output {keystr(at)} of call {call}": out for at, out in named}
            found[f"random numbers after call {call}"] = torch.rand(3)
            found |= layout_of([out for out in outs if isinstance(out, Tensor)], leaves, call)
    if training:
        wanted = [out for out in found.values() if isinstance(out, Tensor) and out.requires_grad]
        found["with gradients"] = torch.tensor(
            [isinstance(out, Tensor) and out.requires_grad for out in found.values()]
        )
        if wanted:
            sum(weighted(out).double() for out in wanted).backward()
        found |= {f"gradient of input {k}": leaf.grad for k, leaf in enumerate(leaves)}
        found |= {f"gradient of {name}": p.grad for name, p in net.named_parameters()}
    found |= {f"input {k}": leaf for k, leaf in enumerate(leaves)}
    found |= dict(net.named_buffers())
    for name, module in net.named_modules():
        kept = {state: getattr(module, state, None) for state in _STATES}
        found |= {f"{name}.{state}": kept[state] for state in kept if kept[state] is not None}
    kept = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in found.items()}
    return Outcome(kept, calls)


def layout_of(outs: Sequence[Tensor], leaves: Sequence[Tensor], call: int) -> dict[str, Any]:
    """Returns the strides of outputs, and for each the first output or input in its memory.

    An empty tensor has None: compiled code returns one for a Leaky's mem of zeros.
    """
    memory = [t.untyped_storage()._cdata if t.numel() else None for t in (*leaves, *outs)]
    strides = [[s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1] for t in outs]
    return {
        f"strides after call {call}": [
            s if t.numel() else None for t, s in zip(outs, strides, strict=True)
        ],
        f"memory after call {call}": [place and memory.index(place) for place in memory],
    }


def equal(actual: Outcome, expected: Outcome, atol: float = 0.0, rtol: float = 0.0) -> None:
    """Asserts that two calls left the same; an error names the first difference.

    `atol` is for numbers up to 1; that of a tensor grows with its largest number.
    """
    assert list(actual.results) == list(expected.results)
    for name, value in expected.results.items():
        other = actual.results[name]
        empty = isinstance(other, Tensor) and other.shape == (0,)
        if empty and isinstance(value, Tensor) and not value.any():
            continue  # a compiled reset of a Leaky returns an empty mem, which means zeros
        try:
            if isinstance(value, Tensor):
                largest = float(value.double().abs().nan_to_num().max()) if value.numel() else 0.0
                close(other, value, atol=atol * max(1.0, largest), rtol=rtol)
            elif isinstance(value, list):
                pairs = list(zip(other, value, strict=True))
                assert all(a == b or None in (a, b) for a, b in pairs), pairs
            else:
                assert other is None if value is None else other == value
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def as_eager(
    make: Callable[[], Any],
    *inputs: Tensor,
    training: bool = True,
    atol: float = 0.0,
    rtol: float = 0.0,
    **options: Any,
) -> Calls:
    """Asserts that the compiled network leaves what the eager one does; returns its calls."""
    run, times = options.get("run"), options.get("times", 1)
    eager = outcome(make, *inputs, training=training, compiled=False, run=run, times=times)
    compiled = outcome(make, *inputs, training=training, compiled=True, **options)
    equal(compiled, eager, atol, rtol)
    return compiled.calls


def dyadic_(net: nn.Module, seed: int = 0) -> nn.Module:
    """Fills weights of ordinary layers with 0, 1/2, 1 and negative ones, so that sums are exact."""
    random = torch.Generator().manual_seed(seed)
    kinds = nn.Linear | nn.Conv1d | nn.Conv2d
    for layer in net.modules():
        if isinstance(layer, kinds):
            for parameter in layer.parameters():
                numbers = torch.randint(-2, 3, parameter.shape, generator=random) / 2
                keep = torch.rand(parameter.shape, generator=random) < 0.5
                parameter.data.copy_(numbers * keep)
        is_norm = isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)
        if is_norm and layer.running_var is not None:
            layer.eps = 0.25  # with a variance of 3.75 its root is 2
            layer.running_var.fill_(3.75)
            layer.running_mean.copy_(torch.arange(len(layer.running_mean)) / 2)
    return net


def numbers(*shape: int, seed: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns multiples of 1/4 between -1 and 2."""
    random = torch.Generator().manual_seed(seed)
    return (torch.randint(-4, 9, shape, generator=random) / 4).to(dtype)
